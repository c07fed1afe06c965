"""Model families: where the sublayers of a decoder layer are, by architecture."""

from dataclasses import dataclass, replace

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
        has_exit_layer: Whether a trained exit layer is served: its decoder layers can
            be run one by one for their K and V, and vLLM hands out the states between
            them (its SupportsEagle3).
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    pairs: frozenset[str] = frozenset()
    has_exit_layer: bool = False


# Layers of Hugging Face's own, which vLLM runs through its Transformers backend.
TRANSFORMERS = Family(pairs=frozenset({"attention"}))


# By vLLM's architecture name. To add one: check that its layers fit `Family`, add it to
# the models of `tests/engine/test_families.py`, and run the identity tests.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(has_exit_layer=True),
    "MistralForCausalLM": Family(has_exit_layer=True),
    "Qwen2ForCausalLM": Family(has_exit_layer=True),
    "Qwen3ForCausalLM": Family(has_exit_layer=True),
    "Phi3ForCausalLM": Family(has_exit_layer=True),
    "GemmaForCausalLM": Family(),
    # A norm after the sublayer, too; of zeros it makes zeros.
    "Gemma2ForCausalLM": Family(),
    "Gemma3ForCausalLM": Family(),
    "GraniteForCausalLM": Family(has_exit_layer=True),
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


WITH_EXIT_LAYER = tuple(
    name for name, family in FAMILIES.items() if family.has_exit_layer
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
            "use draft_source 'context'"
        )
    return FAMILIES[architecture]
