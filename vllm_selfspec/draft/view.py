"""`DraftView`: the target model, run as a draft plan says.

One rule: it owns no weights and no KV cache. Its modules are shallow copies of the
target's that share every parameter, buffer and attention layer with it; only what the
axes of the plan exchange is another. What they exchange it for, and what that needs
loaded beside the target, is in the file of each axis.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from types import MethodType
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models import supports_multimodal

from vllm_selfspec.plan.axes import AXES
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.families import Family, UnsupportedModelError, family_of
from vllm_selfspec.plan.skip_set import SUBLAYERS
from vllm_selfspec.served_config import plan_of

# What attention, MLP and decoder layers of the supported families call their input.
INPUT_NAMES = ("hidden_states", "x")


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


class OwnHead(nn.Module):
    """Stands for vLLM's `LogitsProcessor`: hands it another LM head.

    Attributes:
        copies: What it hands over, by the target's.
    """

    def __init__(self, processor: nn.Module, copies: Mapping[Any, Any]) -> None:
        super().__init__()
        self._processor, self.copies = processor, copies

    def forward(self, lm_head: Any, *args: Any, **kwargs: Any) -> Any:
        lm_head = getattr(lm_head, "base_layer", lm_head)  # of a LoRA layer
        return self._processor(self.copies.get(lm_head, lm_head), *args, **kwargs)


class ViewBuilder:
    """A draft view in the making: what axes change.

    Attributes:
        model: The target as a module of the view's own, whose `compute_logits` may be
            exchanged.
        layers: Its decoder layers, in a list of the view's own.
        own_modules: The modules on the way from `model` to `layers`. They are the
            view's, not the target's.
        may_compile: Whether the view drafts the same when it is compiled.
        window: The last tokens that attention reads, beside the first block, or below 1
            which share of all; None where it reads all.
    """

    may_compile = True
    window: float | None = None

    def __init__(self, target: Any, num_layers: int, family: Family) -> None:
        path, layers = find_layers(target, num_layers)
        self._family = family
        self.layers = nn.ModuleList(layers)
        self.model = _with_submodule(target, path.split("."), self.layers)
        self.own_modules = _modules_on(self.model, path.split("."))

    def skip(self, index: int, sublayers: Sequence[str]) -> None:
        """Leaves sublayers of a layer out; with all of them, the layer."""
        layer = self.layers[index]
        if len(sublayers) == len(SUBLAYERS):
            self.layers[index] = SkippedLayer(layer)
            return
        for which in sublayers:
            sublayer = getattr(layer, getattr(self._family, which))
            stand_in = SkippedSublayer(sublayer, which in self._family.pairs)
            self.replace_sublayer(index, which, stand_in)

    def replace_sublayer(self, index: int, which: str, new: nn.Module) -> None:
        """Runs `new` in place of a layer's attention or MLP."""
        name = getattr(self._family, which)
        self.layers[index] = _with_submodule(self.layers[index], [name], new)

    def replace(self, index: int, layer: nn.Module) -> None:
        """Runs `layer` in place of one of the target's."""
        self.layers[index] = layer

    def exchange(self, copies: Mapping[nn.Module, nn.Module]) -> None:
        """Runs copies in place of modules within the layers, wherever they are."""
        for index, layer in enumerate(self.layers):
            self.layers[index] = _exchanged(layer, copies)

    def exchange_head(self, copies: Mapping[nn.Module, nn.Module]) -> None:
        """Computes logits with a copy of the LM head, whichever module that is."""
        for module in self.own_modules:
            for name, child in module._modules.items():
                if isinstance(child, LogitsProcessor | LogitsProcessorWithLoRA):
                    module._modules[name] = OwnHead(child, copies)

    def take_out_aux_hidden_states(self) -> None:
        """Does not hand out the states between layers, which the target may."""
        for module in self.own_modules:
            if hasattr(module, "aux_hidden_state_layers"):
                module.aux_hidden_state_layers = ()


class LoadedTarget:
    """A loaded target, and what the axes of its plans load beside it, once.

    Attributes:
        target: The model.
    """

    def __init__(self, target: nn.Module, plan: DraftPlan, vllm_config: Any) -> None:
        """For plans that need no more loaded than `plan`, the first."""
        self.target = target
        self._family = family_of(vllm_config.model_config.architecture)
        self._loaded = {
            name: resolve_name(loader)(value, target, vllm_config)
            for name, value in plan.values
            if (loader := AXES.named(name).loader) is not None
        }

    def release(self) -> None:
        """Gives back what was loaded; from now on the target alone can be run."""
        self._loaded.clear()

    def view(self, plan: DraftPlan) -> "DraftView":
        """The target, run as a plan says."""
        builder = ViewBuilder(self.target, plan.num_layers, self._family)
        for name, value in plan.values:
            AXES.named(name).build(value, builder, self._loaded.get(name))
        return DraftView(builder)


class DraftView:
    """Runs the target's own modules as a draft plan says.

    Attributes:
        model: The target as a module of the view's own; its forward and its
            `compute_logits` are the target's own where no axis exchanged them.
        own_modules: See `ViewBuilder`.
        may_compile: See `ViewBuilder`.
        is_compiled: Whether `model` runs compiled code; see `compile`.
        window: See `ViewBuilder`.
        attn_layer_names: vLLM's names of the attention layers that run.
    """

    def __init__(self, built: ViewBuilder) -> None:
        self.window = built.window
        self.model, self.own_modules = built.model, built.own_modules
        self.may_compile, self.is_compiled = built.may_compile, False
        self.attn_layer_names = frozenset(
            module.layer_name
            for module in built.layers.modules()
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
        """By the target's LM head: `[num_tokens, vocab_size]`."""
        logits: torch.Tensor = self.model.compute_logits(hidden_states)
        return logits


def take_weights(target: nn.Module, vllm_config: Any) -> None:
    """Lets the axes of the plan take what they need of a target that is loaded, while
    its weights are as they were loaded."""
    plan = plan_of(vllm_config)
    for name, _ in plan.values:
        if (taker := AXES.named(name).taker) is not None:
            resolve_name(taker)(plan, target, vllm_config)


def find_layers(target: Any, num_layers: int) -> tuple[str, nn.ModuleList]:
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


def _with_submodule(module: nn.Module, path: list[str], new: nn.Module) -> Any:
    """A shallow copy of `module` in which the submodule at `path` is `new`."""
    name, *rest = path
    if rest:
        new = _with_submodule(getattr(module, name), rest, new)
    return _with_children(module, {name: new})


def _exchanged(module: nn.Module, copies: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """`module`, or a shallow copy of it in which copies stand for what they are of."""
    if module in copies:
        return copies[module]
    children = {
        name: new
        for name, child in module.named_children()
        # vLLM finds an attention layer, and its KV, by its name.
        if not isinstance(child, AttentionLayerBase)
        and (new := _exchanged(child, copies)) is not child
    }
    if not children:
        return module
    clone: nn.Module = _with_children(module, children)
    return clone


def _with_children(module: nn.Module, children: Mapping[str, nn.Module]) -> Any:
    """A shallow copy of `module` with some children exchanged."""
    clone = copy.copy(module)
    clone._modules = {**module._modules, **children}
    # vLLM's Transformers backend gives modules a forward of their own, bound to them.
    for key, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            setattr(clone, key, MethodType(value.__func__, clone))
    return clone
