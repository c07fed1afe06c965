"""A plan that was found is found again, under the same circumstances alone."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_selfspec import chosen_plan
from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.engine import first_start
from vllm_selfspec.plan import calibrated
from vllm_selfspec.plan.calibrated import Circumstances
from vllm_selfspec.plan.cost import CheckpointError
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel

HERE = Circumstances("m", "f00", "bfloat16", "2 x CPU", (("vllm", "0.32"),), 0)
PLAN = DraftPlan.skipping(SkipSet.of(4, mlp=[1]))
FIGURES = {
    "num_speculative_tokens": 3,
    "acceptance": [0.8, 0.6],
    "tokens_per_verification": 2.4,
    "draft_cost": 0.5,
    "verify_cost": 1.1,
    "speed_up": 1.2,
}
STEP = StepCost((10.0,) * 4, (30.0,) * 4, 44.0)  # 204 bytes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    return calibrated.directory()


def kept(figures: dict[str, object] = FIGURES) -> None:
    HERE.keep({**PLAN.to_dict(), "model": "m", "figures": figures})


def test_what_was_kept_is_found() -> None:
    assert HERE.find() is None
    kept()
    found = HERE.find()
    assert found is not None
    assert found.plan(4) == PLAN
    assert "2 x CPU" in (found.note or ""), "a reader sees what it is for"


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "f01"},
        {"dtype": "float32"},
        {"hardware": "4 x CPU"},
        {"versions": (("vllm", "0.33"),)},
        {"memory": 5},
    ],
)
def test_it_is_not_found_under_others(other: dict[str, object]) -> None:
    kept()
    assert replace(HERE, **other).find() is None  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"skip_layers": {}}', "\0" * 99])
def test_a_damaged_entry_is_one_that_is_not_there(
    content: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept()
    HERE.file.write_text(content)
    with caplog.at_level(logging.WARNING, logger="vllm.selfspec"):
        assert HERE.find() is None
    assert "anew" in caplog.text
    kept()
    assert HERE.find() is not None


def test_where_nothing_can_be_written_nothing_is_kept(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in place of the directory")
    kept()
    assert HERE.find() is None


def test_the_newest_plan_of_a_model_is_found_for_a_reader(cache: Path) -> None:
    kept()
    newer = replace(HERE, dtype="float32")
    newer.keep({**PLAN.to_dict(), "model": "newer", "figures": FIGURES})
    os.utime(HERE.file, (1, 1))
    found = calibrated.newest_of("f00", 0)
    assert found is not None and found.model == "newer"
    assert calibrated.newest_of("f01", 0) is None
    assert calibrated.newest_of("f00", 5) is None, "for as much memory"


def test_auto_takes_it() -> None:
    kept()
    known = chosen_plan.Known(HERE.find())
    found = chosen_plan.resolve_plan(
        SelfSpecConfig.parse({}), TargetModel(4, "m"), known=known
    )
    assert found.plan == PLAN and found.is_calibrated and not found.is_guess
    assert found.num_speculative_tokens == 3
    assert found.acceptance == pytest.approx((0.8, 0.75)), "the second given the first"
    guess = chosen_plan.resolve_plan(SelfSpecConfig.parse({}), TargetModel(4, "m"))
    assert guess.is_guess and not guess.acceptance


def test_what_was_found_for_another_model_is_not_taken() -> None:
    kept()
    HERE.keep({**PLAN.to_dict(), "figures": FIGURES, "architecture": {"vocab_size": 8}})
    known = chosen_plan.Known(HERE.find())
    others = TargetModel(6), TargetModel(4, architecture={"vocab_size": 9})
    for other in others:
        found = chosen_plan.resolve_plan(SelfSpecConfig.parse({}), other, known=known)
        assert found.is_guess and not found.is_calibrated


def test_weights_are_told_apart_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those on the Hub nothing but their configuration may be here."""
    commits = {"main": "1" * 40, "old": "2" * 40}

    def locate(model: str, files: object, revision: str | None) -> Path:
        if model == "gone":
            raise CheckpointError("offline")
        return tmp_path / f"models--{model}" / "snapshots" / commits[revision or "main"]

    monkeypatch.setattr(first_start, "locate", locate)

    def place(model: str, revision: str | None = None) -> Path | None:
        model_config = SimpleNamespace(model=model, revision=revision, dtype="bfloat16")
        parallel = SimpleNamespace(tensor_parallel_size=1)
        found = first_start._circumstances(model_config, parallel, 0)
        return None if found is None else found.file

    assert place("a/model") == place("a/model", "main") is not None
    assert place("a/model") != place("a/model", "old")
    assert place("gone") is None
    monkeypatch.setattr(first_start, "locate", lambda model, *_: Path(model))
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_model.bin").write_text(name)
        assert place(str(tmp_path / name)) is None, "only safetensors are read"
        (tmp_path / name / "model.safetensors").write_text(name)
    assert place(str(tmp_path / "x")) != place(str(tmp_path / "y"))


def test_what_the_user_says_comes_first() -> None:
    kept()
    known = chosen_plan.Known(HERE.find())
    config = SelfSpecConfig.parse({"exit_layer": 2})
    found = chosen_plan.resolve_plan(config, TargetModel(4, "m"), known=known)
    assert found.plan.skip_set == SkipSet.early_exit(4, 2)
    assert not found.is_guess and not found.is_calibrated


@pytest.mark.parametrize(
    ("memory", "in_int4"),
    [
        ("30%", {"attention", "mlp", "head"}),
        (60, {"attention", "mlp", "head"}),
        ("20%", {"mlp"}),
        (13, {"head"}),
        (2, set()),
        (0, set()),
    ],
)
def test_draft_memory_is_filled_and_not_more(
    memory: int | str, in_int4: set[str]
) -> None:
    config = SelfSpecConfig.parse({"draft_memory": memory} if memory else {})
    found = chosen_plan.resolve_plan(
        config, TargetModel(4, "m"), known=chosen_plan.Known(step=STEP)
    )
    words = found.plan["draft_weights"].by_part
    assert {part for part, word in words.items() if word == "int4"} == in_int4
    assert found.plan.extra_bytes(STEP) <= config.memory_beside(STEP.total)
    assert found.is_guess
    if in_int4:
        assert not found.plan.skip_set.num_skipped


def test_no_memory_is_planned_for_copies_of_experts() -> None:
    config = SelfSpecConfig.parse({"draft_memory": "30%"})
    known = chosen_plan.Known(step=replace(STEP, has_experts=True))
    found = chosen_plan.resolve_plan(config, TargetModel(4, "m"), known=known)
    words = found.plan["draft_weights"].by_part
    assert words == {"attention": "int4", "mlp": "same", "head": "int4"}


def test_a_search_while_serving_starts_from_it_too() -> None:
    kept()
    known = chosen_plan.Known(HERE.find())
    config = SelfSpecConfig.parse({"skip_layers": "online"})
    found = chosen_plan.resolve_plan(config, TargetModel(4, "m"), known=known)
    assert found.plan == PLAN


def test_without_sizes_there_is_no_share_of_them() -> None:
    config = SelfSpecConfig.parse({"draft_memory": "30%"})
    with pytest.raises(ConfigError, match="say draft_weights instead"):
        chosen_plan.resolve_plan(config, TargetModel(4, "m"))


def test_a_kept_plan_is_a_profile_like_others() -> None:
    kept()
    document = json.loads(HERE.file.read_text())
    assert document["figures"]["speed_up"] == 1.2
