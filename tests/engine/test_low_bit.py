"""Drafts of the target's own weights in fewer bits leave its output alone."""

import ctypes
import gc
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_lora import SETTINGS as LORA
from test_lora import build_adapter
from test_tensor_parallel import IN_FULL, TWO, a_core_each  # noqa: F401

from helpers.engines import Engines, drafter_of, greedy, prompts_of, run, token_ids
from helpers.environment import IS_V2
from helpers.models import DEMO_MODEL, NUM_LAYERS, build_tiny_model
from vllm_selfspec.bench.tasks import load
from vllm_selfspec.cli.preview import Preview
from vllm_selfspec.draft import low_bit_linear
from vllm_selfspec.draft.low_bit import copies_of
from vllm_selfspec.draft.low_bit_linear import (
    CPUInt4,
    Int4,
    LowBitMethod,
    OfScheme,
    low_bit_copy,
)
from vllm_selfspec.draft.view import OwnHead
from vllm_selfspec.engine.measure import measure_sublayers
from vllm_selfspec.plan.axis_draft_weights import DraftWeights
from vllm_selfspec.plan.draft_plan import DraftPlan

BY_PART = {"attention": "int8", "mlp": "int4", "head": "int4"}
NUM_DRAFTS = 3
# First draft tokens of a random model that are accepted at least. A coarse copy of it
# says less often the same than one of a trained model; chance says it hardly ever.
LIKE = 0.2
# Rounding to 15 steps leaves .10 of a normal distribution's weights, to 255 by row and
# activations by token about .01.
MAX_ERROR = {"int8": 0.03, "int4": 0.15}
NUM_PROMPTS, MAX_TOKENS = (2, 8) if IS_V2 else (6, 20)
# What else can be in a layer: biases, a fused projection, an LM head that is the
# embedding and is never called so, sublayers side by side.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "phi3": {},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 48},
    "llama": {"tie_word_embeddings": True},
    "cohere": {"tie_word_embeddings": True},
}
WEIGHTS: list[Any] = ["int8", "int4", BY_PART]
if IS_V2:  # in the interpreter each takes long
    MODELS, WEIGHTS = {"qwen2": {}}, [BY_PART]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("low_bit")
    return {
        name: str(build_tiny_model(name, directory, **keys))
        for name, keys in MODELS.items()
    }


def spec(weights: Any, **keys: Any) -> dict[str, Any]:
    return {"draft_weights": weights, "num_speculative_tokens": NUM_DRAFTS, **keys}


def copies_in(llm: Any) -> list[Any]:
    """What the draft of the engine's one worker runs of them: the LM head last."""
    view = drafter_of(llm.collective_rpc(lambda w: w.model_runner)[0])._view
    modules = [*view.model.modules()]
    heads = [h for m in modules if isinstance(m, OwnHead) for h in m.copies.values()]
    found = [*modules, *heads]
    # A LoRA layer says what the layer has that it is over.
    found = [m for m in found if "quant_method" in vars(m)]
    return [m for m in found if isinstance(m.quant_method, LowBitMethod)]


@pytest.mark.v2
@pytest.mark.shows("Engine", "drafts in 8 and 4 bits")
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_plain_vllms(
    name: str, weights: Any, models: dict[str, str], engines: Engines
) -> None:
    model, prompts = models[name], prompts_of(NUM_PROMPTS)
    expected, _ = run(engines.get(model), prompts, greedy(MAX_TOKENS))
    llm = engines.get(model, spec(weights))
    found, counts = run(llm, prompts, greedy(MAX_TOKENS))
    assert token_ids(found) == token_ids(expected)

    assert counts.accepted_at[0] > LIKE * counts.drafts
    assert copies_in(llm)


