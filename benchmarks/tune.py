"""Does the tuner predict acceptance, and find a better plan than others do?

    python benchmarks/tune.py -o benchmarks/results/tune

First, acceptance as `tune` predicts it against what the engine counts while it
generates, for three models and two tasks. Then searches on the demo model, widened: the
tuner's, and Draft & Verify's with ten times the evaluations, by the tokens per second
of real generation, and with `--by-score` by the tuner's own score, too. What they find,
and plans that need no search, generate held-out texts, in turns with plain vLLM. A
thousand plans that generate take hours: `--widen-search` has a smaller model do it.
"""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))
import draft_and_verify

from vllm_selfspec.bench.own_models import BENCHMARKS, find_model
from vllm_selfspec.bench.page import markdown_table
from vllm_selfspec.bench.provenance import provenance
from vllm_selfspec.bench.run import prepare
from vllm_selfspec.bench.tasks import load, token_ids
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.tuning.offline.search import Search
from vllm_selfspec.tuning.offline.tuning_engine import Known, TuningEngine
from vllm_selfspec.tuning.score import Score, best_score, walk

MODELS = ("demo_model", "plain_model", "small_model")
TASKS = ("code", "chat")
MAX_PROMPT_TOKENS = 256
MAX_DRAFTS = 6


def engine(
    path: Path, task: str, numbers: slice, max_tokens: int, dtype: str
) -> TuningEngine:
    """With some of a task's prompts."""
    tuner = TuningEngine(
        str(path),
        token_ids(load(task).prompts[numbers], path, MAX_PROMPT_TOKENS),
        max_tokens,
        MAX_DRAFTS,
        dtype=dtype,
        **settings(max_tokens),
    )
    KEPT.append(tuner)
    return tuner


def settings(max_tokens: int) -> dict[str, Any]:
    """What all engines here have in common."""
    return {
        "enforce_eager": True,
        "max_model_len": MAX_PROMPT_TOKENS + max_tokens + 2 * MAX_DRAFTS,
        "kv_cache_memory_bytes": 512 << 20,
        "gpu_memory_utilization": 0.1,
    }


KEPT: list[Any] = []  # vLLM's engines cannot end one by one in a process


