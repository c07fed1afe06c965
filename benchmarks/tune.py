"""Does the tuner foretell acceptance, and find a better plan than others do?

    python benchmarks/tune.py -o benchmarks/results/tune

First, acceptance as `tune` predicts it against what the engine counts while it
generates, for three models and two tasks. Then searches on the demo model, by the costs
of the widened one: the tuner's, and Draft & Verify's Bayesian optimisation (a Gaussian
process over a number in [0, 1] for each sublayer, above 0.5 skips it) with ten times
the evaluations. What they find, and plans that need no search, generate held-out texts
with the widened model, in turns with plain vLLM.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_selfspec import versions
from vllm_selfspec.bench.page import markdown_table
from vllm_selfspec.bench.run import BENCHMARKS, find_model, prepare
from vllm_selfspec.bench.tasks import load, token_ids
from vllm_selfspec.demo import cpu_name
from vllm_selfspec.skip_set import SUBLAYERS, SkipSet, SkipSetError
from vllm_selfspec.tuning.candidates import simple_plans, skipping
from vllm_selfspec.tuning.engine import Known, TuningEngine
from vllm_selfspec.tuning.score import Score, best_score, walk
from vllm_selfspec.tuning.search import Search

MODELS = ("demo_model", "plain_model", "small_model")
TASKS = ("code", "chat")
MAX_PROMPT_TOKENS = 256
MAX_DRAFTS = 6
SEED = 1  # Draft & Verify's


def engine(
    path: Path, task: str, numbers: slice, max_tokens: int, dtype: str
) -> TuningEngine:
    """With some of a task's prompts."""
    return TuningEngine(
        str(path),
        token_ids(load(task).prompts[numbers], path, MAX_PROMPT_TOKENS),
        max_tokens,
        MAX_DRAFTS,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=MAX_PROMPT_TOKENS + max_tokens + 2 * MAX_DRAFTS,
        kv_cache_memory_bytes=512 << 20,
        gpu_memory_utilization=0.1,
    )


