"""Which drafts stand on a CPU, and what follows them, where tokens are all that is
asked for: by temperature, top-k, top-p and penalties.

One rule: what is emitted is what vLLM's rejection sampler emits, or distributed as
that is. It copies the logits of all drafts three times, draws noise for each token of
the vocabulary and sorts it for top-p. With 150,000 tokens and 16 requests with a draft
each that takes 70 ms, with top-p 200. Here a row is looked at once it is reached, and a
token is drawn by one number: 7 ms. Steps without drafts are sampled in the same way.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_selfspec.draft.drawing import drawn, largest
from vllm_selfspec.draft.penalties import Penalties
from vllm_selfspec.draft.seeded import PLACEHOLDER_TOKEN_ID
from vllm_selfspec.draft.truncation import distribution, limits_of


def asks_for_tokens_alone(sampling: SamplingMetadata) -> bool:
    """Whether no request of a batch asks for more than tokens by temperature, top-k,
    top-p and penalties, drawn with any noise."""
    processors = sampling.logitsprocs
    holder = sampling.thinking_budget_state_holder
    return bool(
        not sampling.generators
        and sampling.max_num_logprobs is None
        and not sampling.logprob_token_ids
        and sampling.allowed_token_ids_mask is None
        and not sampling.bad_words_token_ids
        and not processors.argmax_invariant
        and not any(map(_is_at_work, processors.non_argmax_invariant))
        and not (holder is not None and holder.has_tracked_requests())
    )


def _is_at_work(processor: Any) -> bool:
    """vLLM hands this one over with every batch."""
    if isinstance(processor, MinTokensLogitsProcessor):
        return bool(processor.min_toks)
    return True


def emitted(
    metadata: Any,
    draft_probs: torch.Tensor | None,
    logits: torch.Tensor,
    sampling: SamplingMetadata,
) -> torch.Tensor:
    """The tokens of each request, where `asks_for_tokens_alone`: its drafts up to the
    first that is rejected, and then one of the target's.

    Args:
        metadata: vLLM's `SpecDecodeMetadata`.
        draft_probs: What the drafts were drawn from, `[num_tokens, vocab_size]`; None
            where each was certain.
        logits: Of all drafts and bonus tokens, `[num_rows, vocab_size]`.
        sampling: Of the requests.

    Returns:
        `[num_reqs, 1 + max_spec_len]`, int32; `PLACEHOLDER_TOKEN_ID` where nothing is
        emitted.
    """
    takes = _taking(logits, sampling)
    targets = metadata.target_logits_indices.tolist()
    drafts = metadata.draft_token_ids.tolist()
    bonus = metadata.bonus_logits_indices.tolist()
    shape = len(bonus), 1 + metadata.max_spec_len
    found = np.full(shape, PLACEHOLDER_TOKEN_ID, np.int32)
    first = 0
    for req, num in enumerate(metadata.num_draft_tokens):
        of_req = drafts[first : first + num]
        for position, draft in enumerate(of_req):
            place = first + position
            q = None if draft_probs is None else draft_probs[place]
            token = takes.token(req, targets[place], of_req[:position], draft, q)
            found[req, position] = token
            if token != draft:
                break
        else:
            found[req, num] = takes.token(req, bonus[req], of_req)
        first += num
    return torch.from_numpy(found)


def sampled(logits: torch.Tensor, sampling: SamplingMetadata) -> torch.Tensor:
    """A token of each request of a step without drafts, where `asks_for_tokens_alone`,
    `[num_reqs, 1]`, int32: taken as in a step with drafts, so that nothing is drafted
    for the sake of a cheaper sampler.

    Args:
        logits: `[num_reqs, vocab_size]`.
        sampling: Of the requests.
    """
    takes = _taking(logits, sampling)
    found = [takes.token(req, req, ()) for req in range(len(logits))]
    return torch.tensor(found, dtype=torch.int32)[:, None]


def _taking(logits: torch.Tensor, sampling: SamplingMetadata) -> "Greedy | Draws":
    is_simple = sampling.all_greedy and sampling.no_penalties
    return Greedy(logits) if is_simple else Draws(logits, sampling)


class Greedy:
    """Takes the largest of each row, whatever was drafted."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._largest = largest(logits).tolist()

    def token(self, req: int, row: int, *_: Any) -> int:
        """As `Draws.token`."""
        return int(self._largest[row])


class Draws:
    """Takes tokens by the rule of Leviathan et al. (2023), section 2.3; of greedy
    requests, the largest.

    Rows are taken one at a time: a tensor of several needs memory that is new to the
    process each time, which takes longer than the arithmetic.
    """

    def __init__(self, logits: torch.Tensor, sampling: SamplingMetadata) -> None:
        self._logits = logits
        self._limits = limits_of(sampling)
        self._penalties = None if sampling.no_penalties else Penalties(sampling)

    def token(
        self,
        req: int,
        row: int,
        before: Sequence[int],
        draft: int = PLACEHOLDER_TOKEN_ID,
        q: torch.Tensor | None = None,
    ) -> int:
        """The next token of a request: the draft with probability min(1, p / q), or
        else one of max(p - q, 0); where nothing was drafted, one of p.

        Args:
            req: The request.
            row: The logits of p.
            before: Drafts that stand already.
            draft: The drafted token, or `PLACEHOLDER_TOKEN_ID`.
            q: What it was drawn from, `[vocab_size]`; None where it was certain.
        """
        logits, limits = self._logits[row], self._limits[req]
        if self._penalties is not None:
            logits = self._penalties.applied(req, logits, before)
        if limits.is_greedy:
            return int(largest(logits[None]))
        p = distribution(logits, limits)
        if draft == PLACEHOLDER_TOKEN_ID:
            return int(drawn(p[None]))
        of_draft = 1.0 if q is None else float(q[draft])
        # Below 1: what is certain is not rejected, and what is impossible not accepted.
        if float(torch.rand((), dtype=torch.float64)) * of_draft < float(p[draft]):
            return draft
        if q is None:
            rest = p.index_fill(0, torch.tensor(draft), 0.0)
        else:
            rest = (p - q).clamp_(min=0.0)
        # Where p and q differ by their rounding alone, nothing may be left.
        return int(drawn((rest if rest.any() else p)[None]))
