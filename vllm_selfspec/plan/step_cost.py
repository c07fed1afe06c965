"""`StepCost`: what one decode step costs, part by part.

One rule: the unit is the caller's. Bytes that are read, seconds, and shares of a step
of the target are all added up and left out in the same way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class StepCost:
    """A step of the target, or of a draft.

    Attributes:
        attention: Attention sublayer and the norm before it, by layer.
        mlp: MLP sublayer and the norm before it, by layer.
        head: Final norm and LM head.
        context: Reading the KV cache, by layer; empty where that is not looked at.
        num_tokens: Of the contexts that it is read of, each.
        others: What a draft runs that its target does not, by name.
        weight_bytes: Bytes of one of the target's weights; 0 where it is quantised.
        copy_shares: By part, what it costs with the copy of its weights that a search
            may take, over what it costs with them; empty where that was not measured,
            and goes by bytes.
        has_experts: Whether MLPs are mixtures of experts, which nobody copies.
    """

    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    head: float
    context: tuple[float, ...] = ()
    num_tokens: int = 0
    others: dict[str, float] = field(default_factory=dict)
    weight_bytes: float = 2.0
    copy_shares: Mapping[str, float] = field(default_factory=dict)
    has_experts: bool = False

    @classmethod
    def uniform(
        cls, num_layers: int, head: float, attention: float, mlp: float
    ) -> "StepCost":
        """With the same cost in every layer."""
        return cls((attention,) * num_layers, (mlp,) * num_layers, head)

    def in_context(self, num_tokens: int, cost: float) -> "StepCost":
        """With as much more, in every layer alike, for reading contexts of so many
        tokens."""
        of_layer = cost / self.num_layers
        context = (of_layer,) * self.num_layers
        return replace(self, context=context, num_tokens=num_tokens)

    def times(self, factor: float) -> "StepCost":
        """In another unit."""
        return replace(
            self,
            attention=tuple(factor * cost for cost in self.attention),
            mlp=tuple(factor * cost for cost in self.mlp),
            head=factor * self.head,
            context=tuple(factor * cost for cost in self.context),
            others={name: factor * cost for name, cost in self.others.items()},
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.attention)

    @property
    def parts(self) -> dict[str, float]:
        """The cost by kind of part."""
        return {
            "attention": sum(self.attention),
            "mlp": sum(self.mlp),
            **({"context": sum(self.context)} if self.context else {}),
            **self.others,
            "head": self.head,
        }

    @property
    def total(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    def measured_with_copies(self, copied: "StepCost") -> "StepCost":
        """Knowing what a step costs with every copy that a search may take."""
        parts = copied.parts
        shares = {part: parts[part] / cost for part, cost in self.parts.items()}
        return replace(self, copy_shares=shares)

    def beside(self, name: str, cost: float) -> "StepCost":
        """With one part more."""
        return replace(self, others={**self.others, name: cost})
