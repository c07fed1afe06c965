"""A plan's score is what the engine would make of it."""

import re
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.engines import KV_CACHE_BYTES, Engines, run
from helpers.full_disk import full_disk
from helpers.models import DEMO_MODEL, NUM_LAYERS
from vllm_selfspec.bench.tasks import load
from vllm_selfspec.config import ConfigError
from vllm_selfspec.plan.cost import ModelWeights
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.profile import read_profile
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.tuning.candidates import greedy_path, neighbours, single_changes
from vllm_selfspec.tuning.offline.engines import RayEngines
from vllm_selfspec.tuning.offline.search import Search
from vllm_selfspec.tuning.offline.tune import parse_budget
from vllm_selfspec.tuning.offline.tuning_engine import TuningEngine
from vllm_selfspec.tuning.score import Score, best_score, walk
from vllm_selfspec.whole_file import WriteError

NUM_DRAFTS = 4
# What `tune` sets for itself: the probe is the V1 worker's.
ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
MAX_TOKENS = 48
KEPT: list[TuningEngine] = []  # vLLM's engines cannot end one by one in a process


def test_a_walk_steps_from_where_the_last_one_ended() -> None:
    # Two right, then the target's own; then none, and so on.
    found = walk([np.array([2, 9, 9, 0, 1, 9])], k=2)
    assert found.verifications == 3, "at 0, 3 and 4"
    assert found.tokens == 3 + 1 + 2
    assert found.accepted_at == (2, 1)
    assert found.tokens_per_verification == pytest.approx(2)
    assert found.acceptance == pytest.approx((2 / 3, 1 / 3))


def test_what_lies_beyond_a_texts_end_is_not_known() -> None:
    found = walk([np.array([0, 0, 2, 1])], k=3)
    assert found.accepted_at == (1, 1, 0), "at 0, 1 and 2"
    assert found.tried_at == (3, 3, 2), "at 2 two tokens are left"
    assert found.acceptance == pytest.approx((1 / 3, 1 / 3, 0))


def test_no_more_is_accepted_than_drafted() -> None:
    found = walk([np.array([9] * 6)], k=1)
    assert (found.verifications, found.accepted_at) == (3, (3,))


def test_the_best_length_is_longer_where_more_is_right_and_drafts_are_cheap() -> None:
    good, bad = [np.full(60, 8)], [np.tile([1, 0], 30)]
    flat = [1.0] * 8
    assert best_score(good, 0.1, flat).k == 8
    assert best_score(bad, 0.1, flat).k == 1
    assert best_score(good, 0.1, flat).speed_up == pytest.approx(60 / 7 / 1.8, rel=0.1)
    steep = [1 + 0.8 * k for k in range(1, 9)]
    assert best_score(good, 0.5, steep).speed_up < 1


def test_of_lengths_that_gain_nearly_the_same_the_shortest_is_taken() -> None:
    right = np.full(400, 3)
    right[0] = 8  # one more step is saved by drafting so far: 1%
    found = best_score([right], 1e-4, [1.0] * 8)
    assert found.k == 3
    assert found.walk.verifications == 100
    assert found.speed_up == pytest.approx(4, rel=1e-3)


def test_candidates_are_distinct_and_the_path_leaves_out_what_is_missed_least() -> None:
    plans = [*DraftPlan(6).candidates()]
    assert len({*plans}) >= len(plans) - 1
    missed = {"0": 9.0, "1": 1.0, "2": 0.5, "3": 3.0}

    losses = {choice: missed[choice[0][-1]] for choice in single_changes(DraftPlan(4))}
    path = [plan.skip_set for plan in greedy_path(DraftPlan(4), losses)]
    assert path[0] == SkipSet.of(4, attention=[2])
    assert path[1] == SkipSet.of(4, attention=[2], mlp=[2])
    assert path[3] == SkipSet.of(4, attention=[1, 2], mlp=[1, 2])
    assert path[-1].num_skipped == 7
    skip_set = SkipSet.of(3, attention=[0, 1], mlp=[0, 1, 2])
    near = [one.skip_set for one in neighbours(DraftPlan.skipping(skip_set))]
    assert len({*near}) == len(near) == 5, "one would leave nothing"
    differing = [
        len(one.attention ^ skip_set.attention) + len(one.mlp ^ skip_set.mlp)
        for one in near
    ]
    assert differing == [1] * 5


@pytest.fixture(scope="module")
def tuner(tiny_models: dict[str, str]) -> TuningEngine:
    return engine(tiny_models["llama"], "code", 3)


def engine(path: str, task: str, num_prompts: int) -> TuningEngine:
    prompts = [prompt.render(None) for prompt in load(task).prompts[:num_prompts]]
    KEPT.append(
        TuningEngine(
            path,
            [text[-120:] for text in prompts],
            MAX_TOKENS,
            NUM_DRAFTS,
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            kv_cache_memory_bytes=16 * KV_CACHE_BYTES,
        )
    )
    return KEPT[-1]


