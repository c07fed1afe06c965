"""`Drafts`: what a propose hands back to the V1 runner.

One rule: every running request has its place, whoever drafted for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_selfspec.draft.mixed_probs import MixedProbs


@dataclass(frozen=True)
class Drafts:
    """What a propose hands back to the V1 runner.

    Attributes:
        token_ids: Drafted tokens of every running request; `[]` drafts nothing.
        probs: Draft distributions `[num_rows, num_steps, vocab_size]` of the requests
            `req_ids`, or None where the drafts are greedy.
        req_ids: The requests that `probs` has a row for, or None.
    """

    token_ids: list[list[int]]
    probs: torch.Tensor | MixedProbs | None = None
    req_ids: list[str] | None = None


def spread(
    token_ids: torch.Tensor,
    probs: torch.Tensor | None,
    rows: np.ndarray,
    num_drafts: np.ndarray,
    req_ids: Sequence[str],
    free: list[list[int]],
) -> Drafts:
    """Spreads the drafted rows over all running requests, between those that took free
    tokens.

    Args:
        token_ids: Of the model, `[num_rows, num_steps]`.
        probs: What they were drawn from, `[num_rows, num_steps, vocab_size]`, or None.
        rows: Their places among the running requests, `[num_rows]`.
        num_drafts: How many of them each takes, by running request.
        req_ids: The running requests.
        free: The free tokens of each; none where the model drafts.
    """
    is_free = [row for row, tokens in enumerate(free) if tokens]
    drafts = [*free]
    for row, tokens in zip(rows, token_ids.tolist(), strict=True):
        drafts[row] = tokens[: num_drafts[row]]
    if probs is None:
        return Drafts(drafts)
    row_req_ids = [req_ids[row] for row in (*rows, *is_free)]
    if not is_free:
        return Drafts(drafts, probs, row_req_ids)
    return Drafts(drafts, MixedProbs(probs, [free[r] for r in is_free]), row_req_ids)
