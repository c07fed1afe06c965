"""What an engine is asked to do in its workers, by `collective_rpc`."""

from collections.abc import Sequence
from typing import Any

from vllm_selfspec.draft_length.costs import StepCosts
from vllm_selfspec.engine.measured_llm import drafter_of
from vllm_selfspec.plan.draft_plan import DraftPlan


def use_plan(worker: Any, plan: DraftPlan) -> None:
    """Has a V1 worker draft by another plan."""
    worker.model_runner.drafter.use_plan(plan)


def adopt_plan(worker: Any, plan: DraftPlan | None) -> None:
    """Has a V1 worker draft by a plan to the end, compiled as vLLM's settings say; or
    leave drafting to free sources."""
    worker.model_runner.drafter.adopt(plan)


def use_costs(
    worker: Any, costs: StepCosts, acceptance: Sequence[float] | None = None
) -> None:
    """Has a worker plan draft lengths by what forwards were measured to take, and by
    what is known of drafts: what was found before, or `acceptance`."""
    drafter_of(worker.model_runner).planner.use_costs(costs, acceptance)
