"""The axis `draft_window`: drafts attend to the first tokens and the last ones alone,
as in StreamingLLM.

At long contexts and many requests a decode step is mostly the reading of the KV cache.
The first tokens are those that attention rests on where it has nothing to look for.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from vllm_selfspec.plan.axis import Axis
from vllm_selfspec.plan.keys import Keys
from vllm_selfspec.plan.target_model import TargetModel

if TYPE_CHECKING:
    from vllm_selfspec.plan.draft_plan import DraftPlan

LEAST = 64
WHOLE = 0  # no window
PARAMETER = "window"


Tokens = Annotated[int, Field(ge=LEAST, le=1 << 24, strict=True)]
Share = Annotated[float, Field(gt=0, lt=1, strict=True)]


class DraftWindowKeys(Keys):
    """What a user may write."""

    draft_window: Tokens | Share | None = Field(
        default=None,
        description="Of the context, how many of the last tokens a draft attends to, "
        "in whole blocks of the KV cache, beside the first block; or which share, like "
        "0.25. Contexts that are shorter are read as a whole.",
    )


class DraftWindowAxis(Axis):
    """Its value is a number of tokens, a share of the context, or `WHOLE`."""

    name = "draft_window"
    keys = DraftWindowKeys
    stored = (Tokens | Share | None, Field(default=None, description="Its window."))

    def neutral(self, num_layers: int) -> float:
        return WHOLE

    def resolve(
        self, config: Any, target: TargetModel, plan: "DraftPlan"
    ) -> "DraftPlan":
        if "draft_window" not in config.model_fields_set:
            return plan
        return plan.with_value(self.name, config.draft_window or WHOLE)

    def to_json(self, value: float) -> Any:
        return value or None

    def from_json(self, stored: Any, num_layers: int) -> float:
        return stored or WHOLE

    def words(self, value: float) -> str:
        if value < 1:
            return f"a window of {value:.0%} of the context"
        return f"a window of {value} tokens"

    def build(self, value: float, view: Any, loaded: Any) -> None:
        view.window = value

    def choices(self, plan: "DraftPlan") -> Mapping[str, tuple[Any, ...]]:
        """With and without the window that the search starts from."""
        value = plan[self.name]
        return {PARAMETER: (WHOLE, value)} if value else {}

    def params(self, value: float) -> dict[str, Any]:
        return {PARAMETER: value}

    def from_params(self, params: Mapping[str, Any], plan: "DraftPlan") -> float:
        return self.from_json(params[PARAMETER], plan.num_layers)
