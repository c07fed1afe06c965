"""The axis `draft_weights`: what may be written, what it costs, how it is kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.models import NUM_LAYERS, build_tiny_model
from vllm_selfspec.chosen_plan import resolve_plan
from vllm_selfspec.cli.preview import Preview
from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.plan.axis_draft_weights import BYTES_PER_WEIGHT, DraftWeights
from vllm_selfspec.plan.cost import ModelWeights
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.errors import PlanError
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel

TARGET = StepCost.uniform(NUM_LAYERS, head=80, attention=10, mlp=20)
BY_PART = {"attention": "int8", "mlp": "int4", "head": "same"}


def plan_of(keys: dict[str, Any], target: TargetModel | None = None) -> DraftPlan:
    config = SelfSpecConfig.parse(keys)
    return resolve_plan(config, target or TargetModel(NUM_LAYERS)).plan


def test_without_a_word_nothing_is_skipped_and_nothing_else_changes() -> None:
    plan = plan_of({"draft_weights": "int4"})
    assert plan == DraftPlan.of(NUM_LAYERS, draft_weights=DraftWeights.all_in("int4"))


def test_it_goes_with_what_is_skipped() -> None:
    plan = plan_of({"draft_weights": "int8", "exit_layer": 1})
    assert plan.skip_set.exit_layer == 1
    assert plan["draft_weights"] == DraftWeights.all_in("int8")


def test_the_targets_own_weights_are_no_change() -> None:
    plan = plan_of({"draft_weights": "same", "skip_layers": {}})
    assert plan == DraftPlan(NUM_LAYERS)
    assert plan_of({"draft_weights": {}, "skip_layers": {}}) == plan


@pytest.mark.parametrize(
    ("value", "finding"),
    [
        ("fp8", "for which vLLM has kernels on some devices only: use 'int8'"),
        ({"mlp": "fp8"}, "use 'int8'"),
        ("int2", "must be 'same', 'int8' or 'int4': write that"),
        ({"mlp": "int2"}, "draft_weights.mlp is 'int2'"),
        ({"experts": "int4"}, "use one of attention, mlp, head"),
        (4, "must be 'same', 'int8', 'int4', or these by part"),
    ],
    ids=str,
)
def test_what_there_is_no_kernel_for_is_refused(value: Any, finding: str) -> None:
    with pytest.raises(ConfigError) as error:
        SelfSpecConfig.parse({"draft_weights": value})
    assert finding in str(error.value)


def test_a_profile_with_another_word_is_refused() -> None:
    stored = {"draft_weights": {"mlp": "int2"}}
    with pytest.raises(PlanError, match="one of same, int8, int4, but a plan says"):
        DraftPlan.from_stored(NUM_LAYERS, stored)


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_a_copy_costs_what_it_reads(word: str) -> None:
    share = BYTES_PER_WEIGHT[word] / TARGET.weight_bytes
    plan = plan_of({"draft_weights": word})
    assert plan.share(TARGET) == pytest.approx(share)
    assert plan.extra_bytes(TARGET) == round(share * TARGET.total)


def test_a_copy_costs_what_it_was_measured_to_cost() -> None:
    copied = StepCost.uniform(NUM_LAYERS, head=20, attention=5, mlp=8)
    target = TARGET.measured_with_copies(copied)
    assert plan_of({"draft_weights": "int4"}).cost(target).total == pytest.approx(
        copied.total
    )
    plan = plan_of({"draft_weights": {"mlp": "int4"}, "skip_layers": {"mlp": [0]}})
    mlp, rest = (NUM_LAYERS - 1) * 8, NUM_LAYERS * 10 + 80
    assert plan.cost(target).total == pytest.approx(mlp + rest)


def test_what_is_skipped_is_not_copied() -> None:
    plan = plan_of({"draft_weights": BY_PART, "skip_layers": {"mlp": [0, 1, 2]}})
    attention = NUM_LAYERS * 10 * BYTES_PER_WEIGHT["int8"] / 2
    mlp = 20 * BYTES_PER_WEIGHT["int4"] / 2
    assert plan.cost(TARGET).total == pytest.approx(attention + mlp + 80)
    assert plan.extra_bytes(TARGET) == round(attention + mlp)


def test_what_is_quantised_already_is_drafted_with_as_it_is() -> None:
    quantised = StepCost.uniform(NUM_LAYERS, head=80, attention=10, mlp=20)
    quantised = StepCost(**{**vars(quantised), "weight_bytes": 0})
    plan = plan_of({"draft_weights": "int4"})
    assert plan.share(quantised) == 1
    assert plan.extra_bytes(quantised) == 0


def test_experts_are_left_as_they_are() -> None:
    config = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
    target = TargetModel.of(NUM_LAYERS, "mixtral", config)
    plan = plan_of({"draft_weights": "int4"}, target)
    assert plan["draft_weights"] == DraftWeights("int4", "same", "int4")


def test_a_plan_survives_json_and_says_itself() -> None:
    plan = plan_of({"draft_weights": BY_PART, "skip_layers": {"mlp": [1]}})
    assert DraftPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert "weights of attention in int8, mlp in int4" in plan.outline()
    assert str(plan_of({"draft_weights": "int4"})) == "weights in int4"


def test_a_search_may_do_without_the_copy_of_a_part() -> None:
    plan = plan_of({"draft_weights": BY_PART})
    choices = {name: c for name, c in plan.choices().items() if "weights" in name}
    assert choices == {
        "weights.attention": ("same", "int8"),
        "weights.mlp": ("same", "int4"),
    }
    assert plan.with_params(plan.params()) == plan
    without = plan.with_params({"weights.mlp": "same"})
    assert without["draft_weights"] == DraftWeights(attention="int8")
    assert not any("weights" in name for name in DraftPlan(NUM_LAYERS).choices())


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_do_not_depend_on_the_checkpoints_type(
    dtype: str, num_bytes: int, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = build_tiny_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model.save_pretrained(path)
    weights = ModelWeights.from_checkpoint(path)
    assert weights.weight_bytes == num_bytes
    keys = {"draft_weights": "int8"}
    extra = Preview.of(str(path), keys).plan.extra_bytes(weights.step)
    assert extra == weights.streamed / num_bytes
