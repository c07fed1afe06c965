"""Two workers with half of every layer each draft as one does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import KV_CACHE_BYTES, Engines, greedy, prompts_of, run, token_ids
from helpers.environment import CORES, IS_PART, IS_SHORT, IS_V2
from helpers.exit_layers import build_exit_layer
from helpers.models import NUM_LAYERS
from vllm_selfspec.draft_length.costs import StepCosts
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.tuning.offline.tuning_engine import TuningEngine

TWO: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
}
NUM_DRAFTS = 3
NUM_PROMPTS, MAX_TOKENS = (4, 12) if IS_V2 else (8, 24)
PLANS: list[dict[str, Any]] = [{"attention": [1], "mlp": [1, 2]}, {}]
if IS_PART:  # in the interpreter each takes long
    PLANS = PLANS[:1]
IN_FULL = pytest.mark.skipif(
    IS_V2 and IS_SHORT, reason="two minutes in the interpreter: make test-all"
)


@pytest.fixture(autouse=True)
def a_core_each(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM reads its variables once, when the first engine of the process starts."""
    from vllm import envs

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"0|{CORES - 1}")
    envs.disable_envs_cache()
    yield
    envs.disable_envs_cache()


@pytest.fixture(autouse=True)
def workers(engines: Engines) -> Iterator[None]:
    yield
    engines.end_workers()


@pytest.mark.parametrize("policy", ["goodput", "threshold"])
def test_both_workers_take_the_same_source_for_a_row(
    policy: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    """Otherwise they would wait for each other for ever."""
    model = tiny_models["qwen3"]
    prompts = [{"prompt_token_ids": [5, 9, 7, 3, 8, 1] * 3}, *prompts_of(3)]
    spec = {"draft_source": "auto", "draft_length": policy, "exit_layer": 3}
    llm = engines.get(model, spec, **TWO)
    if policy == "goodput":
        llm.collective_rpc(_plan_by_cheap_rows)
    expected, _ = run(engines.get(model), prompts, greedy(MAX_TOKENS))
    for _ in range(3):
        found, _ = run(llm, prompts, greedy(MAX_TOKENS))
        assert token_ids(found) == token_ids(expected)
    first, second = llm.collective_rpc(_drafted)
    assert first == second and first["context"]


def _plan_by_cheap_rows(worker: Any) -> None:
    """Whatever the machine does meanwhile, a copy is worth its rows at first."""
    costs = StepCosts((1, 64), (1.0, 1.0), (0.5, 0.5))
    worker.model_runner.drafter.planner.use_costs(costs)


def _drafted(worker: Any) -> dict[str, int]:
    return dict(worker.model_runner.drafter.planner.stats.drafted)


@IN_FULL
@pytest.mark.v2
@pytest.mark.shows("Engine", "tensor parallelism")
@pytest.mark.parametrize("plan", PLANS)
def test_greedy_text_is_plain_vllms(
    plan: dict[str, Any], tiny_models: dict[str, str], engines: Engines
) -> None:
    model, prompts = tiny_models["qwen3"], prompts_of(NUM_PROMPTS)
    spec = {"skip_layers": plan, "num_speculative_tokens": NUM_DRAFTS}
    expected, _ = run(engines.get(model), prompts, greedy(MAX_TOKENS))
    found, counts = run(engines.get(model, spec, **TWO), prompts, greedy(MAX_TOKENS))
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens
    assert (counts.acceptance == 1) is (not plan)


@IN_FULL
@pytest.mark.v2
@pytest.mark.shows("Engine", "tensor parallelism, exit layer")
def test_an_exit_layer_drafts_as_in_one_worker(
    tiny_models: dict[str, str], engines: Engines, tmp_path: Path
) -> None:
    model, prompts = tiny_models["qwen3"], prompts_of(NUM_PROMPTS)
    head = build_exit_layer(model, NUM_LAYERS - 1, tmp_path / "head")
    spec = {"trained_exit_layer": str(head), "num_speculative_tokens": NUM_DRAFTS}
    _, expected = run(engines.get(model, spec), prompts, greedy(MAX_TOKENS))
    _, counts = run(engines.get(model, spec, **TWO), prompts, greedy(MAX_TOKENS))
    assert counts == expected
    assert counts.acceptance == 1, "it runs what the target runs"


@pytest.mark.shows(
    "Engine", "tensor parallelism, skip_layers 'online'", v2="refused: see below"
)
def test_both_workers_change_plans_together(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    model, prompts = tiny_models["qwen3"], prompts_of(8)
    spec = {"skip_layers": "online", "online": {"share": 0.5}}
    llm = engines.get(model, spec, **TWO)
    expected, _ = run(engines.get(model), prompts, greedy(MAX_TOKENS))
    for _ in range(4):
        found, _ = run(llm, prompts, greedy(MAX_TOKENS))
        assert token_ids(found) == token_ids(expected)
    (first, second) = llm.collective_rpc(_search)
    assert first == second
    assert first[0] > 1, "nothing was tried, so nothing was shown"


def _search(worker: Any) -> tuple[int, str, str]:
    search = worker.model_runner.drafter.tuner.search
    return search.num_duels, str(search.incumbent), str(search.candidate)


@pytest.mark.shows(
    "Engine",
    "tensor parallelism, tune",
    v2="no: `tune` reads positions from V1's batch, and runs V1 everywhere",
)
def test_plans_are_scored_over_two_workers(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    found = TuningEngine(
        tiny_models["qwen3"],
        prompts_of(3),
        MAX_TOKENS,
        NUM_DRAFTS,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=16 * KV_CACHE_BYTES,
        **TWO,
    )
    engines.others.append(found._engine.llm)
    everything = found.score(DraftPlan(NUM_LAYERS), range(3))
    assert everything.walk.acceptance == (1,) * everything.k
    less = found.score(DraftPlan.skipping(SkipSet.of(NUM_LAYERS, mlp=[1, 2])), range(3))
    assert less.walk.acceptance[0] < 1
