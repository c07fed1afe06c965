"""The draft lengths that bring most tokens per second, given chances and costs.

One rule: a draft token must earn what it costs. On a machine with idle memory bandwidth
that is little; on a busy one it is the work of a row, and then nothing is drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_selfspec.draft_length.costs import Costs
from vllm_selfspec.draft_length.types import Bools, Floats, Ints

# Drafting must promise this much more than not drafting: estimates are noisy, and the
# mistake that users do not forgive is to be slower.
MARGIN = 0.01


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


@dataclass(frozen=True)
class Mix:
    """Draft tokens of a batch, and where they are from.

    Attributes:
        lengths: Of each request, `[num_reqs]`.
        is_free: Whether they are a free source's rather than the model's, `[num_reqs]`.
        rate: Expected tokens per second; those of not drafting where that is best.
    """

    lengths: Ints
    is_free: Bools
    rate: float


def best_lengths(
    survival: Floats, room: Ints, costs: Costs, prompts: Prompts = NO_PROMPTS
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
    free = np.zeros((len(survival), 0))
    return best_mix(within_room(survival, room), free, costs, prompts).lengths


def best_mix(
    model: Floats, free: Floats, costs: Costs, prompts: Prompts = NO_PROMPTS
) -> Mix:
    """The same where some rows have a free proposal: it takes no draft step, and the
    steps of the others run fewer rows.

    For every d each row takes the source whose tokens bring more, each counted by how
    much likelier it is than what a row of the verification must bring to pay. At d = 0
    no step is run, and who has a proposal takes it.

    Args:
        model: Chance that tokens 1 to i of the model's are all accepted; 0 beyond what
            a request may draft, `[num_reqs, max_drafts]`.
        free: The same of what is proposed for free; 0 beyond it, `[num_reqs, most]`.
        costs: Of this model on this machine.
        prompts: What may be computed beside.
    """
    num_reqs, max_drafts = model.shape
    width = max(max_drafts, free.shape[1])
    found = _Best(num_reqs, num_reqs * width, costs, prompts)
    has_free = (free > 0).any(axis=1)
    free_worth = np.maximum(free - found.least_worth, 0).sum(axis=1)
    # [num_reqs, max_drafts]: of the model's first tokens
    worth = np.maximum(model - found.least_worth, 0).cumsum(axis=1)
    may_draft = model[:, :1].any(axis=1)
    mixes: list[tuple[Bools, Ints]] = []  # which rows copy; requests of the best tokens
    chance = np.zeros((num_reqs, width))
    for deepest in range(1 - has_free.any(), max_drafts + 1):
        least = worth[:, deepest - 1] if deepest else 0.0
        is_free: Bools = has_free & (free_worth >= least)
        num_drafting = int(np.count_nonzero(may_draft & ~is_free)) if deepest else 0
        if deepest and not num_drafting:
            continue
        chance[:] = 0.0
        chance[:, :deepest] = model[:, :deepest]
        chance[is_free] = 0.0
        chance[is_free, : free.shape[1]] = free[is_free]
        flat = chance.ravel()
        order = np.argsort(-flat, kind="stable")[: np.count_nonzero(flat)]
        found.offer(len(mixes), deepest, num_drafting, np.cumsum(flat[order]))
        mixes.append((is_free, order // width))
    if found.choice is None:
        nothing = np.zeros(num_reqs, np.int64)
        return Mix(nothing, np.zeros(num_reqs, bool), found.rate)
    which, num = found.choice
    is_free, request = mixes[which]
    lengths = np.bincount(request[:num], minlength=num_reqs).astype(np.int64)
    return Mix(lengths, is_free, found.rate)


def best_uniform(
    survival: Floats,
    room: Ints,
    costs: Costs,
    lengths: Sequence[int],
    prompts: Prompts = NO_PROMPTS,
    is_free: bool = False,
) -> Mix:
    """The same for one length of all requests, out of `lengths`: what can be replayed
    from a CUDA graph, which is captured for whole batches. None is above the longest
    draft. What `is_free` takes no draft steps."""
    num_reqs, steps = len(room), np.asarray(lengths, np.int64)
    # [num_lengths]: tokens to verify beside the newest ones, and how many of them are
    # expected to be accepted
    num_drafts = np.minimum.outer(steps, room).sum(axis=1)
    accepted = within_room(survival, room).sum(axis=0).cumsum()[steps - 1]
    plain, *_ = seconds = verify_seconds(
        costs, num_reqs, np.concatenate([[0], num_drafts]), prompts
    )
    draft = 0.0 if is_free else float(costs.draft(num_reqs))
    rate = (num_reqs + accepted) / (seconds[1:] + steps * draft)
    best = int(np.where(num_drafts, rate, 0.0).argmax())
    least = num_reqs / float(plain) * (1 + MARGIN)
    found, free = np.zeros(num_reqs, np.int64), np.full(num_reqs, is_free)
    if not num_drafts[best] or rate[best] <= least:
        return Mix(found, free, least)
    return Mix(np.minimum(room, steps[best]), free, float(rate[best]))


def within_room(survival: Floats, room: Ints) -> Floats:
    """Chances `[num_reqs, most]` of the tokens that there is room for, `[num_reqs]`; 0
    of the others."""
    return survival * (np.arange(survival.shape[1]) < room[:, None])


class _Best:
    """The best way to draft, of those that were offered.

    Attributes:
        choice: Its name and its n; None where drafting is not worth it.
        rate: Expected tokens per second.
        least_worth: The chance at which a draft token pays for its row, about: what a
            row more costs while twice as many are verified, in tokens of plain steps.
    """

    def __init__(
        self, num_reqs: int, most: int, costs: Costs, prompts: Prompts
    ) -> None:
        """For R requests and `most` draft tokens of the batch at most."""
        self.choice: tuple[int, int] | None = None
        self._num_reqs = num_reqs
        # [most + 1], by n; and [R + 1], by rows that draft
        self._verify = verify_seconds(costs, num_reqs, np.arange(most + 1), prompts)
        self._draft = costs.draft(np.arange(num_reqs + 1))
        plain = float(self._verify[0])
        double = float(self._verify[min(num_reqs, most)]) - costs.beside(num_reqs)
        self.least_worth = max(double / plain - 1, 0.0)
        self.rate = num_reqs / plain * (1 + MARGIN)

    def offer(self, name: int, deepest: int, num_drafting: int, gain: Floats) -> None:
        """Ways to draft at most `deepest` tokens a request.

        Args:
            name: To know it by.
            deepest: d, the number of draft steps.
            num_drafting: Rows of each of them.
            gain: Tokens that are expected to be accepted of the first n, from n = 1.
        """
        if not len(gain):
            return
        seconds = self._verify[1 : 1 + len(gain)]
        seconds = seconds + deepest * float(self._draft[num_drafting])
        rate = (self._num_reqs + gain) / seconds
        most = int(rate.argmax())
        if rate[most] > self.rate:
            self.rate = float(rate[most])
            self.choice = name, 1 + most


def verify_seconds(
    costs: Costs, num_reqs: int, num_drafts: Ints | int, prompts: Prompts
) -> Floats:
    """Expected seconds for R requests and their drafts, without what prompts take."""
    rest = costs.beside(num_reqs) * np.greater(num_drafts, 0)
    alone = costs.verify(num_reqs + num_drafts)
    if not prompts.chance:
        return alone + rest
    rows = prompts.num_rows + num_reqs
    longer = costs.verify(rows + num_drafts) - costs.verify(rows)
    beside = costs.verify(num_reqs) + longer
    return alone + prompts.chance * (beside - alone) + rest
