"""`cut`: the target's first N layers and its last, as a model of its own class.

One rule: no more of a checkpoint is read than the model has.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vllm_selfspec.plan.cost import LAYER, weight_files
from vllm_selfspec.plan.exit_card import tensors_file
from vllm_selfspec.plan.families import UnsupportedModelError, family_of
from vllm_selfspec.plan.target_model import TargetModel

# Modules of a family's decoder that hold its layers.
LAYERS = ("layers", "h")


def cut(path: Path, exit_layer: int, dtype: torch.dtype, trained: Path | None) -> Any:
    """The target's class, with N + 1 layers."""
    import transformers

    target = TargetModel.read(path, str(path))
    family_of(target.class_name)
    config: Any = transformers.AutoConfig.from_pretrained(path)
    _check_can_cut(target, config, exit_layer)
    config = _cut_config(config, target.num_layers, exit_layer)
    weights = _cut_weights(path, target.num_layers, exit_layer)
    if trained is not None:
        for name, tensor in load_file(tensors_file(trained)).items():
            weights[renumbered(name, exit_layer)] = tensor
    logging: Any = transformers.logging
    logging.disable_progress_bar()
    cls: Any = getattr(transformers, target.class_name)
    model, info = cls.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        output_loading_info=True,
    )
    lacking = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if lacking:
        raise UnsupportedModelError(
            "an exit layer is one of the target's own kind, but after "
            f"{exit_layer} layers of this {target.class_name} there is another: its "
            f"last layer has no {lacking[0]}: use another --exit-layer"
        )
    return model


def _check_can_cut(target: TargetModel, config: Any, exit_layer: int) -> None:
    if not 1 <= exit_layer < target.num_layers:
        raise UnsupportedModelError(
            "an exit layer comes after at least one and before the last of the "
            f"target's {target.num_layers} layers, but --exit-layer is {exit_layer}: "
            f"use 1 to {target.num_layers - 1}"
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            "an exit layer starts from plain weights, but this checkpoint is "
            "quantised: train on the original one"
        )


def _cut_config(config: Any, num_layers: int, exit_layer: int) -> Any:
    """Of N + 1 layers, the last one of the target's last's kind."""
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == num_layers:
            setattr(config, key, [*value[:exit_layer], value[-1]])
    config.num_hidden_layers = exit_layer + 1
    if hasattr(config, "first_k_dense_replace"):  # DeepSeek's layers without experts
        first = min(config.first_k_dense_replace, exit_layer)
        config.first_k_dense_replace = first
    return config


def _cut_weights(
    path: Path, num_layers: int, exit_layer: int
) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint that the student has, by its names of them."""
    found = {}
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                layer = LAYER.match(name)
                index = int(layer["index"]) if layer else 0
                if index == num_layers - 1:
                    found[renumbered(name, exit_layer)] = tensors.get_tensor(name)
                elif index < exit_layer:
                    found[name] = tensors.get_tensor(name)
    return found


def names_of(path: Path, index: int) -> Iterator[str]:
    """Tensors of one layer."""
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                if (layer := LAYER.match(name)) and int(layer["index"]) == index:
                    yield name


def renumbered(name: str, index: int) -> str:
    """The same tensor of another layer."""
    layer = LAYER.match(name)
    if layer is None:
        return name
    start, end = layer.span("index")
    return f"{name[:start]}{index}{name[end:]}"


def layers_of(model: Any) -> Any:
    for name in LAYERS:
        if hasattr(model.base_model, name):
            return getattr(model.base_model, name)
    raise UnsupportedModelError(
        f"a decoder keeps its layers in {' or '.join(LAYERS)}, but "
        f"{type(model).__name__} has neither: it cannot be trained yet"
    )
