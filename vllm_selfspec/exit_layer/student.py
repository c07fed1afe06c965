"""`Student`: the target's first N layers, the exit layer, its last norm and LM head.

One rule: it is a model of the target's own Hugging Face class with N + 1 layers, the
last of which has the weights of the target's last. So no family needs code here, and no
more of the target is in memory than runs.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from vllm_selfspec.cost import LAYER, weight_files
from vllm_selfspec.exit_layer.card import TENSORS_FILE, read_exit_card
from vllm_selfspec.support import UnsupportedModelError, family_of
from vllm_selfspec.target_model import TargetModel

# Modules of a family's decoder that hold its layers.
LAYERS = ("layers", "h")
SAVED_BYTES = 2  # of a parameter, in bfloat16


class Student:
    """What is trained, in the place it is trained in.

    Attributes:
        exit_layer: N, the target's layers before the exit layer.
        head_rank: Of its own LM head; 0 for a full one, None for the target's.
        device: It runs on.
        trained: The parameters that are trained, float32, by the names that they are
            saved under.
    """

    def __init__(
        self,
        path: Path,
        exit_layer: int,
        head_rank: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        trained: Path | None = None,
    ) -> None:
        """Reads what it needs of the checkpoint in the directory `path`.

        Args:
            path: Of the target.
            exit_layer: N.
            head_rank: See the attribute.
            dtype: Of what is frozen, and of the computation.
            device: torch's name of it.
            trained: Directory of a head to begin with, which fits; None for the
                target's last layer and LM head.

        Raises:
            UnsupportedModelError: If the target cannot be cut there.
            CheckpointError: If the weights are missing.
        """
        self.exit_layer, self.head_rank = exit_layer, head_rank
        self.device, self._dtype = torch.device(device), dtype
        self._model = _cut(path, exit_layer, dtype, trained)
        self._model.requires_grad_(False).eval().to(self.device)
        self._layer = _layers(self._model)[exit_layer].float().requires_grad_()
        self._head = PickingHead(_own_head(self._model, head_rank))
        _load_own_head(self._head.inner, trained)
        self._model.set_output_embeddings(self._head)
        self.trained = self._by_saved_name(path)

    @classmethod
    def read(cls, path: Path, head: Path, **settings: Any) -> "Student":
        """A trained one.

        Args:
            path: Checkpoint directory of the target.
            head: Directory of the exit head.
            settings: As for `Student`.

        Raises:
            ExitHeadError: If the head is damaged, or another target's.
        """
        card = read_exit_card(head)
        card.check_fits(TargetModel.read(path, str(path)), path)
        return cls(path, card.exit_layer, card.head_rank, trained=head, **settings)

    @property
    def own_head(self) -> int | None:
        """Bytes of its own LM head as it is saved; None where it has the target's."""
        if self.head_rank is None:
            return None
        return SAVED_BYTES * sum(p.numel() for p in self._head.inner.parameters())

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
        found = {
            prefix + name: parameter
            for name, parameter in self._layer.named_parameters()
        }
        own = _saved_head(self._head.inner) if self.head_rank is not None else {}
        self._prefix = prefix
        trained = found | own
        last = TargetModel.read(path, "").num_layers - 1
        known = {_renumbered(name, 0) for name in _names(path, last)}
        saved = self._saved(found)
        if not {*saved} <= known:
            raise UnsupportedModelError(
                "an exit head has the names of the target's own tensors, but this "
                f"target has no {sorted({*saved} - known)[0]!r}: families whose "
                "checkpoints name them otherwise cannot be trained yet"
            )
        return trained

    def _saved(self, trained: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """By the names of the target's checkpoint, with 0 for the layer's index."""
        from transformers.core_model_loading import revert_weight_conversion

        layer = {
            n: p.detach() for n, p in trained.items() if n.startswith(self._prefix)
        }
        reverted: Any = revert_weight_conversion(self._model, layer)
        found = {_renumbered(name, 0): tensor for name, tensor in reverted.items()}
        return found | {n: p.detach() for n, p in trained.items() if n not in layer}


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


def _cut(path: Path, exit_layer: int, dtype: torch.dtype, trained: Path | None) -> Any:
    """The target's class, with N + 1 layers."""
    import transformers

    target = TargetModel.read(path, str(path))
    family_of(target.class_name)
    config: Any = transformers.AutoConfig.from_pretrained(path)
    _check_can_cut(target, config, exit_layer)
    config = _cut_config(config, target.num_layers, exit_layer)
    weights = _cut_weights(path, target.num_layers, exit_layer)
    if trained is not None:
        for name, tensor in load_file(trained / TENSORS_FILE).items():
            if LAYER.match(name):
                weights[_renumbered(name, exit_layer)] = tensor
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
                    found[_renumbered(name, exit_layer)] = tensors.get_tensor(name)
                elif index < exit_layer:
                    found[name] = tensors.get_tensor(name)
    return found


def _names(path: Path, index: int) -> Iterator[str]:
    """Tensors of one layer."""
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                if (layer := LAYER.match(name)) and int(layer["index"]) == index:
                    yield name


def _renumbered(name: str, index: int) -> str:
    """The same tensor of another layer."""
    layer = LAYER.match(name)
    if layer is None:
        return name
    start, end = layer.span("index")
    return f"{name[:start]}{index}{name[end:]}"


def _layers(model: Any) -> Any:
    for name in LAYERS:
        if hasattr(model.base_model, name):
            return getattr(model.base_model, name)
    raise UnsupportedModelError(
        f"a decoder keeps its layers in {' or '.join(LAYERS)}, but "
        f"{type(model).__name__} has neither: it cannot be trained yet"
    )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    (name,) = (name for name, module in model.named_modules() if module is wanted)
    return str(name)


def _own_head(model: Any, rank: int | None) -> nn.Module:
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


def _load_own_head(head: nn.Module, trained: Path | None) -> None:
    own = {} if trained is None else load_file(trained / TENSORS_FILE)
    with torch.no_grad():
        for name, parameter in _saved_head(head).items():
            if name in own:
                parameter.copy_(own[name])


def _saved_head(head: nn.Module) -> dict[str, nn.Parameter]:
    return {f"head.{name}": parameter for name, parameter in head.named_parameters()}
