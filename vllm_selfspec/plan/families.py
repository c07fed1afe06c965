"""Which models and deployments can be drafted for.

One rule: what is not known to work is refused here, before any weights are loaded, with
the reason and what to do instead.
"""

from dataclasses import dataclass, replace
from typing import Any

from vllm_selfspec.plan.skip_set import SUBLAYERS


class UnsupportedModelError(ValueError):
    """A model, or a way to deploy it, that selfspec does not support."""


@dataclass(frozen=True)
class Family:
    """Where the sublayers of a decoder layer are.

    Both must add their output to the residual stream and nothing else, so that an
    output of zero is the same as leaving the sublayer out.

    Attributes:
        attention: Name of the attention sublayer within a decoder layer.
        mlp: Name of the MLP sublayer.
        pairs: Sublayers that return a pair: their output, and a bias to add or the
            attention weights, which may be None.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    pairs: frozenset[str] = frozenset()


# Layers of Hugging Face's own, which vLLM runs through its Transformers backend.
TRANSFORMERS = Family(pairs=frozenset({"attention"}))


# By vLLM's architecture name. To add one: check that its layers fit `Family`, add it to
# the models of `tests/engine/test_families.py`, and run the identity tests.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(),
    "Phi3ForCausalLM": Family(),
    "GemmaForCausalLM": Family(),
    # A norm after the sublayer, too; of zeros it makes zeros.
    "Gemma2ForCausalLM": Family(),
    "Gemma3ForCausalLM": Family(),
    "GraniteForCausalLM": Family(),
    "Exaone4ForCausalLM": Family(),
    "Glm4ForCausalLM": Family(),
    "NemotronForCausalLM": Family(),
    "Ernie4_5ForCausalLM": Family(),
    "ApertusForCausalLM": Family(),
    # Attention and MLP side by side, added up.
    "CohereForCausalLM": Family(),
    "Cohere2ForCausalLM": Family(),
    "FalconForCausalLM": Family("self_attention", pairs=frozenset(SUBLAYERS)),
    "GPT2LMHeadModel": Family(attention="attn"),
    "GPTJForCausalLM": Family(attention="attn"),
    "MixtralForCausalLM": Family(mlp="block_sparse_moe"),
    "Qwen2MoeForCausalLM": Family(),
    "Qwen3MoeForCausalLM": Family(),
    "GptOssForCausalLM": Family(attention="attn"),
    "DeepseekV2ForCausalLM": Family(),
    "Glm4MoeForCausalLM": Family(),
    "OlmoeForCausalLM": Family(),
    "Ernie4_5_MoeForCausalLM": Family(),
    "GraniteMoeForCausalLM": Family(mlp="block_sparse_moe"),
    # Text, from images or audio too.
    "PaliGemmaForConditionalGeneration": Family(),
    "Qwen2AudioForConditionalGeneration": Family(),
    "OlmoForCausalLM": TRANSFORMERS,
    "Olmo2ForCausalLM": TRANSFORMERS,
    "Olmo3ForCausalLM": TRANSFORMERS,
    "SmolLM3ForCausalLM": TRANSFORMERS,
    "PhiForCausalLM": TRANSFORMERS,
    "GlmForCausalLM": TRANSFORMERS,
    "ArceeForCausalLM": TRANSFORMERS,
    "SeedOssForCausalLM": TRANSFORMERS,
    "HunYuanDenseV1ForCausalLM": TRANSFORMERS,
    "Starcoder2ForCausalLM": TRANSFORMERS,
    "GPTNeoXForCausalLM": replace(TRANSFORMERS, attention="attention"),
    "GPTBigCodeForCausalLM": replace(TRANSFORMERS, attention="attn"),
}


# Whose decoder layers are run one by one for their K and V, and whose layers' states
# vLLM hands out (its SupportsEagle3).
WITH_EXIT_LAYER = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GraniteForCausalLM",
)


def family_of(architecture: str) -> Family:
    """The family of a vLLM architecture.

    Raises:
        UnsupportedModelError: If it is none of `FAMILIES`.
    """
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"selfspec must know where a model's sublayers are, and does for "
            f"{', '.join(FAMILIES)}, but this model is a {architecture}: "
            "serve it without --speculative-config selfspec"
        )
    return FAMILIES[architecture]


def raise_if_unsupported(model_config: Any, parallel_config: Any) -> None:
    """Refuses what a draft cannot run on.

    Args:
        model_config: vLLM's `ModelConfig` of the target.
        parallel_config: vLLM's `ParallelConfig`.

    Raises:
        UnsupportedModelError: With the first reason found.
    """
    reasons = {
        "a pipeline stage holds only some layers, but a draft needs all of them in one "
        f"process, and pipeline_parallel_size is "
        f"{parallel_config.pipeline_parallel_size}: use tensor parallelism": (
            parallel_config.pipeline_parallel_size > 1
        ),
        "an encoder-decoder model's cross-attention is not part of a skip set: serve "
        "it without selfspec": model_config.is_encoder_decoder,
        "recurrent layers change their state on every forward and cannot take a "
        "rejected draft back but by kernels of vLLM's for GPUs, where selfspec was not "
        "tried on them, and this model has some: serve it without selfspec": (
            model_config.is_hybrid or model_config.is_attention_free
        ),
        "with M-RoPE the text after an image goes on at positions that are not those "
        "of its tokens, by which a draft counts, and this model has it: serve it "
        "without selfspec": model_config.uses_mrope,
        "only text generation can be drafted for, and the model runner is "
        f"{model_config.runner_type!r}: serve it without selfspec": (
            model_config.runner_type != "generate"
        ),
        "a draft's KV slots are not split over context-parallel ranks, and "
        "decode_context_parallel_size is "
        f"{parallel_config.decode_context_parallel_size}: use 1": (
            parallel_config.decode_context_parallel_size > 1
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModelError(f"selfspec: {reason}")
    family_of(model_config.architecture)


def raise_if_no_exit_layer(
    model_config: Any, has_loras: bool, has_connector: bool
) -> None:
    """Refuses what a trained exit layer cannot be a part of.

    Args:
        model_config: vLLM's `ModelConfig` of the target.
        has_loras: Whether it is served with adapters.
        has_connector: Whether KV blocks come from elsewhere.

    Raises:
        UnsupportedModelError: With the first reason found.
    """
    reasons = {
        f"an exit layer is served for {', '.join(WITH_EXIT_LAYER)}, but this model is "
        f"a {model_config.architecture}: use exit_layer without exit_head": (
            model_config.architecture not in WITH_EXIT_LAYER
        ),
        "an exit layer is trained for a target without adapters, but enable_lora is "
        "on: leave out exit_head": has_loras,
        "a KV connector moves what the target's attention writes, and the exit layer's "
        "K and V are written beside it, but kv_transfer_config is given: leave out "
        "exit_head": has_connector,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModelError(f"selfspec: {reason}")
