"""`Budget`: what training an exit layer costs, on paper, before any of it is paid.

One rule: operations and bytes are counted from the target's config.json; how fast a
machine is must be said.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOKEN_BYTES = 4  # int32
TOP_BYTES = 4 + 2  # a token and its log-probability, int32 and float16
SAVED_BYTES, ADAM_BYTES = 2, 16  # bfloat16; float32 with gradient and two moments


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with gated MLPs, by its config.json."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """Raises `KeyError` where a size is missing."""
        heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
        return cls(
            config["num_hidden_layers"],
            hidden_size,
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden_size // heads,
            config["vocab_size"],
        )

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (heads + 3 * self.intermediate_size + 2)

    @property
    def head(self) -> int:
        """Parameters of the LM head."""
        return self.vocab_size * self.hidden_size

    def attention(self, length: int) -> float:
        """FLOPs of a layer's scores and sums for a token, of which half are masked."""
        return 2 * length * self.num_heads * self.head_dim


@dataclass(frozen=True)
class Run:
    """How much is trained on, and how fast.

    Attributes:
        exit_layer: N.
        num_prompts: Each is gone on with once.
        prompt_tokens: Of a prompt.
        own_tokens: Generated for it.
        epochs: Over all of it.
        top_k: Tokens of the target's distribution that are kept.
        flops: Of a GPU at its best, a second.
        trains_at: Share of that a training reaches.
        generates_at: Share that generation reaches at hundreds of requests at once.
    """

    exit_layer: int
    num_prompts: int = 50_000
    prompt_tokens: int = 256
    own_tokens: int = 256
    epochs: int = 3
    top_k: int = 32
    flops: float = 989e12  # H100 SXM, bfloat16, dense
    trains_at: float = 0.4
    generates_at: float = 0.15


@dataclass(frozen=True)
class Budget:
    """What it comes to.

    Attributes:
        num_parameters: That are trained.
        head_bytes: Of the saved head.
        memory_bytes: Of weights and optimizer state, on each GPU.
        cache_bytes: Of the texts and what the target says of them.
        generation_flops: Of the target, once.
        training_flops: Of N + 1 layers and the LM head, over all epochs.
        generation_hours: Of one GPU.
        training_hours: Of one GPU.
    """

    num_parameters: int
    head_bytes: int
    memory_bytes: int
    cache_bytes: int
    generation_flops: float
    training_flops: float
    generation_hours: float
    training_hours: float

    @classmethod
    def of(cls, shape: Shape, run: Run) -> "Budget":
        """Two FLOPs a parameter and token forward, and two each for the gradients of
        inputs and weights. Frozen layers have no backward pass, and the LM head only
        that to its inputs, at the target's own tokens."""
        length = run.prompt_tokens + run.own_tokens
        frozen = run.exit_layer * shape.layer
        attention = shape.attention(length)
        of_token = 2 * frozen + run.exit_layer * attention
        of_token += 6 * shape.layer + 3 * attention
        of_prompt = length * of_token + run.own_tokens * 4 * shape.head
        training = run.epochs * run.num_prompts * of_prompt
        whole = shape.num_layers * (2 * shape.layer + attention)
        generation = length * whole + run.own_tokens * 2 * shape.head
        generation *= run.num_prompts
        own = TOKEN_BYTES + run.top_k * TOP_BYTES
        cached = run.prompt_tokens * TOKEN_BYTES + run.own_tokens * own
        kept = frozen + 2 * shape.head
        return cls(
            shape.layer,
            SAVED_BYTES * shape.layer,
            SAVED_BYTES * kept + ADAM_BYTES * shape.layer,
            run.num_prompts * cached,
            generation,
            training,
            generation / (run.flops * run.generates_at) / 3600,
            training / (run.flops * run.trains_at) / 3600,
        )
