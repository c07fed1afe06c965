"""Skip sets that are looked for while serving: found, paid for, and never seen in the
text."""

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.engines import Engines, greedy, prompts_of, run, token_ids
from helpers.environment import IS_V2
from helpers.full_disk import full_disk
from helpers.models import DEMO_MODEL, NUM_LAYERS
from vllm_selfspec.chosen_plan import resolve_plan
from vllm_selfspec.config import ConfigError, Online, SelfSpecConfig
from vllm_selfspec.draft_length.costs import StepCosts
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.profile import ProfileError, read_profile
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel
from vllm_selfspec.tuning.online.search import OnlineSearch
from vllm_selfspec.tuning.online.tuner import OnlineCosts, OnlineTuner, Saving

SEARCHED = 8  # layers of a model that is not there
COSTS = OnlineCosts(
    StepCosts((1, 64), (1.0, 1.6), (0.9, 1.0)),
    DraftPlan(SEARCHED),
    StepCost.uniform(SEARCHED, head=0.1, attention=0.04, mlp=0.06),
)
SPEED = COSTS.speed(num_reqs=1, max_drafts=4)
# Sublayers without which a draft is wrong, by task: the others are not missed.
CODE = SkipSet.of(SEARCHED, attention=[0, 3], mlp=[1])
CHAT = SkipSet.of(SEARCHED, attention=[0, 6], mlp=[4, 7])


def agreement(plan: DraftPlan, needed: SkipSet) -> float:
    skipped = plan.skip_set
    missed = len(skipped.attention & needed.attention) + len(skipped.mlp & needed.mlp)
    return float(0.93 * 0.6**missed)


def serve(search: OnlineSearch, needed: SkipSet, num_batches: int, seed: int) -> None:
    """Rows of a task; what is hard in a text is hard for both. For each that is scored
    there are some verifications."""
    chance = random.Random(seed)
    for _ in range(num_batches):
        share = agreement(search.incumbent, needed)
        search.verified([chance.random() < share for _ in range(64)])
        hardness = [chance.random() for _ in range(32)]
        plans = (search.incumbent, search.candidate)
        right = [[h < agreement(plan, needed) for h in hardness] for plan in plans]
        search.observe(*right, SPEED)


def worth(plan: DraftPlan, needed: SkipSet) -> float:
    return SPEED(plan, agreement(plan, needed))


def best(needed: SkipSet) -> float:
    """Of the plan that runs what is needed and nothing else."""
    whole = frozenset(range(SEARCHED))
    skipped = SkipSet.of(SEARCHED, whole - needed.attention, whole - needed.mlp)
    return worth(DraftPlan.skipping(skipped), needed)


def spread() -> DraftPlan:
    return DraftPlan.skipping(SkipSet.evenly_spread(SEARCHED))


def test_a_better_plan_is_found_and_another_task_finds_its_own() -> None:
    search = OnlineSearch(spread())
    serve(search, CODE, 800, seed=1)
    assert worth(search.incumbent, CODE) > 0.97 * best(CODE)
    on_chat = worth(search.incumbent, CHAT)
    serve(search, CHAT, 800, seed=2)
    assert worth(search.incumbent, CHAT) > max(0.97 * best(CHAT), 1.2 * on_chat)
    assert search.num_duels > search.num_adopted > 3


def test_a_plan_far_from_the_first_is_found_within_few_rows() -> None:
    """By single sublayers it would take ten times as many."""
    whole = frozenset(range(SEARCHED))
    needed = SkipSet.of(SEARCHED, attention=[0, 1], mlp=[0, 1])  # an exit after two
    start = SkipSet.of(SEARCHED, attention=whole, mlp=whole - {7})
    search = OnlineSearch(DraftPlan.skipping(start))
    serve(search, needed, 40, seed=4)
    assert worth(search.incumbent, needed) > 0.97 * best(needed)


def test_a_task_that_comes_back_finds_its_plan_within_few_rows() -> None:
    """What served longest is tried first once the texts have changed."""
    for seed in range(5):
        search = OnlineSearch(spread())
        for turn, needed in enumerate((CODE, CHAT) * 3):
            num_batches = 800 if turn < 2 else 40
            serve(search, needed, num_batches, seed=10 * seed + turn)
            found = worth(search.incumbent, needed)
            assert found > 0.95 * best(needed), f"seed {seed}, turn {turn}"
        assert search.num_changes >= 5


def test_texts_that_do_not_change_seldom_look_as_if() -> None:
    """Three deviations, estimated from few batches; an alarm costs a few duels."""
    num = 0
    for seed in range(5):
        search = OnlineSearch(spread())
        serve(search, CODE, 400, seed)
        num += search.num_changes
    assert num <= 20


