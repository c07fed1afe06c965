"""`Engines`: what scores the plans of a search: one engine here, or some by Ray.

One rule: all of them score on the same texts and by the same costs, those of the first.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

from vllm_selfspec.draft_length.types import Ints
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.tuning.offline.tuning_engine import Known, TuningEngine
from vllm_selfspec.tuning.score import Score


class Engines(Protocol):
    """What a search needs of them.

    Attributes:
        num: Plans that are scored at once.
        known: What the first found out.
    """

    num: int
    known: Known

    def right(self, plan: DraftPlan, numbers: Sequence[int]) -> list[Ints]:
        """See `TuningEngine.right`."""
        ...

    def score(self, plans: Sequence[DraftPlan], numbers: Sequence[int]) -> list[Score]:
        """What each plan gains on some texts."""
        ...

    def measure(
        self, plans: Sequence[tuple[DraftPlan, int]], numbers: Sequence[int]
    ) -> list[Score]:
        """See `TuningEngine.measure`."""
        ...


class LocalEngine:
    """One engine, in this process."""

    num = 1

    def __init__(self, *args: Any, **settings: Any) -> None:
        """See `TuningEngine`."""
        self._engine = TuningEngine(*args, **settings)
        self.known = self._engine.known
        self.right, self.measure = self._engine.right, self._engine.measure

    def score(self, plans: Sequence[DraftPlan], numbers: Sequence[int]) -> list[Score]:
        """One plan after the other."""
        return [self._engine.score(plan, numbers) for plan in plans]


class RayEngines:
    """An engine in each of `num` Ray workers, with the GPUs that it needs."""

    def __init__(self, num: int, *args: Any, **settings: Any) -> None:
        """Starts them, in the cluster of `RAY_ADDRESS` or else on this machine.

        Args:
            num: How many.
            args: See `TuningEngine`.
            settings: See `TuningEngine`.
        """
        import ray
        import torch

        self.num = num
        self._ray: Any = ray
        environment = {k: v for k, v in os.environ.items() if k.startswith("VLLM_")}
        ray.init(
            runtime_env={"env_vars": environment},
            log_to_driver=False,
            ignore_reinit_error=True,
        )
        gpus = settings.get("tensor_parallel_size", 1)
        actor: Any = ray.remote(TuningEngine)
        actor = actor.options(
            num_cpus=1, num_gpus=gpus if torch.cuda.is_available() else 0
        )
        first = actor.remote(*args, **settings)
        self.known: Known = ray.get(first.found_out.remote())
        others = [
            actor.remote(*args, **settings, known=self.known) for _ in range(num - 1)
        ]
        self._actors = [first, *others]

    def right(self, plan: DraftPlan, numbers: Sequence[int]) -> list[Ints]:
        """Of the first."""
        found: list[Ints] = self._ray.get(self._actors[0].right.remote(plan, numbers))
        return found

    def score(self, plans: Sequence[DraftPlan], numbers: Sequence[int]) -> list[Score]:
        """The plans go round."""
        answers = [
            self._actors[which % self.num].score.remote(plan, numbers)
            for which, plan in enumerate(plans)
        ]
        found: list[Score] = self._ray.get(answers)
        return found

    def measure(
        self, plans: Sequence[tuple[DraftPlan, int]], numbers: Sequence[int]
    ) -> list[Score]:
        """Of the first: on one machine the others would disturb it."""
        found: list[Score] = self._ray.get(
            self._actors[0].measure.remote(plans, numbers)
        )
        return found
