"""The axis `skip_layers`: sublayers that a draft leaves out, as in *Draft & Verify*.

An exit after layer N is the case in which all sublayers from N on are left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from vllm_selfspec.plan.axis import Axis
from vllm_selfspec.plan.keys import OBJECT, PATH, Keys
from vllm_selfspec.plan.skip_set import SUBLAYERS, SkipLayers, SkipSet, SkipSetError
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel

if TYPE_CHECKING:
    from vllm_selfspec.plan.draft_plan import DraftPlan

AUTO, ONLINE = "auto", "online"
# SWIFT's 0.45 and around it.
SPREAD_RATIOS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75)


def _form_of(skip_layers: object) -> str | None:
    """Told apart first, so that an error speaks of the form that was meant."""
    if isinstance(skip_layers, str):
        return PATH
    return OBJECT if isinstance(skip_layers, Mapping | SkipLayers) else None


SkipLayersOrWord = Annotated[
    # Linux takes no path longer than this.
    Annotated[str, Field(max_length=4096), Tag(PATH)]
    | Annotated[SkipLayers, Tag(OBJECT)],
    Discriminator(_form_of),
]


class SkipLayersKeys(Keys):
    """What a user may write."""

    skip_layers: SkipLayersOrWord = Field(
        default=AUTO,
        description="'auto', 'online' (as auto, and looks for a better one while "
        'serving), a skip set ({"attention": [...], "mlp": [...]}), or the path of a '
        "JSON profile.",
    )
    exit_layer: int | None = Field(
        default=None,
        ge=1,
        lt=10_000,
        strict=True,
        description="Draft with layers 0 to N-1, then the final norm and LM head. "
        "Excludes skip_layers.",
    )

    @model_validator(mode="after")
    def _one_skip_set(self) -> "SkipLayersKeys":
        says_both = {"skip_layers", "exit_layer"} <= self.model_fields_set
        has_layer = getattr(self, "trained_exit_layer", None) is not None
        if says_both and self.exit_layer is not None and not has_layer:
            raise ValueError(
                "exit_layer and skip_layers exclude each other: remove one of them"
            )
        return self


class SkipLayersAxis(Axis):
    """Its value is a `SkipSet`; its parameters are `attention.3` and the like."""

    name = "skip_layers"
    keys = SkipLayersKeys
    stored = (SkipLayers, Field(description="The skip set."))
    is_exchangeable = True

    def neutral(self, num_layers: int) -> SkipSet:
        return SkipSet.of(num_layers)

    def resolve(
        self, config: Any, target: TargetModel, plan: "DraftPlan"
    ) -> "DraftPlan":
        num_layers = target.num_layers
        if isinstance(config.skip_layers, SkipLayers):
            try:
                skip_set = self.from_json(config.skip_layers, num_layers)
            except SkipSetError as error:
                raise SkipSetError(f"skip_layers: {error}") from error
            return plan.with_value(self.name, skip_set)
        if config.exit_layer is not None:
            skip_set = SkipSet.early_exit(num_layers, config.exit_layer)
            return plan.with_value(self.name, skip_set)
        return plan

    def cost(self, value: SkipSet, draft: StepCost, target: StepCost) -> StepCost:
        attention, mlp = (
            tuple(
                0.0 if layer in getattr(value, sublayer) else cost
                for layer, cost in enumerate(getattr(draft, sublayer))
            )
            for sublayer in SUBLAYERS
        )
        context = tuple(
            0.0 if layer in value.attention else cost
            for layer, cost in enumerate(draft.context)
        )
        return replace(draft, attention=attention, mlp=mlp, context=context)

    def choices(self, plan: "DraftPlan") -> Mapping[str, tuple[Any, ...]]:
        return {
            _param(layer, sublayer): (False, True)
            for layer in range(plan.num_layers)
            for sublayer in SUBLAYERS
        }

    def params(self, value: SkipSet) -> dict[str, Any]:
        return {
            _param(layer, sublayer): layer in getattr(value, sublayer)
            for sublayer in SUBLAYERS
            for layer in range(value.num_layers)
        }

    def from_params(self, params: Mapping[str, Any], plan: "DraftPlan") -> SkipSet:
        lists = {
            sublayer: [
                layer
                for layer in range(plan.num_layers)
                if params[_param(layer, sublayer)]
            ]
            for sublayer in SUBLAYERS
        }
        return SkipSet.of(plan.num_layers, **lists)

    def candidates(self, plan: "DraftPlan") -> Iterator[SkipSet]:
        """Evenly spread sets, and an exit after every layer."""
        for ratio in SPREAD_RATIOS:
            yield SkipSet.evenly_spread(plan.num_layers, ratio)
        for exit_layer in range(1, plan.num_layers):
            yield SkipSet.early_exit(plan.num_layers, exit_layer)

    def to_json(self, value: SkipSet) -> Any:
        return value.to_dict()

    def from_json(self, stored: Any, num_layers: int) -> SkipSet:
        lists = stored.model_dump() if isinstance(stored, SkipLayers) else stored
        return SkipSet.from_dict(num_layers, lists)

    def words(self, value: SkipSet) -> str:
        return str(value)

    def outline(self, value: SkipSet) -> str:
        if value.exit_layer is not None:
            return str(value)
        counts = (f"{s} in {len(getattr(value, s))}" for s in SUBLAYERS)
        return f"skips {' and '.join(counts)} of {value.num_layers} layers"

    def build(self, value: SkipSet, view: Any, loaded: Any) -> None:
        for layer in range(value.num_layers):
            skipped = [s for s in SUBLAYERS if layer in getattr(value, s)]
            if skipped:
                view.skip(layer, skipped)


def _param(layer: int, sublayer: str) -> str:
    return f"{sublayer}.{layer}"
