"""`DraftView`: the target model, run without the sublayers of a skip set.

One rule: it owns no weights and no KV cache. Its modules are shallow copies of the
target's that share every parameter, buffer and attention layer with it; only skipped
sublayers are exchanged. Where an exit layer was trained for the target, the view runs
it after the layers that it comes after, and in place of those that follow.
"""

import copy
import inspect
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models import supports_multimodal

from vllm_selfspec.plan.families import Family, UnsupportedModelError
from vllm_selfspec.plan.skip_set import SUBLAYERS, SkipSet

# What attention, MLP and decoder layers of the supported families call their input.
INPUT_NAMES = ("hidden_states", "x")


class ExitLayer(Protocol):
    """What `exit_layer` loads.

    Attributes:
        index: N: it comes after so many of the target's layers.
        layer: A decoder layer of the target's class.
        head: An LM head of its own; None where it shares the target's.
    """

    @property
    def index(self) -> int: ...
    @property
    def layer(self) -> nn.Module: ...
    @property
    def head(self) -> nn.Module | None: ...


class _Skipped(nn.Module):
    """Finds the input among the arguments of the module it stands for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names = [*inspect.signature(module.forward).parameters]
        (self._input,) = (name for name in INPUT_NAMES if name in self._names)

    def _argument(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in kwargs:
            return kwargs[name]
        return args[self._names.index(name)]


class SkippedSublayer(_Skipped):
    """Stands for a sublayer that adds nothing to the residual stream."""

    def __init__(self, sublayer: nn.Module, returns_pair: bool = False) -> None:
        """For a sublayer that returns its output, or a pair of it and None."""
        super().__init__(sublayer)
        self._returns_pair = returns_pair

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Fresh each time: vLLM's fused add-and-norm writes into its input.
        zeros = torch.zeros_like(self._argument(self._input, args, kwargs))
        return (zeros, None) if self._returns_pair else zeros


class SkippedLayer(_Skipped):
    """Stands for a decoder layer that is skipped whole, norms included.

    A layer hands on its output, or its output and the residual stream that it is still
    to be added to; then it takes both.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states = self._argument(self._input, args, kwargs)
        if "residual" not in self._names:
            return hidden_states
        return hidden_states, self._argument("residual", args, kwargs)


class DraftView:
    """Runs the target's own modules minus a skip set.

    Attributes:
        model: The target as a module with the skipped sublayers exchanged; its forward
            and its `compute_logits` are the target's own.
        own_modules: The modules on the way from `model` to its list of layers. They are
            the view's, not the target's.
        is_compiled: Whether `model` runs compiled code; see `compile`.
        attn_layer_names: vLLM's names of the attention layers that still run.
    """

    def __init__(
        self,
        target: Any,
        skip_set: SkipSet,
        family: Family,
        exit_layer: ExitLayer | None = None,
    ) -> None:
        path, layers = _find_layers(target, skip_set.num_layers)
        drafting = nn.ModuleList(
            _draft_layer(layer, index, skip_set, family)
            for index, layer in enumerate(layers)
        )
        if exit_layer is not None:
            drafting[exit_layer.index] = exit_layer.layer
        self.model = _with_submodule(target, path.split("."), drafting)
        self.own_modules = _modules_on(self.model, path.split("."))
        if exit_layer is not None:
            self._take_out(exit_layer)
        self.is_compiled = False
        self.attn_layer_names = frozenset(
            module.layer_name
            for module in drafting.modules()
            if isinstance(module, AttentionLayerBase)
        )

    def _take_out(self, exit_layer: ExitLayer) -> None:
        """What the target does for an exit layer alone, and its head for another."""
        for module in self.own_modules:
            if hasattr(module, "aux_hidden_state_layers"):
                module.aux_hidden_state_layers = ()
        if exit_layer.head is not None:
            self.model.compute_logits = exit_layer.head.forward

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states after the final norm, `[num_tokens, hidden_size]`.

        Runs under a forward context of vLLM, as the target does. `input_ids` and
        `positions` are `[num_tokens]`.
        """
        hidden_states: torch.Tensor = self.model(input_ids, positions)
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """By the target's LM head, or the exit layer's: `[num_tokens, vocab_size]`."""
        logits: torch.Tensor = self.model.compute_logits(hidden_states)
        return logits


def _find_layers(target: Any, num_layers: int) -> tuple[str, nn.ModuleList]:
    """The one list of the target's decoder layers, and its path in the model."""
    # Towers for images and audio have layers, too.
    multimodal = supports_multimodal(target)
    text_model = target.get_language_model() if multimodal else target
    within = {*text_model.modules()}
    found = [
        (path, module)
        for path, module in target.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
        if module in within
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"selfspec looks for one list of {num_layers} decoder layers in "
            f"{type(target).__name__}, but found {[path for path, _ in found]}: "
            "serve this model without --speculative-config selfspec"
        )
    return found[0]


def _modules_on(module: nn.Module, path: list[str]) -> list[Any]:
    """`module` and its descendants along `path`, without the last."""
    names = [".".join(path[:length]) for length in range(len(path))]
    return [module.get_submodule(name) for name in names]


def _draft_layer(
    layer: nn.Module, index: int, skip_set: SkipSet, family: Family
) -> nn.Module:
    """The layer as the draft runs it: itself, a copy with holes, or nothing."""
    skipped = [which for which in SUBLAYERS if index in getattr(skip_set, which)]
    if len(skipped) == len(SUBLAYERS):
        return SkippedLayer(layer)
    for which in skipped:
        name = getattr(family, which)
        stand_in = SkippedSublayer(getattr(layer, name), which in family.pairs)
        layer = _with_submodule(layer, [name], stand_in)
    return layer


def _with_submodule(module: nn.Module, path: list[str], new: nn.Module) -> Any:
    """A shallow copy of `module` in which the submodule at `path` is `new`."""
    name, *rest = path
    if rest:
        new = _with_submodule(getattr(module, name), rest, new)
    clone = copy.copy(module)
    clone._modules = {**module._modules, name: new}
    # vLLM's Transformers backend gives modules a forward of their own, bound to them.
    for key, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            setattr(clone, key, MethodType(value.__func__, clone))
    return clone