def test_a_plan_that_cannot_be_bettered_stays() -> None:
    whole = frozenset(range(SEARCHED))
    start = SkipSet.of(SEARCHED, whole - CODE.attention, whole - CODE.mlp)
    for seed in range(5):
        search = OnlineSearch(DraftPlan.skipping(start))
        serve(search, CODE, 400, seed)
        assert worth(search.incumbent, CODE) > 0.97 * best(CODE)


def test_workers_that_see_the_same_rows_decide_the_same() -> None:
    found = [OnlineSearch(spread()) for _ in range(2)]
    for search in found:
        serve(search, CODE, 200, seed=3)
    assert found[0].incumbent == found[1].incumbent
    assert found[0].candidate == found[1].candidate


def input_batch(num_reqs: int, num_prompt: int, num_computed: int) -> Any:
    """As much of vLLM's as is looked at; its token at position t is t."""
    return SimpleNamespace(
        req_ids=[f"r{i}" for i in range(num_reqs)],
        num_prompt_tokens=np.full(num_reqs, num_prompt),
        num_computed_tokens_cpu=np.full(num_reqs, num_computed),
        token_ids_cpu=np.broadcast_to(np.arange(1 << 15), (num_reqs, 1 << 15)),
    )


Asked = tuple[DraftPlan, np.ndarray, np.ndarray]


