"""`RowPlanner`: what each row of a batch drafts, decided where its tokens are known.

One rule: it decides between a verification and the drafts that follow it, in the
worker. That is where free sources can look at the newest tokens; and where steps are
scheduled one after the other, nobody has to know earlier. (Where they are scheduled
ahead of the device, `engine.scheduler` decides, and there is the model alone.)

Ranks of a tensor-parallel group decide alike, because they see the same tokens and take
the first one's word for what a step took.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_tp_group

from vllm_selfspec import served_config
from vllm_selfspec.draft.free_sources import FreeSources, Request
from vllm_selfspec.draft.stats import DraftStats
from vllm_selfspec.draft_length.acceptance import NO_GUESS
from vllm_selfspec.draft_length.arrivals import Arrivals
from vllm_selfspec.draft_length.best_lengths import Prompts
from vllm_selfspec.draft_length.costs import Contexts, StepCosts
from vllm_selfspec.draft_length.goodput import WINDOW, Goodput, Plan, Proposed
from vllm_selfspec.draft_length.looks import Looks
from vllm_selfspec.draft_length.options import captured_lengths
from vllm_selfspec.draft_length.slots import Slots
from vllm_selfspec.draft_length.types import Bools, Ints
from vllm_selfspec.plan.source import NOTHING, Proposal
from vllm_selfspec.plan.sources import MODEL

# Where the policy does not go by costs, a row takes the source whose tokens are
# expected to be accepted more: verifying costs the same whatever is verified, and
# drafting next to nothing.
NO_COSTS = ((1, 2), (1.0, 1.0), (1e-6, 1e-6))


@dataclass(frozen=True)
class SampledStep:
    """A step that has sampled and not drafted yet, in either model runner's terms.

    Attributes:
        req_ids: Its requests, `[num_reqs]`.
        running: All requests of the worker, those that this step left out, too.
        num_sampled: Tokens that it emitted, 0 where a prompt goes on, `[num_reqs]`.
        num_drafted: Draft tokens that it verified, `[num_reqs]`.
        room: The most each request may draft, `[num_reqs]`; nothing where a prompt goes
            on, whatever stands there.
        num_scheduled: Rows of each request, `[num_reqs]`.
        num_left: Known tokens that each still has to read, `[num_reqs]`.
        num_tokens: All tokens of each, those that it emitted included, `[num_reqs]`.
        token_ids_of: All tokens of the request in a row.
    """

    req_ids: Sequence[str]
    running: Collection[str]
    num_sampled: Ints
    num_drafted: Ints
    room: Ints
    num_scheduled: Ints
    num_left: Ints
    num_tokens: Ints
    token_ids_of: Callable[[int], np.ndarray]

    @property
    def samples(self) -> Bools:
        """Which requests it emitted tokens for, `[num_reqs]`."""
        found: Bools = self.num_sampled > 0
        return found

    @property
    def num_rows(self) -> int:
        """Rows of its forward."""
        return int(self.num_scheduled.sum())

    @property
    def num_prompt_rows(self) -> int:
        """How many of them are of prompts."""
        decodes = self.samples & (self.num_scheduled == 1 + self.num_drafted)
        return int(self.num_scheduled[~decodes].sum())

    @property
    def num_prompt_left(self) -> int:
        """Rows that those prompts have left."""
        return int(self.num_left[~self.samples].sum())


@dataclass
class RowPlan:
    """What the rows of a batch draft.

    Attributes:
        model: Draft tokens of the model, `[num_reqs]`.
        proposals: Free tokens of the others; nothing for those of the model.
        reads: What the model's drafts read: see `goodput.Plan`.
    """

    model: Ints
    proposals: list[Proposal] = field(default_factory=list)
    reads: int = WINDOW


class RowPlanner:
    """`Goodput` in the terms of a batch.

    Attributes:
        goodput: What decides; None until costs were measured.
        stats: What was planned, and what came of it.
    """

    def __init__(self, vllm_config: Any) -> None:
        """As configured. By measured costs it plans from `use_costs` on."""
        self._max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self._max_drafts = served_config.num_model_tokens(vllm_config)
        self._draft_plan = served_config.plan_of(vllm_config)
        self._sources = FreeSources(served_config.sources_of(vllm_config))
        self._acceptance = served_config.acceptance_of(vllm_config)
        self._goes_by_costs = served_config.plans_draft_lengths(vllm_config)
        self._uniform = [] if self._sources.num_kinds else uniform_lengths(vllm_config)
        parallel_config = vllm_config.parallel_config
        self._has_ranks = parallel_config.tensor_parallel_size > 1
        # Data-parallel ranks in lockstep wait for each other: a step's time is that of
        # the slowest, with as many draft steps as any of them planned.
        self._is_timed = parallel_config.data_parallel_size == 1
        self.stats = DraftStats(vllm_config)
        self._counts_lengths = not served_config.stops_rows(vllm_config)
        self._slots = Slots(self._max_num_reqs)
        self._arrivals = Arrivals()
        self._looks = Looks()
        self._look_took: tuple[float, int] | None = None  # seconds of so many rows
        self._req_ids: list[str] = []  # of the last step that was planned
        self._num_rested = 0  # steps since then
        self._kinds: dict[str, int] = {}  # of free tokens, to be verified
        self._plan = RowPlan(np.zeros(0, np.int64))
        self._started: float | None = None  # when the last step had sampled
        self.goodput: Goodput | None = None
        if not self._goes_by_costs:
            self.use_costs(StepCosts(*NO_COSTS))

    @classmethod
    def of(cls, vllm_config: Any) -> "RowPlanner | None":
        """As configured; None where nothing is to be decided here."""
        return cls(vllm_config) if served_config.plans_rows(vllm_config) else None

    @property
    def is_uniform(self) -> bool:
        """Whether all requests get one length."""
        return bool(self._uniform)

    @property
    def model_drafts(self) -> bool:
        """Whether the model drafts at all."""
        return self._max_drafts > 0

    def took_free_tokens(self, req_ids: Sequence[str]) -> Bools:
        """Whether what was last planned for each request are free tokens, `[n]`."""
        return np.array([req_id in self._kinds for req_id in req_ids], bool)

    def leave_to_free_sources(self) -> None:
        """Has the model draft nothing, from the next `use_costs` on."""
        self._max_drafts = 0

    def use_costs(
        self, costs: StepCosts, acceptance: Sequence[float] | None = None
    ) -> None:
        """Plans by these costs, knowing nothing of requests.

        Args:
            costs: Of this model on this machine.
            acceptance: Chance that each draft token of the model is accepted, given
                those before it; None takes what was found before, if anything was.
        """
        self.goodput = Goodput(
            self._max_num_reqs,
            self._max_drafts,
            costs,
            self._uniform,
            self._sources.max_tokens,
            self._sources.guesses or NO_GUESS,
            self._goes_by_costs and self._draft_plan.has_window,
        )
        found = self._acceptance if acceptance is None else acceptance
        self.goodput.acceptance.expect(found[: self._max_drafts])

    def rests(
        self, req_ids: Sequence[str], num_scheduled: int, has_drafts: bool
    ) -> bool:
        """Whether nothing is drafted after this step, as after the last one: known
        without looking at its requests, because they are the same, decode, and rest.
        The host's time for a step that drafts nothing is the user's loss.

        Args:
            req_ids: Of the step, `[num_reqs]`.
            num_scheduled: Rows of its forward.
            has_drafts: Whether it verified any.
        """
        num_reqs = len(req_ids)
        if self.goodput is None or not self._goes_by_costs or has_drafts:
            return False
        if num_scheduled != num_reqs or self._req_ids != req_ids:
            return False
        if self._is_time_to_look(num_reqs) or not self.goodput.rest():
            return False
        self._looks.passed(self.goodput.plain)
        self._arrivals.none()
        self._num_rested += 1
        self._started = time.perf_counter()
        return True

    def plan(self, step: SampledStep) -> RowPlan:
        """What is drafted after a step; first learns from what it verified.

        vLLM warms up its kernels with requests of its own before costs are measured:
        they draft all they may, and nothing is learnt from them.
        """
        if self.goodput is None:
            most = np.minimum(step.room * step.samples, self._max_drafts)
            return RowPlan(most, [NOTHING] * len(step.req_ids))
        self._slots.admit(step.req_ids, step.running, self.goodput.admit)
        self._sources.keep(step.running)
        self._observe(self.goodput, step)
        prompts = self._arrivals.next(
            bool(step.samples.any()),
            step.num_prompt_rows,
            step.num_prompt_left,
        )
        rows = np.flatnonzero(step.samples & (step.room > 0))
        contexts = self._contexts(step.num_tokens[rows])
        plan, proposals, kinds = self._decide(step, rows, prompts, contexts)
        if not self._goes_by_costs:
            own_room = np.minimum(step.room[rows], self._max_drafts)
            plan.lengths = np.where(plan.is_free, plan.lengths, own_room)
        self._count(plan, contexts)
        self._plan = self._spread(plan, rows, proposals, len(step.req_ids))
        self._remember(step, rows[plan.is_free], kinds[plan.is_free])
        self._req_ids = [*step.req_ids]
        return self._plan

    def _decide(
        self, step: SampledStep, rows: Ints, prompts: Prompts, contexts: Contexts
    ) -> tuple[Plan, Sequence[Proposal], Ints]:
        """What these rows of the step draft; and what free sources have for each, if it
        was time to ask them, with its kind, `[num_rows]`."""
        assert self.goodput is not None
        num_rows, started = len(rows), time.perf_counter()
        slots = self._slots.of([step.req_ids[row] for row in rows])
        proposals: Sequence[Proposal] = [NOTHING] * num_rows
        kinds, is_look = np.zeros(num_rows, np.int64), self._is_time_to_look(num_rows)
        if is_look:
            asked = [Request(step.req_ids[r], step.token_ids_of(r)) for r in rows]
            proposals, kinds = self._sources.propose(asked, slots, self.goodput.free)
        num_free = np.array([len(one.token_ids) for one in proposals], np.int64)
        proposed = Proposed(num_free, kinds) if num_free.any() else None
        plan = self.goodput.plan(slots, step.room[rows], prompts, proposed, contexts)
        if self._sources.num_kinds:
            plain = self.goodput.plain
            if is_look:
                self._looks.brought(plain * plan.gain(plain) * plan.is_free.any())
                self._look_took = time.perf_counter() - started, num_rows
            self._looks.passed(plain)
        return plan, proposals, kinds

    def _is_time_to_look(self, num_rows: int) -> bool:
        """Whether free sources are asked, for so many rows."""
        return bool(
            self._sources.num_kinds and num_rows and self._looks.is_due(num_rows)
        )

    def _remember(self, step: SampledStep, rows: Ints, kinds: Ints) -> None:
        """Which rows take free tokens, until they are verified: those of a request that
        a step leaves out stay."""
        self._kinds = {
            req_id: kind
            for req_id, kind in self._kinds.items()
            if req_id in step.running and req_id not in step.req_ids
        }
        for row, kind in zip(rows, kinds, strict=True):
            self._kinds[step.req_ids[row]] = int(kind)

    def _observe(self, goodput: Goodput, step: SampledStep) -> None:
        """Learns from what was verified, and from what it took."""
        num_rested, self._num_rested = self._num_rested, 0
        rows = np.flatnonzero(step.samples)
        req_ids = [step.req_ids[row] for row in rows]
        slots = self._slots.of(req_ids)
        kinds = np.array([self._kinds.get(req_id, -1) for req_id in req_ids], np.int64)
        drafted, accepted = step.num_drafted[rows], step.num_sampled[rows] - 1
        is_free = kinds >= 0
        reads = np.full(len(rows), self._plan.reads)
        of_model = drafted * ~is_free, accepted * ~is_free
        goodput.acceptance.observe(slots, *of_model, reads, 1 + num_rested)
        if is_free.any():
            goodput.free.observe(
                slots, drafted * is_free, accepted * is_free, np.maximum(kinds, 0)
            )
        if self._counts_lengths:
            self.stats.lengths.update(drafted.tolist())
            self.stats.lengths[0] += num_rested * len(self._req_ids)
        self.stats.steps["plain"] += num_rested
        names = np.array([*self._sources.names, MODEL])[kinds]  # the last of kind -1
        for name in {*names.tolist()}:
            own = names == name
            self.stats.verified(name, drafted[own], np.minimum(accepted, drafted)[own])
        self._observe_time(goodput, step)
        if not self._has_ranks or get_tp_group().is_first_rank:
            self.stats.publish("rows", goodput.beliefs)

    def _observe_time(self, goodput: Goodput, step: SampledStep) -> None:
        """From one sampled step to the next are the drafts of the first and the
        verification of the second."""
        now, before = time.perf_counter(), self._started
        self._started = now
        is_decode = not step.num_prompt_rows and bool(step.samples.all())
        is_known = before is not None and self._goes_by_costs and self._is_timed
        if not (is_decode and is_known):
            return
        model = self._plan.model
        looked, num_looked = self._look_took or (0.0, 0)
        seconds, looked = self._agreed(now - (before or now), looked)
        if num_looked:
            self._looks.took(looked, num_looked)
            self._look_took = None
        goodput.costs.observe(
            step.num_rows,
            int((model > 0).sum()),
            int(model.max(initial=0)),
            seconds,
            len(step.req_ids),
            self._contexts(step.num_tokens),
        )

    def _contexts(self, num_tokens: Ints) -> Contexts:
        return Contexts.of(num_tokens, self._draft_plan.tokens_read(num_tokens))

    def _agreed(self, *seconds: float) -> Sequence[float]:
        """As the first rank of the tensor-parallel group has them."""
        if not self._has_ranks:
            return seconds
        group, said = get_tp_group(), torch.tensor(seconds, dtype=torch.float64)
        dist.broadcast(said, src=group.ranks[0], group=group.cpu_group)
        return [*said.tolist()]

    def _count(self, plan: Plan, contexts: Contexts) -> None:
        assert self.goodput is not None
        if not len(plan.lengths):
            return
        drafting = "trial" if plan.is_trial else "drafting"
        self.stats.steps[drafting if plan.lengths.any() else "plain"] += 1
        num_rows = int(((plan.lengths > 0) & ~plan.is_free).sum())
        if num_rows and self._goes_by_costs:
            costs = self.goodput.costs.within(len(plan.lengths), contexts)
            seconds = float(costs.draft(num_rows))
            self.stats.draft_seconds += plan.num_steps * seconds

    def _spread(
        self, plan: Plan, rows: Ints, proposals: Sequence[Proposal], num_reqs: int
    ) -> RowPlan:
        """Over all requests of the step."""
        model, spread = np.zeros(num_reqs, np.int64), [NOTHING] * num_reqs
        model[rows] = plan.lengths * ~plan.is_free
        for row, proposal, length, is_free in zip(
            rows, proposals, plan.lengths, plan.is_free, strict=True
        ):
            if is_free:
                spread[row] = Proposal(proposal.token_ids[:length], proposal.kind)
        return RowPlan(model, spread, plan.reads)


def uniform_lengths(vllm_config: Any) -> list[int]:
    """The lengths a whole batch may have where CUDA graphs hold whole decode batches;
    empty where there are none, and each request may have its own."""
    if not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return []
    return captured_lengths(*served_config.longest_drafts(vllm_config))
