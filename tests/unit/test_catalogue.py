"""Published plans are found for their own models, and for no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.models import build_tiny_model
from vllm_selfspec.chosen_plan import resolve_plan
from vllm_selfspec.cli.main import app
from vllm_selfspec.config import SelfSpecConfig
from vllm_selfspec.plan import catalogue
from vllm_selfspec.plan.catalogue import entries, find
from vllm_selfspec.plan.cost import ModelWeights
from vllm_selfspec.plan.target_model import TargetModel

LLAMA_2_13B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "vocab_size": 32000,
}


def target(name: str, **changed: Any) -> TargetModel:
    config = {**LLAMA_2_13B, **changed}
    return TargetModel.of(config["num_hidden_layers"], name, config)


# D&V, and what follows from them: attention + MLP + LM head of the draft, as a share.
SHARES = {
    "llama-2-13b": 0.639,
    "llama-2-13b-chat": 0.639,
    "codellama-13b": 0.622,
    "llama-2-70b": 0.517,
}


@pytest.mark.parametrize("name", SHARES)
def test_the_published_plans_read_what_was_published_of_them(name: str) -> None:
    entry = entries()[name]
    a = entry.architecture
    assert a is not None and entry.num_layers is not None
    hidden, heads = a["hidden_size"], a["num_attention_heads"]
    kv = hidden * a["num_key_value_heads"] // heads
    attention = 2 * hidden * hidden + 2 * hidden * kv
    weights = ModelWeights(
        attention=(attention,) * entry.num_layers,
        mlp=(3 * hidden * a["intermediate_size"],) * entry.num_layers,
        head=hidden * a["vocab_size"],
    )
    share = entry.plan(entry.num_layers).share(weights.step)
    assert share == pytest.approx(SHARES[name], abs=5e-4)
    assert "arXiv 2309.08168" in str(entry.note), "its source"


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-2-13b-hf",
        "/models/Llama-2-13b-hf/",
        "/hub/models--meta-llama--Llama-2-13b-hf/snapshots/5c31dfb671ce7cfe2d7bb7c04375e44",
    ],
)
def test_auto_takes_the_plan_of_the_model_and_says_so(name: str) -> None:
    plan = resolve_plan(SelfSpecConfig.parse({}), target(name))
    assert plan.plan.skip_set.attention >= {3, 5, 6, 8}
    assert plan.source == "auto: the catalogue's plan for meta-llama/Llama-2-13b-hf"


@pytest.mark.parametrize(
    "other",
    [
        target("meta-llama/Llama-2-13b-chat-v2"),
        target("meta-llama/Llama-2-13b-hf", vocab_size=32016),
        target("meta-llama/Llama-2-13b-hf", num_hidden_layers=32),
    ],
)
def test_another_model_gets_none(other: TargetModel) -> None:
    assert find(other) is None
    assert "no catalogue entry" in resolve_plan(SelfSpecConfig.parse({}), other).source


def test_a_model_on_disk_is_found_by_directory_and_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny_model("llama", tmp_path)
    read = TargetModel.read(path, str(path))
    profiles = tmp_path / "profiles"
    shutil.copytree(catalogue.DIRECTORY, profiles)
    content = {
        "model": f"someone/{path.name}",
        "architecture": read.architecture,
        "skip_layers": {"mlp": [1]},
    }
    (profiles / "own.json").write_text(json.dumps(content))
    monkeypatch.setattr(catalogue, "DIRECTORY", profiles)
    entries.cache_clear()
    try:
        found = find(read)
        assert found is not None and found.skip_layers.mlp == (1,)
    finally:
        entries.cache_clear()


def test_the_command_lists_all_of_it() -> None:
    runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    shown = runner.invoke(app, ["catalogue"])
    assert shown.exit_code == 0
    for entry in entries().values():
        assert str(entry.model) in shown.stdout
    found = json.loads(runner.invoke(app, ["catalogue", "--json"]).stdout)
    assert found.keys() == entries().keys()
    assert found["llama-2-70b"]["skip_layers"]["mlp"][:3] == [2, 4, 9]
