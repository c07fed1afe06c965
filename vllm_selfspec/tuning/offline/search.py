"""`Search`: finds the plan with the best score, by Optuna, within a time.

One rule: whatever was scored is in the study, an SQLite file, as soon as it was. A
search that is stopped or killed goes on from there, and its best so far is the study's.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.tuning.candidates import (
    Choice,
    changed,
    greedy_path,
    neighbours,
    single_changes,
)
from vllm_selfspec.tuning.score import Score
from vllm_selfspec.whole_file import WriteError

# A plan that is this far behind the best on the first texts is not tried on the rest.
PRUNE_BELOW = 0.9
FIRST_TEXTS = 2

# Scores plans on some of the texts, by number, as many at once as there are engines.
Evaluate = Callable[[Sequence[DraftPlan], Sequence[int]], list[Score]]


@dataclass(frozen=True)
class Found:
    """A plan and what it is worth on all texts.

    Attributes:
        plan: The plan.
        speed_up: Tokens per second over plain vLLM's, by `Score`.
        k: Draft tokens a step at which it is that.
        acceptance: Share of the steps that accept the first i draft tokens, i from 1.
        draft_cost: c, of a draft step over a plain step.
        verify_cost: v, of verifying `k` tokens over a plain step.
        tokens_per_verification: E.
    """

    plan: DraftPlan
    speed_up: float
    k: int
    acceptance: tuple[float, ...]
    draft_cost: float
    verify_cost: float
    tokens_per_verification: float

    @classmethod
    def of(cls, plan: DraftPlan, score: Score) -> "Found":
        """A score, as it is kept."""
        return cls(
            plan,
            score.speed_up,
            score.k,
            score.walk.acceptance,
            score.draft_cost,
            score.verify_cost,
            score.walk.tokens_per_verification,
        )


@contextmanager
def _kept_in(file: Path) -> Iterator[None]:
    """Around what writes the study, plan by plan.

    Raises:
        WriteError: If SQLite cannot; it keeps what was written before.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except (StorageInternalError, OperationalError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise WriteError(
            f"a search keeps every plan in {str(file)!r}, but that failed ({reason}): "
            "make room there, or choose another --output; the same command goes on "
            "with what is kept"
        ) from error


class Search:
    """Scores plans, the likely ones first, until the time is over."""

    def __init__(
        self,
        start: DraftPlan,
        evaluate: Evaluate,
        num_texts: int,
        study_file: Path,
        study_name: str,
        num_at_once: int = 1,
        seed: int = 0,
    ) -> None:
        """Opens or makes the study.

        Args:
            start: The plan that the others are made from.
            evaluate: Scores plans.
            num_texts: How many texts there are.
            study_file: SQLite file of the study.
            study_name: Tells studies of other models or texts in the file apart.
            num_at_once: Plans that `evaluate` takes best.
            seed: Of the sampler.

        Raises:
            WriteError: If the study cannot be written; so does `run`.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self._start, self._evaluate = start, evaluate
        self._num_at_once = num_at_once
        self._texts = range(num_texts)
        self._random = random.Random(seed)
        self._study_file = study_file
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=num_at_once > 1
        )
        with _kept_in(study_file):
            self._study = optuna.create_study(
                study_name=study_name,
                storage=f"sqlite:///{study_file}",
                sampler=sampler,
                direction="maximize",
                load_if_exists=True,
            )
            self._end_what_was_killed()

    def _end_what_was_killed(self) -> None:
        state = self._optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            self._study.tell(trial.number, state=state.FAIL)

    def run(
        self,
        budget_s: float,
        report: Callable[["Search", str], None],
        max_plans: float = math.inf,
    ) -> None:
        """Scores plans until `budget_s` seconds are over, or Ctrl-C.

        Args:
            budget_s: Seconds.
            report: Called after each plan with a line about it.
            max_plans: Ends it earlier, when so many were scored or pruned.
        """
        end = time.monotonic() + budget_s
        trials = self._trials()
        with _kept_in(self._study_file):
            while time.monotonic() < end and self.num_tried < max_plans:
                self._try([next(trials) for _ in range(self._num_at_once)], report)

    def _trials(self) -> Iterator[tuple[Any, DraftPlan]]:
        """Trials of plans that were not tried yet: the simple ones, the greedy path,
        and then in turns neighbours of the best and the sampler's."""
        known = {plan for plan, _ in self._tried()}
        for plan in self._candidates(known):
            if plan is None or plan not in known:
                trial, plan = self._ask(plan, known)
                known.add(plan)
                yield trial, plan

    def _candidates(self, known: set[DraftPlan]) -> Iterator[DraftPlan | None]:
        yield from self._start.candidates()
        yield from greedy_path(self._start, self._losses())
        while True:
            yield self._neighbour_of_the_best(known)
            yield None

    def _neighbour_of_the_best(self, known: set[DraftPlan]) -> DraftPlan | None:
        """With one choice changed, that is not `known`; None if there is none."""
        found = self.found()
        if not found:
            return None
        left = [plan for plan in neighbours(found[0].plan) if plan not in known]
        return self._random.choice(left) if left else None

    def _ask(
        self, plan: DraftPlan | None, known: set[DraftPlan]
    ) -> tuple[Any, DraftPlan]:
        """A trial of `plan`, or of one that the sampler proposes."""
        state = self._optuna.trial.TrialState
        choices = self._start.choices()
        categorical = self._optuna.distributions.CategoricalDistribution
        space = {name: categorical(values) for name, values in choices.items()}
        proposed = None if plan is None else self._params(plan)
        while True:
            if proposed is not None:
                self._study.enqueue_trial(proposed)
            trial = self._study.ask(space)
            plan = self._plan(trial.params)
            if plan is not None and plan not in known:
                return trial, plan
            self._study.tell(trial, state=state.FAIL)
            # What it likes best is known; then a neighbour of that.
            name = self._random.choice([*choices])
            others = [v for v in choices[name] if v != trial.params[name]]
            proposed = {**trial.params, name: self._random.choice(others)}

    def _params(self, plan: DraftPlan) -> dict[str, Any]:
        """What of a plan's parameters the search chooses."""
        params = plan.params()
        return {name: params[name] for name in self._start.choices()}

    def _plan(self, params: Mapping[str, Any]) -> DraftPlan | None:
        """The plan of a trial; None if there is none, as where nothing is left."""
        found = changed(self._start, [*params.items()])
        if found is None and dict(params) == self._params(self._start):
            return self._start
        return found

    def _losses(self) -> dict[Choice, float]:
        """What a single choice loses for the cost that it saves, by the first texts;
        kept in the study."""
        kept = self._study.user_attrs.get("losses")
        plans = single_changes(self._start)
        if kept is None:
            first = self._texts[:FIRST_TEXTS]
            whole, *scores = self._evaluate([self._start, *plans.values()], first)
            kept = [_loss(whole, score) for score in scores]
            self._study.set_user_attr("losses", kept)
        return dict(zip(plans, kept, strict=True))

    def _try(
        self,
        trials: Sequence[tuple[Any, DraftPlan]],
        report: Callable[["Search", str], None],
    ) -> None:
        best = max((found.speed_up for found in self.found()), default=0.0)
        first = self._evaluate([plan for _, plan in trials], self._texts[:FIRST_TEXTS])
        promising = []
        for (trial, plan), score in zip(trials, first, strict=True):
            if score.speed_up >= PRUNE_BELOW * best:
                promising.append((trial, plan))
                continue
            trial.report(score.speed_up, 0)
            self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
            report(self, f"{score.speed_up:.2f}x on the first texts: {plan}")
        scores = self._evaluate([plan for _, plan in promising], self._texts)
        for (trial, plan), score in zip(promising, scores, strict=True):
            found = Found.of(plan, score)
            for name, value in vars(found).items():
                if name != "plan":  # that is what the trial's parameters say
                    trial.set_user_attr(name, value)
            self._study.tell(trial, score.speed_up)
            report(self, f"{score.speed_up:.2f}x, k {score.k}: {plan}")

    def _tried(self) -> Iterator[tuple[DraftPlan, Found | None]]:
        """Plans of the study; those that were pruned without a figure."""
        state = self._optuna.trial.TrialState
        for trial in self._study.get_trials(
            deepcopy=False, states=(state.COMPLETE, state.PRUNED)
        ):
            plan = self._plan(trial.params)
            if plan is None:
                continue
            attrs = dict(trial.user_attrs)
            if trial.state == state.PRUNED:
                yield plan, None
            else:
                attrs["acceptance"] = tuple(attrs["acceptance"])
                yield plan, Found(plan=plan, **attrs)

    def found(self) -> list[Found]:
        """All that were scored on every text, the best first."""
        scored = {plan: found for plan, found in self._tried() if found is not None}
        return sorted(scored.values(), key=lambda found: -found.speed_up)

    @property
    def num_tried(self) -> int:
        """Plans so far, with those of earlier runs and those that were pruned."""
        return sum(1 for _ in self._tried())


def _loss(whole: Score, score: Score) -> float:
    lost = whole.walk.acceptance[0] - score.walk.acceptance[0]
    return lost / max(whole.draft_cost - score.draft_cost, 1e-6)
