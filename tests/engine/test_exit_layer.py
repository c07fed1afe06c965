"""An exit layer in the engine: the text is plain vLLM's, its KV that of every token.

The target's last layer after all the others is the target: such a head must draft what
the target says, always. A K or V that is missing, stale or of another token shows as a
rejected draft.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.engines import (
    Engines,
    counter,
    drafter_of,
    greedy,
    prompts_of,
    run,
    token_ids,
)
from helpers.environment import IS_PART, IS_V2
from helpers.exit_layers import build_exit_layer
from helpers.models import NUM_LAYERS, build_tiny_model
from helpers.reference import (
    recorded_drafts,
    reference_draft,
    reference_exit_logits,
)
from vllm_selfspec.bench.methods import methods_of
from vllm_selfspec.bench.run import describe
from vllm_selfspec.cli.preview import Preview
from vllm_selfspec.config import ConfigError
from vllm_selfspec.draft import exit_layer
from vllm_selfspec.engine.support import raise_if_refused
from vllm_selfspec.plan.axis import Deployment
from vllm_selfspec.plan.axis_exit_layer import TrainedExitLayer
from vllm_selfspec.plan.cost import CheckpointError
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.exit_card import ExitLayerError, read_exit_card
from vllm_selfspec.plan.families import UnsupportedModelError
from vllm_selfspec.plan.skip_set import SkipSet, SkipSetError

pytestmark = pytest.mark.v2
WHOLE = NUM_LAYERS - 1  # the exit layer is the target's last then
NUM_DRAFTS = 4
MAX_TOKENS = 12 if IS_V2 else 32
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 48},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "granite": {"residual_multiplier": 0.7, "logits_scaling": 2.0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    return {
        family: str(build_tiny_model(family, directory, **keys))
        for family, keys in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def heads(
    models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Path]:
    """By family and exit layer."""
    directory = tmp_path_factory.mktemp("heads")
    return {
        (family, exit_layer): build_exit_layer(
            models[family], exit_layer, directory / family / str(exit_layer)
        )
        for family in FAMILIES
        for exit_layer in (2, WHOLE)
    }


def spec_of(head: Path, **more: Any) -> dict[str, Any]:
    return {
        "trained_exit_layer": str(head),
        "num_speculative_tokens": NUM_DRAFTS,
        **more,
    }


@pytest.mark.shows("Engine", "trained exit layers")
@pytest.mark.parametrize("exit_layer", [2, WHOLE])
@pytest.mark.parametrize("family", ["llama"] if IS_PART else [*FAMILIES])
def test_the_text_is_plain_vllms_in_every_family(
    family: str,
    exit_layer: int,
    models: dict[str, str],
    heads: dict[tuple[str, int], Path],
    engines: Engines,
) -> None:
    path = models[family]
    expected, _ = run(engines.get(path), prompts_of(8), greedy(MAX_TOKENS))
    llm = engines.get(path, spec_of(heads[family, exit_layer]))
    found, counts = run(llm, prompts_of(8), greedy(MAX_TOKENS))
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens
    is_target = counts.accepted_tokens == counts.draft_tokens
    assert is_target is (exit_layer == WHOLE)


def test_weights_of_a_model_of_the_hub_are_compared_once_they_are_here(
    models: dict[str, str],
    heads: dict[tuple[str, int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = read_exit_card(heads["llama", WHOLE])
    named: Any = SimpleNamespace(model="nobody/model", revision=None)

    def gone(*_: Any) -> Path:
        raise CheckpointError("offline")

    monkeypatch.setattr(exit_layer, "locate", gone)
    exit_layer._check_weights(card, named)
    monkeypatch.setattr(exit_layer, "locate", lambda *_: Path(models["llama"]))
    exit_layer._check_weights(card, named)
    other = build_tiny_model("llama", tmp_path, initializer_range=0.1)
    monkeypatch.setattr(exit_layer, "locate", lambda *_: other)
    with pytest.raises(ExitLayerError, match="weights .* in place of"):
        exit_layer._check_weights(card, named)


def test_new_weights_are_refused(
    models: dict[str, str], heads: dict[tuple[str, int], Path], engines: Engines
) -> None:
    llm = engines.get(models["llama"], spec_of(heads["llama", WHOLE]))
    with pytest.raises(NotImplementedError, match="leave out trained_exit_layer"):
        llm.collective_rpc("reload_weights")


@pytest.mark.parametrize("policy", ["goodput", "threshold", "thompson-calibrated"])
def test_the_text_is_plain_vllms_under_each_draft_length(
    policy: str,
    models: dict[str, str],
    heads: dict[tuple[str, int], Path],
    engines: Engines,
) -> None:
    path = models["llama"]
    expected, _ = run(engines.get(path), prompts_of(8), greedy(MAX_TOKENS))
    llm = engines.get(path, spec_of(heads["llama", WHOLE], draft_length=policy))
    found, counts = run(llm, prompts_of(8), greedy(MAX_TOKENS))
    assert token_ids(found) == token_ids(expected)
    assert counts.accepted_tokens == counts.draft_tokens


def all_accepted(
    llm: Any, plain: Any, prompts: list[Any], max_tokens: int = MAX_TOKENS
) -> list[Any]:
    """Generates the target's text, of which every token was drafted right."""
    expected, _ = run(plain, prompts, greedy(max_tokens))
    found, counts = run(llm, prompts, greedy(max_tokens))
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens
    assert counts.accepted_tokens == counts.draft_tokens, counts
    return found


