"""`DraftPlanner`: `BatchGoodput` in the terms of vLLM's scheduler.

One rule: requests come and go by their names here, and have places there.
"""

from collections.abc import Collection

import numpy as np

from vllm_selfspec.draft.stats import DraftStats
from vllm_selfspec.draft_length.batch_goodput import BatchGoodput
from vllm_selfspec.draft_length.best_lengths import NO_PROMPTS, Prompts
from vllm_selfspec.draft_length.costs import NO_CONTEXT, Contexts
from vllm_selfspec.draft_length.slots import Slots
from vllm_selfspec.plan.sources import MODEL


class DraftPlanner:
    """Plans the drafts that follow a step, and learns from what was verified.

    Attributes:
        goodput: What decides.
        lengths: Draft tokens that a request may have verified in its next step, by
            request id, of those that draft at all.
        copying: Requests whose next drafts are of the source on the device.
        stats: What was planned, and what came of it.
    """

    def __init__(
        self,
        goodput: BatchGoodput,
        max_num_reqs: int,
        stats: DraftStats,
        device_source: str = "",
    ) -> None:
        self.goodput, self.stats = goodput, stats
        self._slots = Slots(max_num_reqs)
        self._device_source = device_source
        self.lengths: dict[str, int] = {}
        self.copying: frozenset[str] = frozenset()

    def plan(
        self,
        room_of: dict[str, int],
        running: Collection[str],
        prompts: Prompts = NO_PROMPTS,
        contexts: Contexts = NO_CONTEXT,
    ) -> int:
        """The number of draft steps after this step; fills `lengths` and `copying`.

        Args:
            room_of: The most that each request which samples in this step may draft.
            running: All requests that run.
            prompts: What the next step may have beside them.
            contexts: Of those requests.
        """
        self._slots.admit(room_of, running, self.goodput.admit)
        plan = self.goodput.plan(
            self._slots.of([*room_of]),
            np.array([*room_of.values()], np.int64),
            prompts,
            None,
            contexts,
        )
        self.lengths = dict(zip(room_of, plan.lengths.tolist(), strict=True))
        waiting = self.copying.intersection(running).difference(room_of)
        self.copying = waiting.union(room_of if plan.is_free.any() else ())
        if room_of:
            drafting = "trial" if plan.is_trial else "drafting"
            self.stats.steps[drafting if plan.lengths.any() else "plain"] += 1
            costs = self.goodput.costs.within(len(room_of), contexts)
            seconds = float(costs.draft(len(room_of)))
            self.stats.draft_seconds += plan.num_steps * seconds
        return plan.num_steps

    def rest(self) -> bool:
        """Whether a step of the same requests as the last is known to be plain."""
        rests = self.goodput.rest()
        self.stats.steps["plain"] += rests
        return rests

    def observe(
        self,
        drafted: dict[str, int],
        accepted: dict[str, int],
        num_steps: int = 1,
        copied: frozenset[str] = frozenset(),
    ) -> None:
        """Learns from a verification, or from so many plain steps.

        Args:
            drafted: Draft tokens that were verified, by request.
            accepted: How many of them were accepted.
            num_steps: That went by: above 1, nothing was drafted in any of them.
            copied: Requests whose drafts were of the source on the device.
        """
        self.stats.lengths.update(drafted.values())
        self.stats.lengths[0] += (num_steps - 1) * len(drafted)
        known = [req_id for req_id in drafted if req_id in self._slots]
        slots = self._slots.of(known)
        is_free = np.array([req_id in copied for req_id in known], bool)
        tried = np.array([drafted[req_id] for req_id in known], np.int64)
        taken = np.array([accepted[req_id] for req_id in known], np.int64)
        for acceptance, is_of, name in (
            (self.goodput.acceptance, ~is_free, MODEL),
            (self.goodput.free, is_free, self._device_source),
        ):
            if acceptance.most:
                own = tried * is_of, taken * is_of
                acceptance.observe(slots, *own, num_steps=num_steps)
                self.stats.verified(name, *own)

    def would_have_copied(self, num_right: dict[str, int]) -> None:
        """Learns from copies that nobody drafted: how many tokens of each longest one
        would have been right, by request."""
        known = [req_id for req_id in num_right if req_id in self._slots]
        if known:
            right = np.array([num_right[req_id] for req_id in known], np.int64)
            most = np.full(len(known), self.goodput.free.most)
            self.goodput.free.observe(self._slots.of(known), most, right)

    def publish(self) -> None:
        """Shows the statistics, if it is time."""
        self.stats.publish("scheduler", self.goodput.beliefs)
