"""How tokens are taken from rows over the whole vocabulary, on CPUs in particular.

One rule: what is taken is what the usual call takes, or has its distribution. Of a
vocabulary of 150,000 a draft step of a small model spends a fifth of its time in
drawing noise for each token, and a twentieth in `argmax`, which has no vectorised
kernel for bfloat16; vLLM has one for float32.
"""

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.v1.sample.sampler import Sampler

BLOCK = 256  # tokens
SMALLEST = 1e-300  # no sum of probabilities is smaller, but 0


def largest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest tokens of each row, as vLLM's sampler takes it,
    `[num_rows]`."""
    found: torch.Tensor = Sampler.greedy_sample(logits.float())
    return found


def drawn(probs: torch.Tensor) -> torch.Tensor:
    """A token of each row, by one uniform number over its distribution function: first
    a block of tokens, then one of it. Sums are of float64, where those of float32 would
    round away what is unlikely.

    Args:
        probs: `[num_rows, vocab_size]`, of any sum above zero.

    Returns:
        Tokens of a probability above zero, `[num_rows]`; any where there are NaNs.
    """
    rest = -probs.shape[1] % BLOCK
    blocks = pad(probs, (0, rest)) if rest else probs
    blocks = blocks.reshape(len(probs), -1, BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    ends = sums.cumsum(dim=-1)
    # Above 0 and at most 1, so it lies within a step of the function.
    share = 1 - torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device)
    share = share * ends[:, -1:]
    block = torch.searchsorted(ends, share).clamp(max=ends.shape[1] - 1)
    share = share - (ends.gather(1, block) - sums.gather(1, block))
    rows = torch.arange(len(probs), device=probs.device)
    inner = blocks[rows, block[:, 0]].cumsum(dim=-1, dtype=torch.float64)
    # Rounding may have put it on the edge of the block, or beyond.
    share = share.clamp(min=SMALLEST).minimum(inner[:, -1:])
    token_ids = block[:, 0] * BLOCK + torch.searchsorted(inner, share)[:, 0]
    return token_ids.clamp(max=probs.shape[1] - 1)


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
