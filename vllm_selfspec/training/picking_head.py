"""`PickingHead`: the target's LM head, at the positions that are asked for."""

import torch
from torch import nn


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
