"""A quantised target drafts with its own quantised sublayers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.engines import Engines, greedy, prompts_of, run, token_ids
from helpers.environment import IS_PART, IS_V2
from helpers.models import NUM_LAYERS, build_tiny_model

PLANS = {
    "empty": {"skip_layers": {}},
    "mixed": {"skip_layers": {"attention": [1, 2], "mlp": [2, 3]}},
    "exit": {"exit_layer": NUM_LAYERS // 4},
}
if IS_PART:  # in the interpreter each takes long
    PLANS = {"mixed": PLANS["mixed"]}
NUM_PROMPTS, MAX_TOKENS = (4, 12) if IS_V2 else (8, 24)
GROUP = 32  # inputs that share a scale, in four bits
PER_INT32 = 8  # numbers of four bits
# In which order AWQ's kernels want them.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]


def int8(weight: torch.Tensor) -> Tensors:
    """A scale for each output, in the format of compressed-tensors."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    whole = (weight / scale).round().to(torch.int8)
    return {"weight": whole, "weight_scale": scale}


def awq(weight: torch.Tensor) -> Tensors:
    """Four bits from a group's least to its greatest."""
    groups = weight.T.unflatten(0, (-1, GROUP))
    least, greatest = groups.amin(1), groups.amax(1)
    scale = (greatest - least) / 15
    zero = (-least / scale).round().clamp(0, 15)
    whole = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 15)
    return {
        "qweight": packed(whole.flatten(0, 1), AWQ_ORDER),
        "qzeros": packed(zero, AWQ_ORDER),
        "scales": scale,
    }


def gptq(weight: torch.Tensor) -> Tensors:
    """Four bits around zero."""
    groups = weight.T.unflatten(0, (-1, GROUP))
    scale = groups.abs().amax(1) / 7
    whole = (groups / scale[:, None]).round().clamp(-8, 7) + 8
    in_order = [*range(PER_INT32)]
    return {
        "qweight": packed(whole.flatten(0, 1).T, in_order).T,
        "qzeros": packed(torch.full_like(scale, 7), in_order),  # one is added
        "scales": scale,
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }


def packed(numbers: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Eight numbers of the last dimension in each int32, the first lowest."""
    eights = numbers.long().unflatten(-1, (-1, PER_INT32))[..., order]
    found = sum(eights[..., at] << (4 * at) for at in range(PER_INT32))
    assert isinstance(found, torch.Tensor)
    return torch.where(found < 2**31, found, found - 2**32).int()


EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}
FOUR_BITS = {"bits": 4, "group_size": GROUP}
# How weights are stored, what config.json says of it, and the activations, for which
# vLLM has no float32 kernels in four bits.
Scheme = tuple[Callable[[torch.Tensor], Tensors], dict[str, Any], str]
SCHEMES: dict[str, Scheme] = {
    "int8 weights (compressed-tensors)": (int8, COMPRESSED_TENSORS, "float32"),
    "AWQ weights": (
        awq,
        {"quant_method": "awq", "zero_point": True, "version": "gemm", **FOUR_BITS},
        "bfloat16",
    ),
    "GPTQ weights": (
        gptq,
        {"quant_method": "gptq", "sym": True, "desc_act": False, **FOUR_BITS},
        "bfloat16",
    ),
}


def quantised(model: Path, scheme: Scheme) -> Path:
    """The model with the weights of its layers stored in fewer bits."""
    from safetensors.torch import load_file, save_file

    quantise, config_of, _ = scheme
    file = model / "model.safetensors"
    tensors: Tensors = {}
    for name, weight in load_file(file).items():
        if ".layers." not in name or weight.dim() != 2:
            tensors[name] = weight
            continue
        for suffix, tensor in quantise(weight).items():
            tensors[name.removesuffix("weight") + suffix] = tensor.contiguous()
    save_file(tensors, file)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = config_of
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        name: str(
            quantised(
                build_tiny_model(
                    "llama", tmp_path_factory.mktemp("quantised"), intermediate_size=128
                ),
                scheme,
            )
        )
        for name, scheme in SCHEMES.items()
    }


@pytest.mark.v2
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.shows("Engine", name)) for name in SCHEMES],
)
def test_quantised_weights_draft_losslessly(
    name: str, plan: str, models: dict[str, str], engines: Engines
) -> None:
    dtype = SCHEMES[name][2]
    prompts, params = prompts_of(NUM_PROMPTS), greedy(MAX_TOKENS)
    spec = {**PLANS[plan], "num_speculative_tokens": 3}
    plain = engines.get(models[name], dtype=dtype)
    drafting = engines.get(models[name], spec, dtype=dtype)
    expected, _ = run(plain, prompts, params)
    found, counts = run(drafting, prompts, params)
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens
    assert (counts.acceptance == 1) is (plan == "empty")
