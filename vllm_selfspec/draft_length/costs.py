"""`StepCosts`: what a verification and a draft step take, measured and kept true.

One rule: only ratios matter. A factor common to all costs, such as a machine that slows
down, changes no decision, and must not be mistaken for a cost of one kind.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from vllm_selfspec.draft_length.types import Floats, Ints

# Deviations of the logarithm of a cost: of all costs alike, of each of the two kinds,
# and of a single number of rows. First how well they are measured at start-up, then
# how far they wander in a step. What a token of context adds is told by two times that
# are nearly the same.
MEASURED = (0.3, 0.15, 0.05)
WANDERING = (0.02, 0.002, 0.002)
MEASURED_OF_CONTEXT, WANDERING_OF_CONTEXT = 0.5, 0.01
# What drafting takes beside forwards is no more than guessed at start-up.
GUESSED_BESIDE, WANDERING_BESIDE = 1.5, 0.02
# Of one step's time around its costs; what lies further off than this many deviations
# (a step that was interrupted) teaches no more than one at the limit.
STEP_NOISE = 0.1
MAX_SURPRISE = 3.0


# Of the ratios of draft steps to verifications at start-up, as many neighbours have a
# say in each.
NUM_NEIGHBOURS = 5


def cleaned(
    num_rows: Sequence[int], verify: Floats, draft: Floats
) -> tuple[Floats, Floats]:
    """Takes out of measurements what cannot be.

    Of verifications, see `without_interruptions`. A draft step is a difference of two
    times, wrong either way; but it runs a part of the same model, so its share of a
    verification changes slowly with the rows, and is the median of its neighbours'.

    Args:
        num_rows: Where it was measured, ascending, `[num_knots]`.
        verify: Seconds of the target's forward and head, `[num_knots]`.
        draft: Seconds of a draft step, `[num_knots]`.

    Returns:
        Both, `[num_knots]`.
    """
    possible = without_interruptions(num_rows, verify)
    share = draft / possible
    reach = NUM_NEIGHBOURS // 2
    median = [
        float(np.median(share[max(0, i - reach) : i + reach + 1]))
        for i in range(share.size)
    ]
    return possible, possible * median


def without_interruptions(num_rows: Sequence[int], seconds: Floats) -> Floats:
    """A forward that was interrupted took too long, never too short: fewer rows cost no
    more than more, and more no more than running fewer as often as it takes.

    Args:
        num_rows: Where it was measured, ascending, `[num_knots]`.
        seconds: What it took, `[num_knots]`.

    Returns:
        What it can have taken, `[num_knots]`.
    """
    rows = np.asarray(num_rows, float)
    times = np.ceil(rows / rows[:, None])  # how often one does for another
    possible: Floats = (np.asarray(seconds)[:, None] * times).min(axis=0)
    return possible


class Contexts(NamedTuple):
    """Tokens in the KV cache, of a batch's requests on average.

    Attributes:
        whole: That a verification reads.
        drafted: That a draft step reads of them.
    """

    whole: float = 0.0
    drafted: float = 0.0

    @classmethod
    def of(cls, num_tokens: Ints, num_read: Ints) -> "Contexts":
        """Of requests by their tokens, and those a draft reads, `[num_reqs]`."""
        if not len(num_tokens):
            return cls()
        return cls(float(num_tokens.mean()), float(num_read.mean()))


class ContextCosts(NamedTuple):
    """Seconds that a token of context adds: kernels read it once for a request, and
    multiply it by each row; those for several rows of a request are others.

    Attributes:
        request: To a verification, of each request.
        row: To a verification, of each row.
        draft: To a draft step, of each row.
        several: To a verification of drafts, of each request, beside its rows.
    """

    request: float = 0.0
    row: float = 0.0
    draft: float = 0.0
    several: float = 0.0


NO_CONTEXT = Contexts()
# Not measured, or too little to be seen; its logarithm must be there.
FREE, LEAST = ContextCosts(), 1e-12


class BesideCosts(NamedTuple):
    """Seconds that a step with drafts takes beside its forwards' rows: matching,
    planning and sampling; attention over requests of several rows; whatever else does
    not run while the device is busy.

    Attributes:
        step: Of the step.
        request: Of each of its requests.
    """

    step: float = 0.0
    request: float = 0.0


NOTHING_BESIDE = BesideCosts()


class Costs(Protocol):
    """Seconds of forwards, by rows."""

    def beside(self, num_reqs: int) -> float:
        """Seconds that a step with drafts takes beside its forwards."""

    def verify(self, num_rows: Ints | int) -> Floats:
        """Seconds to verify, or to decode, `num_rows` token rows."""

    def draft(self, num_rows: Ints | int) -> Floats:
        """Seconds of one draft step of `num_rows` rows."""


class StepCosts:
    """Seconds of the engine's two kinds of forwards, by number of token rows and, on
    top of that, by tokens of context; and what a step with drafts takes beside them.

    Costs are interpolated linearly between measured numbers of rows, and go on with the
    last slope beyond them. Their logarithms are the state of a Kalman filter that
    observes the time of whole steps. All costs wander together, each kind wanders a
    little by itself, and each number of rows a little more: so a step of one kind also
    says how fast the machine is at present, and costs that were not seen for long are
    readily corrected once they are.
    """

    def __init__(
        self,
        num_rows: Sequence[int],
        verify: Sequence[float] | Floats,
        draft: Sequence[float] | Floats,
        of_context: ContextCosts = FREE,
        beside: BesideCosts = NOTHING_BESIDE,
    ) -> None:
        """From measurements. More rows are taken to cost no less than fewer.

        Args:
            num_rows: Where it was measured, ascending, at least two.
            verify: Seconds of the target's forward and head at each, without context.
            draft: Seconds of a draft step at each.
            of_context: What a token of context adds.
            beside: A guess at what a step with drafts takes beside its forwards.

        Raises:
            ValueError: If there are not at least two, or one takes no time.
        """
        self._rows = np.asarray(num_rows, float)
        # [2, num_knots]: verify, draft
        seconds = np.asarray([verify, draft], float)
        if self._rows.size < 2 or seconds.shape != (2, self._rows.size):
            raise ValueError(
                f"costs need at least two numbers of rows, but there are {num_rows}"
            )
        if (seconds <= 0).any() or (np.diff(self._rows) <= 0).any():
            raise ValueError(
                "costs must be above zero at ascending numbers of rows, but are "
                f"{seconds.tolist()} at {num_rows}"
            )
        of_rows = np.maximum.accumulate(seconds, axis=1).ravel()
        # [2 num_knots + 6]: verify, draft, of context, and beside
        every = np.concatenate([of_rows, np.maximum([*of_context, *beside], LEAST)])
        self._log, self._seconds = np.log(every), every
        self._covariance = self._spread(MEASURED, MEASURED_OF_CONTEXT, GUESSED_BESIDE)
        self._wandering = self._spread(
            WANDERING, WANDERING_OF_CONTEXT, WANDERING_BESIDE
        )

    def _spread(
        self,
        deviations: tuple[float, float, float],
        of_context: float,
        beside: float,
    ) -> Floats:
        """Covariance of all costs, `[2 num_knots + 6, 2 num_knots + 6]`."""
        common, of_kind, single = (deviation**2 for deviation in deviations)
        size = self._rows.size
        kinds = np.repeat([0, 1, 0, 1, 0, 2], [size, size, 2, 1, 1, 2])
        alone = np.repeat([single, of_context**2, beside**2], [2 * size, 4, 2])
        same_kind = kinds[:, None] == kinds
        found: Floats = common + of_kind * same_kind + np.diag(alone)
        return found

    @property
    def of_context(self) -> ContextCosts:
        """What a token of context adds."""
        return ContextCosts(*self._seconds[-6:-2].tolist())

    def beside(self, num_reqs: int) -> float:
        """Seconds that a step with drafts takes beside its forwards."""
        return float(self._seconds[-2] + num_reqs * self._seconds[-1])

    def verify(self, num_rows: Ints | int) -> Floats:
        """Seconds to verify, or to decode, `num_rows` token rows without context."""
        return self._seconds_of(0, num_rows)

    def draft(self, num_rows: Ints | int) -> Floats:
        """Seconds of one draft step of `num_rows` rows without context."""
        return self._seconds_of(1, num_rows)

    def within(self, num_reqs: int, contexts: Contexts) -> "Costs":
        """The same for requests that have such contexts."""
        return CostsInContext(self, num_reqs, contexts) if contexts.whole else self

    def _seconds_of(self, kind: int, num_rows: Ints | int) -> Floats:
        size = self._rows.size
        seconds = self._seconds[kind * size : (kind + 1) * size]
        rows = np.asarray(num_rows, float)
        # Below the first one it stays; beyond the last one it goes on.
        slope = (seconds[-1] - seconds[-2]) / (self._rows[-1] - self._rows[-2])
        beyond = np.maximum(0.0, rows - self._rows[-1])
        found: Floats = np.interp(rows, self._rows, seconds) + slope * beyond
        return found

    def _weights(self, num_rows: int) -> Floats:
        """Of the measured numbers of rows in that interpolation, `[num_knots]`; they
        add up to 1."""
        last = self._rows.size - 2
        left = min(max(int(self._rows.searchsorted(num_rows, "right")) - 1, 0), last)
        width = self._rows[left + 1] - self._rows[left]
        share = max(0.0, float((num_rows - self._rows[left]) / width))
        weights = np.zeros(self._rows.size)
        weights[left], weights[left + 1] = 1 - share, share
        return weights

    def observe(
        self,
        num_verified: int,
        num_drafting: int,
        num_steps: int,
        seconds: float,
        num_reqs: int = 0,
        contexts: Contexts = NO_CONTEXT,
    ) -> None:
        """Corrects the costs by an engine step.

        Args:
            num_verified: Token rows of the target's forward.
            num_drafting: Rows of each draft step.
            num_steps: Draft steps.
            seconds: What all of it took.
            num_reqs: Requests of the target's forward.
            contexts: Of these requests.
        """
        num_draft_rows = num_steps * num_drafting
        has_drafts = num_verified > num_reqs > 0
        whole, drafted = contexts
        used = np.concatenate(
            [
                self._weights(num_verified),
                num_steps * self._weights(num_drafting),
                np.multiply([num_reqs, num_verified], whole),
                [num_draft_rows * drafted, num_reqs * whole * has_drafts],
                np.multiply([1, num_reqs], has_drafts),
            ]
        )
        parts = used * self._seconds
        predicted = parts.sum()
        # How the logarithm of the step's time moves with each cost's.
        slope = parts / predicted
        covariance = self._covariance + self._wandering
        gain = covariance @ slope
        variance = float(slope @ gain) + STEP_NOISE**2
        limit = MAX_SURPRISE * math.sqrt(variance)
        surprise = min(max(math.log(seconds / predicted), -limit), limit)
        self._log += gain * (surprise / variance)
        self._seconds = np.exp(self._log)
        self._covariance = covariance - np.outer(gain, gain) / variance


@dataclass(frozen=True)
class CostsInContext:
    """Those of requests that have a context to attend to.

    Attributes:
        costs: Without.
        num_reqs: Requests.
        contexts: Theirs.
    """

    costs: StepCosts
    num_reqs: int
    contexts: Contexts

    def beside(self, num_reqs: int) -> float:
        """Seconds that a step with drafts takes beside its forwards."""
        several = num_reqs * self.costs.of_context.several
        return self.costs.beside(num_reqs) + self.contexts.whole * several

    def verify(self, num_rows: Ints | int) -> Floats:
        """Seconds to verify, or to decode, `num_rows` token rows."""
        of = self.costs.of_context
        seconds = self.num_reqs * of.request + np.asarray(num_rows) * of.row
        return self.costs.verify(num_rows) + self.contexts.whole * seconds

    def draft(self, num_rows: Ints | int) -> Floats:
        """Seconds of one draft step of `num_rows` rows."""
        seconds = np.asarray(num_rows) * self.costs.of_context.draft
        return self.costs.draft(num_rows) + self.contexts.drafted * seconds
