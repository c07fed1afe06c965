"""What is timed at start-up is what will run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.engines import Engines, drafter_of, planner_of
from helpers.environment import IS_V2
from vllm_selfspec.draft_length.costs import ContextCosts
from vllm_selfspec.engine import measure, scheduler
from vllm_selfspec.engine.measure import measure_context

LONG: dict[str, Any] = {"max_model_len": 512, "block_size": 32}
NUM_DRAFTS, CONTEXT, WINDOW = 4, 150, 64
SPEC = {
    "exit_layer": 2,
    "num_speculative_tokens": NUM_DRAFTS,
    "draft_length": "goodput",
    "draft_window": WINDOW,
}


@pytest.fixture(scope="module")
def runner(tiny_models: dict[str, str], engines: Engines) -> Any:
    llm = engines.get(tiny_models["llama"], SPEC, **LONG)
    (found,) = llm.collective_rpc(lambda worker: worker.model_runner)
    return found


def reads_of(runner: Any, num_rows: int, num_drafts: int) -> list[list[int]]:
    """Lengths that the first layer's attention reads, by forward and request."""
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.attention import Attention

    modules = runner.model.modules()
    first = next(module for module in modules if isinstance(module, Attention))
    found: list[list[int]] = []

    def read(*_: Any) -> None:
        metadata = get_forward_context().attn_metadata
        assert isinstance(metadata, dict)
        found.append(metadata[first.layer_name].seq_lens.tolist())

    hook = first.register_forward_pre_hook(read)
    drafter_of(runner).dummy_step(runner, num_rows, num_drafts, CONTEXT)
    hook.remove()
    return found


@pytest.mark.v2
def test_a_dummy_request_attends_to_its_context(runner: Any) -> None:
    for num_rows in (1, 2, 1 + NUM_DRAFTS):
        verified, *drafted = reads_of(runner, num_rows, 2 if num_rows == 1 else 0)
        assert verified == [CONTEXT + num_rows], "all rows are of one request"
        for reads in drafted:
            assert WINDOW < max(reads) < CONTEXT, "the window alone"
        assert len(drafted) == (2 if num_rows == 1 else 0)


@pytest.mark.v2
def test_where_the_model_drafts_nothing_there_is_nothing_of_drafts_to_time(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    spec = {"draft_source": "context", "draft_length": "goodput"}
    llm = engines.get(tiny_models["llama"], spec, **LONG)
    assert planner_of(llm).goodput.costs.of_context.draft < 1e-3


@pytest.mark.skipif(not IS_V2, reason="the V1 runner's graphs hold any batch")
@pytest.mark.v2
def test_a_dummy_batch_is_of_a_shape_that_there_is_a_graph_for(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    from vllm_selfspec.draft.v2_step import dummy_forward

    llm = engines.get(tiny_models["llama"], SPEC, **LONG, max_num_seqs=4)
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    shapes: list[list[int]] = []
    prepare = runner.model_state.prepare_attn

    def watched(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(input_batch.num_scheduled_tokens.tolist())
        return prepare(input_batch, *args, **kwargs)

    runner.model_state.prepare_attn = watched
    try:
        for num_rows in (3, 4, 6, 8, 10, 14):
            dummy_forward(runner, num_rows, [1, 2, 4])
    finally:
        del runner.model_state.prepare_attn
    # Draft lengths 1, 2 and 4; none of one row more, so 10 and 14 are of 2 and 4.
    assert shapes == [[1] * 3, [1] * 4, [2] * 3, [2] * 4, [3] * 4, [5] * 3]
    assert runner.decode_query_len == 1 + NUM_DRAFTS


@pytest.mark.skipif(IS_V2, reason="vLLM's own dummy context in the V2 runner")
def test_what_is_read_lies_in_blocks_of_its_own_and_stays(runner: Any) -> None:
    table = runner.input_batch.block_table.block_tables[0]
    # What a dummy's tokens would leave may itself be nothing but zeros.
    before = [cache.fill_(1).clone() for cache in runner.kv_caches]
    seen: list[list[int]] = []
    run = runner._dummy_run

    def dummy_run(*args: Any, **kwargs: Any) -> Any:
        seen.append(table.block_table.np[0, : CONTEXT // table.block_size].tolist())
        return run(*args, **kwargs)

    runner._dummy_run = dummy_run
    try:
        drafter_of(runner).dummy_step(runner, 1, 2, CONTEXT)
    finally:
        del runner._dummy_run
    assert len({*seen[0]}) == len(seen[0]) > 1 and 0 not in seen[0]
    assert not table.block_table.np[0].any(), "as vLLM left it"
    for cache, old in zip(runner.kv_caches, before, strict=True):
        assert torch.equal(cache, old), "nothing is written"
        cache.zero_()


@pytest.mark.v2
def test_what_a_token_of_context_adds_is_measured(
    runner: Any, tiny_models: dict[str, str], engines: Engines
) -> None:
    worker = type("Worker", (), {"model_runner": runner})
    found = measure_context(worker)
    assert all(0 <= seconds < 0.1 for seconds in found)
    llm = engines.get(tiny_models["llama"], SPEC, **LONG)
    assert isinstance(planner_of(llm).goodput.costs.of_context, ContextCosts)


@pytest.mark.v2
def test_what_was_measured_is_what_is_planned_by(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = ContextCosts(1e-3, 2e-3, 3e-3, 4e-3)
    monkeypatch.setattr(scheduler, "measure_context", lambda _: costs)
    llm = engines.get(tiny_models["llama"], SPEC, **LONG, max_num_seqs=5)
    assert planner_of(llm).goodput.costs.of_context == pytest.approx(costs)


def test_steps_in_a_row_are_timed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host goes on while the device is busy."""
    now, done = 0.0, []

    def run() -> None:
        nonlocal now
        now += 2.0
        done.append("run")

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "_wait", lambda: done.append("wait"))
    assert measure.seconds_of([run], repeats=2, in_a_row=3) == [2.0]
    timed = ["wait", "run", "run", "run", "wait"]
    assert done == ["run", "wait", *timed, *timed]


@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize("has_device", [True, False])
def test_steps_run_in_a_row_where_they_are_scheduled_ahead_of_a_device(
    is_ahead: bool, has_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_device)
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=is_ahead)
    )
    assert (measure.num_in_a_row(config) > 1) is (is_ahead and has_device)
