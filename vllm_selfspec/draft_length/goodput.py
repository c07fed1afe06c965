"""`Goodput`: the draft lengths that bring most tokens per second, of the whole batch.

One rule: a draft token must earn what it costs. On a machine with idle memory bandwidth
that is little; on a busy one it is the work of a row, and then nothing is drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_selfspec.draft_length.acceptance import Acceptance
from vllm_selfspec.draft_length.costs import StepCosts
from vllm_selfspec.draft_length.types import Floats, Ints, Slots

# Drafting must promise this much more than not drafting: estimates are noisy, and the
# mistake that users do not forgive is to be slower.
MARGIN = 0.01
# Share of the time spent on finding out whether drafting pays again.
EXPLORE_SHARE = 0.005


def best_lengths(survival: Floats, room: Ints, costs: StepCosts) -> Ints:
    """The lengths that maximise expected tokens per second.

    A batch of R requests that drafts at most d tokens each, n in all, takes
    `verify(R + n) + d draft(R)` seconds and is expected to emit R tokens and, for each
    draft token, its chance of surviving. For every d the best n tokens are the
    likeliest ones: a token is never likelier than the one before it, so they are whole
    prefixes. All n and d are tried.

    Args:
        survival: Chance that tokens 1 to i are all accepted, `[num_reqs, max_drafts]`.
        room: The most each request may draft, `[num_reqs]`.
        costs: Of this model on this machine.

    Returns:
        Draft tokens of each request, `[num_reqs]`.
    """
    num_reqs, max_drafts = survival.shape
    depth = np.broadcast_to(np.arange(1, max_drafts + 1), survival.shape)
    allowed = depth <= room[:, None]
    # The likeliest first; of equals the one that comes first in its request.
    order = np.lexsort((depth[allowed], -survival[allowed]))
    gain, depth = survival[allowed][order], depth[allowed][order]
    request = np.nonzero(allowed)[0][order]
    plain = num_reqs / float(costs.verify(num_reqs))
    best, lengths = plain * (1 + MARGIN), np.zeros(num_reqs, np.int64)
    step = float(costs.draft(num_reqs))
    verify = costs.verify(num_reqs + np.arange(1, gain.size + 1))
    for deepest in range(1, int(room.max(initial=0)) + 1):
        within = depth <= deepest
        tokens = num_reqs + np.cumsum(gain[within])
        rate = tokens / (verify[: tokens.size] + deepest * step)
        most = int(rate.argmax())
        if rate[most] > best:
            best = rate[most]
            lengths = np.bincount(request[within][: most + 1], minlength=num_reqs)
    return lengths.astype(np.int64)


def best_uniform_length(
    survival: Floats, room: Ints, costs: StepCosts, choices: Sequence[int]
) -> Ints:
    """The same for one length of all requests, out of `choices`: what can be replayed
    from a CUDA graph, which is captured for whole batches."""
    num_reqs = len(room)
    plain = num_reqs / float(costs.verify(num_reqs))
    step = float(costs.draft(num_reqs))
    best, lengths = plain * (1 + MARGIN), np.zeros(num_reqs, np.int64)
    for choice in choices:
        tried = np.minimum(room, choice)
        if not tried.any():
            continue
        kept = np.arange(survival.shape[1]) < tried[:, None]
        seconds = float(costs.verify(num_reqs + int(tried.sum()))) + choice * step
        rate = (num_reqs + float((survival * kept).sum())) / seconds
        if rate > best:
            best, lengths = rate, tried
    return lengths


@dataclass
class Plan:
    """What a step drafts.

    Attributes:
        lengths: Draft tokens to verify, of each request, `[num_reqs]`.
        is_trial: Whether it drafts only to find out whether that pays.
    """

    lengths: Ints
    is_trial: bool = False

    @property
    def num_steps(self) -> int:
        """Draft steps of the batch: its longest draft."""
        return int(self.lengths.max(initial=0))


class Goodput:
    """Chooses draft lengths step by step, and learns from what came of them."""

    def __init__(
        self,
        num_slots: int,
        max_drafts: int,
        costs: StepCosts,
        uniform: Sequence[int] = (),
    ) -> None:
        """For `num_slots` requests at a time, and drafts of up to `max_drafts`.

        Args:
            num_slots: Requests at a time.
            max_drafts: The longest draft.
            costs: Of this model on this machine.
            uniform: The lengths a whole batch may have; empty where each request may
                have its own.
        """
        self._uniform = tuple(uniform)
        self.acceptance = Acceptance(num_slots, max_drafts)
        self.costs = costs
        self._max_drafts = max_drafts
        self._owed = 0.0  # seconds that trials may take by now

    @property
    def is_uniform(self) -> bool:
        """Whether all requests get one length."""
        return bool(self._uniform)

    def plan(self, slots: Slots, room: Ints) -> Plan:
        """Lengths for the requests `slots`, each at most its `room`, `[num_reqs]`."""
        num_reqs = len(slots)
        if not num_reqs:
            return Plan(np.zeros(0, np.int64))
        room = np.minimum(room, self._max_drafts)
        survival = self.acceptance.survival(slots)
        if self._uniform:
            lengths = best_uniform_length(survival, room, self.costs, self._uniform)
        else:
            lengths = best_lengths(survival, room, self.costs)
        if lengths.any():
            return Plan(lengths)
        return self._trial(num_reqs, room)

    def _trial(self, num_reqs: int, room: Ints) -> Plan:
        """One token for everybody, where that was saved up for; else nothing."""
        tried = np.minimum(room, 1)
        plain = float(self.costs.verify(num_reqs))
        self._owed += EXPLORE_SHARE * plain
        price = (
            float(self.costs.verify(num_reqs + int(tried.sum())))
            - plain
            + float(self.costs.draft(num_reqs))
        )
        if self._owed < price or not tried.any():
            return Plan(np.zeros(num_reqs, np.int64))
        self._owed = 0.0
        return Plan(tried, is_trial=True)

    def beliefs(self) -> dict[str, float]:
        """What it takes new requests to be like, to be shown: acceptance by position,
        given that the tokens before were accepted."""
        found = self.acceptance.population()
        return {f"acceptance_{i}": float(q) for i, q in enumerate(found, 1)}
