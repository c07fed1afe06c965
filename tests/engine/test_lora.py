"""Requests of one batch draft each with its own LoRA adapter."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import Engines, greedy, prompts_of, run, token_ids
from helpers.models import NUM_LAYERS, TINY, build_tiny_model

RANK = 8
NUM_DRAFTS = 3
# One place more than there are adapters: on CPU vLLM gives a request without one,
# beside others, what the last place holds (vLLM pull request 48421).
SETTINGS: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "max_lora_rank": RANK}


def build_adapter(directory: Path, name: str, seed: int) -> str:
    """Random matrices, large enough that an adapter changes the text, for attention and
    MLP; in the format of the package peft."""
    import torch
    from safetensors.torch import save_file

    hidden, inner = TINY["hidden_size"], TINY["intermediate_size"]
    outputs = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, TINY["head_dim"]),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(NUM_LAYERS):
        for module, (num_in, num_out) in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, num_in) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_out, RANK) * 0.2
    path = directory / name
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    names = sorted({module.rpartition(".")[2] for module in outputs})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": names,
        "task_type": "CAUSAL_LM",
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_model("llama", tmp_path_factory.mktemp("lora")))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """For the requests of a batch, in turn: two adapters and none."""
    from vllm.lora.request import LoRARequest

    directory = tmp_path_factory.mktemp("adapters")
    found = [
        LoRARequest(name, number, build_adapter(directory, name, number))
        for number, name in enumerate(("one", "two"), 1)
    ]
    return [*found, None]


def generate(llm: Any, num: int, adapters: list[Any]) -> tuple[Any, Any]:
    params = greedy(24)
    requests = [adapters[number % len(adapters)] for number in range(num)]
    return run(llm, prompts_of(num), params, lora_request=requests)


@pytest.mark.v2
@pytest.mark.shows("Engine", "LoRA adapters")
@pytest.mark.parametrize("skip_layers", [{}, {"attention": [1], "mlp": [1, 2]}])
def test_adapters_draft_losslessly(
    skip_layers: dict[str, Any], model: str, adapters: list[Any], engines: Engines
) -> None:
    expected, _ = generate(engines.get(model, **SETTINGS), 7, adapters)
    spec = {"skip_layers": skip_layers, "num_speculative_tokens": NUM_DRAFTS}
    found, counts = generate(engines.get(model, spec, **SETTINGS), 7, adapters)
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens
    assert (counts.acceptance == 1) is (not skip_layers)


def test_the_adapters_make_texts_of_their_own(
    model: str, adapters: list[Any], engines: Engines
) -> None:
    llm = engines.get(model, **SETTINGS)
    texts = [token_ids(generate(llm, 3, [one])[0]) for one in adapters]
    assert texts[0] != texts[1]
    assert texts[1] != texts[2]
    assert texts[0] != texts[2]
