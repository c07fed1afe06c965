"""`LowBitCopies`: linear layers of the target with their weights in fewer bits.

One rule: a copy is vLLM's own module with another `quant_method`. Sharding, biases,
fused projections and adapters are therefore as in the target, and no model is known by
name. Copies are taken while the target is loaded, because vLLM packs its weights next.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import (
    FusedMoEMethodBase,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models import supports_multimodal

from vllm_selfspec.draft.low_bit_linear import NoKernelError, low_bit_copy
from vllm_selfspec.draft.view import find_layers
from vllm_selfspec.plan.axis_draft_weights import HEAD, SAME, DraftWeights
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.families import family_of
from vllm_selfspec.plan.skip_set import SUBLAYERS
from vllm_selfspec.served_config import tunes_online

logger = init_logger("vllm.selfspec")  # below vLLM's logger, so it is shown


@dataclass
class LowBitCopies:
    """What a draft view exchanges.

    Attributes:
        parts: By part of the model, copies by what they are of.
        left: Why others were left as they are.
    """

    parts: dict[str, dict[nn.Module, Any]] = field(
        default_factory=lambda: {part: {} for part in DraftWeights().by_part}
    )
    left: set[str] = field(default_factory=set)

    def add(self, part: str, module: Any, word: str) -> None:
        """Makes a copy, if there is a kernel for it."""
        try:
            self.parts[part][module] = low_bit_copy(module, word)
        except NoKernelError as error:
            self.left.add(str(error))

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(method.num_bytes for method in self._methods())

    @property
    def may_compile(self) -> bool:
        """Whether compiled code drafts with all of them as eager code does."""
        return all(method.may_compile for method in self._methods())

    @property
    def kernels(self) -> set[str]:
        """vLLM's names of what computes with them."""
        return {method.kernel for method in self._methods()}

    def _methods(self) -> Iterator[Any]:
        for copies in self.parts.values():
            for copy in copies.values():
                yield copy.quant_method


# Between the loading of a target and the making of its draft view.
_taken: WeakKeyDictionary[nn.Module, LowBitCopies] = WeakKeyDictionary()


@torch.no_grad()
def take_copies(plan: DraftPlan, target: nn.Module, vllm_config: VllmConfig) -> None:
    """Copies what a plan runs, layer by layer."""
    copies, words = LowBitCopies(), plan["draft_weights"].by_part
    if vllm_config.quant_config is not None:
        copies.left.add("weights that are quantised already")
    else:
        for part, module in _linears(plan, target, vllm_config, copies.left):
            copies.add(part, module, words[part])
        if words[HEAD] != SAME:
            for module in _heads(target, vllm_config, copies.left):
                copies.add(HEAD, module, words[HEAD])
    _taken[_key(target)] = copies
    logger.info_once(
        "selfspec keeps %d linear layers in fewer bits beside the target: %.1f MB, for "
        "vLLM's kernel %s",
        sum(map(len, copies.parts.values())),
        copies.num_bytes / 1e6,
        " and ".join(sorted(copies.kernels)) or "(none)",
    )
    for reason in sorted(copies.left):
        logger.info_once("selfspec drafts with %s as they are", reason)


def copies_of(
    value: DraftWeights, target: nn.Module, vllm_config: VllmConfig
) -> LowBitCopies:
    """Those that were taken of a target.

    Raises:
        RuntimeError: If vLLM loaded it without processing its weights.
    """
    copies = _taken.pop(_key(target), None)
    if copies is None:
        raise RuntimeError(
            "selfspec takes low-bit copies while vLLM processes the weights that it "
            f"loaded, but load_format {vllm_config.load_config.load_format!r} brings "
            "processed ones: use another, or leave out draft_weights"
        )
    return copies


def _key(target: nn.Module) -> nn.Module:
    """LoRA wraps modules of a model; this one stays."""
    return next(m for m in target.modules() if isinstance(m, nn.ModuleList))


def _linears(
    plan: DraftPlan, target: nn.Module, vllm_config: VllmConfig, left: set[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers that a plan runs in fewer bits, with their parts; with a search
    while serving, which tries other skip sets, those of every layer."""
    family = family_of(vllm_config.model_config.architecture)
    _, layers = find_layers(target, plan.num_layers)
    for index, layer in enumerate(layers):
        for which in SUBLAYERS:
            word = getattr(plan["draft_weights"], which)
            is_skipped = index in getattr(plan.skip_set, which)
            if word == SAME or (is_skipped and not tunes_online(vllm_config)):
                continue
            for linear in _within(getattr(layer, getattr(family, which)), left):
                yield which, linear


def _within(sublayer: nn.Module, left: set[str]) -> list[nn.Module]:
    """The linear layers of a sublayer that its forward calls. With experts there are
    none: what their router says must be what the target's says."""
    modules = [*sublayer.modules()]
    methods = [getattr(module, "quant_method", None) for module in modules]
    if any(isinstance(method, FusedMoEMethodBase) for method in methods):
        left.add("experts")
        return []
    of_attention = {
        module
        for attention in modules
        if isinstance(attention, AttentionLayerBase)
        for module in attention.modules()
    }
    return [
        module
        for module, method in zip(modules, methods, strict=True)
        if isinstance(module, LinearBase)
        and isinstance(method, UnquantizedLinearMethod)
        if module not in of_attention
    ]


def _heads(target: Any, vllm_config: VllmConfig, left: set[str]) -> Iterator[nn.Module]:
    """The LM head, which is the embedding where the two are tied."""
    config = vllm_config.model_config
    if config.head_dtype != config.dtype:
        left.add("an LM head of another dtype")
        return
    model = target.get_language_model() if supports_multimodal(target) else target
    embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    heads = [m for m in embeddings if isinstance(m, ParallelLMHead)] or embeddings
    if len(heads) == 1 and isinstance(
        heads[0].quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod
    ):
        yield heads[0]
    else:
        left.add("an LM head of another kind")
