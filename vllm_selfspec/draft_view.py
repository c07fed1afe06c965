"""`DraftView`: the target model, run without the sublayers of a skip set.

One rule: it owns no weights and no KV cache. Its modules are shallow copies of the
target's that share every parameter, buffer and attention layer with it; only skipped
sublayers are exchanged.
"""

import copy
import inspect
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_selfspec.skip_set import SkipSet
from vllm_selfspec.support import Family, UnsupportedModelError


class SkippedSublayer(nn.Module):
    """Stands for a sublayer that adds nothing to the residual stream."""

    def __init__(self, sublayer: nn.Module) -> None:
        super().__init__()
        # The hidden states are the last parameter without a default of every attention
        # (positions, hidden_states) and MLP (x) forward in the supported families.
        parameters = inspect.signature(sublayer.forward).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty]
        self._name, self._position = required[-1], len(required) - 1

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        hidden_states = kwargs.get(self._name)
        if hidden_states is None:
            hidden_states = args[self._position]
        # Fresh each time: vLLM's fused add-and-norm writes into its input.
        return torch.zeros_like(hidden_states)


class SkippedLayer(nn.Module):
    """Stands for a decoder layer that is skipped whole, norms included."""

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return hidden_states, residual


class DraftView:
    """Runs the target's own modules minus a skip set.

    Attributes:
        model: The target as a module with the skipped sublayers exchanged; its forward
            and its `compute_logits` are the target's own.
        own_modules: The modules on the way from `model` to its list of layers. They are
            the view's, not the target's.
        is_compiled: Whether `model` runs compiled code; see `draft_compile`.
        attn_layer_names: vLLM's names of the attention layers that still run.
    """

    def __init__(self, target: Any, skip_set: SkipSet, family: Family) -> None:
        path, layers = _find_layers(target, skip_set.num_layers)
        drafting = nn.ModuleList(
            _draft_layer(layer, index, skip_set, family)
            for index, layer in enumerate(layers)
        )
        self.model = _with_submodule(target, path.split("."), drafting)
        self.own_modules = _modules_on(self.model, path.split("."))
        self.is_compiled = False
        self.attn_layer_names = frozenset(
            module.layer_name
            for module in drafting.modules()
            if isinstance(module, AttentionLayerBase)
        )

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
        """The target's own LM head: `[num_tokens, vocab_size]`."""
        logits: torch.Tensor = self.model.compute_logits(hidden_states)
        return logits


def _find_layers(target: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    """The one list of the target's decoder layers, and its path in the model."""
    found = [
        (path, module)
        for path, module in target.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
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
    names = [
        name
        for name, skipped in (
            (family.attention, skip_set.attention),
            (family.mlp, skip_set.mlp),
        )
        if index in skipped
    ]
    if len(names) == 2:
        return SkippedLayer()
    for name in names:
        layer = _with_submodule(layer, [name], SkippedSublayer(getattr(layer, name)))
    return layer


def _with_submodule(module: nn.Module, path: list[str], new: nn.Module) -> Any:
    """A shallow copy of `module` in which the submodule at `path` is `new`."""
    name, *rest = path
    if rest:
        new = _with_submodule(getattr(module, name), rest, new)
    clone = copy.copy(module)
    clone._modules = {**module._modules, name: new}
    return clone
