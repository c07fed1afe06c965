"""A step of the V2 runner that is run to be timed.

One rule: it is laid out as a verification is. Where CUDA graphs hold whole batches,
they hold those in which each request has as many rows as the next; a batch of another
shape runs eagerly, and would be timed for what never runs.
"""

from collections.abc import Sequence
from typing import Any

import torch


def dummy_forward(
    runner: Any, num_rows: int, lengths: Sequence[int], context: int = 0
) -> None:
    """The target's forward and LM head over so many rows, or a few more.

    Args:
        runner: vLLM's V2 `GPUModelRunner`.
        num_rows: Of as many requests as there may be; with a context, of one.
        lengths: Drafts of a request for which there are graphs; empty where none are.
        context: Tokens to attend to before them.
    """
    query_len = runner.decode_query_len
    if context:
        num_reqs, query_len, is_uniform = 1, num_rows, num_rows > 1
    else:
        least = -(-num_rows // runner.max_num_reqs)
        fitting = [1 + length for length in lengths if 1 + length >= least > 1]
        is_uniform = bool(fitting)
        query_len = min(fitting, default=query_len)
        num_reqs = -(-num_rows // query_len)
    num_tokens = num_reqs * query_len if is_uniform else num_rows
    before, runner.decode_query_len = runner.decode_query_len, query_len
    try:
        _, hidden_states = runner._dummy_run(
            num_tokens, uniform_decode=is_uniform, context_len=context
        )
    finally:
        runner.decode_query_len = before
    with torch.inference_mode():
        runner.model.compute_logits(hidden_states)
