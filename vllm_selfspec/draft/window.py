"""What a draft with a window of the KV cache reads, in blocks.

One rule: the arithmetic is of whole numbers, so the host and the device agree.
"""

from typing import Any

from vllm_selfspec.plan.axis_draft_window import LEAST_OF_SHARE


def blocks_kept(window: float, seq_lens: Any, block_size: int) -> Any:
    """Blocks before that of the newest token that a draft reads, beside the first.

    Args:
        window: Tokens, or a share of the context, which is below 1.
        seq_lens: Tokens in the cache, `[num_rows]`, in NumPy or PyTorch.
        block_size: Tokens in a block.

    Returns:
        Of each row, `[num_rows]`, as `seq_lens` is.
    """
    if window >= 1:
        return seq_lens * 0 - (-int(window) // block_size)
    percent = max(1, round(100 * window))
    blocks = seq_lens * percent // (100 * block_size) + 1
    return blocks.clip(min=-(-LEAST_OF_SHARE // block_size))
