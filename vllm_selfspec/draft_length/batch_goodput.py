"""`BatchGoodput`: what a whole batch drafts, decided before the step that it follows.

One rule: a batch drafts from one source, the model or copies. Where steps are scheduled
ahead of the device nobody knows which requests have a match; what is known is how often
the copies of each were right, and by that they are planned, as the model's drafts are.
"""

import math
from collections.abc import Sequence

import numpy as np

from vllm_selfspec.draft_length.acceptance import NO_GUESS, Acceptance
from vllm_selfspec.draft_length.best_lengths import (
    best_mix,
    verify_seconds,
    within_room,
)
from vllm_selfspec.draft_length.costs import Contexts, StepCosts
from vllm_selfspec.draft_length.goodput import (
    EXPLORE_SHARE,
    TRIED_TOKENS,
    Batch,
    Goodput,
    Plan,
    PlannedSource,
)

# Beliefs of one source do not move while the other drafts, and those of both slowly.
COMPARE_EVERY = 8


class BatchGoodput(Goodput):
    """`Goodput` where steps are scheduled ahead of the device.

    Attributes:
        free: Of copies, whether a request has a match or not.
    """

    def __init__(
        self,
        num_slots: int,
        max_drafts: int,
        costs: StepCosts,
        uniform: Sequence[int] = (),
        max_copied: int = 0,
    ) -> None:
        """For `num_slots` requests at a time.

        Args:
            num_slots: Requests at a time.
            max_drafts: The longest draft of the model; 0 where it has none.
            costs: Of this model on this machine.
            uniform: The lengths a whole batch may have; empty where each request may
                have its own.
            max_copied: The longest copy; 0 where nothing is copied.
        """
        how = costs, uniform, max_copied, NO_GUESS
        super().__init__(num_slots, max_drafts, *how, looks_at_plain_steps=True)
        self._copies = not max_drafts  # the better source, when they were compared
        self._until_compared = 0  # steps
        self._owed_other = 0.0  # seconds that trials of the other source may take
        self._tried_copies = False  # in the last trial where nothing was worth it
        self._step_before: tuple[bool, int] | None = None  # its kind

    def admit(self, slot: int) -> None:
        """A new request takes the place `slot`."""
        super().admit(slot)
        self._until_compared = 0

    def observe_step(
        self,
        num_verified: int,
        num_reqs: int,
        num_steps: int,
        seconds: float,
        contexts: Contexts,
    ) -> None:
        """Learns what steps take, from one of the same kind as the one before it.

        Results come while the device is busy with the next step. So between two of them
        run the draft steps that followed the former, and where the host is slower than
        the device, what it does for a step shows in the time of another. Steps that are
        alike may be taken for each other.

        Args:
            num_verified: Token rows of the target's forward.
            num_reqs: Its requests, all of which decode.
            num_steps: Draft steps after it.
            seconds: From the former step's result to this one's.
            contexts: Of its requests.
        """
        kind = num_verified > num_reqs, num_steps
        if kind == self._step_before:
            how = num_verified, num_reqs, num_steps, seconds, num_reqs, contexts
            self.costs.observe(*how)
        self._step_before = kind

    def observe_other_step(self) -> None:
        """Nothing is learnt of a step that computes prompts, nor of the next."""
        self._step_before = None

    def _found(self, batch: Batch) -> Plan:
        """The better source's. Planning takes the host's time, so which that is is
        asked of the same requests once in so many steps."""
        sources = self._sources()
        self._owed_other += EXPLORE_SHARE * self.plain
        self._until_compared -= 1
        if len(sources) == 1 or self._until_compared >= 0:
            plan = self._plan_of(sources[-1 if self._copies else 0], batch)
            if len(sources) == 1 or plan.lengths.any():
                return plan
        return self._compared(sources, batch)

    def _compared(self, sources: Sequence[PlannedSource], batch: Batch) -> Plan:
        """The plan of the better source; of the other instead, to find out about it, as
        far as that was saved up for."""
        plans = [self._plan_of(source, batch) for source in sources]
        other, found = sorted(plans, key=lambda plan: plan.rate)
        if not found.lengths.any():
            return found
        self._copies, self._until_compared = bool(found.is_free.any()), COMPARE_EVERY
        tried = self._worth_a_try(other, batch)
        is_known = self._acceptance_of(tried).is_known()
        if is_known and self._owed_other < self._price_of(tried, batch, found.rate):
            return found
        self._owed_other = 0.0
        return tried

    def _sources(self) -> list[PlannedSource]:
        """Those there are."""
        copies = PlannedSource(self.free, is_free=True)
        both = PlannedSource(self.acceptance), copies
        return [source for source in both if source.most]

    def _plan_of(self, source: PlannedSource, batch: Batch) -> Plan:
        """The best of one source's; nothing where that is best."""
        survival = source.acceptance.survival(batch.slots)
        room = np.minimum(batch.room, source.most)
        if self._uniform:
            return self._uniform_plan(survival, room, batch, source.is_free)
        chances, none = within_room(survival, room), np.zeros((len(batch), 0))
        model, free = (none, chances) if source.is_free else (chances, none)
        mix = best_mix(model, free, batch.costs, batch.prompts)
        is_free = np.full(len(batch), source.is_free)
        return Plan(mix.lengths, is_free=is_free, rate=mix.rate)

    def _worth_a_try(self, plan: Plan, batch: Batch) -> Plan:
        """What to draft to find out about a source that was passed over: its own plan,
        or if that is nothing, a few tokens."""
        lengths = plan.lengths
        if not lengths.any():
            most = min(self._acceptance_of(plan).most, TRIED_TOKENS)
            if self._uniform:
                most = max(length for length in self._uniform if length <= most)
            lengths = np.minimum(batch.room, most)
        return Plan(lengths, is_trial=True, is_free=plan.is_free)

    def _acceptance_of(self, plan: Plan) -> Acceptance:
        return self.free if plan.is_free.any() else self.acceptance

    def _price_of(self, plan: Plan, batch: Batch, usual_rate: float) -> float:
        """Seconds that a step so drafted is expected to lose on the usual one."""
        survival = self._acceptance_of(plan).survival(batch.slots)
        gain = within_room(survival, plan.lengths).sum()
        num_reqs, num_drafts = len(batch), int(plan.lengths.sum())
        costs = batch.costs
        verify = float(verify_seconds(costs, num_reqs, num_drafts, batch.prompts))
        seconds = verify + plan.num_steps * float(costs.draft(num_reqs))
        return seconds - (num_reqs + float(gain)) / usual_rate

    def _source_to_try(self) -> PlannedSource:
        """By turns; one that was hardly tried comes first."""
        sources = self._sources()
        for source in sources:
            if not source.acceptance.is_known():
                return source
        of_copies = len(sources) > 1 and not self._tried_copies
        return sources[-1] if of_copies else sources[0]

    def _owed_for(self, source: PlannedSource) -> float:
        """Until a source is known it is tried without saving up: what that takes is
        bounded, and may be little beside what a good one brings."""
        is_known = source.acceptance.is_known()
        return super()._owed_for(source) if is_known else math.inf

    def _trial(self, batch: Batch) -> Plan:
        plan = super()._trial(batch)
        if plan.is_trial:
            self._tried_copies = bool(plan.is_free.any())
        return plan

    def beliefs(self) -> dict[str, float]:
        """As of `Goodput`, and of copies."""
        copied = self.free.population()
        return super().beliefs() | {
            f"copy_acceptance_{i}": float(q) for i, q in enumerate(copied, 1)
        }
