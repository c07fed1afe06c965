"""Says, step by step, how many draft tokens each request gets.

One rule: vLLM's schedulers stay as they are. Where steps are scheduled ahead of the
device, a subclass of vLLM's scheduler names the number of draft steps before a step is
run, cuts each request's drafts to its own length before they are verified, and tells
the controller what came of it. Where they are scheduled one after the other, the worker
decides when it knows more: see `draft.row_planner`.
"""

import copy
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_selfspec import served_config
from vllm_selfspec.draft.row_planner import uniform_lengths
from vllm_selfspec.draft.stats import DraftStats
from vllm_selfspec.draft_length.arrivals import Arrivals, foreseen
from vllm_selfspec.draft_length.batch_goodput import BatchGoodput
from vllm_selfspec.draft_length.best_lengths import Prompts
from vllm_selfspec.draft_length.costs import (
    BesideCosts,
    ContextCosts,
    Contexts,
    StepCosts,
    cleaned,
)
from vllm_selfspec.engine.draft_planner import DraftPlanner
from vllm_selfspec.engine.hindsight import Hindsight
from vllm_selfspec.engine.measure import (
    measure_context,
    measure_costs,
    measure_sublayers,
)
from vllm_selfspec.engine.plain_steps import OfScheduler, PlainSteps
from vllm_selfspec.engine.workers import use_costs
from vllm_selfspec.plan.sources import SOURCES

logger = init_logger("vllm.selfspec")  # below vLLM's logger, so it is shown
# What drafting takes beside forwards, over a plain step, and for each request: until
# steps have shown it.
BESIDE = (0.03, 0.003)
# Of the results of so many plain steps one is looked at: the host's time is the step's.
SEEN_PLAIN = 8


def prepare(vllm_config: Any, executor: Any) -> None:
    """Measures what forwards cost, and hands it to what decides by it: the scheduler,
    which is named here, or the workers.

    Args:
        vllm_config: Of the engine; its scheduler is not made yet.
        executor: vLLM's, with workers that are ready to run.
    """
    # vLLM warns of schedulers that it does not know. These are its own, and every
    # release that is supported was tried with them.
    logging.getLogger("vllm.config.scheduler").addFilter(_is_not_of_ours)
    tunes = served_config.tunes_online(vllm_config)
    if served_config.calibration_of(vllm_config) is not None:
        from vllm_selfspec.tuning.calibration import calibrate_or_go_on

        calibrate_or_go_on(vllm_config, executor)
    elif tunes or served_config.plans_draft_lengths(vllm_config):
        costs = measured(executor)
        if tunes:
            _start_tuning(vllm_config, executor, costs)
        _plan_by(costs, vllm_config, executor)
    if served_config.plans_rows(vllm_config):
        _schedule_full_lengths(vllm_config)
    _add_plain_steps(vllm_config.scheduler_config)


def _start_tuning(vllm_config: Any, executor: Any, costs: StepCosts) -> None:
    from vllm_selfspec.tuning.online import tuner as online

    plan = served_config.plan_of(vllm_config)
    sublayers = executor.collective_rpc(measure_sublayers)
    told = online.costs_of(copy.deepcopy(costs), plan, sublayers)
    executor.collective_rpc(online.start, args=(told,))


def _add_plain_steps(config: Any) -> None:
    """Puts `PlainSteps` before the scheduler that was chosen, a user's own included.

    One that is not made from vLLM's is left alone.
    """
    found = config.get_scheduler_cls()
    if issubclass(found, Scheduler) and not issubclass(found, PlainSteps):
        named = {"__module__": __name__}
        config.scheduler_cls = type(found.__name__, (PlainSteps, found), named)


def _plan_by(costs: StepCosts, vllm_config: Any, executor: Any) -> None:
    """Lets the workers plan draft lengths, or a scheduler in place of the one that vLLM
    would take.

    A scheduler class of the user's own that runs ahead of the device is left alone;
    drafts then have full length.
    """
    config = vllm_config.scheduler_config
    if not served_config.plans_draft_lengths(vllm_config):
        return
    if served_config.plans_in_worker(vllm_config):
        executor.collective_rpc(use_costs, args=(costs,))
    elif config.get_scheduler_cls() is AsyncScheduler:
        named = {"costs": costs, "__module__": __name__}
        config.scheduler_cls = type("PlanningScheduler", (PlanningScheduler,), named)
    else:
        _schedule_full_lengths(vllm_config)


def _schedule_full_lengths(vllm_config: Any) -> None:
    """The full length whatever the number of requests, unless the user has a schedule.

    With none at all vLLM would fill new requests up with placeholders for drafts.
    """
    if served_config.bounds_lengths(vllm_config):
        return
    length = vllm_config.num_speculative_tokens
    if served_config.source_on_device(vllm_config):  # beside the model it is not asked
        length = served_config.num_model_tokens(vllm_config) or length
    most = vllm_config.scheduler_config.max_num_seqs
    speculative_config = vllm_config.speculative_config
    speculative_config.num_speculative_tokens_per_batch_size = [(1, most, length)]


