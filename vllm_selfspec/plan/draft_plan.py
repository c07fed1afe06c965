"""`DraftPlan`: how a draft differs from its target.

One rule: it is the only form that a plan has. What the user writes becomes one,
profiles keep it, workers receive it, searches move in it, `show` prints it, and the
benchmark compares it. It is a value for each axis of `plan.axes`, and knows none of
them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_selfspec.plan.axes import AXES
from vllm_selfspec.plan.axis import Ints
from vllm_selfspec.plan.errors import PlanError
from vllm_selfspec.plan.step_cost import StepCost


@dataclass(frozen=True)
class DraftPlan:
    """A value for each axis, for a model of some depth.

    Attributes:
        num_layers: Decoder layers of the model.
        values: By axis, in the order of the table, those that are not neutral.

    Raises:
        PlanError: If values do not fit the model or each other.
    """

    num_layers: int
    values: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, num_layers: int, **values: Any) -> "DraftPlan":
        """By the names of axes; those that are left out are neutral."""
        plan = cls(num_layers)
        for name, value in values.items():
            plan = plan.with_value(name, value)
        return plan

    @classmethod
    def skipping(cls, skip_set: Any) -> "DraftPlan":
        """What leaves out the sublayers of a `SkipSet`, and nothing else."""
        return cls.of(skip_set.num_layers, skip_layers=skip_set)

    def with_value(self, name: str, value: Any) -> "DraftPlan":
        """With another value of one axis, and what that implies for others."""
        return self.implying(name, value)._completed()

    def implying(self, name: str, value: Any) -> "DraftPlan":
        """`with_value` for an axis that completes a plan: asks no other axis."""
        values = {**dict(self.values), AXES.named(name).name: value}
        return DraftPlan(
            self.num_layers,
            tuple(
                (axis.name, values[axis.name])
                for axis in AXES
                if axis.name in values
                and values[axis.name] != axis.neutral(self.num_layers)
            ),
        )

    def _completed(self) -> "DraftPlan":
        plan = self
        for axis in AXES:
            plan = axis.completed(plan)
        return plan

    def __getitem__(self, name: str) -> Any:
        """The value of an axis."""
        values = dict(self.values)
        if name in values:
            return values[name]
        return AXES.named(name).neutral(self.num_layers)

    @property
    def skip_set(self) -> Any:
        """The `SkipSet`: which sublayers are left out."""
        return self["skip_layers"]

    def cost(self, target: StepCost) -> StepCost:
        """A draft step, by what a step of the target costs.

        Raises:
            PlanError: If the costs are of a model of another depth.
        """
        if target.num_layers != self.num_layers:
            raise PlanError(
                f"a plan must be of the model's own depth, but it is of "
                f"{self.num_layers} layers and the model has {target.num_layers}: "
                "make it for this model"
            )
        draft = target
        for name, value in self.values:
            draft = AXES.named(name).cost(value, draft, target)
        return draft

    def share(self, target: StepCost) -> float:
        """The cost of a draft step over that of a target step: the `c` of `bound`."""
        return self.cost(target).total / target.total

    @property
    def has_window(self) -> bool:
        """Whether a draft step attends to less than the whole of a long context."""
        longest = np.array([1 << 30])
        return bool(self.tokens_read(longest) < longest)

    def tokens_read(self, num_tokens: Ints) -> Ints:
        """Of contexts of `num_tokens`, how many tokens a draft step attends to."""
        for name, value in self.values:
            num_tokens = AXES.named(name).tokens_read(value, num_tokens)
        return num_tokens

    def extra_bytes(self, target: StepCost) -> int:
        """Weights that are kept beside the target's, whose bytes are given."""
        draft, found = target, 0
        for name, value in self.values:
            found += AXES.named(name).extra_bytes(value, draft, target)
            draft = AXES.named(name).cost(value, draft, target)
        return found

    def within_memory(self, target: StepCost, most_bytes: float) -> "DraftPlan":
        """The plan with what brings most for at most so many bytes beside the target,
        whose bytes are given."""
        plan = self
        for axis in AXES:
            value = axis.within_memory(plan, target, most_bytes)
            plan = plan.with_value(axis.name, value)
        return plan

    def for_contexts(self, num_tokens: int) -> "DraftPlan":
        """The plan with what may bring most where contexts have so many tokens."""
        plan = self
        for axis in AXES:
            plan = plan.with_value(axis.name, axis.for_contexts(plan, num_tokens))
        return plan

    def choices(self, is_exchangeable: bool = False) -> dict[str, tuple[Any, ...]]:
        """What a search that starts from here may choose, by parameter; with
        `is_exchangeable`, while an engine serves."""
        found: dict[str, tuple[Any, ...]] = {}
        for axis in AXES:
            if axis.is_exchangeable >= is_exchangeable:
                found |= axis.choices(self)
        return found

    def params(self) -> dict[str, Any]:
        """The plan as those parameters."""
        return {k: v for axis in AXES for k, v in axis.params(self[axis.name]).items()}

    def with_params(self, params: Mapping[str, Any]) -> "DraftPlan":
        """With some of them changed.

        Raises:
            PlanError: If there is no such plan.
        """
        every, plan = {**self.params(), **params}, self
        for axis in AXES:
            plan = plan.implying(axis.name, axis.from_params(every, self))
        return plan._completed()

    def candidates(self, is_exchangeable: bool = False) -> Iterator["DraftPlan"]:
        """Plans worth a try before any search that starts from here."""
        for axis in AXES:
            if axis.is_exchangeable >= is_exchangeable:
                for value in axis.candidates(self):
                    yield self.with_value(axis.name, value)

    def to_keys(self) -> dict[str, Any]:
        """As a user writes it: a key for each axis with a value."""
        return {name: AXES.named(name).to_json(value) for name, value in self.values}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a key for each axis, as in a profile, and `num_layers`."""
        stored = {axis.name: axis.to_json(self[axis.name]) for axis in AXES}
        return {"num_layers": self.num_layers, **stored}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DraftPlan":
        """The inverse of `to_dict`; other keys are not read."""
        stored = {axis.name: data[axis.name] for axis in AXES if axis.name in data}
        return cls.from_stored(data["num_layers"], stored)

    @classmethod
    def from_stored(cls, num_layers: int, stored: Mapping[str, Any]) -> "DraftPlan":
        """By what a profile keeps for some axes.

        Raises:
            PlanError: If it does not fit a model of so many layers.
        """
        values = {
            name: AXES.named(name).from_json(value, num_layers)
            for name, value in stored.items()
            if value is not None
        }
        return cls.of(num_layers, **values)

    def __str__(self) -> str:
        words = [AXES.named(name).words(value) for name, value in self.values]
        return ", ".join(words) or "nothing skipped"

    def outline(self) -> str:
        """The same in one line, however deep the model."""
        lines = [AXES.named(name).outline(value) for name, value in self.values]
        return ", ".join(lines) or "nothing skipped"
