"""Exit layers: a trained decoder layer after the target's first layers, which drafts.

One rule: the target stays as it is. What is trained is one layer, and an LM head of its
own where that is asked for; `train_exit` orders the parts, `exit_card` says what is
saved.
"""
