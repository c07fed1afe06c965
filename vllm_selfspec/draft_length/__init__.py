"""How far to draft: controllers that know neither vLLM nor torch.

There are two kinds. `Goodput` decides before a step, for the whole batch, from measured
costs and observed acceptance. A stop rule (`Threshold`, `Thompson`,
`CalibratedThompson`) decides while drafting, for each row, whether to draft one token
more. Both only choose how many draft tokens are verified, never which: whatever they
decide, the text is the target's (`stop_rules` says why).
"""
