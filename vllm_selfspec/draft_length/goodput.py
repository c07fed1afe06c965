"""`Goodput`: what to draft, from which source, step by step, for the whole batch.

One rule: what is believed is learnt from what was verified; what is decided follows
from beliefs and costs alone (`best_lengths`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_selfspec.draft_length.acceptance import NO_GUESS, Acceptance, Guesses
from vllm_selfspec.draft_length.best_lengths import (
    MARGIN,
    NO_PROMPTS,
    Prompts,
    best_mix,
    best_uniform,
    verify_seconds,
    within_room,
)
from vllm_selfspec.draft_length.costs import (
    NO_CONTEXT,
    Contexts,
    Costs,
    StepCosts,
)
from vllm_selfspec.draft_length.types import Bools, Floats, Ints, Slots

# Share of the time spent on finding out whether drafting pays again. Each trial in vain
# makes the next one wait longer, so that over T seconds they take in the order of
# sqrt(T); to a limit, because texts change and nobody says so.
EXPLORE_SHARE = 0.005
MOST_PATIENCE = 8.0
# A free proposal that was passed over is verified all the same once in so many times,
# and so many tokens of it: its kind may have turned good. That, too, takes no more than
# the share above: on a busy machine a row costs more than many of them bring.
TRY_EVERY, TRIED_TOKENS = 50, 4
# The same of drafts that read more of the context, or less; more often as long as they
# are hardly known.
TRY_READING_EVERY = 5
# What drafts of a plan with a window read; as kinds of `Acceptance`.
WINDOW, WHOLE = 0, 1
# Where steps run ahead of the device, their times at start-up, when each is waited for,
# say little of what a plain one takes; so some are run after so many that draft, then
# after twice as many each time. Of these the first is still slow from those before it.
FIRST_LOOK, LAST_LOOK, LOOK_STEPS = 4, 256, 4
# Where drafting was not worth it, it is not asked again for so many steps of the same
# requests, and then for twice as many each time: what is believed moves slowly while
# nothing is verified, and asking takes the host's time.
REST, LONGEST_REST = 8, 32


@dataclass(frozen=True)
class Proposed:
    """What free sources propose for the rows of a batch.

    Attributes:
        num_tokens: 0 where nothing, `[num_reqs]`.
        kinds: Of the proposals, over all sources, `[num_reqs]`.
    """

    num_tokens: Ints
    kinds: Ints


@dataclass(frozen=True)
class Batch:
    """The requests that a step is planned for.

    Attributes:
        slots: Their places, `[num_reqs]`.
        room: The most each may draft, `[num_reqs]`.
        prompts: What may be computed beside.
        proposed: For free; None where there is nothing.
        readings: What drafts may read, and what steps cost then; first the usual.
    """

    slots: Slots
    room: Ints
    prompts: Prompts
    proposed: Proposed | None
    readings: Sequence[tuple[int, Costs]]

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def costs(self) -> Costs:
        """What steps cost where drafts read the usual."""
        return self.readings[0][1]


@dataclass
class Plan:
    """What a step drafts.

    Attributes:
        lengths: Draft tokens to verify, of each request, `[num_reqs]`.
        is_trial: Whether it drafts only to find out whether that pays.
        is_free: Whether they are those of the free proposal, `[num_reqs]`.
        reads: `WINDOW` for what the draft plan has the model's drafts read, `WHOLE` for
            whole contexts.
        rate: Expected tokens per second; 0 where that was not asked.
    """

    lengths: Ints
    is_trial: bool = False
    is_free: Bools = field(default_factory=lambda: np.zeros(0, bool))
    reads: int = WINDOW
    rate: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.is_free):
            self.is_free = np.zeros(len(self.lengths), bool)

    @property
    def num_steps(self) -> int:
        """Draft steps of the batch: the longest draft of the model."""
        return int(self.lengths[~self.is_free].max(initial=0))

    def gain(self, plain: float) -> float:
        """How much more tokens per second are expected than of plain steps, which take
        `plain` seconds, as a share of theirs; 0 where it drafts only to find out."""
        usual = len(self.lengths) / plain * (1 + MARGIN)
        return max(self.rate / usual - 1, 0.0)


@dataclass(frozen=True)
class PlannedSource:
    """A source whose drafts are planned.

    Attributes:
        acceptance: Of them.
        is_free: Whether they take no draft steps.
    """

    acceptance: Acceptance
    is_free: bool = False

    @property
    def most(self) -> int:
        """The longest draft; 0 where it has none."""
        return self.acceptance.most


class Goodput:
    """Chooses draft lengths step by step, and learns from what came of them.

    Attributes:
        acceptance: Of the model's drafts, by what they read.
        free: Of free proposals, by kind.
        costs: Of this model on this machine.
        plain: Seconds of a plain step of the requests that were last planned.
    """

    def __init__(
        self,
        num_slots: int,
        max_drafts: int,
        costs: StepCosts,
        uniform: Sequence[int] = (),
        max_free: int = 0,
        free_guesses: Guesses = NO_GUESS,
        has_window: bool = False,
        looks_at_plain_steps: bool = False,
    ) -> None:
        """For `num_slots` requests at a time, and drafts of up to `max_drafts`.

        Args:
            num_slots: Requests at a time.
            max_drafts: The longest draft of the model.
            costs: Of this model on this machine.
            uniform: The lengths a whole batch may have; empty where each request may
                have its own.
            max_free: The longest free proposal.
            free_guesses: Of free proposals, by kind: see `Acceptance`.
            has_window: Whether the draft plan has one, which need not be used.
            looks_at_plain_steps: Whether some are run once in a while where all draft.
        """
        self._uniform = tuple(uniform)
        self._has_window = has_window
        self._not_read = np.zeros(2, np.int64)  # steps since each was tried
        self.acceptance = Acceptance(num_slots, max_drafts, (*NO_GUESS, *NO_GUESS))
        self.free = Acceptance(num_slots, max_free, free_guesses)
        self.costs = costs
        self.plain = 0.0
        self._owed = 0.0  # seconds that trials may take by now
        self._price = 0.0  # of the next one, when it was last looked at
        self._patience = 1.0  # how many times its price a trial waits for
        # Chance of the first draft token at the last trial, free or of the model.
        self._hope = {False: 1.0, True: 1.0}
        self._passed_over = np.zeros(len(free_guesses), np.int64)
        self._owed_free = 0.0  # seconds that trials of free proposals may take by now
        self._looks_at_plain_steps = looks_at_plain_steps
        self._look_after, self._drafting = FIRST_LOOK, 0  # steps that draft
        self._looking = 0  # plain steps of a look that are still to come
        self._resting: bytes = b""  # the requests that draft nothing
        self._rest = 0  # for so many steps
        self._next_rest = REST

    @property
    def is_uniform(self) -> bool:
        """Whether all requests get one length."""
        return bool(self._uniform)

    def admit(self, slot: int) -> None:
        """A new request takes the place `slot`."""
        self.acceptance.admit(slot)
        self.free.admit(slot)
        self._rest = 0

    def plan(
        self,
        slots: Slots,
        room: Ints,
        prompts: Prompts = NO_PROMPTS,
        proposed: Proposed | None = None,
        contexts: Contexts = NO_CONTEXT,
    ) -> Plan:
        """Lengths of a batch, and which of them are free proposals'.

        Args:
            slots: Its requests, `[num_reqs]`.
            room: The most each may draft, `[num_reqs]`.
            prompts: What may be computed beside.
            proposed: For free; None where there is nothing.
            contexts: Of these requests.
        """
        num_reqs = len(slots)
        if not num_reqs:
            return Plan(np.zeros(0, np.int64))
        if proposed is None and self._resting == slots.tobytes() and self.rest():
            return Plan(np.zeros(num_reqs, np.int64))
        readings = self._readings(num_reqs, contexts)
        batch = Batch(slots, room, prompts, proposed, readings)
        self.plain = float(batch.costs.verify(num_reqs))
        found = self._found(batch)
        if found.lengths.any():
            self._resting, self._rest = b"", 0
            if self._is_time_to_look():
                return Plan(np.zeros(num_reqs, np.int64))
            self._patience = 1.0 if found.num_steps else self._patience
            return found
        is_same = self._resting == slots.tobytes()
        self._next_rest = min(2 * self._next_rest, LONGEST_REST) if is_same else REST
        self._resting, self._rest = slots.tobytes(), self._next_rest
        self._drafting = self._looking = 0
        return self._trial(batch)

    @property
    def rests(self) -> bool:
        """Whether drafting was not worth it when it was last asked."""
        return self._rest > 0

    def rest(self) -> bool:
        """Whether a step is plain that is of the same requests as the last one, which
        was: known without looking at them, as long as they are left alone."""
        owed = self._owed + EXPLORE_SHARE * self.plain
        is_time_to_try = self._source_to_try().most and owed >= self._price
        if not self._rest or is_time_to_try:
            return False
        self._rest, self._owed = self._rest - 1, owed
        return True

    def _is_time_to_look(self) -> bool:
        """Whether a step that would draft is to be plain, to see what that takes."""
        if self._looking:
            self._looking -= 1
            return True
        self._drafting += 1
        if not self._looks_at_plain_steps or self._drafting <= self._look_after:
            return False
        self._drafting, self._look_after = 0, min(2 * self._look_after, LAST_LOOK)
        self._looking = LOOK_STEPS - 1
        return True

    def _readings(self, num_reqs: int, of: Contexts) -> list[tuple[int, Costs]]:
        """See `Batch`; for so many requests with such contexts."""
        usual = self.costs.within(num_reqs, of)
        if not self._has_window:
            return [(WINDOW, usual)]
        if of.drafted >= of.whole:
            return [(WHOLE, usual)]
        whole = Contexts(of.whole, of.whole)
        return [(WINDOW, usual), (WHOLE, self.costs.within(num_reqs, whole))]

    def _found(self, batch: Batch) -> Plan:
        """What is best by what is believed; nothing where no draft is worth it."""
        if not self._uniform:
            return self._best(batch)
        room = np.minimum(batch.room, self.acceptance.most)
        survival = self.acceptance.survival(batch.slots)
        return self._uniform_plan(survival, room, batch)

    def _uniform_plan(
        self,
        survival: Floats,
        room: Ints,
        batch: Batch,
        is_free: bool = False,
    ) -> Plan:
        """One length for all, out of those that such drafts may have."""
        most = survival.shape[1]
        lengths = [length for length in self._uniform if length <= most]
        how = batch.costs, lengths, batch.prompts, is_free
        mix = best_uniform(survival, room, *how)
        return Plan(mix.lengths, is_free=mix.is_free, rate=mix.rate)

    def _best(self, batch: Batch) -> Plan:
        """The best over what drafts may read. What is passed over is tried once in a
        while: it may be better for other texts."""
        free, plans = self._free_chances(batch), []
        for reads, costs in batch.readings:
            kinds = np.full(len(batch), reads)
            model = within_room(
                self.acceptance.survival(batch.slots, kinds), batch.room
            )
            mix = best_mix(model, free, costs, batch.prompts)
            is_free = mix.is_free & (mix.lengths > 0)
            plans.append(Plan(mix.lengths, is_free=is_free, reads=reads, rate=mix.rate))
        found = max(plans, key=lambda plan: plan.rate)
        if batch.proposed is not None:
            self._try_free(found, batch, batch.proposed)
        if len(plans) > 1 and found.num_steps:
            other = 1 - found.reads
            self._not_read[other] += 1
            is_known = self.acceptance.is_known(other)
            if self._not_read[other] >= (TRY_EVERY if is_known else TRY_READING_EVERY):
                self._not_read[other], found.reads = 0, other
        return found

    def _free_chances(self, batch: Batch) -> Floats:
        """Chance that tokens 1 to i of what is free are all accepted; 0 beyond it,
        `[num_reqs, most]`."""
        if batch.proposed is None:
            return np.zeros((len(batch), 0))
        survival = self.free.survival(batch.slots, batch.proposed.kinds)
        return within_room(survival, np.minimum(batch.proposed.num_tokens, batch.room))

    def _try_free(self, plan: Plan, batch: Batch, proposed: Proposed) -> None:
        """Puts free proposals that were passed over often enough into a plan, as far as
        that was saved up for."""
        num_free, kinds = np.minimum(proposed.num_tokens, batch.room), proposed.kinds
        owed = self._owed_free + EXPLORE_SHARE * self.plain
        self._owed_free = min(owed, self.plain)
        rows = np.flatnonzero((num_free > 0) & ~plan.is_free)
        np.add.at(self._passed_over, kinds[rows], 1)
        due = rows[self._passed_over[kinds[rows]] >= TRY_EVERY]
        if not len(due):
            return
        row, before = int(due[0]), plan.lengths.sum()
        length = int(min(num_free[row], TRIED_TOKENS))
        tried = np.array([before, before - plan.lengths[row] + length])
        price = np.diff(
            verify_seconds(batch.costs, len(kinds), tried, NO_PROMPTS)
        ).item()
        if self._owed_free >= price:
            self._owed_free -= max(price, 0.0)
            self._passed_over[kinds[row]] = 0
            plan.lengths[row], plan.is_free[row] = length, True

    def _trial(self, batch: Batch) -> Plan:
        """One token for everybody, where that was saved up for; else nothing."""
        source, num_reqs = self._source_to_try(), len(batch)
        reads, costs = batch.readings[0]
        tried = np.minimum(batch.room, min(source.most, 1))
        self._owed += EXPLORE_SHARE * self.plain
        owed = self._owed_for(source)
        if owed < self._price or not tried.any():
            return Plan(np.zeros(num_reqs, np.int64))
        seconds = verify_seconds(costs, num_reqs, int(tried.sum()), batch.prompts)
        draft = 0.0 if source.is_free else float(costs.draft(num_reqs))
        self._price = (float(seconds) - self.plain + draft) * self._patience
        if owed < self._price:
            return Plan(np.zeros(num_reqs, np.int64))
        self._owed = self._price = 0.0
        self._rest = 0
        hope = float(source.acceptance.population()[0])
        grown = 1.0 if hope > self._hope[source.is_free] else self._patience + 1
        self._patience = min(grown, MOST_PATIENCE)
        self._hope[source.is_free] = hope
        is_free = np.full(num_reqs, source.is_free)
        return Plan(tried, is_trial=True, is_free=is_free, reads=reads)

    def _owed_for(self, source: PlannedSource) -> float:
        """Seconds that a trial of this source may take by now."""
        return self._owed

    def _source_to_try(self) -> PlannedSource:
        """Whose drafts are tried where none are worth it."""
        return PlannedSource(self.acceptance)

    def beliefs(self) -> dict[str, float]:
        """What it takes new requests to be like, to be shown: acceptance by position,
        given that the tokens before were accepted."""
        found = self.acceptance.population()
        return {f"acceptance_{i}": float(q) for i, q in enumerate(found, 1)}
