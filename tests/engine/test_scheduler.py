"""Planning draft lengths, in the scheduler or in the worker."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.engines import (
    Engines,
    planner_of,
    prompts_of,
    run,
    scheduler_of,
    token_ids,
    with_costs,
)
from helpers.environment import IS_V2
from vllm_selfspec.draft.stats import DraftStats
from vllm_selfspec.draft_length.arrivals import Arrivals, foreseen
from vllm_selfspec.draft_length.batch_goodput import BatchGoodput
from vllm_selfspec.draft_length.best_lengths import Prompts
from vllm_selfspec.draft_length.costs import ContextCosts, StepCosts
from vllm_selfspec.draft_length.goodput import WHOLE, WINDOW
from vllm_selfspec.draft_length.options import captured_lengths, schedule_of_all
from vllm_selfspec.engine.draft_planner import DraftPlanner
from vllm_selfspec.engine.scheduler import PlanningScheduler

NUM_DRAFTS = 4
SPEC: dict[str, Any] = {
    "exit_layer": 2,
    "num_speculative_tokens": NUM_DRAFTS,
    "draft_length": "goodput",
}
# Verifying costs nothing, drafting next to nothing; and the other way round.
CHEAP = ((1, 64), (1.0, 1.0), (0.001, 0.001))
DEAR = ((1, 64), (1.0, 64.0), (1.0, 1.0))


class Config:
    """As much of a `VllmConfig` as statistics look at."""

    class model_config:
        served_model_name = "m"


def planner(costs: tuple[Any, Any, Any] = CHEAP, **kwargs: Any) -> DraftPlanner:
    goodput = BatchGoodput(2, NUM_DRAFTS, StepCosts(*costs), **kwargs)
    return DraftPlanner(goodput, 2, DraftStats(Config()))


def test_lengths_differ_by_what_requests_have_shown() -> None:
    found = planner(costs=((1, 8), (1.0, 1.6), (0.1, 0.1)))
    for _ in range(40):
        found.plan({"good": 4, "bad": 4}, ["good", "bad"])
        found.observe({"good": 4, "bad": 4}, {"good": 4, "bad": 0})
    found.plan({"good": 4, "bad": 4}, ["good", "bad"])
    assert found.lengths["good"] == 4 > found.lengths["bad"]


def test_one_length_for_all_where_graphs_hold_whole_batches() -> None:
    found = planner(costs=((1, 8), (1.0, 1.6), (0.1, 0.1)), uniform=[1, 2, 4])
    for _ in range(40):
        found.plan({"good": 4, "bad": 4}, ["good", "bad"])
        found.observe({"good": 4, "bad": 4}, {"good": 4, "bad": 0})
    assert found.plan({"good": 4, "bad": 4}, ["good", "bad"]) in (1, 2, 4)
    assert len(set(found.lengths.values())) == 1


def test_a_prompt_that_waits_for_want_of_memory_is_not_foreseen() -> None:
    assert foreseen(num_left=0, num_waiting=300, num_rows=8, most=2048) == 0
    assert foreseen(num_left=0, num_waiting=300, num_rows=2000, most=2048) == 300
    assert foreseen(num_left=100, num_waiting=300, num_rows=8, most=2048) == 100
    assert foreseen(num_left=5000, num_waiting=0, num_rows=2048, most=2048) == 2048


def test_prompts_that_wait_are_foreseen_and_others_expected_by_what_came() -> None:
    found = Arrivals()
    assert found.next(True, 0, 200) == Prompts(200, 1.0), "they wait"
    after = found.next(True, 200, 0)
    assert after == Prompts(0, 0.0), "nobody else came, and nobody waits"
    assert found.next(False, 300, 0) == after, "beside no decode it costs none time"
    for _ in range(200):
        found.next(True, 100, 0)
        expected = found.next(True, 0, 0)
    assert expected.num_rows == 100
    assert expected.chance == pytest.approx(0.5, abs=0.05)


def test_places_of_requests_that_ended_are_given_out_again() -> None:
    found = planner()
    for number in range(20):
        running = [f"r{number}", f"r{number + 1}"]
        found.plan(dict.fromkeys(running, 4), running)
        assert set(found.lengths) == set(running)
    found.observe({"gone": 4}, {"gone": 4})  # its last step comes in late
    assert found.plan({}, []) == 0


def test_no_more_is_planned_than_a_request_has_room_for() -> None:
    found = planner()
    assert found.plan({"a": 1, "b": 0}, ["a", "b"]) == 1
    assert found.lengths == {"a": 1, "b": 0}


def test_every_captured_length_is_in_the_schedule_that_vllm_captures_by() -> None:
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    for most in (1, 2, 4, 5, 8, 32):
        lookup = build_dynamic_sd_schedule_lookup(
            [list(entry) for entry in schedule_of_all(most)], 64, most
        )
        assert set(lookup) == {0, *captured_lengths(most)}
        assert max(captured_lengths(most)) == most


def greedy(**overrides: Any) -> Any:
    from vllm import SamplingParams

    defaults = {"temperature": 0, "max_tokens": 16 if IS_V2 else 32, "ignore_eos": True}
    return SamplingParams(**{**defaults, **overrides})


@pytest.mark.v2
def test_the_workers_measure_their_costs_at_start_up(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    llm = engines.get(tiny_models["llama"], SPEC)
    costs = planner_of(llm).goodput.costs
    for rows in (1, 8, 40):
        assert float(costs.draft(rows)) > 0 and 0 < float(costs.verify(rows)) < 10


@pytest.mark.v2
def test_where_drafts_are_dear_the_engine_is_plain_vllm(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, llm = (engines.get(tiny_models["llama"], s) for s in (None, SPEC))
    with_costs(llm, DEAR, monkeypatch)
    expected, _ = run(plain, prompts_of(3), greedy())
    found, counts = run(llm, prompts_of(3), greedy())
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens == 0, "not even a trial: it would cost many steps"


@pytest.mark.v2
def test_the_longer_the_context_the_more_a_draft_of_a_window_is_worth(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, params = {**SPEC, "draft_window": 64}, greedy(max_tokens=8)
    long, short = prompts_of(2, shortest=200), prompts_of(2)
    plain, llm = (engines.get(tiny_models["llama"], s) for s in (None, spec))
    with_costs(llm, (*DEAR, ContextCosts(request=0.05, draft=1e-4)), monkeypatch)
    for prompts, drafts in ((short, False), (long, True)):
        expected, _ = run(plain, prompts, params)
        found, counts = run(llm, prompts, params)
        assert token_ids(found) == token_ids(expected)
        assert bool(counts.draft_tokens) is drafts, counts


@pytest.mark.v2
def test_a_window_that_drafts_worse_than_it_saves_is_not_used(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing skipped a draft that reads the whole context is always right."""
    spec = {**SPEC, "draft_source": "auto", "draft_window": 64}
    spec |= {"exit_layer": None, "skip_layers": {}}
    settings = {"max_model_len": 512, "block_size": 32}
    path, prompts = tiny_models["llama"], prompts_of(3, shortest=300)
    plain, llm = (engines.get(path, s, **settings) for s in (None, spec))
    with_costs(llm, (*CHEAP, ContextCosts(1e-5, 0.0, 1e-6)), monkeypatch)
    expected, _ = run(plain, prompts, greedy())
    found, counts = run(llm, prompts, greedy())
    assert token_ids(found) == token_ids(expected) and counts.draft_tokens
    acceptance = planner_of(llm).goodput.acceptance
    tried, taken = acceptance._tried[:, 0], acceptance._taken[:, 0]
    assert tried[WHOLE] > tried[WINDOW] > 0
    assert taken[WHOLE] == tried[WHOLE] and taken[WINDOW] < tried[WINDOW]


