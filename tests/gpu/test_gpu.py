"""What only a GPU can show: CUDA graphs draft what eager steps draft, without waiting.

`benchmarks/gpu_smoke.py` has the figures: memory, speed, acceptance of a trained model.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.engines import Engines, drafter_of, greedy, prompts_of, run, token_ids
from helpers.models import NUM_LAYERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"enforce_eager": False, **GRAPHS},
    "compiled": {"enforce_eager": False},
}
NUM_DRAFTS = 4
MAX_TOKENS = 32
PLANS: dict[str, dict[str, Any]] = {
    "empty": {"skip_layers": {}},
    "middling": {"skip_layers": {"attention": [1], "mlp": [2]}},
    "exit": {"exit_layer": NUM_LAYERS // 2},
    "int4": {"skip_layers": {}, "draft_weights": "int4"},
    "schedule": {
        "exit_layer": NUM_LAYERS // 2,
        "num_speculative_tokens_per_batch_size": [[1, 2, 4], [3, 4, 1], [5, 8, 2]],
    },
}
SHARE = {"gpu_memory_utilization": 0.05}  # of the device, by each of the engines


def drafter(llm: Any) -> Any:
    return drafter_of(llm.collective_rpc(lambda worker: worker.model_runner)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plan", PLANS)
def test_text_is_plain_vllms_and_acceptance_that_of_eager_drafting(
    plan: str, mode: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    # 1 to 8 requests: batch sizes with a graph of their own, and padded ones. Where all
    # but one token of a prompt is cached, vLLM fills a request's first step up with
    # placeholders for drafts, and counts them.
    path, keys = tiny_models["llama"], {"num_speculative_tokens": NUM_DRAFTS}
    keys |= PLANS[plan]
    settings = {**SHARE, "enable_prefix_caching": False}
    plain = engines.get(path, **settings)
    eager = engines.get(path, keys, **settings)
    llm = engines.get(path, keys, **settings, **MODES[mode])
    for num_requests in (1, 3, 8):
        prompts = prompts_of(num_requests)
        expected, _ = run(plain, prompts, greedy(MAX_TOKENS))
        _, eager_counts = run(eager, prompts, greedy(MAX_TOKENS))
        found, counts = run(llm, prompts, greedy(MAX_TOKENS))
        assert token_ids(found) == token_ids(expected)
        if plan == "int4":  # on an H200 one of 46 was accepted at another position
            counts, eager_counts = (
                replace(each, accepted_at=()) for each in (counts, eager_counts)
            )
        assert counts == eager_counts, "a graph must not replay stale metadata"
        if plan == "empty":
            assert counts.accepted_tokens == counts.draft_tokens > 0


def test_every_batch_size_and_number_of_drafts_has_a_graph(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    keys = {"num_speculative_tokens": NUM_DRAFTS, **PLANS["schedule"]}
    llm = engines.get(tiny_models["llama"], keys, **SHARE, **MODES["graphs"])
    speculator = drafter(llm)
    graphs = speculator.decode_cudagraph_manager.graphs
    assert graphs
    if speculator.supports_decode_metadata_update:
        lengths = {desc.num_speculative_tokens for desc in graphs}
        assert lengths == {1, 2, 4}, "those of the schedule"


def test_drafting_never_waits_for_the_device(
    tiny_models: dict[str, str],
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"num_speculative_tokens": NUM_DRAFTS, **PLANS["exit"]}
    llm = engines.get(tiny_models["llama"], keys, **SHARE, **MODES["graphs"])
    run(llm, prompts_of(8), greedy(MAX_TOKENS))  # kernels are compiled
    speculator = drafter(llm)
    propose, num_calls = type(speculator).propose, 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        torch.cuda.set_sync_debug_mode("error")  # what waits, raises
        try:
            return propose(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(type(speculator), "propose", watched)
    run(llm, prompts_of(8), greedy(MAX_TOKENS))
    assert num_calls > 0
    from vllm import SamplingParams

    drawn = {"temperature": 1.0, "top_k": 9, "repetition_penalty": 1.2, "seed": 7}
    run(llm, prompts_of(8), SamplingParams(max_tokens=MAX_TOKENS, **drawn))


def test_weights_and_kv_blocks_are_those_of_plain_vllm(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    path = tiny_models["llama"]
    found = []
    for keys in (None, {"exit_layer": NUM_LAYERS // 2}):
        llm = engines.get(path, keys, **SHARE, **MODES["graphs"])
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        models = [runner.model]
        if keys is not None:
            models.append(drafter(llm)._view.model)
        storages = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for model in models
            for p in model.parameters()
        }
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        found.append((sum(storages.values()), blocks))
    assert found[0] == found[1]


def test_text_over_vllms_ray_executor(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    """Which vLLM's CPU platform refuses; test_ray has what is sent over it."""
    pytest.importorskip("ray")
    path = tiny_models["llama"]
    keys = {"num_speculative_tokens": NUM_DRAFTS, **PLANS["middling"]}
    by_ray = {"distributed_executor_backend": "ray", **SHARE}
    expected, _ = run(engines.get(path, **SHARE), prompts_of(8), greedy(MAX_TOKENS))
    found, counts = run(
        engines.get(path, keys, **by_ray), prompts_of(8), greedy(MAX_TOKENS)
    )
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens


def test_text_after_sleep_and_wake(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    """The view must draft with the weights where they are after waking."""
    path = tiny_models["llama"]
    keys = {"num_speculative_tokens": NUM_DRAFTS, **PLANS["middling"]}
    llm = engines.get(path, keys, enable_sleep_mode=True, **SHARE, **MODES["graphs"])
    before, counts_before = run(llm, prompts_of(8), greedy(MAX_TOKENS))
    llm.sleep(level=1)
    llm.wake_up()
    after, counts_after = run(llm, prompts_of(8), greedy(MAX_TOKENS))
    assert token_ids(after) == token_ids(before)
    assert counts_after == counts_before