def _is_not_of_ours(record: logging.LogRecord) -> bool:
    return PlanningScheduler.__module__ not in record.getMessage()


def measured(executor: Any) -> StepCosts:
    """What forwards cost, as the workers measure it."""
    started = time.perf_counter()
    # A step is done when its slowest worker is.
    num_rows, *seconds = zip(*executor.collective_rpc(measure_costs), strict=True)
    verify, draft = cleaned(num_rows[0], *(np.max(t, axis=0) for t in seconds))
    slowest = np.max(executor.collective_rpc(measure_context), axis=0)
    of_context = ContextCosts(*slowest.tolist())
    logger.info(
        "selfspec: a step of %s rows takes %s ms, a draft step %s; 1000 tokens of "
        "context add %s for each request, row, draft row, and request with drafts "
        "(measured in %.1f s)",
        list(num_rows[0]),
        np.round(1000 * verify, 1).tolist(),
        np.round(1000 * draft, 1).tolist(),
        np.round(1e6 * slowest, 2).tolist(),
        time.perf_counter() - started,
    )
    beside = BesideCosts(*(share * float(verify[0]) for share in BESIDE))
    return StepCosts(num_rows[0], verify, draft, of_context, beside)


class PlanningScheduler(OfScheduler, AsyncScheduler):
    """vLLM's scheduler that runs ahead of the worker, planning; drafts stay there, and
    are known here by their number alone."""

    costs: StepCosts

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        if not served_config.bounds_lengths(config):
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (
                self.max_num_running_reqs + 1
            )
        self._num_model_tokens = served_config.num_model_tokens(config)
        self.planner = DraftPlanner(
            self.goodput_by(self.costs),
            self.max_num_running_reqs,
            DraftStats(config),
            served_config.source_on_device(config) or "",
        )
        self._hindsight = hindsight_of(config)
        # Steps that verify copies, and whose they are, until they are told of.
        self._copied: deque[tuple[SchedulerOutput, frozenset[str]]] = deque()
        self._arrivals = Arrivals()
        self._draft_plan = served_config.plan_of(config)
        self._updated: float | None = None  # when the last step ended, if busy since
        self._resting: set[str] = set()  # the requests of the last step, if plain
        self._num_plain = 0  # results of plain steps that were not looked at

    def goodput_by(self, costs: StepCosts) -> BatchGoodput:
        """What decides by these costs, knowing nothing of requests."""
        return BatchGoodput(
            self.max_num_running_reqs,
            self._num_model_tokens,
            costs,
            uniform_lengths(self.vllm_config),
            served_config.num_device_tokens(self.vllm_config),
        )

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        if self._rests(scheduler_output):
            self._arrivals.none()
            scheduler_output.num_spec_tokens_to_schedule = 0
            super()._update_after_schedule(scheduler_output)
            return
        verified = scheduler_output.scheduled_spec_decode_tokens
        copied = self.planner.copying.intersection(verified)
        if copied:
            self._copied.append((scheduler_output, copied))
        most = scheduler_output.num_spec_tokens_to_schedule
        room_of = {
            req_id: min(most, self._room(self.requests[req_id]))
            for req_id, num_tokens in scheduler_output.num_scheduled_tokens.items()
            if _samples(self.requests[req_id], num_tokens)
        }
        running = [request.request_id for request in self.running]
        prompts = self._prompts(scheduler_output.num_scheduled_tokens)
        contexts = self._contexts(room_of)
        num_steps = self.planner.plan(room_of, running, prompts, contexts)
        copies = not num_steps and any(self.planner.lengths.values())
        # More than the model drafts asks the device's source for all it has.
        num_drafts = self.num_spec_tokens if copies else num_steps
        scheduler_output.num_spec_tokens_to_schedule = min(most, num_drafts)
        super()._update_after_schedule(scheduler_output)
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[req_id]
            if request.spec_token_ids:
                length = self.planner.lengths.get(req_id, 0)
                request.spec_token_ids = request.spec_token_ids[:length]
        scheduled = scheduler_output.num_scheduled_tokens
        self._resting = set() if num_drafts else {*scheduled}

    def _rests(self, scheduler_output: SchedulerOutput) -> bool:
        """Whether nothing is to be decided: the same requests decode, and they rest."""
        scheduled = scheduler_output.num_scheduled_tokens
        return (
            scheduler_output.total_num_scheduled_tokens == len(scheduled)
            and scheduled.keys() == self._resting
            and self.planner.rest()
        )

    def _contexts(self, req_ids: Iterable[str]) -> Contexts:
        """Of those that have not ended: a step that was under way knows no better."""
        found = (self.requests.get(req_id) for req_id in req_ids)
        num_tokens = [request.num_tokens for request in found if request is not None]
        whole = np.array(num_tokens, np.int64)
        return Contexts.of(whole, self._draft_plan.tokens_read(whole))

    def _prompts(self, num_scheduled: Mapping[str, int]) -> Prompts:
        """Rows of prompts that the step after this one may have."""
        num_rows = num_left = num_waiting = 0
        for request in self.running:
            rest = request.num_prompt_tokens - request.num_computed_tokens
            if rest > 0:
                num_tokens = num_scheduled.get(request.request_id, 0)
                num_rows += num_tokens
                num_left += max(0, rest - num_tokens)
        if self.waiting and len(self.running) < self.max_num_running_reqs:
            num_waiting = self.waiting.peek_request().num_tokens
        total = sum(num_scheduled.values())
        num_foreseen = foreseen(
            num_left, num_waiting, total, self.max_num_scheduled_tokens
        )
        decodes = total > num_rows
        return self._arrivals.next(decodes, num_rows, num_foreseen)

    def _room(self, request: Request) -> int:
        """The most it can use: this step brings one token at least, and the next one
        a token more than it verifies."""
        context: int = self.max_model_len - request.num_tokens - 1
        if self.planner.goodput.is_uniform:
            # One shorter row would cost the whole batch its graph.
            return max(0, context)
        output: int = request.max_tokens - request.num_output_tokens - 2
        return max(0, min(context, output))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        """vLLM's; what came of the drafts is told to the planner first."""
        self._observe(scheduler_output, model_runner_output)
        self._look_back()
        found = super().update_from_output(scheduler_output, model_runner_output)
        self._updated = time.perf_counter() if self.requests else None
        if self.log_stats:
            self.planner.publish()
        return found

    def _observe(self, output: SchedulerOutput, result: Any) -> None:
        num_scheduled = len(output.num_scheduled_tokens)
        is_plain = output.total_num_scheduled_tokens == num_scheduled
        if is_plain and self.planner.goodput.rests:
            self._num_plain += 1
            if self._num_plain < SEEN_PLAIN:
                return  # one as good as the next
        num_steps, self._num_plain = max(self._num_plain, 1), 0
        drafted, accepted = {}, {}
        for req_id, row in result.req_id_to_index.items():
            num_tokens = output.num_scheduled_tokens.get(req_id, 0)
            drafts = output.scheduled_spec_decode_tokens.get(req_id, ())
            sampled = result.sampled_token_ids[row] if result.sampled_token_ids else ()
            if num_tokens == 1 + len(drafts) and len(sampled):
                drafted[req_id] = len(drafts)
                accepted[req_id] = len(sampled) - 1
        self.planner.observe(drafted, accepted, num_steps, self._copied_in(output))
        is_decode = len(drafted) == num_scheduled > 0
        # Data-parallel ranks in lockstep wait for each other: a step's time is that of
        # the slowest, with as many draft steps as any of them planned.
        is_own = self.vllm_config.parallel_config.data_parallel_size == 1
        goodput = self.planner.goodput
        if not (is_decode and is_own and self._updated is not None):
            goodput.observe_other_step()
            return
        num_draft_steps = output.num_spec_tokens_to_schedule
        goodput.observe_step(
            output.total_num_scheduled_tokens,
            num_scheduled,
            num_draft_steps if num_draft_steps <= self._num_model_tokens else 0,
            time.perf_counter() - self._updated,
            self._contexts(drafted),
        )

    def _look_back(self) -> None:
        """Of requests that did not copy, finds out whether that had been better."""
        if self._hindsight is None or self._updated is None:
            return
        passed = time.perf_counter() - self._updated
        copying = self.planner.copying
        others = (one for one in self.running if one.request_id not in copying)
        self.planner.would_have_copied(self._hindsight.look(others, passed))

    def _copied_in(self, output: SchedulerOutput) -> frozenset[str]:
        """Requests whose drafts, which this step verified, were copies."""
        if not any(step is output for step, _ in self._copied):
            return frozenset()
        while self._copied[0][0] is not output:  # one that nobody was told of
            self._copied.popleft()
        return self._copied.popleft()[1]


def hindsight_of(vllm_config: Any) -> Hindsight | None:
    """Of an engine whose copies are matched on the device."""
    name = served_config.source_on_device(vllm_config)
    if name is None:
        return None
    proposer = SOURCES.named(name).proposer(served_config.sources_of(vllm_config)[name])
    most = served_config.num_device_tokens(vllm_config)
    return None if proposer is None else Hindsight(proposer, most)


def _samples(request: Request, num_tokens: int) -> bool:
    """Whether a step with `num_tokens` of it reaches its newest token."""
    computed: int = request.num_computed_tokens + num_tokens
    return computed >= int(request.num_tokens)