@pytest.mark.v2
def test_where_drafts_are_cheap_all_of_them_are_made(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, llm = (engines.get(tiny_models["llama"], s) for s in (None, SPEC))
    with_costs(llm, CHEAP, monkeypatch)
    expected, _ = run(plain, prompts_of(3), greedy())
    found, counts = run(llm, prompts_of(3), greedy())
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens > 3 * counts.drafts, counts


@pytest.mark.v2
def test_drafts_beyond_a_requests_length_are_not_verified(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engines.get(tiny_models["llama"], SPEC)
    with_costs(llm, CHEAP, monkeypatch)
    goodput, planned = planner_of(llm).goodput, []
    plan = goodput.plan

    def uneven(slots: Any, room: Any, *others: Any) -> Any:
        found = plan(slots, room, *others)
        found.lengths = np.minimum(found.lengths, np.arange(len(found.lengths)))
        planned.append(int(found.lengths.sum()))
        return found

    monkeypatch.setattr(goodput, "plan", uneven)
    num_tokens = 8 if IS_V2 else 20
    expected, _ = run(
        engines.get(tiny_models["llama"]), prompts_of(4), greedy(max_tokens=num_tokens)
    )
    found, counts = run(llm, prompts_of(4), greedy(max_tokens=num_tokens))
    assert token_ids(found) == token_ids(expected)
    # What was planned in the last step of a request is not verified any more.
    assert 0 < counts.draft_tokens <= sum(planned)
    assert counts.draft_tokens < 4 * counts.drafts


def test_a_schedule_of_the_users_bounds_the_lengths(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = [[1, 2, 4], [3, 8, 0]]
    spec = {**SPEC, "num_speculative_tokens_per_batch_size": schedule}
    llm = engines.get(tiny_models["llama"], spec)
    with_costs(llm, CHEAP, monkeypatch)
    _, few = run(llm, prompts_of(2), greedy())
    _, many = run(llm, prompts_of(4), greedy())
    assert few.draft_tokens > 0 == many.draft_tokens


def test_data_parallel_engines_have_every_length_that_graphs_are_captured_by(
    tiny_models: dict[str, str],
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    spec = {"method": "selfspec", "draft_source": "model", **SPEC}
    args = EngineArgs(
        tiny_models["llama"],
        dtype="float32",
        speculative_config=spec,
        data_parallel_size=2,
    )
    config = args.create_engine_config().speculative_config
    found = config.num_speculative_tokens_per_batch_size
    assert [tuple(entry) for entry in found] == schedule_of_all(NUM_DRAFTS)


def test_a_scheduler_of_the_users_is_left_alone(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    class Own(Scheduler):
        """Somebody else's."""

    llm = engines.get(tiny_models["llama"], SPEC, scheduler_cls=Own)
    assert isinstance(scheduler_of(llm), Own)
    assert not isinstance(scheduler_of(llm), PlanningScheduler)
    with_costs(llm, CHEAP, monkeypatch)
    _, counts = run(llm, prompts_of(2), greedy())
    assert counts.draft_tokens > 3 * counts.drafts
    with_costs(llm, DEAR, monkeypatch)
    _, counts = run(llm, prompts_of(2), greedy())
    assert counts.draft_tokens == 0, "the worker plans"


def test_what_was_planned_is_shown_among_vllms_metrics(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prometheus_client import REGISTRY, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    llm = engines.get(tiny_models["llama"], SPEC, served_model_name="shown")
    with_costs(llm, CHEAP, monkeypatch)
    run(llm, prompts_of(3), greedy())
    planner_of(llm).stats._written -= 60  # it is time
    run(llm, prompts_of(3), greedy())
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(generate_latest(REGISTRY).decode())
        for sample in family.samples
        if sample.labels.get("model_name") == "shown"
    }
    count = samples["vllm:selfspec_draft_length_count", "shown"]
    none = samples["vllm:selfspec_draft_length_bucket", "0.0", "shown"]
    assert 0 <= none < count
    assert samples["vllm:selfspec_draft_length_sum", "shown"] > 2 * count
    assert samples["vllm:selfspec_steps_total", "drafting", "shown"] > 0
    assert samples["vllm:selfspec_draft_seconds_total", "shown"] > 0
    assert 0 < samples["vllm:selfspec_controller", "acceptance_1", "shown"] < 1


def test_a_session_between_two_turns_keeps_nobody_from_drafting() -> None:
    from vllm.v1.request import RequestStatus

    from vllm_selfspec.engine.plain_steps import PlainSteps

    scheduler: Any = PlainSteps.__new__(PlainSteps)
    session = SimpleNamespace(status=RequestStatus.WAITING, request_id="s")
    scheduler.requests, scheduler.running = {"s": session}, []
    scheduler.max_num_running_reqs, scheduler._plain = 2, {"s"}
    assert scheduler._needs_plain_step(), "it may be admitted"
    session.status = RequestStatus.WAITING_FOR_STREAMING_REQ
    assert not scheduler._needs_plain_step()
    scheduler._plain = set()
    assert not scheduler._needs_plain_step()
