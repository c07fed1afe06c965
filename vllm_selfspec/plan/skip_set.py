"""`SkipSet`: which attention and MLP sublayers a draft leaves out.

One rule: a `SkipSet` that exists is valid for its number of layers. It is an immutable
value that knows nothing of torch or vLLM.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from vllm_selfspec.plan.errors import PlanError
from vllm_selfspec.plan.keys import Keys

# SWIFT (arXiv 2410.06916, section 4.1) skips this share of the sublayers before it has
# learned anything of the model; D&V's searched sets lie near it.
DEFAULT_SKIP_RATIO = 0.45

SUBLAYERS = ("attention", "mlp")


# A layer index. The upper bound is far above any model; it keeps a malformed profile
# from costing memory before it is checked against the model.
LayerIndex = Annotated[int, Field(ge=0, lt=10_000, strict=True)]


class SkipSetError(PlanError):
    """A skip set that does not fit the model."""


@dataclass(frozen=True)
class SkipSet:
    """The sublayers a draft skips, by 0-based layer index.

    Attributes:
        num_layers: Decoder layers of the model it belongs to.
        attention: Layers whose attention sublayer is skipped.
        mlp: Layers whose MLP sublayer is skipped.

    Raises:
        SkipSetError: If an index is no layer of the model, or nothing would be left.
    """

    num_layers: int
    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for sublayer in SUBLAYERS:
            self._check_indices(sublayer, getattr(self, sublayer))
        if self.num_skipped == 2 * self.num_layers:
            raise SkipSetError(
                "a draft must run at least one sublayer, but this skip set names all "
                f"{2 * self.num_layers}: keep one, for example "
                f"attention and mlp of layer {self.num_layers - 1}"
            )

    def _check_indices(self, sublayer: str, layers: frozenset[int]) -> None:
        outside = sorted(i for i in layers if not 0 <= i < self.num_layers)
        if outside:
            raise SkipSetError(
                f"skip set names {sublayer} of layer {outside[0]}, but the model has "
                f"{self.num_layers} layers (0 to {self.num_layers - 1}): "
                f"remove {outside} from {sublayer!r}"
            )

    @classmethod
    def of(
        cls, num_layers: int, attention: Iterable[int] = (), mlp: Iterable[int] = ()
    ) -> "SkipSet":
        """Builds a skip set from any iterables of layer indices."""
        return cls(num_layers, frozenset(attention), frozenset(mlp))

    @classmethod
    def early_exit(cls, num_layers: int, exit_layer: int) -> "SkipSet":
        """Runs layers `0 .. exit_layer - 1` whole and skips the others.

        What follows is the model's own final norm and LM head, as in LayerSkip
        (arXiv 2404.16710, section 3.2).

        Raises:
            SkipSetError: If the model has fewer than `exit_layer` layers.
        """
        if not 1 <= exit_layer <= num_layers:
            raise SkipSetError(
                f"exit_layer is the number of layers a draft runs, 1 to {num_layers} "
                f"for this model, but it is {exit_layer}: "
                f"use {min(max(exit_layer, 1), num_layers)}"
            )
        skipped = range(exit_layer, num_layers)
        return cls.of(num_layers, skipped, skipped)

    @classmethod
    def before_exit(
        cls, num_layers: int, exit_layer: int, holes: "SkipSet | None"
    ) -> "SkipSet":
        """`early_exit` that leaves out sublayers of the first layers, too.

        Raises:
            SkipSetError: If `holes` names a layer from `exit_layer` on.
        """
        leaves = cls.early_exit(num_layers, exit_layer)
        if holes is None:
            return leaves
        outside = sorted((holes.attention | holes.mlp) & leaves.whole_layers)
        if outside:
            raise SkipSetError(
                "with an exit layer, skip_layers names layers before the exit layer, 0 "
                f"to {exit_layer - 1}, but it names {outside[0]}: remove {outside}"
            )
        return cls.of(
            num_layers, leaves.attention | holes.attention, leaves.mlp | holes.mlp
        )

    @classmethod
    def evenly_spread(
        cls, num_layers: int, ratio: float = DEFAULT_SKIP_RATIO
    ) -> "SkipSet":
        """Skips `ratio` of all sublayers, evenly spread; first and last layer are kept.

        Attention and MLP are picked separately, each at equal distances among the inner
        layers, so that no stretch of the model loses all of one kind.
        """
        num_inner = max(num_layers - 2, 0)
        count = min(round(ratio * 2 * num_layers), 2 * num_inner)

        def spread(count: int) -> list[int]:
            return [1 + (2 * n + 1) * num_inner // (2 * count) for n in range(count)]

        # An odd one goes to attention, of which every set published by D&V skips more.
        return cls.of(num_layers, spread(count - count // 2), spread(count // 2))

    @classmethod
    def from_dict(
        cls, num_layers: int, lists: Mapping[str, Iterable[int]]
    ) -> "SkipSet":
        """The inverse of `to_dict`, for a model of `num_layers` layers."""
        return cls.of(num_layers, lists.get("attention", ()), lists.get("mlp", ()))

    def to_dict(self) -> dict[str, Any]:
        """`{"attention": [...], "mlp": [...]}`, as a user writes it."""
        return {s: sorted(getattr(self, s)) for s in SUBLAYERS}

    @property
    def num_skipped(self) -> int:
        """Skipped sublayers of either kind."""
        return len(self.attention) + len(self.mlp)

    @property
    def whole_layers(self) -> frozenset[int]:
        """Layers of which neither sublayer runs."""
        return self.attention & self.mlp

    @property
    def exit_layer(self) -> int | None:
        """N if this skips exactly the layers from N on, else None."""
        first = self.num_layers - len(self.whole_layers)
        is_exit = self.num_skipped and self == self.early_exit(self.num_layers, first)
        return first if is_exit else None

    def __str__(self) -> str:
        if not self.num_skipped:
            return "nothing skipped"
        if self.exit_layer is not None:
            return f"exit after layer {self.exit_layer - 1} of {self.num_layers}"
        parts = [f"{s} {_ranges(getattr(self, s))}" for s in SUBLAYERS]
        return f"skips {'; '.join(parts)} (of {self.num_layers} layers)"


class SkipLayers(Keys):
    """A skip set as a user or a profile writes it, by 0-based layer index."""

    attention: tuple[LayerIndex, ...] = Field(
        default=(), description="Layers whose attention sublayer the draft skips."
    )
    mlp: tuple[LayerIndex, ...] = Field(
        default=(), description="Layers whose MLP sublayer the draft skips."
    )


def _ranges(layers: frozenset[int]) -> str:
    """`{1, 2, 3, 7}` as `1-3,7`."""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    text = (f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return ",".join(text) or "none"
