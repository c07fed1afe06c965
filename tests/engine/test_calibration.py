"""The first start of a model finds a plan, and the next ones draft by it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.engines import (
    KV_CACHE_BYTES,
    Engines,
    drafter_of,
    greedy,
    planner_of,
    run,
    with_costs,
)
from helpers.environment import IS_V2
from helpers.models import DEMO_MODEL
from vllm_selfspec.draft.view import DraftView
from vllm_selfspec.draft_length.costs import StepCosts
from vllm_selfspec.plan import calibrated
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.profile import read_profile
from vllm_selfspec.served_config import plan_of
from vllm_selfspec.tuning import calibration, probing

BARE = {"draft_length": "goodput", "draft_source": "auto"}
PROMPTS = ["def add(a, b):\n", "The answer is", "import os\nimport sys\nimport os\n"]
# A model whose forwards dominate: its first start has seconds, a tiny model's has ms.
KEPT: list[Engines] = []  # vLLM's engines cannot end one by one in a process
SMALL = KV_CACHE_BYTES // 2
ROWS = (1, 2, 4, 8, 16, 32, 64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    return calibrated.directory()


def costs_are(draft: float, monkeypatch: pytest.MonkeyPatch) -> StepCosts:
    """Forwards that take no time in truth: a step of the target 1 s, and of a draft
    that leaves nothing out `draft` of that, of what is found a quarter."""
    costs = StepCosts(ROWS, (1.0,) * len(ROWS), (0.25 * draft,) * len(ROWS))
    monkeypatch.setattr(calibration, "measured", lambda executor: costs)
    monkeypatch.setattr(probing, "time_steps", lambda w, rows, n: [1.0] * len(rows))
    parts = (0.1 * draft, 0.025 * draft, 0.05 * draft)  # of 12 layers
    monkeypatch.setattr(probing, "time_sublayers", lambda w, rows, n: parts)
    monkeypatch.setattr(StepCosts, "observe", lambda *_: None)
    return costs


def start(keys: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A new engine of the demo model: `Engines` would hand out the last one."""
    spec = {**BARE, **(keys or {})}
    settings = {"kv_cache_memory_bytes": 4 * KV_CACHE_BYTES, **settings}
    KEPT.append(Engines())
    return KEPT[-1].get(str(DEMO_MODEL), spec, **settings)


def expected(engines: Engines) -> Any:
    return run(engines.get(str(DEMO_MODEL)), PROMPTS, greedy(24))[0]


def token_ids(outputs: Any) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in outputs]


def drafter(llm: Any) -> Any:
    return drafter_of(llm.collective_rpc(lambda worker: worker.model_runner)[0])


def only_file(cache: Path) -> Path:
    (found,) = cache.glob("*.json")
    return found


