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


@dataclass(frozen=True)
class Prompts:
    """Rows of prompts that may be computed in the step that verifies.

    Attributes:
        num_rows: m.
        chance: That they are.
    """

    num_rows: int
    chance: float


NO_PROMPTS = Prompts(0, 0.0)


def best_lengths(
    survival: Floats, room: Ints, costs: StepCosts, prompts: Prompts = NO_PROMPTS
) -> Ints:
    """The lengths that maximise expected tokens per second.

    A batch of R requests that drafts at most d tokens each, n in all, takes
    `verify(R + n) + d draft(R)` seconds and is expected to emit R tokens and, for each
    draft token, its chance of surviving. For every d the best n tokens are the
    likeliest ones: a token is never likelier than the one before it, so they are whole
    prefixes. All n and d are tried.

    Beside m rows of prompts a step's time is mostly theirs, and tokens per second of
    that step would say to draft whatever the rows cost. But prompts end: what counts is
    how much longer their step takes for n rows more, `verify(m + R + n) - verify(m +
    R)`, on top of the time that R requests take without them.

    Args:
        survival: Chance that tokens 1 to i are all accepted, `[num_reqs, max_drafts]`.
        room: The most each request may draft, `[num_reqs]`.
        costs: Of this model on this machine.
        prompts: What may be computed beside.

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
    choices = []
    for deepest in range(1, int(room.max(initial=0)) + 1):
        within = depth <= deepest
        gains = np.cumsum(gain[within])
        choices.append(_Choice(deepest, np.arange(1, gains.size + 1), gains))
    chosen = _best(choices, num_reqs, costs, prompts)
    if chosen is None:
        return np.zeros(num_reqs, np.int64)
    deepest, num_drafts = chosen
    first = request[depth <= deepest][:num_drafts]
    return np.bincount(first, minlength=num_reqs).astype(np.int64)


def best_uniform_length(
    survival: Floats,
    room: Ints,
    costs: StepCosts,
    lengths: Sequence[int],
    prompts: Prompts = NO_PROMPTS,
) -> Ints:
    """The same for one length of all requests, out of `lengths`: what can be replayed
    from a CUDA graph, which is captured for whole batches."""
    position = np.arange(survival.shape[1])
    choices = []
    for length in lengths:
        tried = np.minimum(room, length)
        kept = survival * (position < tried[:, None])
        if tried.any():
            choices.append(
                _Choice(length, np.array([tried.sum()]), np.array([kept.sum()]))
            )
    chosen = _best(choices, len(room), costs, prompts)
    return np.minimum(room, chosen[0] if chosen else 0)


@dataclass(frozen=True)
class _Choice:
    """Ways to draft at most `deepest` tokens a request.

    Attributes:
        deepest: d, the number of draft steps.
        num_drafts: n, draft tokens of the batch, `[num_ways]`.
        gain: How many of them are expected to be accepted, `[num_ways]`.
    """

    deepest: int
    num_drafts: Ints
    gain: Floats


def _best(
    choices: Sequence[_Choice], num_reqs: int, costs: StepCosts, prompts: Prompts
) -> tuple[int, int] | None:
    """d and n of the best way, or None where drafting is not worth it."""
    step = float(costs.draft(num_reqs))
    best = num_reqs / float(costs.verify(num_reqs)) * (1 + MARGIN)
    found = None
    for choice in choices:
        seconds = _verify(costs, num_reqs, choice.num_drafts, prompts)
        rate = (num_reqs + choice.gain) / (seconds + choice.deepest * step)
        most = int(rate.argmax())
        if rate[most] > best:
            best = float(rate[most])
            found = choice.deepest, int(choice.num_drafts[most])
    return found


def _verify(
    costs: StepCosts, num_reqs: int, num_drafts: Ints | int, prompts: Prompts
) -> Floats:
    """Expected seconds for R requests and their drafts, without what prompts take."""
    alone = costs.verify(num_reqs + num_drafts)
    if not prompts.chance:
        return alone
    rows = prompts.num_rows + num_reqs
    longer = costs.verify(rows + num_drafts) - costs.verify(rows)
    beside = costs.verify(num_reqs) + longer
    return alone + prompts.chance * (beside - alone)


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

    def plan(self, slots: Slots, room: Ints, prompts: Prompts = NO_PROMPTS) -> Plan:
        """Lengths of a batch.

        Args:
            slots: Its requests, `[num_reqs]`.
            room: The most each may draft, `[num_reqs]`.
            prompts: What may be computed beside.
        """
        num_reqs = len(slots)
        if not num_reqs:
            return Plan(np.zeros(0, np.int64))
        room = np.minimum(room, self._max_drafts)
        survival = self.acceptance.survival(slots)
        if self._uniform:
            lengths = best_uniform_length(
                survival, room, self.costs, self._uniform, prompts
            )
        else:
            lengths = best_lengths(survival, room, self.costs, prompts)
        if lengths.any():
            return Plan(lengths)
        return self._trial(num_reqs, room, prompts)

    def _trial(self, num_reqs: int, room: Ints, prompts: Prompts) -> Plan:
        """One token for everybody, where that was saved up for; else nothing."""
        tried = np.minimum(room, 1)
        plain = float(self.costs.verify(num_reqs))
        self._owed += EXPLORE_SHARE * plain
        seconds = _verify(self.costs, num_reqs, int(tried.sum()), prompts)
        price = float(seconds) - plain + float(self.costs.draft(num_reqs))
        if self._owed < price or not tried.any():
            return Plan(np.zeros(num_reqs, np.int64))
        self._owed = 0.0
        return Plan(tried, is_trial=True)

    def beliefs(self) -> dict[str, float]:
        """What it takes new requests to be like, to be shown: acceptance by position,
        given that the tokens before were accepted."""
        found = self.acceptance.population()
        return {f"acceptance_{i}": float(q) for i, q in enumerate(found, 1)}
