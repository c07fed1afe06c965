"""The axis `trained_exit_layer`: one trained layer in place of those after layer N, as
in EESD.

It runs on the states that the first N layers leave, with a KV cache of its own beside
theirs, and its output goes to the target's final norm and LM head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from vllm_selfspec.plan.axis import Axis, Deployment
from vllm_selfspec.plan.exit_card import ExitLayerError, read_exit_card
from vllm_selfspec.plan.families import WITH_EXIT_LAYER
from vllm_selfspec.plan.keys import Keys, shown
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel

if TYPE_CHECKING:
    from vllm_selfspec.plan.draft_plan import DraftPlan

PART = "exit layer"

FORMER_NAME = "exit_head"  # of the key


def by_present_names(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """A user's keys; `exit_head` is what `trained_exit_layer` used to be called.

    Raises:
        ValueError: If both names are there.
    """
    if FORMER_NAME not in keys:
        return keys
    if "trained_exit_layer" in keys:
        raise ValueError(
            "exit_head is the former name of trained_exit_layer, and both are "
            "there: remove exit_head"
        )
    renamed = {FORMER_NAME: "trained_exit_layer"}
    return {renamed.get(key, key): value for key, value in keys.items()}


class ExitLayerKeys(Keys):
    """What a user may write."""

    trained_exit_layer: str | None = Field(
        default=None,
        max_length=4096,
        description="Directory of a trained exit layer, as `vllm-selfspec train-exit` "
        "writes it: a layer that follows the first N. exit_layer may then be left "
        "out, and skip_layers be a skip set within those N.",
    )

    @model_validator(mode="before")
    @classmethod
    def _former_name(cls, keys: Any) -> Any:
        return by_present_names(keys) if isinstance(keys, Mapping) else keys

    @model_validator(mode="after")
    def _skips_before_it(self) -> "ExitLayerKeys":
        skip_layers: Any = getattr(self, "skip_layers", None)
        is_said = "skip_layers" in self.model_fields_set
        is_word = is_said and isinstance(skip_layers, str)
        if self.trained_exit_layer is not None and is_word:
            raise ValueError(
                "with trained_exit_layer, skip_layers is a skip set within the layers "
                f"before it, but it is {shown(skip_layers)}: write one, like "
                '{"mlp": [1]}, or leave it out'
            )
        return self


class StoredExitLayer(Keys):
    """As a profile keeps it."""

    directory: str = Field(max_length=4096, description="Of its card and tensors.")
    after: int = Field(
        ge=1, lt=10_000, strict=True, description="N: the target's layers before it."
    )


@dataclass(frozen=True)
class TrainedExitLayer:
    """One on disk.

    Attributes:
        directory: Absolute path of its card and tensors.
        after: N: it follows so many of the target's layers.
    """

    directory: str
    after: int


class ExitLayerAxis(Axis):
    """Its value is a `TrainedExitLayer`, or None."""

    name = "trained_exit_layer"
    loader = "vllm_selfspec.draft.exit_layer:ServedExitLayer.load"
    keys = ExitLayerKeys
    stored = (
        StoredExitLayer | None,
        Field(default=None, description="The trained exit layer."),
    )

    def neutral(self, num_layers: int) -> None:
        return None

    def resolve(
        self, config: Any, target: TargetModel, plan: "DraftPlan"
    ) -> "DraftPlan":
        directory = config.trained_exit_layer
        if directory is None:
            return plan
        card = read_exit_card(Path(directory))
        card.check_fits(target, Path(target.name))
        if config.exit_layer not in (None, card.exit_layer):
            raise ExitLayerError(
                "an exit layer follows the layers that it was trained after, and the "
                f"first {card.exit_layer} those are for {directory!r}, but exit_layer "
                f"is {config.exit_layer}: leave it out"
            )
        holes = None
        if not isinstance(config.skip_layers, str):
            holes = SkipSet.from_dict(card.num_layers, config.skip_layers.model_dump())
        skip_set = SkipSet.before_exit(card.num_layers, card.exit_layer, holes)
        value = TrainedExitLayer(str(Path(directory).absolute()), card.exit_layer)
        return plan.with_value("skip_layers", skip_set).with_value(self.name, value)

    def completed(self, plan: "DraftPlan") -> "DraftPlan":
        """The layers that it stands for are left out."""
        value = plan[self.name]
        if value is None:
            return plan
        leaves = SkipSet.early_exit(plan.num_layers, value.after)
        skipped = plan["skip_layers"]
        both = SkipSet.of(
            plan.num_layers,
            leaves.attention | skipped.attention,
            leaves.mlp | skipped.mlp,
        )
        return plan.implying("skip_layers", both)

    def refusal(self, value: TrainedExitLayer, deployment: Deployment) -> str | None:
        architecture = deployment.model_config.architecture
        if architecture not in WITH_EXIT_LAYER:
            return (
                f"an exit layer is served for {', '.join(WITH_EXIT_LAYER)}, but this "
                f"model is a {architecture}: use exit_layer without trained_exit_layer"
            )
        if deployment.has_loras:
            return (
                "an exit layer is trained for a target without adapters, but "
                "enable_lora is on: leave out trained_exit_layer"
            )
        if deployment.has_connector:
            return (
                "a KV connector moves what the target's attention writes, and the exit "
                "layer's K and V are written beside it, but kv_transfer_config is "
                "given: leave out trained_exit_layer"
            )
        return None

    def cost(self, value: Any, draft: StepCost, target: StepCost) -> StepCost:
        """A layer of the target's class."""
        return draft.beside(PART, target.attention[-1] + target.mlp[-1])

    def extra_bytes(self, value: Any, draft: StepCost, target: StepCost) -> int:
        return round(target.attention[-1] + target.mlp[-1])

    def choices(self, plan: "DraftPlan") -> Mapping[str, tuple[Any, ...]]:
        """With and without the one that the search starts from."""
        return {} if plan[self.name] is None else {self.name: (False, True)}

    def params(self, value: Any) -> dict[str, Any]:
        return {self.name: value is not None}

    def from_params(self, params: Mapping[str, Any], plan: "DraftPlan") -> Any:
        return plan[self.name] if params[self.name] else None

    def to_json(self, value: Any) -> Any:
        return None if value is None else dict(vars(value))

    def from_json(self, stored: Any, num_layers: int) -> TrainedExitLayer:
        keys = stored if isinstance(stored, Mapping) else stored.model_dump()
        SkipSet.early_exit(num_layers, keys["after"])  # that there are so many
        return TrainedExitLayer(**keys)

    def words(self, value: TrainedExitLayer) -> str:
        return f"trained exit layer after layer {value.after - 1}"

    def build(self, value: TrainedExitLayer, view: Any, loaded: Any) -> None:
        view.replace(value.after, loaded.layer)
        view.take_out_aux_hidden_states()
