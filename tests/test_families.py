"""Every supported family drafts with its own sublayers, losslessly."""

import subprocess
import sys
from typing import Any

import pytest
from conftest import (
    NUM_LAYERS,
    Engines,
    build_tiny_model,
    drafter_of,
    prompts_of,
    run,
    token_ids,
)

from vllm_selfspec.skip_set import SkipSet
from vllm_selfspec.support import FAMILIES

EVERY = range(NUM_LAYERS)
PLANS = {
    "attention": SkipSet.of(NUM_LAYERS, attention=[0, 2]),
    "MLP": SkipSet.of(NUM_LAYERS, mlp=[1, 3]),
    "mixed": SkipSet.of(NUM_LAYERS, attention=[0, 1, 3], mlp=[1, 2]),
    "all but one": SkipSet.of(NUM_LAYERS, attention=EVERY, mlp=[1, 2, 3]),
}
NUM_DRAFTS = 3
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

# Hugging Face's name of the configuration and what it needs beside the usual, by
# vLLM's architecture.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi3ForCausalLM": ("phi3", {}),
    "Gemma2ForCausalLM": (
        "gemma2",
        {"sliding_window": 48, "tie_word_embeddings": True},
    ),
    "Gemma3ForCausalLM": ("gemma3_text", {"sliding_window": 48}),
    "GraniteForCausalLM": (
        "granite",
        {
            "residual_multiplier": 0.7,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
        },
    ),
    "CohereForCausalLM": ("cohere", {"tie_word_embeddings": True}),
    "FalconForCausalLM": ("falcon", {"bias": True, "head_dim": None}),
    "GPT2LMHeadModel": (
        "gpt2",
        {"n_inner": 96, "head_dim": None, "num_key_value_heads": None},
    ),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 4}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {**MOE, "num_experts": 4}),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "Starcoder2ForCausalLM": ("starcoder2", {}),
    "GPTNeoXForCausalLM": (
        "gpt_neox",
        {"rotary_pct": 0.5, "head_dim": None, "num_key_value_heads": None},
    ),
}


MIXTURES = {"MixtralForCausalLM", "Qwen3MoeForCausalLM"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("families")
    return {
        name: str(build_tiny_model(family, directory, **overrides))
        for name, (family, overrides) in MODELS.items()
    }


def test_every_family_is_tested() -> None:
    usual = {f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
    assert set(FAMILIES) == usual | set(MODELS)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - MIXTURES))
def test_a_family_drafts_losslessly(
    name: str, paths: dict[str, str], engines: Engines
) -> None:
    check(paths[name], engines)


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_a_mixture_of_experts_drafts_losslessly(
    name: str, paths: dict[str, str]
) -> None:
    """In a process of its own: whether vLLM has a group for experts is decided by the
    first model of a process."""
    done = subprocess.run(
        [sys.executable, __file__, paths[name]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def check(path: str, engines: Engines) -> None:
    """Whatever is skipped, the text is plain vLLM's; with nothing skipped all drafts
    are right."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = prompts_of(8)
    expected, _ = run(engines.get(path), prompts, params)
    spec = {"skip_layers": {}, "num_speculative_tokens": NUM_DRAFTS}
    llm = engines.get(path, spec)
    found, counts = run(llm, prompts, params)
    assert token_ids(found) == token_ids(expected)
    assert counts.acceptance == 1, "nothing was skipped"
    for what, plan in PLANS.items():
        use(llm, plan)
        found, counts = run(llm, prompts, params)
        assert token_ids(found) == token_ids(expected), what
        assert counts.draft_tokens
        assert counts.acceptance < 1, f"{what}: as if nothing were skipped"


def use(llm: Any, plan: SkipSet) -> None:
    """Drafts with another plan from now on."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.model_runner
    drafter_of(runner).use_skip_set(plan)


if __name__ == "__main__":
    check(sys.argv[1], Engines())