def test_the_first_start_finds_a_plan_and_the_second_takes_it(
    cache: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs_are(1.0, monkeypatch)
    first = start()
    found = read_profile(only_file(cache))
    plan = found.plan(12)
    assert drafter(first).plan == plan
    assert found.figures is not None and found.figures.speed_up > 1.3
    assert plan.skip_set.num_skipped >= 12, "it was trained to be exited early"
    kept = found.figures.acceptance
    believed = planner_of(first).goodput.acceptance.survival(np.zeros(1, np.int64))[0]
    assert believed[: len(kept)] == pytest.approx(kept, abs=0.02), (
        "what was found is gone by"
    )
    monkeypatch.setattr(calibration, "calibrate", None)  # nothing is looked for
    second = start(max_num_seqs=7)
    assert drafter(second).plan == plan
    for llm in (first, second):
        outputs, counts = run(llm, PROMPTS, greedy(24))
        assert token_ids(outputs) == token_ids(expected(engines))
        assert planner_of(llm).stats.drafted["model"], "and the model drafts"


def test_useless_drafts_are_left_to_copies(
    cache: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs_are(12.0, monkeypatch)
    first = start(max_num_seqs=6)
    found = read_profile(only_file(cache)).figures
    assert found is not None and found.speed_up < calibrated.USEFUL
    second = start(max_num_seqs=5)
    for llm in (first, second):
        outputs, counts = run(llm, PROMPTS, greedy(24))
        assert token_ids(outputs) == token_ids(expected(engines))
        assert not planner_of(llm).stats.drafted["model"]
        assert not planner_of(llm).stats.steps["trial"]
    assert counts.draft_tokens, "copies"


def test_without_time_nothing_is_found_and_nothing_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not looked at is not what brings nothing."""
    costs_are(1.0, monkeypatch)
    llm = start({"calibration_seconds": 0.01}, max_num_seqs=3)
    assert not [*cache.glob("*")]
    run(llm, PROMPTS, greedy(8))
    start(max_num_seqs=3)
    assert read_profile(only_file(cache)).plan(12).skip_set.num_skipped


def test_nothing_is_copied_for_drafts_that_nobody_makes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs_are(12.0, monkeypatch)
    spec = {"draft_memory": "30%"}
    first, second = (start(spec, max_num_seqs=n) for n in (3, 2))
    assert plan_of(first.llm_engine.vllm_config).values, "it was tried"
    assert not plan_of(second.llm_engine.vllm_config).values


def test_a_source_alone_drafts_all_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs_are(12.0, monkeypatch)
    llm = start({"draft_source": "model"}, max_num_seqs=4)
    assert planner_of(llm).goodput.acceptance.population().size == 4, "it may draft"
    with_costs(llm, ((1, 2), (1.0, 1.0), (0.1, 0.1)), monkeypatch)
    assert run(llm, PROMPTS, greedy(8))[1].draft_tokens


def test_what_was_damaged_is_found_anew_and_a_full_place_is_no_reason_to_stop(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs_are(1.0, monkeypatch)
    start(max_model_len=200)
    file = only_file(cache)
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    start(max_model_len=201)
    assert json.loads(file.read_text())["figures"] == json.loads(whole)["figures"]
    file.unlink()
    cache.rmdir()
    cache.write_text("not a directory")
    llm = start(max_model_len=202)
    assert drafter(llm).plan.skip_set.num_skipped >= 12


def test_memory_is_taken_for_a_draft_in_few_bits(
    cache: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs_are(1.0, monkeypatch)
    llm = start({"draft_memory": "30%"})
    plan = drafter(llm).plan
    assert plan["draft_weights"].mlp == "int4"
    assert run(llm, PROMPTS, greedy(24))[0]
    found = token_ids(run(llm, PROMPTS, greedy(24))[0])
    assert found == token_ids(expected(engines))


def test_the_probe_says_what_the_target_goes_on_with(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = {"kv_cache_memory_bytes": 4 * KV_CACHE_BYTES}
    llm = engines.get(str(DEMO_MODEL), {"skip_layers": {}}, **room)
    plain = engines.get(str(DEMO_MODEL))
    prompts = [plain.get_tokenizer().encode(prompt) for prompt in PROMPTS]
    ask = llm.collective_rpc
    texts = ask(probing.start_probe_on, args=(20, prompts))[0]
    wanted = [
        [*o.prompt_token_ids, *o.outputs[0].token_ids]
        for o in run(plain, PROMPTS, greedy(20))[0]
    ]
    assert [list(text) for text in texts] == wanted
    numbers = np.repeat(np.arange(3), 4)
    positions = np.concatenate([len(p) + np.arange(4) for p in prompts])
    nothing = DraftPlan(12)
    right = ask(probing.num_right, args=(numbers, positions, nothing, 3))[0]
    assert right.tolist() == [3] * 12, "rows of several texts at once"
    ask(probing.stop_probe)
    outputs, _ = run(llm, PROMPTS, greedy(12))
    assert token_ids(outputs) == [
        text[len(p) :][:12] for text, p in zip(wanted, prompts, strict=True)
    ]


def test_what_goes_wrong_meanwhile_is_no_reason_not_to_serve(
    cache: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs_are(1.0, monkeypatch)

    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(probing, "num_right", fails)
    llm = start(max_model_len=204)
    assert not planner_of(llm).model_drafts, "nobody knows a plan"
    assert not [*cache.glob("*.json")]
    assert token_ids(run(llm, PROMPTS, greedy(24))[0]) == token_ids(expected(engines))


@pytest.mark.parametrize(
    ("keys", "drafts"),
    [
        ({}, False),
        ({"draft_source": "model"}, True),
        ({"draft_length": "fixed"}, True),
        ({"draft_memory": "30%"}, True),
        ({"exit_layer": 3}, True),
    ],
)
def test_a_plan_that_nobody_has_measured_does_not_draft_beside_copies(
    keys: dict[str, Any], drafts: bool, cache: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    spec = {"method": "selfspec", "calibration_seconds": 0, **keys}
    if keys == {"exit_layer": 3}:
        del spec["calibration_seconds"]
    config = EngineArgs(
        str(DEMO_MODEL), dtype="float32", speculative_config=spec
    ).create_engine_config()
    found = config.additional_config["selfspec"]
    assert ("model" in found["sources"]) is drafts
    assert found["calibration"] is None


def test_a_cache_too_small_for_any_text_is_no_reason_to_stop(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs_are(1.0, monkeypatch)
    llm = start(max_model_len=203, kv_cache_memory_bytes=SMALL)
    assert not [*cache.glob("*.json")], "nothing was found"
    assert not planner_of(llm).model_drafts
    llm = start(
        {"draft_source": "model"}, max_model_len=203, kv_cache_memory_bytes=SMALL
    )
    assert drafter(llm).plan.skip_set.num_skipped == 11, "evenly spread, as guessed"


def test_a_timed_draft_step_stays_within_the_positions_that_there_are(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever token it drafts: a vocabulary may be larger than the longest context."""
    llm = engines.get(str(DEMO_MODEL), {"exit_layer": 3})
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    seen: list[int] = []
    call = DraftView.__call__

    def noted(self: Any, input_ids: Any, positions: Any) -> Any:
        seen.append(int(positions.max()))
        return call(self, input_ids, positions)

    monkeypatch.setattr(DraftView, "__call__", noted)
    monkeypatch.setattr(
        DraftView, "compute_logits", lambda self, hidden: hidden.new_ones(2, 999_999)
    )
    runner.drafter.dummy_step(runner, 2, 3)
    assert seen == [0, 0, 0]


SERVER = """
import sys
from vllm import LLM
LLM({model!r}, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4,
    kv_cache_memory_bytes={cache}, speculative_config={{"method": "selfspec"}})
"""


@pytest.mark.skipif(IS_V2, reason="plans are looked for in the V1 runner")
def test_two_servers_that_start_at_once_both_start(cache: Path) -> None:
    code = SERVER.format(model=str(DEMO_MODEL), cache=4 * KV_CACHE_BYTES)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for one in both:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors[-3000:]
    assert read_profile(only_file(cache)).figures is not None
    assert not [*cache.glob("*.partial")]