def test_with_nothing_skipped_every_draft_is_right(tuner: TuningEngine) -> None:
    found = tuner.right(DraftPlan(NUM_LAYERS), range(3))
    for text, right in zip(tuner.known.texts, found, strict=True):
        remaining = np.arange(len(text.token_ids) - 1 - text.first, 0, -1)
        assert right.tolist() == np.minimum(remaining, NUM_DRAFTS).tolist()


def test_costs_grow_with_what_runs(tuner: TuningEngine) -> None:
    full = DraftPlan(NUM_LAYERS)
    half = DraftPlan.skipping(SkipSet.early_exit(NUM_LAYERS, 2))
    assert 0 < tuner.known.draft_cost(half) < tuner.known.draft_cost(full)
    assert len(tuner.known.verify_costs) == NUM_DRAFTS


@pytest.mark.parametrize("task", ["code", "chat"])
def test_predicted_acceptance_is_the_engines(task: str, engines: Engines) -> None:
    from vllm import SamplingParams

    found = engine(str(DEMO_MODEL), task, 6)
    plan = DraftPlan.skipping(SkipSet.early_exit(12, 4))
    predicted = walk(found.right(plan, range(6)), NUM_DRAFTS).acceptance
    llm = engines.get(
        str(DEMO_MODEL),
        {"exit_layer": 4, "num_speculative_tokens": NUM_DRAFTS},
        max_model_len=512,
    )
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    _, counts = run(llm, [text.prompt for text in found.known.texts], params)
    measured = [at / counts.drafts for at in counts.accepted_at]
    # A text ends within a draft once: what is then counted differs by a step of ten.
    assert predicted[0] == pytest.approx(measured[0], abs=0.05)
    assert predicted[3] == pytest.approx(measured[3], abs=0.08)


SEARCHED = 6  # layers of a model that is not there


def evaluate(plans: Sequence[DraftPlan], numbers: Sequence[int]) -> list[Score]:
    """As if only the attention of layers 0 and 3 and the MLP of layer 5 were missed."""
    found = []
    for plan in plans:
        skipped = plan.skip_set
        missed = len(skipped.attention & {0, 3}) + len(skipped.mlp & {5})
        right = np.full(60, max(0, 4 - 2 * missed))
        cost = 0.05 + 0.9 * (1 - skipped.num_skipped / (2 * SEARCHED))
        found.append(best_score([right for _ in numbers], cost, [1.0] * 4))
    return found


def searching(file: Path, evaluate: Any = evaluate, **kwargs: Any) -> Search:
    return Search(DraftPlan(SEARCHED), evaluate, 4, file, "study", **kwargs)


def ignore(search: Search, line: str) -> None:
    pass


def test_a_search_finds_what_is_not_missed(tmp_path: Path) -> None:
    search = searching(tmp_path / "study.db", num_at_once=2)
    search.run(600, ignore, max_plans=100)  # no clock: the machine may be busy
    best, *_ = search.found()
    assert best.plan.skip_set.attention == {1, 2, 4, 5}
    assert best.plan.skip_set.mlp == {0, 1, 2, 3, 4}
    assert best.k == 4
    assert best.speed_up == evaluate([best.plan], range(4))[0].speed_up
    spread = DraftPlan.skipping(SkipSet.evenly_spread(SEARCHED))
    assert best.speed_up > evaluate([spread], range(4))[0].speed_up


def test_a_search_goes_on_from_the_best_by_single_sublayers(tmp_path: Path) -> None:
    """No simple plan is what is wanted, and skipped alone no sublayer loses a token."""
    layers = range(12)
    wanted = SkipSet.of(12, attention={*layers} - {5}, mlp={*layers} - {2, 7})

    def near(plans: Sequence[DraftPlan], numbers: Sequence[int]) -> list[Score]:
        found = []
        for plan in plans:
            skipped = plan.skip_set
            off = len(skipped.attention ^ wanted.attention)
            off += len(skipped.mlp ^ wanted.mlp)
            right = [np.full(60, 4)] * len(numbers)
            found.append(best_score(right, 0.1, [1 + 0.2 * off] * 4))
        return found

    search = Search(DraftPlan(12), near, 4, tmp_path / "study.db", "study")
    search.run(600, ignore, max_plans=120)
    assert search.found()[0].plan.skip_set == wanted


