"""Exit heads without training: a layer of the target's own, as a head's files."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from vllm_selfspec.plan.cost import weight_files
from vllm_selfspec.plan.exit_card import write_exit_head
from vllm_selfspec.plan.target_model import TargetModel, weights_fingerprint


def build_exit_head(
    model: str,
    exit_layer: int,
    directory: Path,
    head_rank: int | None = None,
    **more: Any,
) -> Path:
    """The target's last layer as the layer that follows the first `exit_layer`.

    After all but the last it is the target itself.

    Args:
        model: A checkpoint, Llama's names.
        exit_layer: N.
        directory: Where the head is to lie.
        head_rank: Of an LM head of its own, near the target's; 0 for a full one.
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
    if head_rank is not None:
        found |= _own_head(tensors["lm_head.weight"], head_rank)
    card = {
        "exit_layer": exit_layer,
        "num_layers": target.num_layers,
        "model": model,
        "architecture": dict(target.architecture),
        "weights": weights_fingerprint(path),
        "head_rank": head_rank,
        "num_parameters": sum(tensor.numel() for tensor in found.values()),
    }
    write_exit_head(directory, card | more, save(found))
    return directory


def _own_head(lm_head: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    if rank == 0:
        chance = torch.Generator().manual_seed(0)
        noise = torch.randn(lm_head.shape, generator=chance)
        return {"head.weight": lm_head + 0.3 * lm_head.std() * noise}
    left, scale, right = torch.linalg.svd(lm_head, full_matrices=False)
    return {
        "head.down.weight": (scale[:rank, None] * right[:rank]).contiguous(),
        "head.up.weight": left[:, :rank].contiguous(),
    }
