"""`Student`: the target's first N layers, the exit layer, its last norm and LM head.

One rule: it is a model of the target's own Hugging Face class with N + 1 layers, the
last of which has the weights of the target's last. So no family needs code here, and no
more of the target is in memory than runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_selfspec.plan.exit_card import read_exit_card
from vllm_selfspec.plan.families import UnsupportedModelError
from vllm_selfspec.plan.target_model import TargetModel
from vllm_selfspec.training.cut import cut, layers_of, names_of, renumbered
from vllm_selfspec.training.picking_head import PickingHead


class Student:
    """What is trained, in the place it is trained in.

    Attributes:
        exit_layer: N, the target's layers before the exit layer.
        device: It runs on.
        trained: The parameters that are trained, float32, by the names that they are
            saved under.
    """

    def __init__(
        self,
        path: Path,
        exit_layer: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        trained: Path | None = None,
    ) -> None:
        """Reads what it needs of the checkpoint in the directory `path`.

        Args:
            path: Of the target.
            exit_layer: N.
            dtype: Of what is frozen, and of the computation.
            device: torch's name of it.
            trained: Directory of an exit layer to begin with, which fits; None for the
                target's last layer.

        Raises:
            UnsupportedModelError: If the target cannot be cut there.
            CheckpointError: If the weights are missing.
        """
        self.exit_layer = exit_layer
        self.device, self._dtype = torch.device(device), dtype
        self._model = cut(path, exit_layer, dtype, trained)
        self._model.requires_grad_(False).eval().to(self.device)
        self._layer = layers_of(self._model)[exit_layer].float().requires_grad_()
        self._head = PickingHead(self._model.get_output_embeddings())
        self._model.set_output_embeddings(self._head)
        self.trained = self._by_saved_name(path)

    @classmethod
    def read(cls, path: Path, trained: Path, **settings: Any) -> "Student":
        """A trained one.

        Args:
            path: Checkpoint directory of the target.
            trained: Directory of the exit layer.
            settings: As for `Student`.

        Raises:
            ExitLayerError: If it is damaged, or another target's.
        """
        card = read_exit_card(trained)
        card.check_fits(TargetModel.read(path, str(path)), path)
        return cls(path, card.exit_layer, trained=trained, **settings)

    @property
    def hidden_size(self) -> int:
        """Of the target."""
        return int(self._model.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Of the target."""
        return int(self._model.config.vocab_size)

    @property
    def num_parameters(self) -> int:
        """That are trained."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def logits(self, token_ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """What it says comes next.

        Args:
            token_ids: `[num_rows, length]`; rows that are shorter are filled up with
                any tokens at the end, which nothing before them sees.
            where: The positions to answer at, of the same shape, bool.

        Returns:
            `[where.sum(), vocab_size]`, float32, row by row.
        """
        self._head.where = where
        # Parameters in float32, computation in `dtype`; in float32 there is no change.
        is_mixed = self._dtype != torch.float32
        with torch.autocast(self.device.type, self._dtype, enabled=is_mixed):
            found: torch.Tensor = self._model(token_ids, use_cache=False).logits
        return found.float()

    @contextmanager
    def without_exit_layer(self) -> Iterator[None]:
        """As an early exit without training is: N layers, norm and LM head."""

        def pass_on(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = self._layer.register_forward_hook(pass_on, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def recorded_states(self) -> Iterator[list[torch.Tensor]]:
        """Collects what enters the exit layer, `[num_rows, length, hidden_size]`."""
        found: list[torch.Tensor] = []

        def record(_: Any, args: Any, kwargs: Any) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        hook = self._layer.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield found
        finally:
            hook.remove()

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What is saved of it."""
        return {
            name: tensor.detach().to("cpu", dtype).contiguous()
            for name, tensor in self._saved(self.trained).items()
        }

    def _by_saved_name(self, path: Path) -> dict[str, nn.Parameter]:
        """Trained parameters; those that a family's checkpoint stores in another form
        (experts, one by one) keep the model's own name here."""
        prefix = f"{_name_of(self._model, self._layer)}."
        trained = {
            prefix + name: parameter
            for name, parameter in self._layer.named_parameters()
        }
        last = TargetModel.read(path, "").num_layers - 1
        known = {renumbered(name, 0) for name in names_of(path, last)}
        saved = self._saved(trained)
        if not {*saved} <= known:
            raise UnsupportedModelError(
                "an exit layer has the names of the target's own tensors, but this "
                f"target has no {sorted({*saved} - known)[0]!r}: families whose "
                "checkpoints name them otherwise cannot be trained yet"
            )
        return trained

    def _saved(self, trained: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """By the names of the target's checkpoint, with 0 for the layer's index."""
        from transformers.core_model_loading import revert_weight_conversion

        layer = {name: parameter.detach() for name, parameter in trained.items()}
        reverted: Any = revert_weight_conversion(self._model, layer)
        return {renumbered(name, 0): tensor for name, tensor in reverted.items()}


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    (name,) = (name for name, module in model.named_modules() if module is wanted)
    return str(name)
