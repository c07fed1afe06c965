"""How tokens are taken from rows over the whole vocabulary, on CPUs in particular.

One rule: what is taken is what the usual call takes, or has its distribution. Of a
vocabulary of 150,000 a draft step of a small model spends a fifth of its time in
drawing noise for each token, and a twentieth in `argmax`, which has no vectorised
kernel for bfloat16; vLLM has one for float32.
"""

from typing import Any

import numpy as np
import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_selfspec.draft.seeded import PLACEHOLDER_TOKEN_ID


def largest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest tokens of each row, as vLLM's sampler takes it,
    `[num_rows]`."""
    found: torch.Tensor = Sampler.greedy_sample(logits.float())
    return found


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


def is_greedy_alone(sampling: SamplingMetadata) -> bool:
    """Whether nothing but the largest logits is asked for, by no request of a batch."""
    holder = sampling.thinking_budget_state_holder
    return bool(
        sampling.all_greedy
        and sampling.no_penalties
        and sampling.max_num_logprobs is None
        and not sampling.logprob_token_ids
        and sampling.allowed_token_ids_mask is None
        and not sampling.bad_words_token_ids
        and not sampling.logitsprocs.non_argmax_invariant
        and not (holder is not None and holder.has_tracked_requests())
    )


def verified_greedily(metadata: Any, logits: torch.Tensor) -> torch.Tensor:
    """What vLLM's rejection sampler says where `is_greedy_alone`, without the float32
    copies of all logits that it makes, two of them: each row emits what the target
    says, up to the first draft token that is not.

    Args:
        metadata: vLLM's `SpecDecodeMetadata`.
        logits: Of all drafts and bonus tokens, `[num_rows, vocab_size]`.

    Returns:
        `[num_reqs, 1 + max_spec_len]`, int32; `PLACEHOLDER_TOKEN_ID` where nothing is
        emitted.
    """
    chosen = largest(logits)
    bonus = chosen[metadata.bonus_logits_indices].tolist()
    target = chosen[metadata.target_logits_indices].tolist()
    drafts = metadata.draft_token_ids.tolist()
    shape = len(bonus), 1 + metadata.max_spec_len
    found = np.full(shape, PLACEHOLDER_TOKEN_ID, np.int32)
    first = 0
    for row, num in enumerate(metadata.num_draft_tokens):
        said = [*target[first : first + num], bonus[row]]
        wrong = (i for i in range(num) if said[i] != drafts[first + i])
        num_emitted = 1 + next(wrong, num)
        found[row, :num_emitted] = said[:num_emitted]
        first += num
    return torch.from_numpy(found)