def agreement(num_texts: int, max_tokens: int, console: Console) -> list[Any]:
    """Acceptance at depth 1 and 4, predicted and counted."""
    found = []
    for name in MODELS:
        for task in TASKS:
            tuner = engine(
                BENCHMARKS / name, task, slice(num_texts), max_tokens, "float32"
            )
            n = tuner.known.num_layers
            plans = {
                "evenly spread": SkipSet.evenly_spread(n),
                f"exit_layer {max(1, n // 4)}": SkipSet.early_exit(n, max(1, n // 4)),
            }
            for what, skip_set in plans.items():
                plan = DraftPlan.skipping(skip_set)
                numbers = range(num_texts)
                predicted = walk(tuner.right(plan, numbers), 4).acceptance
                (counted,) = tuner.measure([(plan, 4)], numbers)
                row = {"model": name, "task": task, "plan": what}
                row |= {"predicted": predicted, "counted": counted.walk.acceptance}
                found.append(row)
                console.print(row)
    return found


def generation(path: Path, numbers: slice) -> draft_and_verify.Generation:
    """Draft & Verify's objective on the code prompts that the tuner has."""
    prompts = token_ids(load("code").prompts[numbers], path, MAX_PROMPT_TOKENS)
    objective = draft_and_verify.Generation(
        path, prompts, dtype="bfloat16", **settings(draft_and_verify.MAX_TOKENS)
    )
    KEPT.append(objective)
    return objective


def known_costs(costly: TuningEngine, file: Path) -> Known:
    """Of the widened model, measured once: a search that goes on needs the same."""
    if file.exists():
        kept = json.loads(file.read_text())
        parts = kept["draft_costs"].items()
        draft = {k: tuple(v) if isinstance(v, list) else v for k, v in parts}
        costs = {"verify_costs": tuple(kept["verify_costs"])}
        return replace(costly.known, **costs, draft_costs=StepCost(**draft))
    known = costly.known
    costs = {
        "verify_costs": known.verify_costs,
        "draft_costs": asdict(known.draft_costs),
    }
    file.write_text(json.dumps(costs) + "\n")
    return costly.known


def searches(
    iterations: int,
    by_score: bool,
    widen_search: int | None,
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
    n, numbers = scorer.known.num_layers, range(num_texts)
    # Until all is done; then the next run starts anew.
    kept = output / "costs.study.json"
    studies = [output / "draft_and_verify.study.db", output / "by_score.study.db"]
    known = known_costs(costly, kept)

    def evaluate(plans: Sequence[DraftPlan], numbers: Sequence[int]) -> list[Score]:
        return [
            best_score(
                scorer.right(plan, numbers),
                known.draft_cost(plan),
                known.verify_costs,
            )
            for plan in plans
        ]

    def timed(what: str, search: Any) -> tuple[DraftPlan, float]:
        started = time.monotonic()
        plan = search()
        seconds = time.monotonic() - started
        console.print(f"{what}: {plan}, {seconds:.0f} s")
        return plan, seconds

    with TemporaryDirectory() as directory:
        start = DraftPlan(n)
        search = Search(
            start, evaluate, num_texts, Path(directory) / "study.db", "tune"
        )

        def tuner() -> DraftPlan:
            # The sublayers one by one on two texts are evaluations, too.
            max_plans = iterations // 10 - 2 * n
            search.run(3600, lambda *_: None, max_plans)
            return search.found()[0].plan

        found = {f"tune, {iterations // 10} evaluations": timed("tune", tuner)}
    searched = find_model("demo", widen_search, console)
    objective = generation(searched, slice(num_texts))
    name = f"Draft & Verify's search, {iterations} evaluations"
    best, seconds = draft_and_verify.search(
        n, objective, iterations, studies[0], console.print
    )
    found[name] = DraftPlan.skipping(best), seconds

    @cache
    def score(skip_set: SkipSet) -> float:
        return evaluate([DraftPlan.skipping(skip_set)], numbers)[0].speed_up

    if by_score:
        best, seconds = draft_and_verify.search(
            n, score, iterations, studies[1], console.print
        )
        found[f"{name} by tune's score"] = DraftPlan.skipping(best), seconds
    exits = [plan for plan in start.candidates() if plan.skip_set.exit_layer]
    best_exit = max(exits, key=lambda plan: evaluate([plan], numbers)[0].speed_up)
    found["best exit layer"] = best_exit, 0.0
    spread = DraftPlan.skipping(SkipSet.evenly_spread(n))
    found["evenly spread, 0.45"] = spread, 0.0
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
                "draft_costs": asdict(known.draft_costs),
            }
        )
    for file in (kept, *studies):
        file.unlink(missing_ok=True)
    return rows


def markdown(document: dict[str, Any]) -> str:
    """What there is of both tables."""
    tables = {"agreement": agreement_table, "searches": searches_table}
    found = [
        f"{run_of(document[name])}\n\n{tables[name](document[name])}"
        for name in PARTS["all"]
        if name in document
    ]
    return "\n".join(found)


def run_of(part: dict[str, Any]) -> str:
    """Where a part's figures are from."""
    texts, tokens = part["texts"]
    return (
        f"`{part['command']}`, {part['date']}: "
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
    columns = ["method", "k", "c", "expected", "measured, held out", "search", "plan"]
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


def command() -> str:
    """What was asked for, but for where its results go."""
    words = sys.argv[1:]
    for name in {"-o", "--output"} & set(words):
        at = words.index(name)
        del words[at : at + 2]
    return shlex.join(["python", "benchmarks/tune.py", *words])


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
    by_score: Annotated[
        bool, typer.Option(help="Draft & Verify's search by the tuner's score, too.")
    ] = False,
    widen_search: Annotated[
        int | None, typer.Option(help="How wide Draft & Verify's search generates.")
    ] = None,
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
            iterations,
            by_score,
            widen_search,
            num_texts,
            max_tokens,
            repeats,
            output,
            console,
        ),
    }
    for name in PARTS[part]:
        started = time.monotonic()
        document[name] = {
            "rows": parts[name](),
            **provenance(command()),
            "seconds": round(time.monotonic() - started),
            "texts": [num_texts, max_tokens],
        }
        file.write_text(json.dumps(document, indent=1) + "\n")
    (output / "tune.md").write_text(markdown(document))
    console.print(markdown(document))


if __name__ == "__main__":
    typer.run(main)
