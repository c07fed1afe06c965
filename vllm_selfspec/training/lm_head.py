"""LM heads of a student: the target's, or one of its own that starts from it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from vllm_selfspec.plan.exit_card import TENSORS_FILE
from vllm_selfspec.plan.families import UnsupportedModelError


class PickingHead(nn.Module):
    """An LM head that runs where it is asked to, and nowhere else.

    Attributes:
        inner: The head itself.
        where: Positions, bool, `[num_rows, length]`.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.where: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_rows, length, hidden_size]` to `[where.sum(), vocab_size]`."""
        found: torch.Tensor = self.inner(hidden[self.where])
        return found


class LowRankHead(nn.Module):
    """`up(down(h))`, at first the best approximation of a full head at that rank."""

    def __init__(self, full: torch.Tensor, rank: int) -> None:
        """By the truncated SVD of `full`, `[vocab_size, hidden_size]`."""
        super().__init__()
        vocab_size, hidden_size = full.shape
        self.down = nn.Linear(hidden_size, rank, bias=False, device=full.device)
        self.up = nn.Linear(rank, vocab_size, bias=False, device=full.device)
        # By the smaller of the two Gram matrices: W'W = V S^2 V', and W V = U S.
        wide = full.double()
        squares, vectors = torch.linalg.eigh(wide.T @ wide)
        chosen = vectors[:, -rank:].flip(-1)  # [hidden_size, rank]
        roots = squares[-rank:].flip(-1).clamp_min(1e-24) ** 0.25
        with torch.no_grad():
            self.down.weight.copy_((chosen * roots).T)
            self.up.weight.copy_(wide @ chosen / roots)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, hidden_size]` to `[n, vocab_size]`."""
        found: torch.Tensor = self.up(self.down(hidden))
        return found


def own_head(model: Any, rank: int | None) -> nn.Module:
    """The LM head that the student has: the target's, or one that starts from it."""
    shared: nn.Linear = model.get_output_embeddings()
    if rank is None:
        return shared
    vocab_size, hidden_size = shared.weight.shape
    if shared.bias is not None or rank > min(vocab_size, hidden_size):
        raise UnsupportedModelError(
            f"an own LM head has a rank of at most {min(vocab_size, hidden_size)} here "
            f"and no bias, but the rank is {rank} and the target's has "
            f"{'no' if shared.bias is None else 'a'} bias: use the target's head"
        )
    weight = shared.weight.detach().float()
    if rank:
        return LowRankHead(weight, rank).requires_grad_()
    own = nn.Linear(hidden_size, vocab_size, bias=False, device=weight.device)
    own.weight = nn.Parameter(weight.clone())
    return own


def load_own_head(head: nn.Module, trained: Path | None) -> None:
    own = {} if trained is None else load_file(trained / TENSORS_FILE)
    with torch.no_grad():
        for name, parameter in saved_head(head).items():
            if name in own:
                parameter.copy_(own[name])


def saved_head(head: nn.Module) -> dict[str, nn.Parameter]:
    return {f"head.{name}": parameter for name, parameter in head.named_parameters()}
