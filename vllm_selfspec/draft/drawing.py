"""How a token is taken from a row over the whole vocabulary, on CPUs in particular.

One rule: what is taken is what the usual call takes, or has its distribution. Of a
vocabulary of 150,000 a draft step of a small model spends a fifth of its time in
drawing noise for each token, and a twentieth in `argmax`, which has no vectorised
kernel for bfloat16.
"""

import numpy as np
import torch


def largest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest tokens of each row, as `argmax` has it, `[num_rows]`."""
    return logits.max(dim=-1).indices


def drawn(probs: torch.Tensor) -> torch.Tensor:
    """A token of each row, by one uniform number over its distribution function, in
    float64: sums of float32 would round away what is unlikely.

    Args:
        probs: `[num_rows, vocab_size]`, of any sum above zero.

    Returns:
        Tokens of a probability above zero, `[num_rows]`.
    """
    sums = probs.cumsum(dim=-1, dtype=torch.float64)
    # Above 0 and at most 1, so it lies within a step of the function.
    share = 1 - torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device)
    return torch.searchsorted(sums, share * sums[:, -1:])[:, 0]


def confidence_of(
    token_ids: torch.Tensor, logits: torch.Tensor, probs: torch.Tensor | None
) -> np.ndarray:
    """The draft's probability of the tokens that it took, `[num_rows]`.

    Args:
        token_ids: `[num_rows]`.
        logits: `[num_rows, vocab_size]`.
        probs: What they were drawn from; None where they are the largest.
    """
    if probs is None:
        probs = logits.softmax(dim=-1, dtype=torch.float32)
    chosen = probs.gather(1, token_ids.long()[:, None])[:, 0]
    return chosen.double().cpu().numpy()
