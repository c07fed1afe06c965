"""Exit layers without training: a layer of the target's own, as a head's files."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from vllm_selfspec.plan.cost import weight_files
from vllm_selfspec.plan.exit_card import write_exit_layer
from vllm_selfspec.plan.target_model import TargetModel, weights_fingerprint


def build_exit_layer(model: str, exit_layer: int, directory: Path, **more: Any) -> Path:
    """The target's last layer as the layer that follows the first `exit_layer`.

    After all but the last it is the target itself.

    Args:
        model: A checkpoint, Llama's names.
        exit_layer: N.
        directory: Where the head is to lie.
        more: Further keys of the card.
    """
    path = Path(model)
    target = TargetModel.read(path, model)
    tensors = {k: v for f in weight_files(path) for k, v in load_file(f).items()}
    last = f"model.layers.{target.num_layers - 1}."
    found = {
        name.replace(last, "model.layers.0."): tensor
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    card = {
        "exit_layer": exit_layer,
        "num_layers": target.num_layers,
        "model": model,
        "architecture": dict(target.architecture),
        "weights": weights_fingerprint(path),
        "num_parameters": sum(tensor.numel() for tensor in found.values()),
    }
    write_exit_layer(directory, card | more, save(found))
    return directory