def asked_of(tuner: OnlineTuner, steps: Any) -> list[Asked]:
    """What is scored while some steps go by; every plan is always right."""
    found: list[Asked] = []

    def next_tokens(
        plan: DraftPlan, rows: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        found.append((plan, rows, positions))
        return positions + 1

    for batch in steps:
        tuner.after_step(batch, len(batch.req_ids), 0, [], next_tokens)
    return found


def tuner_of(share: float, start: DraftPlan | None = None) -> OnlineTuner:
    start = start or spread()
    found = OnlineTuner(start, Online(share=share), 4, max_num_reqs=64)
    found.use_costs(COSTS)
    return found


@pytest.mark.parametrize("share", [0.002, 0.01])
def test_no_more_than_its_share_of_the_time_goes_into_scoring(share: float) -> None:
    num_steps = 20_000
    tuner = tuner_of(share)
    steps = (input_batch(4, 8, 8 + n) for n in range(num_steps))
    asked = asked_of(tuner, steps)
    spent = sum(COSTS.draft(len(rows), plan) for plan, rows, _ in asked)
    whole = num_steps * COSTS.verify(4)
    assert 0.9 * share * whole < spent <= share * whole


def test_only_what_the_target_has_computed_and_said_is_scored() -> None:
    asked = asked_of(tuner_of(0.5), (input_batch(3, 40, 40 + n) for n in range(60)))
    assert asked
    for incumbent, candidate in zip(asked[::2], asked[1::2], strict=True):
        assert incumbent[0] != candidate[0]
        assert np.array_equal(incumbent[1:], candidate[1:]), "both are asked the same"
    pairs = [pair for _, rows, at in asked[::2] for pair in zip(rows, at, strict=True)]
    assert {row for row, _ in pairs} == {0, 1, 2}
    assert len(pairs) == len(set(pairs)), "nothing twice"
    assert min(at for _, at in pairs) == 39, "the prompt is not the target's own"
    assert max(at for _, at in pairs) < 40 + 60


def test_nothing_is_scored_before_costs_are_known() -> None:
    tuner = OnlineTuner(DraftPlan(SEARCHED), Online(), 4, max_num_reqs=64)
    assert not asked_of(tuner, (input_batch(4, 8, 100) for _ in range(100)))


def config_of(**keys: Any) -> SelfSpecConfig:
    return SelfSpecConfig.parse({"method": "selfspec", **keys})


def test_online_keys_want_the_word(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="skip_layers is 'auto': make it 'online'"):
        config_of(online={"share": 0.1})
    with pytest.raises(ConfigError, match="directory that exists"):
        config_of(
            skip_layers="online", online={"profile": str(tmp_path / "no" / "p.json")}
        )
    with pytest.raises(ConfigError, match="share"):
        config_of(skip_layers="online", online={"share": 0})


def test_what_was_found_costs_no_engine_where_the_disk_is_full(tmp_path: Path) -> None:
    file, failed = tmp_path / "found.json", Counter[str]()
    save = Saving(file, TargetModel(SEARCHED), failed)
    save(DraftPlan.skipping(CODE))
    with full_disk():
        save(DraftPlan.skipping(CHAT))
    assert kept_in(file).mlp == {1}, "the plan before is kept"
    assert failed == {"profile": 1}
    save(DraftPlan.skipping(CHAT))
    assert kept_in(file).mlp == {4, 7}


def kept_in(file: Path) -> SkipSet:
    skip_set: SkipSet = read_profile(file).plan(SEARCHED).skip_set
    return skip_set


def test_it_starts_from_the_profile_that_it_kept(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    config = config_of(skip_layers="online", online={"profile": str(file)})
    target = TargetModel(SEARCHED, "m", {})
    assert resolve_plan(config, target).plan == spread()
    file.write_text('{"skip_layers": {"mlp": [2]}, "num_layers": 8}')
    found = resolve_plan(config, target)
    assert found.plan.skip_set == SkipSet.of(SEARCHED, mlp=[2])
    assert str(file) in found.source
    with pytest.raises(ProfileError, match="9 layers in place of 8"):
        resolve_plan(config, TargetModel(9, "other", {}))


def test_it_is_refused_where_engines_run_in_lockstep() -> None:
    from vllm.engine.arg_utils import EngineArgs

    spec = {"method": "selfspec", "skip_layers": "online"}
    args = EngineArgs(str(DEMO_MODEL), speculative_config=spec, data_parallel_size=2)
    with pytest.raises(ConfigError, match="data_parallel_size is 2"):
        args.create_engine_config()


@pytest.mark.v2
@pytest.mark.shows(
    "Refused",
    "skip_layers 'online' in the V2 runner: its CUDA graphs of drafts hold a skip set",
)
def test_the_v2_runner_refuses_to_exchange_skip_sets() -> None:
    if not IS_V2:
        pytest.skip("its modules need Triton")
    from vllm_selfspec.draft.v2_row_stops import make_speculator

    config: Any = SimpleNamespace(additional_config={"selfspec": {"online": {}}})
    with pytest.raises(ConfigError, match="'online' exchanges skip sets") as error:
        make_speculator(config, "cpu")  # type: ignore[arg-type]
    assert "VLLM_USE_V2_MODEL_RUNNER is not 0: set it to 0" in str(error.value)


# In the engine.

GREEDY_TOKENS = 96


def online(engines: Engines, model: str, **keys: Any) -> Any:
    spec = {"skip_layers": "online", "online": {"share": 0.5, **keys}}
    return engines.get(model, spec)


def tuner_in(llm: Any) -> OnlineTuner:
    core = llm.llm_engine.engine_core.engine_core
    found: OnlineTuner = core.model_executor.driver_worker.model_runner.drafter.tuner
    return found


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_text_is_plain_vllms_while_plans_change(
    family: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    model = tiny_models[family]
    prompts = prompts_of(8)
    llm = online(engines, model)
    tuner = tuner_in(llm)
    expected, _ = run(engines.get(model), prompts, greedy(GREEDY_TOKENS))
    for _ in range(3):
        found, _ = run(llm, prompts, greedy(GREEDY_TOKENS))
        assert token_ids(found) == token_ids(expected)
    assert tuner.search.num_duels > 1, "nothing was tried, so nothing was shown"


def test_every_verification_is_told(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = online(engines, tiny_models["llama"])
    search, told = tuner_in(llm).search, []
    monkeypatch.setattr(search, "verified", told.extend)
    _, counts = run(llm, prompts_of(8), greedy(GREEDY_TOKENS))
    assert 0 < counts.accepted_at[0] < counts.drafts
    assert (sum(told), len(told)) == (counts.accepted_at[0], counts.drafts)


def test_a_plan_that_skips_nothing_is_always_right(
    tiny_models: dict[str, str],
    engines: Engines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "kept.json"
    file.write_text(f'{{"skip_layers": {{}}, "num_layers": {NUM_LAYERS}}}')
    llm = online(engines, tiny_models["qwen3"], profile=str(file))
    search, seen = tuner_in(llm).search, []
    assert search.incumbent == DraftPlan(NUM_LAYERS)
    monkeypatch.setattr(search, "observe", lambda *args: seen.append(args[:2]))
    run(llm, prompts_of(8), greedy(GREEDY_TOKENS))
    right, right_candidate = map(np.concatenate, zip(*seen, strict=True))
    assert len(right) >= 64
    assert right.all(), "it reads another context than the target did"
    assert not right_candidate.all(), "and so does what skips something"


def test_what_is_better_is_adopted_and_kept(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that skips what matters most is left soon."""
    file = tmp_path / "kept.json"
    file.write_text(f'{{"skip_layers": {{"mlp": {[*range(1, 12)]}}}}}')
    llm = online(engines, str(DEMO_MODEL), profile=str(file))
    tuner = tuner_in(llm)
    first = tuner.search.incumbent
    expected, _ = run(engines.get(str(DEMO_MODEL)), texts(), greedy(GREEDY_TOKENS))
    for _ in range(4):
        found, _ = run(llm, texts(), greedy(GREEDY_TOKENS))
        assert token_ids(found) == token_ids(expected)
    assert tuner.search.num_adopted
    assert tuner.search.incumbent != first
    kept = read_profile(file)
    assert kept.num_layers == 12 and kept.architecture is not None
    assert kept.plan(12) == tuner.search.incumbent


def texts() -> list[str]:
    from vllm_selfspec.bench.tasks import load

    return [prompt.render(None)[:200] for prompt in load("code").prompts[:8]]
