"""What an engine is asked to do in its workers, by `collective_rpc`."""

from typing import Any

from vllm_selfspec.draft_length.costs import StepCosts
from vllm_selfspec.engine.measured_llm import drafter_of
from vllm_selfspec.plan.draft_plan import DraftPlan


def use_plan(worker: Any, plan: DraftPlan) -> None:
    """Has a V1 worker draft by another plan."""
    worker.model_runner.drafter.use_plan(plan)


def use_costs(worker: Any, costs: StepCosts) -> None:
    """Has a worker plan draft lengths by what forwards were measured to take."""
    drafter_of(worker.model_runner).planner.use_costs(costs)
