"""Every supported family drafts with its own sublayers, losslessly."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from test_multimodal import MODELS as MULTIMODAL

from helpers import reference
from helpers.engines import Engines, drafter_of, greedy, prompts_of, run, token_ids
from helpers.environment import IS_SHORT, IS_V2
from helpers.models import NUM_LAYERS, TINY, VOCAB_SIZE, build_tiny_model
from helpers.reference import recorded_drafts, reference_draft
from vllm_selfspec.plan.cost import (
    LAYER,
    ModelWeights,
    read_headers,
    weight_files,
)
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.families import FAMILIES
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.target_model import TargetModel

EVERY = range(NUM_LAYERS)
NOTHING = SkipSet.of(NUM_LAYERS)
PLANS = {
    "attention": SkipSet.of(NUM_LAYERS, attention=[0, 2]),
    "MLP": SkipSet.of(NUM_LAYERS, mlp=[1, 3]),
    "mixed": SkipSet.of(NUM_LAYERS, attention=[0, 1, 3], mlp=[1, 2]),
    "all but one": SkipSet.of(NUM_LAYERS, attention=EVERY, mlp=[1, 2, 3]),
}
if IS_V2:  # in the interpreter each takes long
    PLANS = {"mixed": PLANS["mixed"]}
NUM_DRAFTS = 3
NUM_PROMPTS, MAX_TOKENS = (4, 16) if IS_V2 else (8, 24)
# Where another module than the sublayer is the last before the residual sum: the norm
# after it.
ADDED = {
    name: ("post_attention_layernorm", "post_feedforward_layernorm")
    for name in (
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "Exaone4ForCausalLM",
    )
} | {
    "Glm4ForCausalLM": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "FalconForCausalLM": ("self_attention", "mlp"),
    "GPT2LMHeadModel": ("attn", "mlp"),
    "GPTJForCausalLM": ("attn", "mlp"),
    "GraniteMoeForCausalLM": ("self_attn", "block_sparse_moe"),
    "GPTBigCodeForCausalLM": ("attn", "mlp"),
    "GPTNeoXForCausalLM": ("attention", "mlp"),
}
SLIDING: dict[str, Any] = {"sliding_window": 48}
HALF_ROTARY: dict[str, Any] = {"partial_rotary_factor": 0.5}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

# Multi-head latent attention, with sizes that its CPU kernel takes. vLLM's CPU build
# runs it right with YaRN, as its checkpoints have it, but not with plain positions.
LATENT: dict[str, Any] = {
    **MOE,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 2,
    "head_dim": None,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
LLAMA_3: dict[str, Any] = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}

# Hugging Face's name of the configuration and what it needs beside the usual, by
# vLLM's architecture.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM, Llama 3's positions": ("llama", LLAMA_3),
    "Phi3ForCausalLM": ("phi3", {}),
    "GemmaForCausalLM": ("gemma", {"tie_word_embeddings": True}),
    "Gemma2ForCausalLM": ("gemma2", {**SLIDING, "tie_word_embeddings": True}),
    "Gemma3ForCausalLM": ("gemma3_text", SLIDING),
    "GraniteForCausalLM": (
        "granite",
        {
            "residual_multiplier": 0.7,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
        },
    ),
    "CohereForCausalLM": ("cohere", {"tie_word_embeddings": True}),
    "Cohere2ForCausalLM": ("cohere2", {**SLIDING, "tie_word_embeddings": True}),
    "NemotronForCausalLM": ("nemotron", HALF_ROTARY),
    "Exaone4ForCausalLM": ("exaone4", SLIDING),
    "Glm4ForCausalLM": ("glm4", HALF_ROTARY),
    "Ernie4_5ForCausalLM": ("ernie4_5", {}),
    "ApertusForCausalLM": ("apertus", {}),
    "FalconForCausalLM": ("falcon", {"bias": True, "head_dim": None}),
    "GPT2LMHeadModel": (
        "gpt2",
        {"n_inner": 96, "head_dim": None, "num_key_value_heads": None},
    ),
    "GPTJForCausalLM": ("gptj", {"rotary_dim": 16, "n_inner": 96, "head_dim": None}),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 4}),
    "Qwen2MoeForCausalLM": (
        "qwen2_moe",
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 64},
    ),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {**MOE, "num_experts": 4}),
    # Attention sinks; sliding and full attention in turns.
    "GptOssForCausalLM": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 48,
            "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2),
        },
    ),
    "DeepseekV2ForCausalLM": ("deepseek_v2", LATENT),
    "Ernie4_5_MoeForCausalLM": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_layer_start_index": 1,
        },
    ),
    "OlmoeForCausalLM": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "GraniteMoeForCausalLM": (
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.7},
    ),
    "Glm4MoeForCausalLM": (
        "glm4_moe",
        {
            **MOE,
            **HALF_ROTARY,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "OlmoForCausalLM": ("olmo", {}),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "Olmo3ForCausalLM": ("olmo3", SLIDING),
    "SmolLM3ForCausalLM": ("smollm3", {}),
    "PhiForCausalLM": ("phi", HALF_ROTARY),
    "GlmForCausalLM": ("glm", HALF_ROTARY),
    "ArceeForCausalLM": ("arcee", {}),
    "SeedOssForCausalLM": ("seed_oss", {}),
    "HunYuanDenseV1ForCausalLM": ("hunyuan_v1_dense", {}),
    "Starcoder2ForCausalLM": ("starcoder2", {}),
    "GPTBigCodeForCausalLM": (
        "gpt_bigcode",
        {"n_inner": 96, "head_dim": None, "num_key_value_heads": None},
    ),
    "GPTNeoXForCausalLM": (
        "gpt_neox",
        {"rotary_pct": 0.5, "head_dim": None, "num_key_value_heads": None},
    ),
}


# In the interpreter, with every change: several KV cache groups, sublayers that return
# pairs, and the Transformers backend.
PART = {"Gemma3ForCausalLM", "FalconForCausalLM", "GPTNeoXForCausalLM"}
# Their layers are like those of others; only with all tests.
ALIKE = {
    "OlmoeForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "GraniteMoeForCausalLM",
    "GPTJForCausalLM",
    "GPTBigCodeForCausalLM",
    "Glm4MoeForCausalLM",
    "GemmaForCausalLM",
    "Cohere2ForCausalLM",
    "NemotronForCausalLM",
    "Exaone4ForCausalLM",
    "Ernie4_5ForCausalLM",
    "ApertusForCausalLM",
    "Qwen2MoeForCausalLM",
    "OlmoForCausalLM",
    "Olmo3ForCausalLM",
    "SmolLM3ForCausalLM",
    "PhiForCausalLM",
    "GlmForCausalLM",
    "ArceeForCausalLM",
    "SeedOssForCausalLM",
    "HunYuanDenseV1ForCausalLM",
}
MIXTURES = {
    "OlmoeForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "GraniteMoeForCausalLM",
    "Glm4MoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV2ForCausalLM",
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("families")
    return {
        name: str(build_tiny_model(family, directory, **overrides))
        for name, (family, overrides) in MODELS.items()
    }


def test_every_family_is_tested() -> None:
    usual = {f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
    tested = {name.partition(",")[0] for name in (*MODELS, *MULTIMODAL)}
    assert set(FAMILIES) == usual | tested


@pytest.mark.parametrize("name", sorted(MODELS))
def test_show_knows_what_each_sublayer_reads(name: str, paths: dict[str, str]) -> None:
    path = Path(paths[name])
    assert TargetModel.read(path, name).class_name == name.partition(",")[0]
    weights = ModelWeights.from_checkpoint(path)
    assert weights.num_layers == NUM_LAYERS
    assert min(*weights.attention, *weights.mlp, weights.head) > 0
    tensors = read_headers(weight_files(path)).items()
    stored = sum(one.num_bytes for tensor, one in tensors if ".wpe." not in tensor)
    embedding = VOCAB_SIZE * TINY["hidden_size"] * 4
    if name in MIXTURES:  # a token does not run through all experts
        assert weights.streamed < stored - embedding
    else:
        assert weights.streamed in (stored, stored - embedding)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_row_names_what_is_in_its_checkpoints(
    name: str, paths: dict[str, str]
) -> None:
    """By itself: names of other families' rows are known, too, to whatever reads."""
    row = FAMILIES[name.partition(",")[0]].checkpoint
    within = {*row.attention, *row.mlp}
    outside = {row.embedding, row.head, row.last_norm, row.positions}
    for tensor in read_headers(weight_files(Path(paths[name]))):
        layer = LAYER.match(tensor)
        if layer is None:
            assert tensor.split(".")[-2] in outside, tensor
            continue
        assert f"{row.layers}.{layer['index']}." in tensor
        assert layer["part"] in within, tensor


