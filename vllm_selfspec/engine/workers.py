"""What an engine is asked to do in its workers, by `collective_rpc`."""

from typing import Any

from vllm_selfspec.plan.skip_set import SkipSet


def use_skip_set(worker: Any, skip_set: SkipSet) -> None:
    """Has a V1 worker draft with another skip set."""
    worker.model_runner.drafter.use_skip_set(skip_set)
