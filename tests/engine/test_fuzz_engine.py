"""500 fuzzed configurations through vLLM itself: none crashes an engine later.

All of them go through the making of vLLM's engine configuration, which starts nothing.
Of the accepted ones a seeded sample then really generates.
"""

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import Phase, given, settings

from helpers.configurations import (
    CANARY,
    FUZZ,
    NUM_FUZZED,
    REFUSALS,
    configurations,
    faults_of,
    names_one_of,
    wanted_skip_set,
    written,
)
from helpers.engines import Engines, greedy, prompts_of, run, token_ids
from vllm_selfspec.config import METHOD
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet

NUM_GENERATING = 12
# Enough to fill a draft of any length and to have some rejected.
NUM_TOKENS = 24


@dataclass(frozen=True)
class Fuzzed:
    """One configuration.

    Attributes:
        spec: As a user writes it.
        faults: Its keys that are at fault.
        skip_set: What it must come to, if none is.
    """

    spec: dict[str, Any]
    faults: set[str]
    skip_set: SkipSet | None


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> list[Fuzzed]:
    """The same 500 configurations on every run; each one asks for selfspec."""
    directory = tmp_path_factory.mktemp("profiles")
    found: list[Fuzzed] = []

    @given(config=configurations)
    @settings(FUZZ, phases=[Phase.generate])
    def collect(config: dict[str, Any]) -> None:
        # vLLM reads - in a key as _, so the same key must not come in both spellings.
        config = {key.replace("-", "_"): value for key, value in config.items()}
        config["method"] = METHOD
        faults = faults_of(config)
        skip_set = None if faults else wanted_skip_set(config)
        spec = written(config, directory / f"{len(found)}.json")
        found.append(Fuzzed(spec, faults, skip_set))

    collect()
    return found


def test_500_configurations_are_accepted_or_refused_before_an_engine_starts(
    fuzzed: list[Fuzzed], tiny_models: dict[str, str]
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    for case in fuzzed:
        args = EngineArgs(
            tiny_models["llama"],
            speculative_config=case.spec,
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
        )
        try:
            config = args.create_engine_config()
        except REFUSALS as error:
            assert names_one_of(str(error), case.faults), f"{case}: {error}"
        else:
            assert not case.faults, f"vLLM would start with {case}"
            plan = config.additional_config[METHOD]
            assert DraftPlan.from_dict(plan["plan"]).skip_set == case.skip_set
            k = case.spec.get("num_speculative_tokens", 4)
            assert config.num_lookahead_tokens == k
        assert not CANARY.exists(), f"executed something in {case}"
    assert len(fuzzed) == NUM_FUZZED
    num_accepted = sum(not case.faults for case in fuzzed)
    assert NUM_FUZZED // 5 < num_accepted < 4 * NUM_FUZZED // 5, (
        f"{num_accepted} accepted: one of the two sides is hardly tried"
    )


def sample_of(fuzzed: list[Fuzzed]) -> list[Fuzzed]:
    """Accepted configurations that all draft differently."""
    distinct = {
        (
            case.skip_set,
            case.spec.get("num_speculative_tokens"),
            case.spec.get("draft_sample_method"),
            repr(case.spec.get("draft_length")),
        ): case
        for case in fuzzed
        if not case.faults
    }
    return random.Random(0).sample(list(distinct.values()), NUM_GENERATING)


def drafts_for(spec: dict[str, Any], num_requests: int) -> bool:
    """Whether anything is to be drafted while this many requests run."""
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    schedule = spec.get("num_speculative_tokens_per_batch_size")
    if schedule is None:
        return True
    return build_dynamic_sd_schedule_lookup(schedule, 8, 32)[num_requests] > 0


def test_accepted_configurations_generate_what_plain_vllm_does(
    fuzzed: list[Fuzzed], tiny_models: dict[str, str], engines: Engines
) -> None:
    model, prompts = tiny_models["llama"], prompts_of(3)
    params = greedy(NUM_TOKENS)
    plain, _ = run(engines.get(model), prompts, params)
    sample = sample_of(fuzzed)
    assert len({case.skip_set for case in sample}) > NUM_GENERATING // 2
    for case in sample:
        outputs, counts = run(engines.get(model, case.spec), prompts, params)
        assert token_ids(outputs) == token_ids(plain), f"{case} changes the text"
        if case.spec.get("draft_length") == "goodput":
            continue  # a tiny model's drafts are hardly ever worth it
        wanted = drafts_for(case.spec, len(prompts))
        assert (counts.draft_tokens > 0) == wanted, f"{case} drafts {counts}"
