"""An axis that another package adds is known everywhere, and no file of ours knows it.

The axis here moves the draft's logits of some tokens up: a draft that is the target
but for that, so it is wrong more often the further they are moved.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import Field

from helpers.engines import Engines, greedy, prompts_of, run, token_ids
from helpers.environment import IS_V2
from helpers.models import NUM_LAYERS
from vllm_selfspec.chosen_plan import resolve_plan
from vllm_selfspec.cli.preview import Preview
from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.plan import axes
from vllm_selfspec.plan.axis import Axis
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.keys import Keys
from vllm_selfspec.plan.profile import read_profile
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel
from vllm_selfspec.tuning.offline.search import Search
from vllm_selfspec.tuning.score import best_score

NAME = "shift"
MOST = 40


class ShiftKeys(Keys):
    shift: int | None = Field(
        default=None, ge=0, le=MOST, strict=True, description="How far up."
    )


class Shift(Axis):
    """Its value is a number; 0 drafts as the target."""

    name = NAME
    keys = ShiftKeys
    stored = (int | None, Field(default=None, ge=0, le=MOST, description="How far."))
    loader = f"{__name__}:Loaded"

    def neutral(self, num_layers: int) -> int:
        return 0

    def resolve(self, config: Any, target: TargetModel, plan: DraftPlan) -> DraftPlan:
        return plan if config.shift is None else plan.with_value(NAME, config.shift)

    def refusal(self, value: int, deployment: Any) -> str | None:
        return "nobody moves so far: stay below 30" if value >= 30 else None

    def cost(self, value: int, draft: StepCost, target: StepCost) -> StepCost:
        return draft.beside(NAME, target.total * value / 1000)

    def extra_bytes(self, value: int, draft: StepCost, target: StepCost) -> int:
        return value

    def choices(self, plan: DraftPlan) -> Mapping[str, tuple[Any, ...]]:
        return {NAME: (0, 5, 20)}

    def params(self, value: int) -> dict[str, Any]:
        return {NAME: value}

    def from_params(self, params: Mapping[str, Any], plan: DraftPlan) -> int:
        return int(params[NAME])

    def to_json(self, value: int) -> int:
        return value

    def from_json(self, stored: Any, num_layers: int) -> int:
        return int(stored)

    def words(self, value: int) -> str:
        return f"moved by {value}"

    def build(self, value: int, view: Any, loaded: Any) -> None:
        compute_logits = view.model.compute_logits
        view.model.compute_logits = lambda *args: compute_logits(*args) + loaded.bias


class Loaded:
    """What its views share, made once."""

    num = 0

    def __init__(self, value: int, target: Any, vllm_config: Any) -> None:
        import torch

        Loaded.num += 1
        vocab_size = vllm_config.model_config.get_vocab_size()
        self.bias = torch.zeros(vocab_size).index_fill_(0, torch.arange(8), value)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """By one call; taken out of the table again."""
    before = [*axes.AXES]
    axes.AXES.register(Shift())
    axes.AXES.register(Shift())
    assert len(axes.AXES) == len(before) + 1, "registered twice is registered once"
    yield
    axes.AXES[:] = before


def plan_of(**keys: Any) -> DraftPlan:
    return resolve_plan(SelfSpecConfig.parse(keys), TargetModel(NUM_LAYERS)).plan


def test_its_key_is_accepted_and_refused() -> None:
    assert plan_of(shift=5)[NAME] == 5
    assert plan_of(shift=5, exit_layer=2).skip_set == plan_of(exit_layer=2).skip_set
    assert str(plan_of(shift=5)) == "moved by 5"
    with pytest.raises(ConfigError, match="shift is 41, but must be at most 40"):
        plan_of(shift=41)
    with pytest.raises(ConfigError, match="no key 'shifts': .*shift"):
        plan_of(shifts=1)


def test_a_plan_keeps_it_on_its_way() -> None:
    plan = plan_of(shift=5, skip_layers={"mlp": [1]})
    assert DraftPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.with_params(plan.params()) == plan
    assert plan != plan_of(skip_layers={"mlp": [1]})


def test_it_is_written_to_and_read_from_a_profile(tmp_path: Path) -> None:
    plan = plan_of(shift=5, exit_layer=2)
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(plan.to_dict()))
    assert read_profile(file).plan(NUM_LAYERS) == plan
    assert plan_of(skip_layers=str(file)) == plan
    assert plan_of(skip_layers=str(file), shift=7)[NAME] == 7, "the user's word wins"


def test_show_prints_it(tiny_models: dict[str, str]) -> None:
    preview = Preview.of(tiny_models["llama"], {"shift": 10})
    found = preview.to_dict()
    assert found["plan"][NAME] == 10 and found["extra_bytes"] == 10
    assert found["streamed_bytes"][NAME]["draft"] > 0
    assert found["draft_share"] == pytest.approx(1.01, abs=1e-3)
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as printed:
        preview.print(console)
    assert "moved by 10" in printed.get() and NAME in printed.get()


def test_a_search_moves_along_it(tmp_path: Path) -> None:
    """As if the further it is moved the more drafts were right."""

    def evaluate(plans: Any, numbers: Any) -> list[Any]:
        return [
            best_score([np.full(40, plan[NAME] // 5)] * len(numbers), 0.1, [1.0] * 4)
            for plan in plans
        ]

    search = Search(DraftPlan(2), evaluate, 1, tmp_path / "study.db", "study")
    search.run(60, lambda *_: None, max_plans=25)
    assert search.found()[0].plan[NAME] == 20


@pytest.mark.v2
def test_it_is_served(tiny_models: dict[str, str], engines: Engines) -> None:
    path, prompts = tiny_models["llama"], prompts_of(3)
    num_tokens = 8 if IS_V2 else 24
    expected, _ = run(engines.get(path), prompts, greedy(num_tokens))
    acceptance, before = {}, Loaded.num
    for value in (0, 20):
        llm = engines.get(path, {"shift": value, "num_speculative_tokens": 3})
        found, counts = run(llm, prompts, greedy(num_tokens))
        assert token_ids(found) == token_ids(expected)
        acceptance[value] = counts.acceptance
    assert acceptance[0] == 1.0 > acceptance[20], "what it does to the view is done"
    assert Loaded.num == before + 1, "the neutral value loads nothing"


def test_a_deployment_is_refused_for_it(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    with pytest.raises(ValueError, match="nobody moves so far: stay below 30"):
        engines.get(tiny_models["llama"], {"shift": 30})


def test_no_file_of_ours_knows_it() -> None:
    package = Path(axes.__file__).parents[1]
    assert not [p for p in package.rglob("*.py") if "moved by" in p.read_text()]