@pytest.fixture
def pair(
    models: dict[str, str], heads: dict[tuple[str, int], Path], engines: Engines
) -> Any:
    """A drafting engine and a plain one with the same settings."""

    def of(**settings: Any) -> tuple[Any, Any]:
        path = models["llama"]
        return (
            engines.get(path, spec_of(heads["llama", WHOLE]), **settings),
            engines.get(path, **settings),
        )

    return of


def test_its_kv_is_whole_after_chunked_prefill(pair: Any) -> None:
    both = pair(max_num_batched_tokens=48, max_num_seqs=4)
    all_accepted(*both, prompts_of(8, shortest=70))


# No prompt is one token longer than the blocks that are cached of it: the V2 runner
# counts such a prefill as a step whose drafts were all rejected.
SHARED = prompts_of(1, shortest=101)[0]["prompt_token_ids"]
WITH_SHARED_PREFIX = [
    {"prompt_token_ids": SHARED + prompt["prompt_token_ids"]}
    for prompt in prompts_of(6, seed=1)
]


def test_its_kv_is_found_again_by_the_prefix_cache(pair: Any) -> None:
    both = pair(block_size=32)
    for _ in range(2):
        found = all_accepted(*both, WITH_SHARED_PREFIX)
    assert all(out.num_cached_tokens >= 96 for out in found), "nothing was cached"
    longer = [
        {"prompt_token_ids": p["prompt_token_ids"] + list(out.outputs[0].token_ids)}
        for p, out in zip(WITH_SHARED_PREFIX, found, strict=True)
    ]
    all_accepted(*both, longer)


def test_its_kv_is_whole_after_preemption(pair: Any) -> None:
    # 5 layers x 2 (K and V) x 32 (head size) x 4 bytes a token: room for two or three
    # of the eight requests when they are long.
    both = pair(kv_cache_memory_bytes=480 << 10, block_size=32)
    before = counter(both[0], "vllm:num_preemptions")
    all_accepted(*both, prompts_of(8, shortest=40), max_tokens=24 if IS_V2 else 100)
    assert counter(both[0], "vllm:num_preemptions") > before, "nothing was preempted"


