"""`Acceptance`: how likely the next draft tokens of each request are to be accepted.

One rule: a new request is taken to be like the ones before it, and shows within a few
steps how it differs.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from vllm_selfspec.draft_length.trials import logit, sigmoid, trials
from vllm_selfspec.draft_length.types import Bools, Floats, Ints, Slots
from vllm_selfspec.plan.source import UNKNOWN

# Before anything was seen, by kind: the chance of the first token, and of another whose
# forerunner was accepted.
Guesses = Sequence[tuple[float, float]]
NO_GUESS: Guesses = (UNKNOWN,)
# Of the weight of few trials, so that a bad draft is found out within few steps.
GUESS_TRIALS = 2.0
# With fewer of a first token hardly anything is known of a kind.
FEW_TRIALS = 20.0
# Before a position was seen: that of the one before it, of the weight of more, because
# one bad trial would otherwise keep it from ever being tried again.
NEIGHBOUR_TRIALS = 10.0
# Of what was found before, on other texts: enough to begin with, and soon outweighed.
EXPECTED_TRIALS = 50.0
# How many trials the population's figures remember.
POPULATION_TRIALS = 500.0
# Where what is seen, of about so many trials, lies further from what was expected than
# so many variances, texts have changed, and of what was seen before no more counts than
# so many trials.
RECENT_TRIALS, CHANGE, TRIALS_AFTER_CHANGE = 50.0, 16.0, 10.0
# How far requests lie apart: the deviation of their logits is about 0.5. Counted on
# texts of a trained model, their variance is 0.22 at 40 tokens and 0.39 at 96.
OWN_PRECISION = 4.0
# What a request has shown fades by this share a step: its text changes, and one that
# was found bad is tried again.
FADE = 0.02
MIN_CHANCE, MAX_CHANCE = 0.005, 0.98


class Acceptance:
    """Acceptance by request, kind of draft, and draft position.

    With q_i the population's chance that draft token i is accepted when those before it
    were, request r is given the chance

        p_ri = sigmoid(logit q_i + b_r),   b_r ~ N(0, 1 / OWN_PRECISION),

    and b_r follows what the request shows by Newton steps on its posterior: after a
    verification in which token i was tried, with y_i = 1 if it was accepted,

        b_r <- b_r + sum (y_i - p_ri) / (OWN_PRECISION + sum p_ri (1 - p_ri)),

    the sum in the denominator being over all trials of the request, fading. Drafts of
    different kinds, such as copies of what was found by long and by short matches, have
    a q of their own; a request's b is of all of them.
    """

    def __init__(
        self, num_slots: int, max_drafts: int, guesses: Guesses = NO_GUESS
    ) -> None:
        """For `num_slots` requests at a time, and drafts of up to `max_drafts`, of as
        many kinds as there are guesses."""
        num_kinds = len(guesses)
        first, then = np.array(guesses, float).T
        self._first_guess = first.tolist()
        # How the odds of a second token differ from those of a first.
        self._odds_grow = (then / (1 - then) / (first / (1 - first))).tolist()
        self._tried = np.zeros((num_kinds, max_drafts))  # by position, of all requests
        self._taken = np.zeros((num_kinds, max_drafts))
        # By kind, of recent trials: accepted over expected, and its variance.
        self._surprise, self._variance = np.zeros(num_kinds), np.ones(num_kinds)
        self._own = np.zeros(num_slots)  # b
        self._known = np.zeros(num_slots)  # the sum in the denominator
        self._population = np.zeros((num_kinds, max_drafts))  # q
        self._usual = np.zeros((num_kinds, max_drafts))  # its logit, within bounds
        self._estimate(range(num_kinds))

    def expect(self, chances: Sequence[float]) -> None:
        """Takes new requests to be like others that were seen before.

        Args:
            chances: That drafts, of whichever kind, are accepted, by position, given
                those before; at most as many as the longest draft.
        """
        reached = np.cumprod([1.0, *chances])[:-1]
        num = EXPECTED_TRIALS * reached
        self._tried[:, : len(num)] = num
        self._taken[:, : len(num)] = num * chances
        self._estimate(range(len(self._tried)))

    @property
    def most(self) -> int:
        """The longest draft."""
        return int(self._tried.shape[1])

    def admit(self, slot: int) -> None:
        """A new request takes the place `slot`."""
        self._own[slot] = self._known[slot] = 0.0

    def population(self) -> Floats:
        """q of the first kind, `[max_drafts]`. A position hardly tried is taken to be
        like the one before it."""
        found: Floats = self._population[0]
        return found

    def num_tried(self, kind: int) -> float:
        """How often a first token of that kind was verified, as far as is known."""
        return float(self._tried[kind, 0]) if self._tried.size else 0.0

    def is_known(self, kind: int = 0) -> bool:
        """Whether that was often enough to go by."""
        return self.num_tried(kind) >= FEW_TRIALS

    def _estimate(self, kinds: Iterable[int]) -> None:
        """Anew from what was seen of those kinds. In plain Python: numpy takes longer
        for so few numbers, one after the other, and every step waits for this."""
        for kind in kinds:
            seen = np.stack([self._tried[kind], self._taken[kind]], axis=1)
            before, weight, found = self._first_guess[kind], GUESS_TRIALS, []
            for i, (tried, taken) in enumerate(seen.tolist()):
                if i == 1:
                    odds = before / max(1 - before, 1e-6) * self._odds_grow[kind]
                    before = odds / (1 + odds)
                before = (taken + weight * before) / (tried + weight)
                found.append(before)
                weight = NEIGHBOUR_TRIALS
            self._population[kind] = found
            self._usual[kind] = logit(within_bounds(self._population[kind]))

    def _chances(self, slots: Slots, kinds: Ints | None) -> Floats:
        """p, `[n, max_drafts]`."""
        usual = self._usual[:1] if kinds is None else self._usual[kinds]
        return within_bounds(sigmoid(usual + self._own[slots, None]))

    def survival(self, slots: Slots, kinds: Ints | None = None) -> Floats:
        """Chance that draft tokens 1 to i are all accepted, `[n, max_drafts]`.

        Args:
            slots: The requests, `[n]`.
            kinds: Of their drafts, `[n]`; None where all are of the first.
        """
        return np.cumprod(self._chances(slots, kinds), axis=1, dtype=np.float64)

    def observe(
        self,
        slots: Slots,
        drafted: Ints,
        accepted: Ints,
        kinds: Ints | None = None,
        num_steps: int = 1,
    ) -> None:
        """Learns from a verification.

        Args:
            slots: The requests that were in it, `[n]`.
            drafted: Their verified draft tokens, 0 where none were, `[n]`.
            accepted: How many of them were accepted, `[n]`.
            kinds: Of their drafts, `[n]`; None where all are of the first.
            num_steps: That went by: above 1, nothing was drafted in any of them.
        """
        if not (drafted.any() or self._known[slots].any() or self._own[slots].any()):
            return  # nothing is seen, and nothing fades
        if not drafted.any():
            self._own[slots] *= (1 - FADE) ** num_steps
            self._known[slots] *= (1 - FADE) ** num_steps
            return
        tried, taken = trials(drafted, accepted, self._tried.shape[1])
        chance = self._chances(slots, kinds)
        known = (1 - FADE) * self._known[slots] + (tried * chance * (1 - chance)).sum(
            axis=1
        )
        moved = (tried * (taken - chance)).sum(axis=1) / (OWN_PRECISION + known)
        self._own[slots] = (1 - FADE) * self._own[slots] + moved
        self._known[slots] = known
        if kinds is None:
            self._remember(0, tried, taken)
            return
        for kind in np.unique(kinds[drafted > 0]).tolist():
            self._remember(kind, tried[kinds == kind], taken[kinds == kind])

    def _remember(self, kind: int, tried: Bools, taken: Bools) -> None:
        """Adds the trials of drafts of a kind, `[num, max_drafts]`, to the others'."""
        num_tried, num_taken = tried.sum(axis=0), taken.sum(axis=0)
        memory = np.exp(-num_tried / POPULATION_TRIALS)
        if self._has_changed(kind, num_tried, num_taken):
            memory *= min(1.0, TRIALS_AFTER_CHANGE / max(self._tried[kind, 0], 1.0))
        self._tried[kind] = memory * self._tried[kind] + num_tried
        self._taken[kind] = memory * self._taken[kind] + num_taken
        self._estimate([kind])

    def _has_changed(self, kind: int, num_tried: Ints, num_taken: Ints) -> bool:
        """Whether these trials, `[max_drafts]`, with others of late, are not of what
        the population was."""
        chance = within_bounds(self._population[kind])
        recent = math.exp(-float(num_tried.sum()) / RECENT_TRIALS)
        surprise = (
            recent * self._surprise[kind] + (num_taken - num_tried * chance).sum()
        )
        # From 1, so that a miss or two of what is nearly certain are none.
        variance = 1 + recent * (self._variance[kind] - 1)
        variance += (num_tried * chance * (1 - chance)).sum()
        has_changed = bool(surprise**2 > CHANGE * variance)
        self._surprise[kind] = 0.0 if has_changed else surprise
        self._variance[kind] = 1.0 if has_changed else variance
        return has_changed


def within_bounds(chances: Floats) -> Floats:
    """Chances that are neither certain nor out of the question."""
    found: Floats = np.minimum(np.maximum(chances, MIN_CHANCE), MAX_CHANCE)
    return found
