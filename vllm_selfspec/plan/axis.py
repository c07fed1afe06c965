"""`Axis`: one way in which a draft may differ from its target.

One rule: everything that is to be known of an axis stands in its file, and nothing of
it elsewhere. Configuration, profiles, costs, searches, `show` and the draft view go
over the table of `plan.axes` and ask each axis.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from vllm_selfspec.plan.keys import Keys
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel

if TYPE_CHECKING:
    from vllm_selfspec.plan.draft_plan import DraftPlan

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Deployment:
    """What a draft plan is to be served in.

    Attributes:
        model_config: vLLM's `ModelConfig` of the target.
        parallel_config: vLLM's `ParallelConfig`.
        has_loras: Whether the target is served with adapters.
        has_connector: Whether KV blocks come from elsewhere.
    """

    model_config: Any
    parallel_config: Any
    has_loras: bool = False
    has_connector: bool = False


class Axis(ABC):
    """One row of the table.

    A value of an axis is immutable and hashable, and equal to another that drafts the
    same.

    Attributes:
        name: Its key in the JSON of a plan.
        keys: The user's configuration keys, with their bounds and descriptions; each
            has a default, which means that the user says nothing.
        stored: Type and pydantic field of its value in a profile.
        taker: What a value takes of the target's weights while those are as they were
            loaded, before vLLM packs them: `module:name` of a callable of the plan, the
            target and vLLM's configuration. Workers alone import it.
        loader: What every view with a value shares, as `module:name` of a callable
            that makes it once, when the target is loaded, from the value, the target
            and vLLM's configuration. Workers alone import it.
        is_exchangeable: Whether another value costs a serving engine nothing, so that
            a search may try values between two steps.
    """

    name: ClassVar[str]
    keys: ClassVar[type[Keys]]
    stored: ClassVar[tuple[Any, Any]]
    taker: ClassVar[str | None] = None
    loader: ClassVar[str | None] = None
    is_exchangeable: ClassVar[bool] = False

    @abstractmethod
    def neutral(self, num_layers: int) -> Any:
        """The value with which a draft is the target, of so many layers."""

    @abstractmethod
    def resolve(
        self, config: Any, target: TargetModel, plan: "DraftPlan"
    ) -> "DraftPlan":
        """`plan` as the user's keys change it.

        Args:
            config: `SelfSpecConfig`, with the keys of every axis.
            target: The model that is to be drafted for.
            plan: What the keys of earlier axes have made of the plan to start from.

        Raises:
            PlanError: If what the user wrote does not fit the model.
        """

    @abstractmethod
    def to_json(self, value: Any) -> Any:
        """The value as a profile keeps it."""

    @abstractmethod
    def from_json(self, stored: Any, num_layers: int) -> Any:
        """The inverse of `to_json`, for a model of so many layers.

        Raises:
            PlanError: If it does not fit such a model.
        """

    @abstractmethod
    def words(self, value: Any) -> str:
        """The value, not the neutral one, in a few words."""

    def outline(self, value: Any) -> str:
        """The same in one line, however deep the model."""
        return self.words(value)

    @abstractmethod
    def build(self, value: Any, view: Any, loaded: Any) -> None:
        """Changes a draft view that is being built.

        Args:
            value: Not the neutral one.
            view: `draft.view.ViewBuilder`.
            loaded: What `loader` made of the value; None where there is none.
        """

    def completed(self, plan: "DraftPlan") -> "DraftPlan":
        """`plan` with what this axis's value in it implies for others.

        Raises:
            PlanError: If it cannot go with theirs.
        """
        return plan

    def refusal(self, value: Any, deployment: Deployment) -> str | None:
        """Why the value cannot be served there, and what to do; None if it can."""
        return None

    def cost(self, value: Any, draft: StepCost, target: StepCost) -> StepCost:
        """What a draft step costs with the value.

        Args:
            value: Not the neutral one.
            draft: The step as the axes before this one leave it.
            target: A step of the whole target, in the same unit.
        """
        return draft

    def tokens_read(self, value: Any, num_tokens: Ints) -> Ints:
        """Of contexts of `num_tokens`, how many tokens a draft step attends to."""
        return num_tokens

    def extra_bytes(self, value: Any, draft: StepCost, target: StepCost) -> int:
        """Bytes of weights that are kept beside the target's; arguments as of `cost`,
        in bytes."""
        return 0

    def within_memory(
        self, plan: "DraftPlan", target: StepCost, most_bytes: float
    ) -> Any:
        """The value that drafts fastest of those with which `plan` keeps at most
        `most_bytes` beside the target, whose bytes are given."""
        return plan[self.name]

    def for_contexts(self, plan: "DraftPlan", num_tokens: int) -> Any:
        """The value that a search starts from where contexts have so many tokens."""
        return plan[self.name]

    def choices(self, plan: "DraftPlan") -> Mapping[str, tuple[Any, ...]]:
        """What a search that starts from `plan` may choose, by parameter: at least two
        values of each, as JSON has them. Names are no other axis's."""
        return {}

    def params(self, value: Any) -> dict[str, Any]:
        """The value as those parameters."""
        return {}

    def from_params(self, params: Mapping[str, Any], plan: "DraftPlan") -> Any:
        """The inverse of `params`; of what they do not say, `plan`'s value.

        Raises:
            PlanError: If there is no such value.
        """
        return plan[self.name]

    def candidates(self, plan: "DraftPlan") -> Iterator[Any]:
        """Values worth a try before any search that starts from `plan`."""
        yield from ()
