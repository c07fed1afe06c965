"""Plans beside a plan: what follows from its parameters, whatever axes they are of."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.errors import PlanError

# A parameter, and one of its values.
Choice = tuple[str, Any]


def other_choices(plan: DraftPlan) -> Iterator[Choice]:
    """Every value of every parameter that is not the plan's own."""
    params = plan.params()
    for name, values in plan.choices().items():
        yield from ((name, value) for value in values if value != params[name])


def changed(plan: DraftPlan, choices: Sequence[Choice]) -> DraftPlan | None:
    """The plan with some choices made; None where there is no such plan, or it is the
    same."""
    try:
        found = plan.with_params(dict(choices))
    except PlanError:
        return None
    return None if found == plan else found


def neighbours(plan: DraftPlan) -> Iterator[DraftPlan]:
    """What differs from a plan in one choice."""
    yield from single_changes(plan).values()


def single_changes(plan: DraftPlan) -> dict[Choice, DraftPlan]:
    """What differs from a plan in one choice, by choice."""
    found = {choice: changed(plan, [choice]) for choice in other_choices(plan)}
    return {choice: one for choice, one in found.items() if one is not None}


def greedy_path(
    plan: DraftPlan, loss_of: Mapping[Choice, float]
) -> Iterator[DraftPlan]:
    """Makes one choice more each time, the one that loses least first.

    Args:
        plan: To start from.
        loss_of: What making a choice alone loses, per cost that it saves.
    """
    for choice in sorted(loss_of, key=lambda choice: loss_of[choice]):
        following = changed(plan, [choice])
        if following is not None:
            plan = following
            yield plan
