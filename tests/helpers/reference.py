"""What a draft must be, by Hugging Face's modules: slow, and independent of vLLM's."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.environment import IS_V2
from vllm_selfspec.plan.exit_card import CARD_FILE, tensors_file
from vllm_selfspec.plan.skip_set import SUBLAYERS, SkipSet

# Of a layer: the modules whose output is added to the residual stream.
ADDED = ("self_attn", "mlp")


@contextmanager
def recorded_drafts() -> Iterator[list[tuple[int, list[int]]]]:
    """Records, for each propose, the number of tokens that the first request has, and
    its draft."""
    recorded: list[tuple[int, list[int]]] = []

    def record_v1(self: Any, runner: Any, *args: Any) -> Any:
        result = original(self, runner, *args)
        num_tokens = int(runner.input_batch.num_tokens_no_spec[0])
        recorded.append((num_tokens, result.token_ids[0]))
        return result

    def record_v2(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        num_rejected = args[5]
        last = int(input_batch.query_start_loc[1] - 1 - num_rejected[0])
        # The newest token comes after the last accepted one, and counts too.
        num_tokens = int(input_batch.positions[last]) + 2
        result = original(self, input_batch, *args, **kwargs)
        recorded.append((num_tokens, result[0].tolist()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        if IS_V2:
            from vllm_selfspec.draft.v2_speculator import SelfSpecSpeculator

            original = SelfSpecSpeculator.propose
            patch.setattr(SelfSpecSpeculator, "propose", record_v2)
        else:
            from vllm_selfspec.draft.v1_proposer import SelfSpecProposer

            original = SelfSpecProposer.propose_for_runner
            patch.setattr(SelfSpecProposer, "propose_for_runner", record_v1)
        yield recorded


@cache
def _process() -> ProcessPoolExecutor:
    """One without vLLM, whose Transformers backend changes Hugging Face's classes."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def reference_draft(
    path: str,
    skip_set: SkipSet,
    context: list[int],
    num_drafts: int,
    added: tuple[str, str] = ADDED,
    exit_layer: Path | None = None,
) -> list[int]:
    """Drafts on the whole model's KV of the context, adding nothing to the residual
    stream where the skip set says so.

    Args:
        path: A checkpoint.
        skip_set: What the draft leaves out.
        context: Token ids, with the newest.
        num_drafts: Tokens to draft.
        added: Names within a layer of what attention and MLP add: the last module
            before the sum.
        exit_layer: Directory of one; its layer stands for the last layers, which the
            skip set leaves out whole.
    """
    arguments = (path, skip_set, context, num_drafts, added, exit_layer)
    return _process().submit(_draft, *arguments).result()


def _draft(
    path: str,
    skip_set: SkipSet,
    context: list[int],
    num_drafts: int,
    added: tuple[str, str],
    exit_layer: Path | None,
) -> list[int]:
    model, layers = _model(path, exit_layer)
    last = len(layers) - (exit_layer is not None)
    with torch.no_grad():
        kv_cache = model(torch.tensor([context[:-1]]), use_cache=True).past_key_values
        for sublayer, name in zip(SUBLAYERS, added, strict=True):
            for index in (i for i in getattr(skip_set, sublayer) if i < last):
                layers[index].get_submodule(name).register_forward_hook(_nothing)
        drafted: list[int] = []
        for step in range(num_drafts):
            logits = model(
                torch.tensor([[drafted[-1] if drafted else context[-1]]]),
                position_ids=torch.tensor([[len(context) - 1 + step]]),
                past_key_values=kv_cache,
            ).logits
            drafted.append(int(logits[0, -1].argmax()))
    return drafted


def reference_exit_logits(
    path: str, exit_layer: Path, context: list[int], drafted: list[int]
) -> torch.Tensor:
    """What an exit layer says after a context and each drafted token but the last,
    `[len(drafted), vocab_size]`; all tokens are run anew, on no KV cache."""
    return _process().submit(_logits, path, exit_layer, context, drafted).result()


def _logits(
    path: str, exit_layer: Path, context: list[int], drafted: list[int]
) -> torch.Tensor:
    model, _ = _model(path, exit_layer)
    with torch.no_grad():
        tokens = torch.tensor([[*context, *drafted[:-1]]])
        found = model(tokens, use_cache=False).logits[0, -len(drafted) :]
    return found  # type: ignore[no-any-return]


def _model(path: str, exit_layer: Path | None) -> tuple[Any, nn.ModuleList]:
    """The model, and its decoder layers; with an exit layer, the model that it drafts
    with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    num_layers = model.config.num_hidden_layers
    layers = next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    )
    if exit_layer is not None:
        _take_exit(model, layers, exit_layer)
    return model, layers


def _take_exit(model: Any, layers: nn.ModuleList, directory: Path) -> None:
    """In place: the head's layer after the first N."""
    tensors = load_file(tensors_file(directory))
    exit_layer = json.loads((directory / CARD_FILE).read_text())["exit_layer"]
    del layers[exit_layer + 1 :]
    layers[-1].load_state_dict(
        {name.removeprefix("model.layers.0."): t for name, t in tensors.items()}
    )
    model.config.num_hidden_layers = exit_layer + 1
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = [*kinds[:exit_layer], kinds[-1]]


def _nothing(_module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)