def test_leaving_out_partial_prefills_is_noticed(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a version would that fills the layer's KV only where it drafts next."""
    from vllm_selfspec.draft import exit_layer as serving

    write = serving._KVOfLayer.forward
    num_batched = 48

    def not_when_full(self: Any, positions: Any, entering: Any) -> None:
        if len(positions) < num_batched:
            write(self, positions, entering)

    both = pair(max_num_batched_tokens=num_batched, max_num_seqs=4)
    monkeypatch.setattr(serving._KVOfLayer, "forward", not_when_full)
    prompts = prompts_of(4, seed=5, shortest=100)
    expected, _ = run(both[1], prompts, greedy(MAX_TOKENS))
    found, counts = run(both[0], prompts, greedy(MAX_TOKENS))
    assert token_ids(found) == token_ids(expected), "a bad draft must not be seen"
    assert counts.accepted_tokens < counts.draft_tokens


def recorded(llm: Any, prompt: dict[str, Any]) -> Any:
    """A request's text, and each draft of it: the tokens it was drafted after, its
    tokens, and its logits."""
    model = drafter_of(worker_of(llm).model_runner)._view.model
    compute, logits = model.compute_logits, []

    def recording(hidden_states: torch.Tensor) -> torch.Tensor:
        found = compute(hidden_states)
        logits.append(found[0].clone())
        return found

    with recorded_drafts() as drafts, pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "compute_logits", recording)
        (output,), counts = run(llm, [prompt], greedy(MAX_TOKENS))
    sequence = list(output.prompt_token_ids) + list(output.outputs[0].token_ids)
    rows = iter(logits)
    found = []
    for num_tokens, drafted in drafts:
        said = [next(rows) for _ in drafted]
        if drafted and num_tokens <= len(sequence):  # the last may go on after the end
            found.append((sequence[:num_tokens], drafted, torch.stack(said)))
    return output, counts, found


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_its_logits_are_those_of_a_full_recomputation(
    models: dict[str, str], heads: dict[tuple[str, int], Path], engines: Engines
) -> None:
    """In a prompt's chunks, after rejections, and on a cached prefix."""
    path, head = models["llama"], heads["llama", 2]
    llm = engines.get(path, spec_of(head), max_num_batched_tokens=48, block_size=32)
    is_cached, num_compared = [], 0
    for _ in range(2):
        output, counts, drafts = recorded(llm, prompts_of(1, 3, shortest=100)[0])
        is_cached.append(output.num_cached_tokens > 0)
        assert counts.accepted_tokens < counts.draft_tokens, "nothing was rejected"
        for context, drafted, logits in drafts[:: 4 if IS_V2 else 1]:
            expected = reference_exit_logits(path, head, context, drafted)
            # Logits up to some hundred; float32 sums in another order.
            torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
            assert drafted == expected.argmax(-1).tolist()
            num_compared += 1
    assert is_cached == [False, True]
    assert num_compared > 3


@pytest.mark.parametrize(
    "holes",
    [{"attention": [1], "mlp": [2]}, {"attention": [0, 1], "mlp": [1]}],
    ids=["sublayers", "a layer"],
)
def test_a_skip_set_before_it_composes(
    holes: dict[str, list[int]],
    models: dict[str, str],
    heads: dict[tuple[str, int], Path],
    engines: Engines,
) -> None:
    """The exit layer's KV of the context is the whole target's, as everybody's is."""
    path, head = models["llama"], heads["llama", WHOLE]
    llm = engines.get(path, spec_of(head, skip_layers=holes))
    expected, _ = run(engines.get(path), prompts_of(1), greedy(MAX_TOKENS))
    output, counts, drafts = recorded(llm, prompts_of(1)[0])
    assert token_ids([output]) == token_ids(expected)
    assert counts.accepted_tokens < counts.draft_tokens
    exits = SkipSet.early_exit(NUM_LAYERS, WHOLE)
    skip_set = SkipSet.of(
        NUM_LAYERS, exits.attention | {*holes["attention"]}, exits.mlp | {*holes["mlp"]}
    )
    for context, drafted, _ in drafts[:: 4 if IS_V2 else 1]:
        assert drafted == reference_draft(
            path, skip_set, context, len(drafted), exit_layer=head
        )


def test_memory_grows_by_the_kv_of_one_layer(pair: Any) -> None:
    drafting, plain = (
        [cache.nbytes for cache in worker_of(llm).model_runner.kv_caches]
        for llm in pair()
    )
    assert len(drafting) == len(plain) + 1
    assert len({*drafting}) == 1, "it has a block wherever the target has one"


