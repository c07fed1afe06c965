"""`ServedExitLayer`: an exit layer in the engine, with a KV cache beside the target's.

One rule: it is a part of the target's forward. Whenever the target has run, the K and V
of the same tokens are written for the exit layer, too, in the same slots: prefill or
verification, whole or in chunks, eagerly or in a CUDA graph. So whatever vLLM does with
the blocks of the target's KV cache is right for the exit layer's: a hit of the prefix
cache, preemption, rejected drafts.

What enters the exit layer comes out of the first layers, which the target has just
run, by the interface that vLLM has for EAGLE-3 (auxiliary hidden states). One layer's K
and V need its norm and its projections alone, neither attention nor MLP; that is all
that is run for them.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.attention import (
    Attention,
    unified_kv_cache_update,
)
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_selfspec.plan.axis_exit_layer import TrainedExitLayer
from vllm_selfspec.plan.cost import CheckpointError
from vllm_selfspec.plan.exit_card import ExitCard, read_exit_card, tensors_file
from vllm_selfspec.plan.hub import DESCRIPTION, locate

logger = init_logger("vllm.selfspec")  # below vLLM's logger, so it is shown
PREFIX = "selfspec_exit"  # of the layer's name until it has its own
# The one-layer model that the exit layer is taken out of has hardly a vocabulary.
VOCAB_SIZE = 64


@dataclass(frozen=True)
class ServedExitLayer:
    """An exit layer, ready to draft.

    Attributes:
        index: N: it comes after so many of the target's layers.
        layer: vLLM's decoder layer of the target's own class.
    """

    index: int
    layer: nn.Module

    @classmethod
    def load(
        cls, value: TrainedExitLayer, target: Any, vllm_config: VllmConfig
    ) -> "ServedExitLayer":
        """That of a draft plan. From now on each forward of the target writes the exit
        layer's K and V, too.

        Raises:
            ExitLayerError: If it is missing or corrupt, or of a target with other
                weights.
        """
        directory = Path(value.directory)
        card = read_exit_card(directory)
        _check_weights(card, vllm_config.model_config)
        device = torch.device(vllm_config.device_config.device)
        tensors = load_file(tensors_file(directory), str(device))
        layer = _layer(target, vllm_config, tensors, device)
        own = layer.parameters()
        num_bytes = sum(one.numel() * one.element_size() for one in own)
        logger.info_once(
            "selfspec drafts with an exit layer after layer %d: %.1f MB of weights, "
            "and the KV cache of one layer more",
            card.exit_layer - 1,
            num_bytes / 1e6,
        )
        found = cls(card.exit_layer, layer)
        target.set_aux_hidden_state_layers((card.exit_layer,))
        writer = _KVOfLayer(layer)

        def write(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if module is not target:  # a draft view has the same hooks
                return output
            hidden_states, (entering,) = output
            writer(_argument("positions", 1, args, kwargs), entering)
            return hidden_states

        target.register_forward_hook(write, with_kwargs=True)
        return found


def _check_weights(card: ExitCard, model_config: ModelConfig) -> None:
    """Compares those of a target that was named as on the Hub: they are here by now,
    where they were not when the name was read."""
    try:
        path = locate(model_config.model, DESCRIPTION, model_config.revision)
    except CheckpointError:
        return
    card.check_weights(path)


def _argument(name: str, at: int, args: tuple[Any, ...], kwargs: Any) -> Any:
    return kwargs[name] if name in kwargs else args[at]


class _KVOfLayer(nn.Module):
    """Writes a decoder layer's K and V of some tokens, and runs nothing else of it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._norm = layer.input_layernorm
        self._attention = copy.copy(layer.self_attn)
        self._attention._modules = {
            **layer.self_attn._modules,
            "attn": _WriteKV(layer.self_attn.attn),
            "o_proj": _Pass(),
        }

    def forward(self, positions: torch.Tensor, entering: torch.Tensor) -> None:
        """For tokens at `positions` `[num_tokens]`, whose states on the way into the
        layer are `entering` `[num_tokens, hidden_size]`."""
        self._attention(positions=positions, hidden_states=self._norm(entering))


class _WriteKV(nn.Module):
    """Stands for vLLM's `Attention`: to the KV cache alone."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._name = attention.layer_name
        self._shape = (-1, attention.num_kv_heads, attention.head_size)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        unified_kv_cache_update(
            key.view(self._shape), value.view(self._shape), self._name
        )
        return query


class _Pass(nn.Module):
    """Stands for the output projection of nothing."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden_states, None


def _layer(
    target: nn.Module,
    vllm_config: VllmConfig,
    tensors: dict[str, torch.Tensor],
    device: torch.device,
) -> nn.Module:
    """The decoder layer, out of a model of the target's class that has no other."""
    single = _single_layer_config(vllm_config)
    model_config = single.model_config
    with set_default_torch_dtype(model_config.dtype), device:
        model: Any = initialize_model(
            vllm_config=single, prefix=PREFIX, model_class=type(target)
        )
    model.load_weights(tensors.items())
    process_weights_after_loading(model, model_config, device)
    (layer,) = model.model.layers
    _rename(layer.self_attn.attn, vllm_config)
    return layer  # type: ignore[no-any-return]


def _single_layer_config(vllm_config: VllmConfig) -> VllmConfig:
    """vLLM's configuration of the target, for one layer like its last; with weights as
    they were trained, where the target's are quantised."""
    found = copy.copy(vllm_config)
    found.quant_config = None
    found.model_config = copy.copy(vllm_config.model_config)
    config = copy.deepcopy(vllm_config.model_config.hf_config)
    config.num_hidden_layers, config.vocab_size = 1, VOCAB_SIZE
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = kinds[-1:]
    found.model_config.hf_config = found.model_config.hf_text_config = config
    return found


def _rename(attention: Attention, vllm_config: VllmConfig) -> None:
    """Calls the exit layer's attention what a layer after the target's last would be
    called, as vLLM does with layers of a draft model: it tells caches apart by the
    number in a name."""
    layers = vllm_config.compilation_config.static_forward_context
    layers.pop(attention.layer_name)
    last = max(layers, key=extract_layer_index)
    number = extract_layer_index(last)
    words = [str(number + 1) if w == str(number) else w for w in last.split(".")]
    attention.layer_name = ".".join(words)
    layers[attention.layer_name] = attention
