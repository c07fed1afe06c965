"""What is drawn from: logits over the temperature, within top-k and top-p.

Drafts keep to those of the target. It accepts a draft token with probability
min(1, p / q), so a draft that keeps to the tokens which the target may choose from is
accepted more often, and what comes out is the target's whatever q is. vLLM's own
drafting knows of the temperature alone.
"""

import math
from dataclasses import dataclass

import torch
from vllm.v1.sample.metadata import SamplingMetadata
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


@dataclass(frozen=True)
class Limits:
    """How the tokens of a request are drawn.

    Attributes:
        temperature: Below `SAMPLING_EPS` nothing is drawn.
        top_k: None for all tokens.
        top_p: None for all tokens.
    """

    temperature: float
    top_k: int | None
    top_p: float | None

    @property
    def is_greedy(self) -> bool:
        """Whether the largest logit is taken."""
        return self.temperature < SAMPLING_EPS


def limits_of(sampling: SamplingMetadata) -> list[Limits]:
    """Of each request of a batch."""
    if sampling.temperature is None:
        return [Limits(0.0, None, None)] * len(sampling.repetition_penalties)
    temperatures = sampling.temperature.tolist()
    none = [None] * len(temperatures)
    top_k = none if sampling.top_k is None else sampling.top_k.tolist()
    top_p = none if sampling.top_p is None else sampling.top_p.tolist()
    return [*map(Limits, temperatures, top_k, top_p)]


def distribution(
    logits: torch.Tensor, limits: Limits, *, is_draft: bool = False
) -> torch.Tensor:
    """What vLLM draws from on a CPU, mostly without sorting the vocabulary for it,
    which takes 10 ms for 150,000 tokens.

    Args:
        logits: `[vocab_size]`.
        limits: Of a greedy request its temperature is not applied.
        is_draft: Some of the tokens at the end of top-p may be other ones that are as
            likely. Which of them vLLM leaves out, only its sort can tell.

    Returns:
        Probabilities, `[vocab_size]`, float32.
    """
    logits = logits.float()
    if not limits.is_greedy:
        logits = logits / limits.temperature
    top_k, top_p = limits.top_k or len(logits), limits.top_p or 1.0
    if top_k >= len(logits) and top_p >= 1:
        return logits.softmax(dim=-1)
    kept = _kept(logits, top_k, top_p, is_draft)
    if kept is None:
        asked = torch.tensor([top_k]), torch.tensor([top_p])
        (limited,) = apply_top_k_top_p(logits[None], *asked)
        probs: torch.Tensor = limited.softmax(dim=-1)
        return probs
    probs = logits[kept].softmax(dim=-1)
    return torch.zeros_like(logits).scatter_(0, kept, probs)


def _kept(
    logits: torch.Tensor, top_k: int, top_p: float, is_draft: bool
) -> torch.Tensor | None:
    """The tokens within both limits: first top-k, with all that are equal to the k-th
    largest, then the likeliest of them that have `top_p` together. None where vLLM's
    sort must say which of equal ones are out."""
    if top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        total = logits[logits >= least].logsumexp(dim=-1)
    else:
        # All that are less likely have less than half of 1 - top_p together.
        total = logits.logsumexp(dim=-1)
        least = total + math.log((1 - top_p) / (2 * len(logits)))
    (token_ids,) = (logits >= least).nonzero(as_tuple=True)
    if top_p >= 1:
        return token_ids
    values, order = logits[token_ids].sort(descending=True, stable=True)
    probs = (values - total).double().exp()
    num_kept = max(1, int((probs.cumsum(dim=-1) - probs < top_p).sum()))
    is_split = num_kept < len(values) and values[num_kept - 1] == values[num_kept]
    return None if is_split and not is_draft else token_ids[order[:num_kept]]
