"""Model families: where the sublayers of a decoder layer are, by architecture."""

from dataclasses import dataclass, replace

from vllm_selfspec.plan.skip_set import SUBLAYERS


class UnsupportedModelError(ValueError):
    """A model, or a way to deploy it, that selfspec does not support."""


@dataclass(frozen=True)
class Checkpoint:
    """What the parts of a model are called in its checkpoint.

    A norm counts with the sublayer it feeds. (A layer of which one sublayer is skipped
    still runs both norms; next to a matrix they are less than a thousandth.)

    Attributes:
        layers: The list of decoder layers, at the end of a longer path or alone.
        attention: Modules of a layer that count as attention.
        mlp: Those that count as MLP.
        embedding: Of tokens; the LM head where there is no other.
        head: The LM head.
        last_norm: Before the LM head.
        positions: The embedding of positions, of which a step reads a row.
    """

    layers: str = "model.layers"
    attention: tuple[str, ...] = ("self_attn", "input_layernorm")
    mlp: tuple[str, ...] = ("mlp", "post_attention_layernorm")
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    last_norm: str = "norm"
    positions: str | None = None


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
        checkpoint: What its parts are called on disk.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    pairs: frozenset[str] = frozenset()
    has_exit_layer: bool = False
    checkpoint: Checkpoint = Checkpoint()


# Layers of Hugging Face's own, which vLLM runs through its Transformers backend.
TRANSFORMERS = Family(pairs=frozenset({"attention"}))

# Norms after the MLP, too, or there alone.
FEEDFORWARD_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
GEMMA_2 = Checkpoint(mlp=("mlp", "post_attention_layernorm", *FEEDFORWARD_NORMS))
GPT_2 = Checkpoint(
    layers="h",
    attention=("attn", "ln_1"),
    mlp=("mlp", "ln_2"),
    embedding="wte",
    last_norm="ln_f",
    positions="wpe",
)
EXPERT_BLOCKS = Checkpoint(mlp=("block_sparse_moe", "post_attention_layernorm"))


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
    "Gemma2ForCausalLM": Family(checkpoint=GEMMA_2),
    "Gemma3ForCausalLM": Family(checkpoint=GEMMA_2),
    "GraniteForCausalLM": Family(has_exit_layer=True),
    "Exaone4ForCausalLM": Family(checkpoint=GEMMA_2),
    "Glm4ForCausalLM": Family(
        checkpoint=Checkpoint(
            attention=("self_attn", "input_layernorm", "post_self_attn_layernorm"),
            mlp=("mlp", "post_attention_layernorm", "post_mlp_layernorm"),
        )
    ),
    "NemotronForCausalLM": Family(),
    "Ernie4_5ForCausalLM": Family(),
    "ApertusForCausalLM": Family(
        checkpoint=Checkpoint(
            attention=("self_attn", "attention_layernorm"),
            mlp=("mlp", "feedforward_layernorm"),
        )
    ),
    # Attention and MLP side by side, added up.
    "CohereForCausalLM": Family(),
    "Cohere2ForCausalLM": Family(),
    "FalconForCausalLM": Family(
        "self_attention",
        pairs=frozenset(SUBLAYERS),
        checkpoint=Checkpoint(
            layers="h",
            attention=("self_attention", "input_layernorm", "ln_attn"),
            mlp=("mlp", "post_attention_layernorm", "ln_mlp"),
            embedding="word_embeddings",
            last_norm="ln_f",
        ),
    ),
    "GPT2LMHeadModel": Family(attention="attn", checkpoint=GPT_2),
    "GPTJForCausalLM": Family(attention="attn", checkpoint=GPT_2),
    "MixtralForCausalLM": Family(mlp="block_sparse_moe", checkpoint=EXPERT_BLOCKS),
    "Qwen2MoeForCausalLM": Family(),
    "Qwen3MoeForCausalLM": Family(),
    "GptOssForCausalLM": Family(attention="attn"),
    "DeepseekV2ForCausalLM": Family(),
    "Glm4MoeForCausalLM": Family(),
    "OlmoeForCausalLM": Family(),
    "Ernie4_5_MoeForCausalLM": Family(),
    "GraniteMoeForCausalLM": Family(mlp="block_sparse_moe", checkpoint=EXPERT_BLOCKS),
    # Text, from images or audio too.
    "PaliGemmaForConditionalGeneration": Family(),
    "Qwen2AudioForConditionalGeneration": Family(),
    "OlmoForCausalLM": TRANSFORMERS,
    "Olmo2ForCausalLM": replace(TRANSFORMERS, checkpoint=GEMMA_2),
    "Olmo3ForCausalLM": replace(TRANSFORMERS, checkpoint=GEMMA_2),
    "SmolLM3ForCausalLM": TRANSFORMERS,
    "PhiForCausalLM": replace(
        TRANSFORMERS, checkpoint=Checkpoint(last_norm="final_layernorm")
    ),
    "GlmForCausalLM": TRANSFORMERS,
    "ArceeForCausalLM": TRANSFORMERS,
    "SeedOssForCausalLM": TRANSFORMERS,
    "HunYuanDenseV1ForCausalLM": TRANSFORMERS,
    "Starcoder2ForCausalLM": TRANSFORMERS,
    "GPTNeoXForCausalLM": replace(
        TRANSFORMERS,
        attention="attention",
        checkpoint=Checkpoint(
            layers="gpt_neox.layers",
            attention=("attention", "input_layernorm"),
            embedding="embed_in",
            head="embed_out",
            last_norm="final_layer_norm",
        ),
    ),
    "GPTBigCodeForCausalLM": replace(TRANSFORMERS, attention="attn", checkpoint=GPT_2),
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
