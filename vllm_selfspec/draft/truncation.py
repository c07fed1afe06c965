"""Draft logits within the target's top-k and top-p.

The target accepts a draft token with probability min(1, p / q), so a draft that keeps
to the tokens which the target may choose from is accepted more often, and what comes
out is the target's whatever q is. vLLM's own drafting knows of the temperature alone.
"""

import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

SAMPLING_EPS = 1e-5  # vLLM's: below it a temperature means greedy


def truncated(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
) -> torch.Tensor:
    """The logits, `[num_rows, vocab_size]`, with -inf where nothing may be drawn.

    Args:
        logits: Not yet divided by the temperature, nor are those returned.
        temperature: `[num_rows]`; a greedy row is cut too, which its maximum survives.
        top_k: `[num_rows]`; the vocabulary's size means all. None where no row has one.
        top_p: `[num_rows]`; 1 means all. None where no row has one.
    """
    if top_k is None and top_p is None:
        return logits
    is_out = apply_top_k_top_p(scaled(logits, temperature), top_k, top_p) == -torch.inf
    return logits.masked_fill(is_out, -torch.inf)


def scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """A float32 copy of the logits over the temperature, `[num_rows]`; greedy rows as
    they are."""
    is_greedy = temperature < SAMPLING_EPS
    return logits.float() / temperature.masked_fill(is_greedy, 1.0)[:, None]
