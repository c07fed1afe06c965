"""The draft lengths that bring most tokens per second, given chances and costs.

One rule: a draft token must earn what it costs. On a machine with idle memory bandwidth
that is little; on a busy one it is the work of a row, and then nothing is drafted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_selfspec.draft_length.costs import StepCosts
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
    """

    lengths: Ints
    is_free: Bools


@dataclass(frozen=True)
class _Choice:
    """Ways to draft at most `deepest` tokens a request.

    Attributes:
        deepest: d, the number of draft steps.
        num_drafting: Rows of each of them.
        num_drafts: n, draft tokens of the batch, `[num_ways]`.
        gain: How many of them are expected to be accepted, `[num_ways]`.
    """

    deepest: int
    num_drafting: int
    num_drafts: Ints
    gain: Floats


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
    free = np.zeros((len(survival), 0))
    return best_mix(_within(survival, room), free, costs, prompts).lengths


def best_mix(
    model: Floats, free: Floats, costs: StepCosts, prompts: Prompts = NO_PROMPTS
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
    least = _least_worth(costs, num_reqs)
    has_free = (free > 0).any(axis=1)
    free_worth = np.maximum(free - least, 0).sum(axis=1)
    free = _padded(free, width)
    choices, mixes = [], []
    for deepest in range(1 - has_free.any(), max_drafts + 1):
        kept = model[:, :deepest]
        worth = np.maximum(kept - least, 0).sum(axis=1)
        is_free = has_free & (free_worth >= worth)
        drafts = ~is_free & (kept > 0).any(axis=1)
        if deepest and not drafts.any():
            continue
        chance = np.where(is_free[:, None], free, _padded(kept, width)).ravel()
        order = np.argsort(-chance, kind="stable")[: np.count_nonzero(chance)]
        gain = np.cumsum(chance[order])
        num_drafts = np.arange(1, len(order) + 1)
        choices.append(_Choice(deepest, int(drafts.sum()), num_drafts, gain))
        mixes.append((is_free, order // width))
    chosen = _best(choices, num_reqs, costs, prompts)
    if chosen is None:
        return Mix(np.zeros(num_reqs, np.int64), np.zeros(num_reqs, bool))
    which, num = chosen
    is_free, request = mixes[which]
    return Mix(np.bincount(request[:num], minlength=num_reqs).astype(np.int64), is_free)


def best_uniform_length(
    survival: Floats,
    room: Ints,
    costs: StepCosts,
    lengths: Sequence[int],
    prompts: Prompts = NO_PROMPTS,
) -> Ints:
    """The same for one length of all requests, out of `lengths`: what can be replayed
    from a CUDA graph, which is captured for whole batches."""
    choices = []
    for length in lengths:
        tried = np.minimum(room, length)
        kept = _within(survival, tried)
        if tried.any():
            total, gain = np.array([tried.sum()]), np.array([kept.sum()])
            choices.append(_Choice(length, len(room), total, gain))
    chosen = _best(choices, len(room), costs, prompts)
    return np.minimum(room, choices[chosen[0]].deepest if chosen else 0)


def _within(survival: Floats, room: Ints) -> Floats:
    """Chances of the tokens that there is room for; 0 of the others."""
    return survival * (np.arange(survival.shape[1]) < room[:, None])


def _padded(chance: Floats, width: int) -> Floats:
    """`[num_reqs, width]`, with tokens that are never accepted."""
    return np.pad(chance, ((0, 0), (0, width - chance.shape[1])))


def _least_worth(costs: StepCosts, num_reqs: int) -> float:
    """The chance at which a draft token pays for its row, about: what a row more costs
    while twice as many are verified, in tokens of plain steps."""
    plain, double = costs.verify(np.array([num_reqs, 2 * num_reqs]))
    return float(double - plain) / float(plain)


def _best(
    choices: Iterable[_Choice], num_reqs: int, costs: StepCosts, prompts: Prompts
) -> tuple[int, int] | None:
    """The best of the choices, by number, and its n; None where drafting is not worth
    it."""
    best = num_reqs / float(costs.verify(num_reqs)) * (1 + MARGIN)
    found = None
    for number, choice in enumerate(choices):
        seconds = verify_seconds(costs, num_reqs, choice.num_drafts, prompts)
        if choice.deepest:
            seconds = seconds + choice.deepest * costs.draft(choice.num_drafting)
        rate = (num_reqs + choice.gain) / seconds
        most = int(rate.argmax())
        if rate[most] > best:
            best = float(rate[most])
            found = number, int(choice.num_drafts[most])
    return found


def verify_seconds(
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
