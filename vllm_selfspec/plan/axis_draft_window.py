"""The axis `draft_window`: drafts attend to the first tokens and the last ones alone,
as in StreamingLLM.

At long contexts and many requests a decode step is mostly the reading of the KV cache.
The first tokens are those that attention rests on where it has nothing to look for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from vllm_selfspec.plan.axis import Axis, Ints
from vllm_selfspec.plan.keys import Keys
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel

if TYPE_CHECKING:
    from vllm_selfspec.plan.draft_plan import DraftPlan

LEAST = 64
# A share of a short context would leave out what drafts hardly do without.
LEAST_OF_SHARE = 256
WHOLE = 0  # no window
# What a search starts from, where contexts are so many times as long.
USUAL, WORTH_IT = 512, 4
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

    def tokens_read(self, value: float, num_tokens: Ints) -> Ints:
        """Without what whole blocks add."""
        window = np.int64(value)
        if value < 1:
            window = np.maximum(np.int64(value * num_tokens), LEAST_OF_SHARE)
        return np.minimum(num_tokens, window)

    def cost(self, value: float, draft: StepCost, target: StepCost) -> StepCost:
        if not draft.num_tokens:
            return draft
        read = int(self.tokens_read(value, np.array([draft.num_tokens]))[0])
        share = read / draft.num_tokens
        return replace(draft, context=tuple(share * cost for cost in draft.context))

    def for_contexts(self, plan: "DraftPlan", num_tokens: int) -> float:
        """A window where it leaves out most."""
        value: float = plan[self.name]
        return value or (USUAL if num_tokens >= WORTH_IT * USUAL else WHOLE)

    def choices(self, plan: "DraftPlan") -> Mapping[str, tuple[Any, ...]]:
        """With and without the window that the search starts from, and others about as
        wide."""
        value = plan[self.name]
        if not value:
            return {}
        others = (value // 2, 2 * value) if value >= 2 * LEAST else ()
        return {PARAMETER: (WHOLE, value, *others)}

    def candidates(self, plan: "DraftPlan") -> Iterator[Any]:
        if plan[self.name]:
            yield WHOLE

    def params(self, value: float) -> dict[str, Any]:
        return {PARAMETER: value}

    def from_params(self, params: Mapping[str, Any], plan: "DraftPlan") -> float:
        return self.from_json(params[PARAMETER], plan.num_layers)
