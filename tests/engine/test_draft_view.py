"""The draft view runs the target's own modules, owns nothing, skips what it should."""

from collections import Counter
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from helpers.engines import Engines, drafter_of, greedy, prompts_of, run, token_ids
from helpers.environment import IS_V2
from helpers.models import FAMILIES, NUM_LAYERS
from helpers.reference import recorded_drafts, reference_draft
from vllm_selfspec.plan.skip_set import SkipSet

pytestmark = pytest.mark.v2
PLANS: dict[str, dict[str, Any]] = {
    "middling": {"skip_layers": {"attention": [1, 3], "mlp": [2, 3]}},
    "absurd": {"skip_layers": {"attention": [0, 1, 2], "mlp": [0, 1, 2, 3]}},
    "first layer": {"skip_layers": {"attention": [0], "mlp": [0]}},
    "exit": {"exit_layer": 2},
}
SKIPPED = {
    "middling": ({1, 3}, {2, 3}),
    "absurd": ({0, 1, 2}, {0, 1, 2, 3}),
    "first layer": ({0}, {0}),
    "exit": ({2, 3}, {2, 3}),
}


def on_worker(llm: Any, function: Any) -> Any:
    return llm.collective_rpc(function)[0]


def memory(worker: Any) -> dict[str, int]:
    runner = worker.model_runner
    modules = [runner.model]
    if drafter_of(runner) is not None:
        modules.append(drafter_of(runner)._view.model)
    tensors = {
        t.data_ptr(): t.numel() * t.element_size()
        for module in modules
        for t in (*module.parameters(), *module.buffers())
        if t.numel()
    }
    return {
        "weight bytes": sum(tensors.values()),
        "KV blocks": worker.cache_config.num_gpu_blocks,
        "KV bytes": sum(kv.numel() * kv.element_size() for kv in runner.kv_caches),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weights_and_no_kv_cache_are_added(
    family: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    plain = on_worker(engines.get(tiny_models[family]), memory)
    drafting = on_worker(engines.get(tiny_models[family], PLANS["middling"]), memory)
    assert drafting == plain
    assert plain["KV blocks"] > 0 and plain["weight bytes"] > 0


def calls_while_drafting(worker: Any, run_drafts: Any) -> Counter[tuple[str, int]]:
    """How often each sublayer of the target runs in a draft step."""
    runner = worker.model_runner
    calls: Counter[tuple[str, int]] = Counter()
    handles = []
    for index, layer in enumerate(runner.model.model.layers):
        for name in ("self_attn", "mlp"):
            module = getattr(layer, name)

            def count(*_: Any, key: tuple[str, int] = (name, index)) -> None:
                calls[key] += 1

            handles.append(module.register_forward_pre_hook(count))
    run_drafts()
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("plan", PLANS)
def test_a_draft_runs_the_kept_sublayers_and_no_other(
    plan: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    llm = engines.get(tiny_models["llama"], PLANS[plan])
    worker = on_worker(llm, lambda worker: worker)
    calls: Counter[tuple[str, int]] = Counter()
    drafter = drafter_of(worker.model_runner)
    original = drafter._draft

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = []
        calls.update(
            calls_while_drafting(
                worker, lambda: result.append(original(*args, **kwargs))
            )
        )
        return result[0]

    drafter._draft = counted
    try:
        run(llm, prompts_of(2), greedy(12))
    finally:
        del drafter._draft
    attention, mlp = SKIPPED[plan]
    every = {("self_attn", i) for i in range(NUM_LAYERS) if i not in attention}
    every |= {("mlp", i) for i in range(NUM_LAYERS) if i not in mlp}
    assert set(calls) == every
    assert len(set(calls.values())) == 1, "a kept sublayer ran more often than another"


def wrong_drafts(path: str, plan: str, engines: Engines) -> int:
    """How many of the first drafts are not what the reference drafts: the one after
    the prefill, and those after rejections."""
    attention, mlp = SKIPPED[plan]
    skip_set = SkipSet.of(NUM_LAYERS, attention=attention, mlp=mlp)
    prompts = prompts_of(1, shortest=20)
    with recorded_drafts() as drafts:
        outputs, counts = run(engines.get(path, PLANS[plan]), prompts, greedy(10))
    assert counts.accepted_tokens < counts.draft_tokens, "nothing was rejected"
    sequence = prompts[0]["prompt_token_ids"] + token_ids(outputs)[0][0]
    assert len(drafts) >= 3
    return sum(
        drafted != reference_draft(path, skip_set, sequence[:num_tokens], len(drafted))
        for num_tokens, drafted in drafts[:3]
    )


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_are_those_of_a_model_without_the_sublayers(
    family: str,
    plan: str,
    tiny_models: dict[str, str],
    engines: Engines,
) -> None:
    assert wrong_drafts(tiny_models[family], plan, engines) == 0


@pytest.mark.skipif(
    not IS_V2, reason="in V1 the runner itself counts no rejected token"
)
def test_reading_the_kv_of_rejected_tokens_is_noticed(
    tiny_models: dict[str, str],
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_selfspec.draft import v2_speculator

    right = v2_speculator.prepare_decode_inputs

    def untrimmed(newest: Any, seq_lens: Any, num_rejected: Any, *args: Any) -> None:
        right(newest, seq_lens, torch.zeros_like(num_rejected), *args)

    monkeypatch.setattr(v2_speculator, "prepare_decode_inputs", untrimmed)
    path = tiny_models["llama"]
    assert wrong_drafts(path, "middling", engines) > 0


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    from vllm_selfspec.draft.view import ViewBuilder
    from vllm_selfspec.plan.families import Family, UnsupportedModelError

    target = torch.nn.Module()
    target.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModelError, match="one list of 4 decoder layers"):
        ViewBuilder(target, 4, Family())


def test_a_forward_that_is_bound_to_a_module_is_bound_to_its_copy() -> None:
    """As vLLM's Transformers backend binds them."""
    from vllm_selfspec.draft.view import _with_submodule

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x)
        return found

    outer = nn.Module()
    outer.inner = nn.Identity()
    outer.forward = MethodType(forward, outer)
    double = nn.Linear(1, 1, bias=False)
    nn.init.constant_(double.weight, 2)
    clone = _with_submodule(outer, ["inner"], double)
    one = torch.ones(1)
    assert clone(one) == 2, "the copy runs what was exchanged in it"
    assert outer(one) == 1