def test_what_was_scored_is_kept_when_the_disk_is_full(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    search = searching(file)
    search.run(60, ignore, max_plans=10)
    with full_disk(), pytest.raises(WriteError) as error:
        search.run(60, ignore, max_plans=20)
    assert "keeps every plan in" in str(error.value)
    assert "make room there" in str(error.value)
    again = searching(file)
    assert again.num_tried == 10
    again.run(60, ignore, max_plans=20)
    assert again.num_tried == 20, "it goes on with room"


def test_what_was_scored_is_kept_when_a_search_is_stopped(tmp_path: Path) -> None:
    calls = 0

    def stopping(plans: Sequence[DraftPlan], numbers: Sequence[int]) -> list[Score]:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return evaluate(plans, numbers)

    search = searching(tmp_path / "study.db", stopping)
    with pytest.raises(KeyboardInterrupt):
        search.run(60, ignore)
    before = search.num_tried
    assert 5 < before < 30
    again = searching(tmp_path / "study.db")
    assert again.num_tried == before
    tried = [plan for plan, _ in again._tried()]
    again.run(3, ignore)
    known = [plan for plan, _ in again._tried()]
    assert known[: len(tried)] == tried and len(known) > len(tried)
    assert len({*known}) == len(known), "what was tried is not tried again"


COMMAND = (sys.executable, "-m", "vllm_selfspec.cli", "tune")
SMALL = shlex.split(
    "--prompts code --num-prompts 2 --max-prompt-tokens 60 --max-tokens 24 "
    "--max-drafts 2 --dtype float32"
)


def wait_for_trials(study: Path, num: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        time.sleep(0.3)
        with suppress(sqlite3.Error), sqlite3.connect(f"file:{study}?mode=ro") as db:
            query = "select count(*) from trials where state = 'COMPLETE'"
            if db.execute(query).fetchone()[0] >= num:
                return
    raise TimeoutError(f"{study} has no {num} trials")


def test_tune_survives_a_kill_and_writes_a_profile_that_vllm_takes(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    profile = tmp_path / "found.json"
    command = [*COMMAND, tiny_models["qwen3"], *SMALL, "-o", str(profile)]
    killed = subprocess.Popen([*command, "--budget", "10m"], stdout=subprocess.DEVNULL)
    wait_for_trials(tmp_path / "found.study.db", 3)
    killed.kill()
    killed.wait()
    assert not profile.exists()
    done = subprocess.run(
        [*command, "--budget", "3s"], capture_output=True, text=True, check=True
    )
    for words in ("Frontier", "Measured in the engine", "of plain vLLM with"):
        assert words in done.stdout
    found = read_profile(profile)
    assert found.figures is not None and found.provenance is not None
    assert int(found.provenance["num_plans"]) >= 4, "those of before the kill too"
    assert (tmp_path / "found.svg").read_text().count("<svg") == 1
    from vllm.engine.arg_utils import EngineArgs

    spec = {"method": "selfspec", "skip_layers": str(profile)}
    config = EngineArgs(
        tiny_models["qwen3"], speculative_config=spec
    ).create_engine_config()
    plan = DraftPlan.from_dict(config.additional_config["selfspec"]["plan"])
    assert plan == found.plan(NUM_LAYERS)
    k = found.figures.num_speculative_tokens
    assert config.additional_config["selfspec"]["num_model_tokens"] == k
    config = EngineArgs(
        tiny_models["qwen3"], speculative_config={**spec, "num_speculative_tokens": 5}
    ).create_engine_config()
    own = config.additional_config["selfspec"]
    assert own["num_model_tokens"] == 5, "the user's word"
    with pytest.raises(ValueError, match="LlamaForCausalLM in place of Qwen3"):
        EngineArgs(tiny_models["llama"], speculative_config=spec).create_engine_config()


def test_tune_says_what_memory_brings(tmp_path: Path) -> None:
    profile = tmp_path / "found.json"
    size = 0.3 * ModelWeights.from_checkpoint(DEMO_MODEL).step.total
    command = [*COMMAND, str(DEMO_MODEL), *SMALL, "-o", str(profile), "--memory", "30%"]
    done = subprocess.run(
        [*command, "--budget", "8s"], capture_output=True, text=True, check=True
    )
    assert "weights in int4" in done.stdout
    _, _, table = done.stdout.partition("Frontier: speed-up against memory")
    # How many rows there are depends on what this machine's step costs today.
    speeds = [float(word) for word in re.findall(r"(\d+\.\d+)x ", table)]
    assert speeds == sorted(speeds) and speeds, "more memory stands there if it pays"
    plan = read_profile(profile).plan(12)
    step = ModelWeights.from_checkpoint(DEMO_MODEL).step
    assert plan.extra_bytes(step) <= size


def test_a_budget_that_is_none_is_refused() -> None:
    assert [parse_budget(text) for text in ("90s", "20m", "0.5h")] == [90, 1200, 1800]
    for text in ("", "20", "m", "-1s", "nans", "infs", "2d"):
        with pytest.raises(ConfigError, match="--budget"):
            parse_budget(text)


def test_ray_workers_score_on_the_same_texts_by_the_same_costs(
    tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    prompts = [prompt.render(None)[:100] for prompt in load("code").prompts[:2]]
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "kv_cache_memory_bytes": 16 * KV_CACHE_BYTES,
    }
    engines = RayEngines(2, tiny_models["llama"], prompts, 24, 2, **settings)
    plans = [DraftPlan.skipping(SkipSet.early_exit(NUM_LAYERS, n)) for n in (1, 2, 3)]
    together = engines.score(plans, range(2))
    again = [engines.score([plan], range(2))[0] for plan in plans]
    assert together == again, "whichever engine it is"
    assert [score.draft_cost for score in together] == pytest.approx(
        [engines.known.draft_cost(plan) for plan in plans]
    )
    (measured,) = engines.measure([(DraftPlan(NUM_LAYERS), 2)], range(2))
    assert measured.walk.acceptance[0] > 0.9, "nothing is skipped"