def showing(names: Iterable[str]) -> Any:
    """Each shows that its model is supported."""
    marked = [
        pytest.param(name, marks=pytest.mark.shows("Models", name))
        for name in sorted(names)
    ]
    return pytest.mark.parametrize("name", marked)


@pytest.mark.v2
@showing(MODELS.keys() - MIXTURES)
def test_a_family_drafts_losslessly(
    name: str, paths: dict[str, str], engines: Engines
) -> None:
    if IS_SHORT and (name not in PART if IS_V2 else name in ALIKE):
        pytest.skip("long: make test-all")
    check(name, paths[name], engines)


@pytest.mark.v2
@showing(MIXTURES)
def test_a_mixture_of_experts_drafts_losslessly(
    name: str, paths: dict[str, str]
) -> None:
    """In a process of its own: whether vLLM has a group for experts is decided by the
    first model of a process."""
    if IS_SHORT and (IS_V2 or name in ALIKE):
        pytest.skip("long: make test-all")
    done = subprocess.run(
        [sys.executable, __file__, name, paths[name]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def check(name: str, path: str, engines: Engines) -> None:
    """Whatever is skipped, the text is plain vLLM's, and the drafts are those of the
    model without it; with nothing skipped all drafts are right."""
    params = greedy(MAX_TOKENS)
    prompts = prompts_of(NUM_PROMPTS, shortest=24)
    expected, _ = run(engines.get(path), prompts, params)
    found, counts = run(drafting(path, NOTHING, engines), prompts, params)
    assert token_ids(found) == token_ids(expected)
    assert counts.acceptance == 1, "nothing was skipped"
    for what, plan in PLANS.items():
        llm = drafting(path, plan, engines)
        with recorded_drafts() as drafts:
            found, counts = run(llm, prompts, params)
        assert token_ids(found) == token_ids(expected), what
        assert counts.draft_tokens
        assert counts.acceptance < 1, f"{what}: as if nothing were skipped"
        sequence = prompts[0]["prompt_token_ids"] + token_ids(found)[0][0]
        for num_tokens, drafted in drafts[:2]:
            added = ADDED.get(name, reference.ADDED)
            context = sequence[:num_tokens]
            assert drafted == reference_draft(
                path, plan, context, len(drafted), added
            ), what


def drafting(path: str, plan: SkipSet, engines: Engines) -> Any:
    """An engine that drafts with the plan from now on. In the V2 runner, whose graphs
    hold a plan, it is the plan's own."""
    given = plan if IS_V2 else NOTHING
    spec = {"skip_layers": given.to_dict(), "num_speculative_tokens": NUM_DRAFTS}
    llm = engines.get(path, spec)
    if not IS_V2:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.model_runner
        drafter_of(runner).use_plan(DraftPlan.skipping(plan))
    return llm


if __name__ == "__main__":
    if IS_V2:
        from triton_cpu_stub.mends import mend

        mend()
    check(*sys.argv[1:], Engines())
