"""Draft & Verify's search for a skip set: its sampler, and what it searches by.

One rule: as published (section 3.3 and the constants of its code): Bayesian
optimisation over a number in [0, 1] for each sublayer, above 0.5 skips it, by the
tokens per second of generating 32 tokens after each of 8 prompts, one at a time, with
up to 8 drafts that stop where the draft is unsure.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_selfspec.engine.measured_llm import MeasuredLLM
from vllm_selfspec.engine.workers import use_plan
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SUBLAYERS, SkipSet, SkipSetError

SEED = 1
MAX_TOKENS = 32
MAX_DRAFTS = 8


class Generation:
    """Tokens per second of real generation, with one plan after the other.

    Attributes:
        num_layers: Of the model.
    """

    def __init__(self, model: Path, prompts: Sequence[Any], **settings: Any) -> None:
        """Starts vLLM.

        Args:
            model: Checkpoint directory.
            prompts: As vLLM takes them.
            settings: Of `vllm.LLM`.
        """
        config = {
            "method": "selfspec",
            "draft_source": "model",
            "skip_layers": {},
            "num_speculative_tokens": MAX_DRAFTS,
            "draft_length": "threshold",
        }
        self._prompts = list(prompts)
        self._engine = MeasuredLLM(str(model), config, max_num_seqs=1, **settings)
        model_config = self._engine.vllm_config.model_config
        self.num_layers = int(model_config.get_total_num_hidden_layers())
        self(SkipSet.evenly_spread(self.num_layers))  # warms up

    def __call__(self, skip_set: SkipSet) -> float:
        """Tokens per second with a plan."""
        self._engine.ask(use_plan, DraftPlan.skipping(skip_set))
        batch = self._engine.generate(self._prompts, MAX_TOKENS, ignore_eos=False)
        return batch.num_tokens / batch.seconds


def search(
    num_layers: int,
    objective: Callable[[SkipSet], float],
    iterations: int,
    study_file: Path,
    say: Callable[[str], Any],
) -> tuple[SkipSet, float]:
    """The best plan, and the seconds that it took.

    Args:
        num_layers: Of the model.
        objective: What a plan is worth; a set of which nothing is left is worth 0.
        iterations: Points, the evenly spread set first.
        study_file: SQLite file of Optuna's study; it goes on where it was stopped.
        say: Called with a line about it now and then.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    complete = (optuna.trial.TrialState.COMPLETE,)
    study = optuna.create_study(
        study_name="Draft & Verify",
        sampler=optuna.samplers.GPSampler(seed=SEED),
        direction="maximize",
        storage=f"sqlite:///{study_file}",
        load_if_exists=True,
    )
    names: dict[str, tuple[int, str]] = {
        f"{s}.{i}": (i, s) for s in SUBLAYERS for i in range(num_layers)
    }
    if not study.trials:
        spread = SkipSet.evenly_spread(num_layers)
        study.enqueue_trial(
            {
                name: 0.9 if i in getattr(spread, sublayer) else 0.1
                for name, (i, sublayer) in names.items()
            }
        )

    def plan_of(trial: Any) -> SkipSet:
        skipped = [names[name] for name, x in trial.params.items() if x > 0.5]
        lists = {s: [i for i, which in skipped if which == s] for s in SUBLAYERS}
        return SkipSet.of(num_layers, **lists)

    while (done := len(study.get_trials(False, complete))) < iterations:
        trial = study.ask()
        for name in names:
            trial.suggest_float(name, 0, 1)
        try:
            value = objective(plan_of(trial))
        except SkipSetError:  # nothing is left
            value = 0.0
        study.tell(trial, value)
        if done % 25 == 0:
            best = plan_of(study.best_trial)
            say(f"Draft & Verify: {done}, best {study.best_value:.3f}, {best}")
    taken = sum(t.duration.total_seconds() for t in study.get_trials(False, complete))
    return plan_of(study.best_trial), taken