def agreement(num_texts: int, max_tokens: int, console: Console) -> list[Any]:
    """Acceptance at depth 1 and 4, predicted and counted."""
    found = []
    for name in MODELS:
        for task in TASKS:
            tuner = engine(
                BENCHMARKS / name, task, slice(num_texts), max_tokens, "float32"
            )
            KEPT.append(tuner)
            n = tuner.known.num_layers
            plans = {
                "evenly spread": SkipSet.evenly_spread(n),
                f"exit_layer {max(1, n // 4)}": SkipSet.early_exit(n, max(1, n // 4)),
            }
            for what, plan in plans.items():
                numbers = range(num_texts)
                predicted = walk(tuner.right(plan, numbers), 4).acceptance
                (counted,) = tuner.measure([(plan, 4)], numbers)
                row = {"model": name, "task": task, "plan": what}
                row |= {"predicted": predicted, "counted": counted.walk.acceptance}
                found.append(row)
                console.print(row)
    return found


KEPT: list[TuningEngine] = []  # vLLM's engines cannot end one by one in a process


def draft_and_verify(
    num_layers: int,
    evaluate: Any,
    numbers: Sequence[int],
    iterations: int,
    storage: str,
    say: Any,
) -> tuple[SkipSet, float]:
    """Draft & Verify's search (section 3.3), from evenly spread, and the seconds that
    it took; it goes on where it was stopped."""
    import optuna

    complete = (optuna.trial.TrialState.COMPLETE,)
    study = optuna.create_study(
        study_name="Draft & Verify",
        sampler=optuna.samplers.GPSampler(seed=SEED),
        direction="maximize",
        storage=storage,
        load_if_exists=True,
    )
    names = [(i, s) for s in SUBLAYERS for i in range(num_layers)]
    if not study.trials:
        spread = SkipSet.evenly_spread(num_layers)
        study.enqueue_trial(
            {f"{s}.{i}": 0.9 if i in getattr(spread, s) else 0.1 for i, s in names}
        )

    def which_name(which: tuple[int, str]) -> str:
        return f"{which[1]}.{which[0]}"

    def plan_of(trial: Any) -> SkipSet:
        skipped = [which for which in names if trial.params[which_name(which)] > 0.5]
        return skipping(num_layers, skipped)

    values: dict[SkipSet, float] = {}  # many points stand for one plan
    while (done := len(study.get_trials(False, complete))) < iterations:
        trial = study.ask()
        for which in names:
            trial.suggest_float(which_name(which), 0, 1)
        try:
            plan = plan_of(trial)
            if plan not in values:
                values[plan] = evaluate([plan], numbers)[0].speed_up
            value = values[plan]
        except SkipSetError:
            value = 0.0
        study.tell(trial, value)
        if done % 25 == 0:
            say(f"Draft & Verify: {done}, best {study.best_value:.3f}x")
    taken = sum(t.duration.total_seconds() for t in study.get_trials(False, complete))
    return plan_of(study.best_trial), taken


def known_costs(costly: TuningEngine, file: Path) -> Known:
    """Of the widened model, measured once: a search that goes on needs the same."""
    if file.exists():
        kept = json.loads(file.read_text())
        verify, (head, attention, mlp) = kept["verify_costs"], kept["draft_costs"]
        costs = {"verify_costs": tuple(verify), "draft_costs": (head, attention, mlp)}
        return replace(costly.known, **costs)
    names = ("verify_costs", "draft_costs")
    costs = {name: getattr(costly.known, name) for name in names}
    file.write_text(json.dumps(costs) + "\n")
    return costly.known


def searches(
    iterations: int,
    num_texts: int,
    max_tokens: int,
    repeats: int,
    output: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """What each search finds, and how fast that generates held-out texts."""
    scorer = engine(
        BENCHMARKS / "demo_model", "code", slice(num_texts), max_tokens, "float32"
    )
    wide = find_model("demo", None, console)
    held_out = slice(num_texts, 2 * num_texts)
    costly = engine(wide, "code", held_out, max_tokens, "bfloat16")
    KEPT.extend([scorer, costly])
    n, numbers = scorer.known.num_layers, range(num_texts)
    # Until all is done; then the next run starts anew.
    kept, study = output / "costs.study.json", output / "draft_and_verify.study.db"
    known = known_costs(costly, kept)

    def evaluate(plans: Sequence[SkipSet], numbers: Sequence[int]) -> list[Score]:
        return [
            best_score(
                scorer.right(plan, numbers),
                known.draft_cost(plan),
                known.verify_costs,
            )
            for plan in plans
        ]

    def timed(what: str, search: Any) -> tuple[SkipSet, float]:
        started = time.monotonic()
        plan = search()
        seconds = time.monotonic() - started
        console.print(f"{what}: {plan}, {seconds:.0f} s")
        return plan, seconds

    with TemporaryDirectory() as directory:
        search = Search(n, evaluate, num_texts, Path(directory) / "study.db", "tune")

        def tuner() -> SkipSet:
            # The sublayers one by one on two texts are evaluations, too.
            max_plans = iterations // 10 - 2 * n
            search.run(3600, lambda *_: None, max_plans)
            return search.found()[0].skip_set

        found = {f"tune, {iterations // 10} evaluations": timed("tune", tuner)}
    found[f"Draft & Verify's search, {iterations} evaluations"] = draft_and_verify(
        n, evaluate, numbers, iterations, f"sqlite:///{study}", console.print
    )
    exits = [plan for plan in simple_plans(n) if plan.exit_layer]
    best_exit = max(exits, key=lambda plan: evaluate([plan], numbers)[0].speed_up)
    found["best exit layer"] = best_exit, 0.0
    found["evenly spread, 0.45"] = SkipSet.evenly_spread(n), 0.0
    expected = evaluate([plan for plan, _ in found.values()], numbers)
    plans = [
        (plan, score.k)
        for (plan, _), score in zip(found.values(), expected, strict=True)
    ]
    runs = []
    for turn in range(repeats):
        console.print(f"Generating held-out texts, turn {turn + 1} of {repeats}")
        runs.append(costly.measure(plans, numbers))
    rows = []
    for which, (what, (plan, seconds)) in enumerate(found.items()):
        ratios = [run[which].speed_up for run in runs]
        rows.append(
            {
                "search": what,
                "plan": plan.to_dict(),
                "words": str(plan),
                "seconds": seconds,
                "k": expected[which].k,
                "draft_cost": expected[which].draft_cost,
                "expected": expected[which].speed_up,
                "expected_first": expected[which].walk.acceptance[0],
                "measured": median(ratios),
                "measured_all": ratios,
                "measured_first": runs[0][which].walk.acceptance[0],
                "verify_costs": known.verify_costs,
                "draft_costs": known.draft_costs,
            }
        )
    kept.unlink()
    study.unlink()
    return rows


def markdown(document: dict[str, Any]) -> str:
    """What there is of both tables."""
    tables = {"agreement": agreement_table, "searches": searches_table}
    found = [
        f"{run_of(name, document[name])}\n\n{tables[name](document[name])}"
        for name in PARTS["all"]
        if name in document
    ]
    return "\n".join(found)


def run_of(name: str, part: dict[str, Any]) -> str:
    """Where a part's figures are from."""
    texts, tokens = part["texts"]
    return (
        f"`python benchmarks/tune.py --part {name}`, {part['date']}: "
        f"{part['hardware']}; vLLM {part['vllm']}, {texts} texts of {tokens} tokens."
    )


def agreement_table(part: dict[str, Any]) -> str:
    """A row for each model, task and plan, and how far off the worst is."""
    rows = [
        [
            row["model"],
            row["task"],
            row["plan"],
            *(f"{row[what][at]:.3f}" for at in DEPTHS for what in KINDS),
        ]
        for row in part["rows"]
    ]
    columns = ["model", "task", "plan", "first, predicted", "counted"]
    columns += ["fourth, predicted", "counted"]
    worst = (
        max(abs(row["predicted"][at] - row["counted"][at]) for row in part["rows"])
        for at in DEPTHS
    )
    said = "Predicted and counted differ by {:.3f} and {:.3f} at most."
    return "\n".join([*markdown_table(columns, rows), "", said.format(*worst)]) + "\n"


def searches_table(part: dict[str, Any]) -> str:
    """A row for each search."""
    columns = ["arm", "k", "c", "expected", "measured, held out", "search", "plan"]
    rows = [
        [
            row["search"],
            str(row["k"]),
            f"{row['draft_cost']:.2f}",
            f"{row['expected']:.2f}x",
            f"{row['measured']:.2f}x",
            f"{row['seconds']:.0f} s",
            row["words"],
        ]
        for row in part["rows"]
    ]
    return "\n".join(markdown_table(columns, rows)) + "\n"


DEPTHS = (0, 3)  # of the first draft token and the fourth
KINDS = ("predicted", "counted")


PARTS = {"agreement": ["agreement"], "searches": ["searches"]}
PARTS["all"] = PARTS["agreement"] + PARTS["searches"]


def main(
    iterations: Annotated[
        int, typer.Option(help="Of Draft & Verify's search; the tuner has a tenth.")
    ] = 1000,
    num_texts: Annotated[int, typer.Option(help="Prompts of each task.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Generated for each.")] = 96,
    repeats: Annotated[int, typer.Option(help="Turns on held-out texts.")] = 3,
    part: Annotated[
        str, typer.Option(help="agreement, searches or all; the others' results stay.")
    ] = "all",
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory of the results.")
    ] = Path("tune-report"),
) -> None:
    """Compare predicted acceptance with counted, and searches with each other."""
    prepare()
    console = Console(highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "tune.json"
    document = json.loads(file.read_text()) if file.exists() else {}
    parts = {
        "agreement": lambda: agreement(num_texts, max_tokens, console),
        "searches": lambda: searches(
            iterations, num_texts, max_tokens, repeats, output, console
        ),
    }
    for name in PARTS[part]:
        started = time.monotonic()
        document[name] = {
            "rows": parts[name](),
            "date": date.today().isoformat(),
            "seconds": round(time.monotonic() - started),
            "hardware": cpu_name(),
            "vllm": versions.vllm_version(),
            "texts": [num_texts, max_tokens],
        }
        file.write_text(json.dumps(document, indent=1) + "\n")
    (output / "tune.md").write_text(markdown(document))
    console.print(markdown(document))


if __name__ == "__main__":
    typer.run(main)
