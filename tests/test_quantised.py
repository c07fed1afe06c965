"""A quantised target drafts with its own quantised sublayers."""

import json
from pathlib import Path

import pytest
from conftest import NUM_LAYERS, Engines, build_tiny_model, prompts_of, run, token_ids

PLANS = {
    "empty": {"skip_layers": {}},
    "mixed": {"skip_layers": {"attention": [1, 2], "mlp": [2, 3]}},
    "exit": {"exit_layer": NUM_LAYERS // 4},
}


def quantised(model: Path) -> Path:
    """Weights in int8, a scale for each output; in the format of compressed-tensors."""
    import torch
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(file).items():
        if ".layers." not in name or weight.dim() != 2:
            tensors[name] = weight
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[name.removesuffix("weight") + "weight_scale"] = scale
    save_file(tensors, file)
    config = json.loads((model / "config.json").read_text())
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    **eight_bits,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    }
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("quantised")
    return str(quantised(build_tiny_model("llama", directory)))


@pytest.mark.parametrize("plan", PLANS)
def test_int8_weights_draft_losslessly(plan: str, model: str, engines: Engines) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    spec = {**PLANS[plan], "num_speculative_tokens": 3}
    expected, _ = run(engines.get(model), prompts_of(8), params)
    found, counts = run(engines.get(model, spec), prompts_of(8), params)
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens
    assert (counts.acceptance == 1) is (plan == "empty")