@pytest.mark.v2
def test_goes_with_a_skip_set_and_copies_only_what_runs(
    models: dict[str, str], engines: Engines
) -> None:
    model, prompts = models["qwen2"], prompts_of(NUM_PROMPTS)
    skips = {"attention": [1], "mlp": [0, 1]}
    llm = engines.get(model, spec("int4", skip_layers=skips))
    expected, _ = run(engines.get(model), prompts, greedy(MAX_TOKENS))
    found, counts = run(llm, prompts, greedy(MAX_TOKENS))
    assert token_ids(found) == token_ids(expected) and counts.draft_tokens
    # Two projections a sublayer.
    assert len(copies_in(llm)) == 2 * (2 * NUM_LAYERS - 3) + 1


@pytest.mark.skipif(IS_V2, reason="the search is for the V1 runner")
def test_sublayers_are_timed_with_their_copies(
    models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engines.get(models["qwen2"], spec(BY_PART))
    (worker,) = llm.collective_rpc(lambda worker: worker)
    drafter = drafter_of(worker.model_runner)
    before, tried = drafter.plan, []
    use_plan = drafter.use_plan
    monkeypatch.setattr(drafter, "use_plan", lambda p: (tried.append(p), use_plan(p)))
    for beside in (before, None):
        tried.clear()
        assert min(measure_sublayers(worker, 1, 1, beside)) > 0
        *timed, last = tried
        assert last == before and len({str(plan) for plan in timed}) > 2
        weights = (beside or DraftPlan(NUM_LAYERS))["draft_weights"]
        assert {plan["draft_weights"] for plan in timed} == {weights}


@pytest.mark.skipif(IS_V2, reason="its drafts are captured in graphs")
def test_a_search_may_leave_a_part_as_it_is(
    models: dict[str, str], engines: Engines
) -> None:
    model, prompts = models["qwen2"], prompts_of(NUM_PROMPTS)
    llm = engines.get(model, spec(BY_PART))
    drafter = drafter_of(llm.collective_rpc(lambda worker: worker.model_runner)[0])
    base = drafter.plan
    assert base.choices()["weights.mlp"] == ("same", "int4")
    drafter.use_plan(base.with_params({"weights.mlp": "same", "weights.head": "same"}))
    try:
        assert len(copies_in(llm)) == 2 * NUM_LAYERS
        expected, _ = run(engines.get(model), prompts, greedy(MAX_TOKENS))
        found, counts = run(llm, prompts, greedy(MAX_TOKENS))
        assert token_ids(found) == token_ids(expected) and counts.accepted_tokens
    finally:
        drafter.use_plan(base)


@pytest.mark.skipif(IS_V2, reason="a trained model takes hours in the interpreter")
@pytest.mark.parametrize(("weights", "least"), [("int8", 0.95), ("int4", 0.85)])
def test_a_trained_models_copy_says_what_it_says(
    weights: str, least: float, engines: Engines
) -> None:
    assert first_accepted(engines.get(str(DEMO_MODEL), spec(weights))) >= least


@pytest.mark.skipif(IS_V2, reason="a trained model takes hours in the interpreter")
def test_the_test_catches_a_wrong_scale_in_one_layer(engines: Engines) -> None:
    llm = engines.get(str(DEMO_MODEL), spec("int4"))
    right, worst = first_accepted(llm), max(errors_of(llm))
    copy = copies_in(llm)[0]
    scales = copy.w_s.data
    copy.w_s.data = scales * 1.5
    try:
        assert max(errors_of(llm)) > MAX_ERROR["int4"] > worst
        copy.w_s.data = scales * 8
        assert first_accepted(llm) < min(right, 0.85)
    finally:
        copy.w_s.data = scales


@pytest.mark.skipif(IS_V2, reason="the copies are the same")
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_every_copy_computes_what_its_layer_does(
    name: str, weights: str, models: dict[str, str], engines: Engines
) -> None:
    errors = errors_of(engines.get(models[name], spec(weights)))
    assert len(errors) == 4 * NUM_LAYERS
    assert max(errors) < MAX_ERROR[weights]


@torch.inference_mode()
def errors_of(llm: Any) -> list[float]:
    """Of each linear layer's copy, the root mean square over that of its output, of
    random input."""
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    generator, errors = torch.Generator().manual_seed(0), []
    for name, module in drafter_of(runner)._view.model.named_modules():
        if isinstance(getattr(module, "quant_method", None), LowBitMethod):
            layer = runner.model.get_submodule(name)
            x = torch.randn(16, layer.input_size, generator=generator)
            outputs = (m.quant_method.apply(m, x, m.bias) for m in (layer, module))
            right, found = outputs
            errors.append(float((found - right).norm() / right.norm()))
    return errors


def first_accepted(llm: Any) -> float:
    """Of the first draft tokens, how many are accepted."""
    prompts = [prompt.render(None) for prompt in load("code").prompts[:6]]
    _, counts = run(llm, prompts, greedy(32))
    assert counts.drafts > 30
    return float(counts.accepted_at[0] / counts.drafts)


def test_the_log_says_which_kernel_computes(
    models: dict[str, str], engines: Engines
) -> None:
    kernels = {
        word: {copy.quant_method.kernel for copy in copies_in(found)}
        for word in ("int8", "int4")
        if (found := engines.get(models["qwen2"], spec(word)))
    }
    assert all("Kernel" in name for name in kernels["int8"]), kernels
    assert kernels["int4"] == {"int4_scaled_mm_cpu"}


@pytest.mark.skipif(IS_V2, reason="the copies are the same")
def test_where_the_fast_kernel_is_missing_vllm_chooses_another(
    models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CPUInt4, "is_supported", lambda _: False)
    model, prompts = models["qwen2"], prompts_of(NUM_PROMPTS)
    llm = engines.get(model, spec("int4", num_speculative_tokens=2))
    assert {type(copy.quant_method) for copy in copies_in(llm)} == {Int4}
    expected, _ = run(engines.get(model), prompts, greedy(MAX_TOKENS))
    found, counts = run(llm, prompts, greedy(MAX_TOKENS))
    assert token_ids(found) == token_ids(expected)
    assert counts.accepted_at[0] > LIKE * counts.drafts


@pytest.mark.skipif(IS_V2, reason="the same for both runners")
def test_what_graphs_point_to_stays_when_another_engine_starts() -> None:
    """vLLM's workspace, where Marlin has its locks: on an H200 an int4 engine came
    down when another had started."""
    from vllm.v1.worker import workspace

    before = workspace._manager
    try:
        workspace.init_workspace_manager(torch.device("cpu"))
        method = Int4(torch.bfloat16, 128)
        used = weakref.ref(workspace.current_workspace_manager())
        workspace.init_workspace_manager(torch.device("cpu"))
        gc.collect()
        assert used() is not None
        del method
        gc.collect()
        assert used() is None, "and no longer than the copy"
    finally:
        workspace._manager = before


@pytest.mark.skipif(IS_V2, reason="the same for both runners")
@pytest.mark.parametrize(
    ("chosen", "fits", "seen"),
    [
        ({}, True, ["marlin"]),
        ({}, False, ["marlin", None]),
        ({"linear_backend": "triton"}, True, [None]),
        ({"linear_backend_per_quant": {"mixed_precision": "triton"}}, True, ["triton"]),
    ],
)
def test_on_cuda_the_kernel_for_few_rows_comes_first(
    chosen: dict[str, Any],
    fits: bool,
    seen: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it takes no such layer, vLLM's own choice follows, and what the user chose
    stays. That it is the faster one was measured on an H200."""
    from vllm.config import KernelConfig, VllmConfig, set_current_vllm_config

    config = VllmConfig(kernel_config=KernelConfig(**chosen))
    before = config.kernel_config.linear_backend_per_quant
    asked: list[str | None] = []

    def pack(self: Any, layer: Any, weight: torch.Tensor) -> None:
        backends = config.kernel_config.linear_backend_per_quant or {}
        asked.append(backends.get("mixed_precision"))
        if not fits and asked[-1] == "marlin":
            raise ValueError("it takes none of this shape")

    monkeypatch.setattr(OfScheme, "pack", pack)
    platform = type(low_bit_linear.current_platform)
    monkeypatch.setattr(platform, "is_cuda", lambda _: True)
    with set_current_vllm_config(config):
        Int4(torch.bfloat16, 32).pack(torch.nn.Module(), torch.zeros(32, 32))
    assert asked == seen
    assert config.kernel_config.linear_backend_per_quant == before


@pytest.mark.v2
@pytest.mark.parametrize("weights", ["int4"] if IS_V2 else ["int8", "int4"])
def test_adapters_go_over_the_copy(
    weights: str, models: dict[str, str], tmp_path: Path, engines: Engines
) -> None:
    from vllm.lora.request import LoRARequest

    path = build_adapter(tmp_path, "adapter", seed=1)
    model, prompts = models["llama" if not IS_V2 else "qwen2"], prompts_of(NUM_PROMPTS)
    adapters = [LoRARequest("adapter", 1, path), None] * (NUM_PROMPTS // 2)
    llm = engines.get(model, spec(weights), **LORA)
    assert len(copies_in(llm)) == 4 * NUM_LAYERS + 1
    plain = engines.get(model, **LORA)
    expected, _ = run(plain, prompts, greedy(MAX_TOKENS), lora_request=adapters)
    found, counts = run(llm, prompts, greedy(MAX_TOKENS), lora_request=adapters)
    assert token_ids(found) == token_ids(expected)
    # Without its adapter a request's draft would be of another model.
    assert counts.accepted_at[0] > LIKE * counts.drafts


@IN_FULL
@pytest.mark.v2
@pytest.mark.usefixtures("a_core_each")
def test_each_worker_copies_its_half(models: dict[str, str], engines: Engines) -> None:
    model, prompts = models["qwen2"], prompts_of(NUM_PROMPTS)
    expected, _ = run(engines.get(model), prompts, greedy(MAX_TOKENS))
    llm = engines.get(model, spec(BY_PART), **TWO)
    found, counts = run(llm, prompts, greedy(MAX_TOKENS))
    assert token_ids(found) == token_ids(expected)
    assert counts.accepted_at[0] > LIKE * counts.drafts


@pytest.mark.skipif(IS_V2, reason="the copies are the same")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_worker_keeps_as_many_bytes_as_are_announced(
    weights: str, tmp_path: Path, engines: Engines
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 16}
    model = str(build_tiny_model("llama", tmp_path, **sizes, vocab_size=2048))
    preview = Preview.of(model, spec(weights))
    announced = preview.plan.extra_bytes(preview.weights.step)
    kept = sum(
        copy.quant_method.num_bytes
        for copy in copies_in(engines.get(model, spec(weights)))
    )
    assert kept == pytest.approx(announced, rel=0.02)


@pytest.mark.skipif(IS_V2, reason="the copies are the same")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_copy_takes_the_memory_that_it_says(weights: str) -> None:
    """oneDNN's part of it is seen by the process alone."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    layer = ReplicatedLinear(4096, 4096, bias=False, params_dtype=torch.bfloat16)
    layer.weight.data.normal_(0, 0.02)
    kept = [low_bit_copy(layer, weights)]  # the first loads libraries
    before = resident()
    kept += [low_bit_copy(layer, weights) for _ in range(4)]
    said = sum(copy.quant_method.num_bytes for copy in kept[1:])
    assert resident() - before == pytest.approx(said, rel=0.05)


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


@pytest.mark.v2
def test_new_weights_are_refused(models: dict[str, str], engines: Engines) -> None:
    llm = engines.get(models["qwen2"], spec("int4"))
    with pytest.raises(NotImplementedError, match="leave out draft_weights"):
        llm.collective_rpc("reload_weights")
    with pytest.raises(NotImplementedError, match="leave out draft_weights"):
        llm.collective_rpc("start_weight_update")


def test_weights_that_vllm_does_not_process_are_refused(
    models: dict[str, str], engines: Engines
) -> None:
    """The copies of an engine's target are gone once it drafts with them."""
    llm = engines.get(models["qwen2"], spec("int4"))
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    with pytest.raises(RuntimeError, match="load_format 'auto' brings"):
        copies_of(DraftWeights.all_in("int4"), runner.model, runner.vllm_config)
