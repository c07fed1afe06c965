"""The axis `draft_weights`: the target drafts with a copy of its own weights in fewer
bits, as in QSpec.

Drafting is bound by the bytes that a step reads, and hardly a token of a trained model
depends on more than four bits of a weight.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from vllm_selfspec.plan.axis import Axis
from vllm_selfspec.plan.errors import PlanError
from vllm_selfspec.plan.keys import OBJECT, PATH, Keys, shown
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel

if TYPE_CHECKING:
    from vllm_selfspec.plan.draft_plan import DraftPlan

SAME: Final = "same"
INT8: Final = "int8"
INT4: Final = "int4"
MLP, HEAD = "mlp", "head"
WEIGHTS = (SAME, INT8, INT4)
# int8 has a scale per output channel. int4 has for each group of weights a scale, and
# as vLLM's CPU kernel keeps it a sum and a zero point, too; its GPU kernels need less.
GROUP_SIZE = 128
# Chance that an int4 draft's next token is right: 0.86 to 0.95 of the first ones of
# models from 0.5 to 8 billion weights, a little less of later ones.
TYPICAL_ACCEPTANCE = 0.88
BYTES_PER_WEIGHT = {INT8: 1.0, INT4: 0.5 + (4 + 4 + 1) / GROUP_SIZE}

Word = Literal["same", "int8", "int4"]


class ByPart(Keys):
    """Weights by part of the model."""

    attention: Word = Field(default=SAME, description="Of attention sublayers.")
    mlp: Word = Field(default=SAME, description="Of MLP sublayers.")
    head: Word = Field(default=SAME, description="Of the LM head.")


def _form_of(draft_weights: object) -> str | None:
    if isinstance(draft_weights, str):
        return PATH
    return OBJECT if isinstance(draft_weights, Mapping | ByPart) else None


class DraftWeightsKeys(Keys):
    """What a user may write."""

    draft_weights: Annotated[
        Annotated[Word, Tag(PATH)] | Annotated[ByPart, Tag(OBJECT)],
        Discriminator(_form_of),
    ] = Field(
        default=SAME,
        description="Weights to draft with: 'same' (the target's own), or a copy of "
        "them in 'int8' or 'int4', which takes memory; for all or by part "
        '({"attention": "int8", "mlp": "int4", "head": "int4"}).',
    )

    @field_validator("draft_weights", mode="before")
    @classmethod
    def _is_a_word(cls, value: Any) -> Any:
        if _form_of(value) is None:
            raise ValueError(
                f"is {shown(value)}, but must be 'same', 'int8', 'int4', or these by "
                'part: write one, like "int4" or {"mlp": "int4"}'
            )
        words = value.values() if isinstance(value, Mapping) else [value]
        if "fp8" in words:
            raise ValueError(
                "must be 'same', 'int8' or 'int4', but is 'fp8', for which vLLM has "
                "kernels on some devices only: use 'int8', which reads as many bytes"
            )
        return value


@dataclass(frozen=True)
class DraftWeights:
    """What each part drafts with: one of `WEIGHTS`.

    Attributes:
        attention: Attention sublayers.
        mlp: MLP sublayers.
        head: The LM head.
    """

    attention: str = SAME
    mlp: str = SAME
    head: str = SAME

    @classmethod
    def all_in(cls, word: str) -> "DraftWeights":
        """The same for every part."""
        return cls(word, word, word)

    @property
    def by_part(self) -> dict[str, str]:
        """Of each part its word."""
        return dict(vars(self))


class DraftWeightsAxis(Axis):
    """Its value is a `DraftWeights`; its parameters are `weights.mlp` and the like."""

    name = "draft_weights"
    keys = DraftWeightsKeys
    stored = (ByPart, Field(default=ByPart(), description="Weights to draft with."))
    taker = "vllm_selfspec.draft.low_bit:take_copies"
    loader = "vllm_selfspec.draft.low_bit:copies_of"

    def neutral(self, num_layers: int) -> DraftWeights:
        return DraftWeights()

    def resolve(
        self, config: Any, target: TargetModel, plan: "DraftPlan"
    ) -> "DraftPlan":
        if "draft_weights" not in config.model_fields_set:
            return plan
        value = self.from_json(config.draft_weights, target.num_layers)
        if target.has_experts:  # vLLM's experts are no linear layers
            value = replace(value, mlp=SAME)
        return plan.with_value(self.name, value)

    def cost(self, value: DraftWeights, draft: StepCost, target: StepCost) -> StepCost:
        attention, mlp, head = (
            _share(part, word, target) for part, word in value.by_part.items()
        )
        return replace(
            draft,
            attention=tuple(cost * attention for cost in draft.attention),
            mlp=tuple(cost * mlp for cost in draft.mlp),
            head=draft.head * head,
        )

    def extra_bytes(
        self, value: DraftWeights, draft: StepCost, target: StepCost
    ) -> int:
        """Of what the draft runs; as many as it then reads."""
        if not target.weight_bytes:
            return 0
        copied = self.cost(value, draft, target).parts
        return round(
            sum(copied[p] for p, word in value.by_part.items() if word != SAME)
        )

    def within_memory(
        self, plan: "DraftPlan", target: StepCost, most_bytes: float
    ) -> DraftWeights:
        """As many bytes of the target in 4 bits as there is room for."""
        left = {MLP} if target.has_experts else set()
        parts = [part for part in DraftWeights().by_part if part not in left]
        some = [
            DraftWeights(**dict.fromkeys(chosen, INT4))
            for num in range(1, len(parts) + 1)
            for chosen in combinations(parts, num)
        ]
        plans = {value: plan.with_value(self.name, value) for value in some}
        fitting = [v for v in some if plans[v].extra_bytes(target) <= most_bytes]
        return max(
            fitting,
            key=lambda value: plans[value].extra_bytes(target),
            default=plan[self.name],
        )

    def to_json(self, value: DraftWeights) -> Any:
        return value.by_part

    def from_json(self, stored: Any, num_layers: int) -> DraftWeights:
        if isinstance(stored, str):
            return DraftWeights.all_in(_known(stored))
        words = stored if isinstance(stored, Mapping) else stored.model_dump()
        return DraftWeights(**{part: _known(word) for part, word in words.items()})

    def words(self, value: DraftWeights) -> str:
        first, *others = set(value.by_part.values())
        if not others:
            return f"weights in {first}"
        listed = (f"{p} in {w}" for p, w in value.by_part.items() if w != SAME)
        return f"weights of {', '.join(listed)}"

    def build(self, value: DraftWeights, view: Any, loaded: Any) -> None:
        view.may_compile = view.may_compile and loaded.may_compile
        for part, word in value.by_part.items():
            if word == SAME:
                continue
            if part == HEAD:
                view.exchange_head(loaded.parts[part])
            else:
                view.exchange(loaded.parts[part])

    def choices(self, plan: "DraftPlan") -> Mapping[str, tuple[Any, ...]]:
        """With and without the copies of each part that the search starts from."""
        words = plan[self.name].by_part
        return {_param(p): (SAME, word) for p, word in words.items() if word != SAME}

    def candidates(self, plan: "DraftPlan") -> Iterator[DraftWeights]:
        """One of the copies that the search may make, for each."""
        words = plan[self.name].by_part
        for part, word in words.items():
            if word != SAME:
                yield DraftWeights(**{part: word})

    def params(self, value: DraftWeights) -> dict[str, Any]:
        return {_param(part): word for part, word in value.by_part.items()}

    def from_params(self, params: Mapping[str, Any], plan: "DraftPlan") -> DraftWeights:
        words = {part: params[_param(part)] for part in plan[self.name].by_part}
        return self.from_json(words, plan.num_layers)


def _param(part: str) -> str:
    return f"weights.{part}"


def _share(part: str, word: str, target: StepCost) -> float:
    """Of the cost of a part of the target, what its copy has: as measured, or by its
    bytes. What is quantised already is not copied."""
    if word == SAME or not target.weight_bytes:
        return 1.0
    by_bytes = BYTES_PER_WEIGHT[word] / target.weight_bytes
    return target.copy_shares.get(part, by_bytes)


def _known(word: str) -> str:
    if word not in WEIGHTS:
        raise PlanError(
            f"draft_weights must be one of {', '.join(WEIGHTS)}, but a plan says "
            f"{word!r}: write one of those"
        )
    return word