def test_a_preview_counts_its_bytes(
    models: dict[str, str], heads: dict[tuple[str, int], Path]
) -> None:
    path = models["llama"]
    found = Preview.of(path, {"trained_exit_layer": str(heads["llama", 2])})
    longer = Preview.of(path, {"exit_layer": 3})
    assert found.draft_share == longer.draft_share, "its layer is like any other"
    layer = found.weights.attention[-1] + found.weights.mlp[-1]
    assert found.streamed()["exit layer"] == (0, layer)
    assert found.to_dict()["extra_bytes"] == layer


def test_a_benchmark_takes_it_beside_other_configurations(
    models: dict[str, str], heads: dict[tuple[str, int], Path]
) -> None:
    configs = [
        {"trained_exit_layer": str(heads["llama", 2]), "draft_length": "thompson"},
        {
            "exit_layer": 2,
            "draft_source": "model",
            "draft_length": "fixed",
            "num_speculative_tokens": 3,
        },
        {"skip_layers": {"mlp": [1]}},
    ]
    plain, *methods = methods_of(
        Path(models["llama"]), None, ["selfspec"], [4], configs
    )
    assert [method.name for method in methods] == [
        "selfspec exit after layer 1 of 4, trained exit layer after layer 1, thompson",
        "selfspec exit after layer 1 of 4, k 3",
        "selfspec skips attention none; mlp 1 (of 4 layers), goodput",
    ]
    assert [method.has_one_length for method in methods] == [False, True, False]
    assert plain.speculative_config is None
    assert describe(methods[0])["speculative_config"]["trained_exit_layer"] == "2", (
        "not its path"
    )


def refused(
    models: dict[str, str], engines: Engines, error: type[Exception], **spec: Any
) -> str:
    with pytest.raises(error) as found:
        engines.get(models["llama"], spec)
    return str(found.value)


@pytest.mark.parametrize(
    ("keys", "error", "said"),
    [
        ({"exit_layer": 1}, ExitLayerError, "but exit_layer is 1: leave it out"),
        ({"skip_layers": {"mlp": [3]}}, SkipSetError, "it names 3: remove [3]"),
        ({"skip_layers": "auto"}, ConfigError, "skip_layers is a skip set"),
    ],
)
def test_what_does_not_fit_a_head_is_refused(
    keys: dict[str, Any],
    error: type[Exception],
    said: str,
    models: dict[str, str],
    heads: dict[tuple[str, int], Path],
    engines: Engines,
) -> None:
    spec = {"trained_exit_layer": str(heads["llama", 2]), **keys}
    assert said in refused(models, engines, error, **spec)


def test_what_an_exit_layer_is_not_part_of_is_refused(
    models: dict[str, str], heads: dict[tuple[str, int], Path], engines: Engines
) -> None:
    spec = {"trained_exit_layer": str(heads["llama", 2])}
    with pytest.raises(UnsupportedModelError, match="enable_lora is on"):
        engines.get(models["llama"], spec, enable_lora=True)
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(UnsupportedModelError, match="kv_transfer_config is given"):
        engines.get(models["llama"], spec, kv_transfer_config=connector)


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "MixtralForCausalLM"])
def test_a_family_without_exit_layers_is_refused(architecture: str) -> None:
    plan = DraftPlan.of(4, trained_exit_layer=TrainedExitLayer("somewhere", 2))
    model_config: Any = SimpleNamespace(architecture=architecture)
    with pytest.raises(UnsupportedModelError, match="without trained_exit_layer"):
        raise_if_refused(plan, Deployment(model_config, parallel_config=None))


def test_a_corrupt_or_foreign_head_is_refused(
    models: dict[str, str], engines: Engines, tmp_path: Path
) -> None:
    head = build_exit_layer(models["llama"], 2, tmp_path / "own")
    file = head / "exit_layer.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    spec = {"trained_exit_layer": str(head)}
    assert "damaged" in refused(models, engines, ExitLayerError, **spec)
    foreign = build_exit_layer(models["qwen2"], 2, tmp_path / "foreign")
    spec = {"trained_exit_layer": str(foreign)}
    assert "Qwen2ForCausalLM" in refused(models, engines, ExitLayerError, **spec)
    card = json.loads((foreign / "card.json").read_text())
    assert card["exit_layer"] == 2
