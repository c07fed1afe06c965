"""Does `skip_layers: "online"` find a task's plan while serving, and at what price?

    python benchmarks/online.py -o benchmarks/results/online

One engine serves one task, then another, then the first again, some streams at a time,
from `auto`'s plan on. After every round of requests vLLM's counters say what was
accepted. Beside it, in the same process and on the same requests: a plan that `tune`'s
search found for that task beforehand, the plan of the other task, and `auto`'s. Their
texts must be the same. What scoring takes is measured, not reckoned.

It has recovered from a switch once it is, for the rest of the phase on average, within
5% of the plan tuned for the task. The model is one whose tasks want different plans
(`two_tasks_model.py`, made at need, in minutes).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))
from two_tasks_model import OUTPUT as TWO_TASKS
from two_tasks_model import two_tasks_model

from vllm_selfspec.bench.own_models import BENCHMARKS
from vllm_selfspec.bench.page import markdown_table, new_plot
from vllm_selfspec.bench.provenance import command_line, provenance
from vllm_selfspec.bench.run import prepare
from vllm_selfspec.bench.tasks import load, token_ids
from vllm_selfspec.engine.measured_llm import MeasuredLLM
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.tuning.offline.search import Search
from vllm_selfspec.tuning.offline.tuning_engine import TuningEngine
from vllm_selfspec.tuning.online.tuner import MAX_ROWS

MAX_PROMPT_TOKENS = 128
NUM_DRAFTS = 4
NUM_TUNED = 8  # texts that a task's plan is searched on
LAST = 5  # rounds of a phase that say where it began and ended
NEAR = 0.95  # of the tuned plan's speed: recovered
KEPT: list[Any] = []  # vLLM's engines cannot end one by one in a process


@dataclass(frozen=True)
class Method:
    """An engine and what it drafts with.

    Attributes:
        name: In the tables.
        engine: What runs it.
    """

    name: str
    engine: MeasuredLLM

    @classmethod
    def start(cls, name: str, model: Path, spec: dict[str, Any]) -> "Method":
        """With drafts of a fixed length, so that acceptance alone differs."""
        config = {"method": "selfspec", "draft_source": "model"}
        config |= {"draft_length": "fixed", "num_speculative_tokens": NUM_DRAFTS}
        # So many rows are scored at once.
        engine = MeasuredLLM(
            str(model), config | spec, max_num_seqs=MAX_ROWS, **SETTINGS
        )
        KEPT.append(engine)
        return cls(name, engine)

    def round(
        self, prompts: Sequence[Any], max_tokens: int
    ) -> tuple[list[Sequence[int]], dict[str, Any]]:
        """What was said, tokens per verification, acceptance by position, seconds."""
        batch = self.engine.generate(prompts, max_tokens)
        counts = batch.counts
        return batch.token_ids, {
            "tokens_per_verification": 1 + counts.accepted_tokens / counts.drafts,
            "acceptance": [at / counts.drafts for at in counts.accepted_at],
            "seconds": batch.seconds,
        }


SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,
    "max_model_len": 512,
    "enable_prefix_caching": False,
}


def tuned(
    model: Path, prompts: Sequence[Any], max_tokens: int, streams: int, budget_s: float
) -> tuple[DraftPlan, Any]:
    """What `tune`'s search finds for some prompts, and the costs that it went by."""
    engine = TuningEngine(
        str(model), prompts, max_tokens, NUM_DRAFTS, streams, **TUNING
    )
    KEPT.append(engine)

    def evaluate(plans: Sequence[DraftPlan], numbers: Sequence[int]) -> list[Any]:
        return [engine.score(plan, numbers) for plan in plans]

    with TemporaryDirectory() as directory:
        file = Path(directory) / "study.db"
        search = Search(
            DraftPlan(engine.known.num_layers), evaluate, len(prompts), file, "one"
        )
        search.run(budget_s, lambda *_: None)
        return search.found()[0].plan, engine.known


TUNING = {key: SETTINGS[key] for key in SETTINGS if key != "enable_prefix_caching"}


def tuner_of(llm: Any) -> Any:
    """Of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.model_runner.drafter.tuner


def speed_of(known: Any, plan: DraftPlan, acceptance: Sequence[float]) -> float:
    """E / (v + k c) at the best draft length, which is what both searches go by.

    Args:
        known: Costs.
        plan: The draft plan.
        acceptance: Share of the steps that accept the first i draft tokens, i from 1.
    """
    emitted = 1 + np.cumsum(acceptance)
    k = np.arange(1, 1 + len(acceptance))
    price = np.array(known.verify_costs) + k * known.draft_cost(plan)
    return float((emitted / price).max())


def plot(rounds: Sequence[dict[str, Any]], phases: Sequence[str]) -> Any:
    """Expected speed-up by round, of what is found online and of fixed plans."""
    figure, axes = new_plot(1, 1, 10, 4)
    axis = axes[0][0]
    for name in dict.fromkeys(row["method"] for row in rounds):
        own = [row["speed"] for row in rounds if row["method"] == name]
        axis.plot(own, label=name, linewidth=2 if name == "online" else 0.8)
    per_phase = rounds_of({"rounds": rounds, "phases": phases})
    for number, task in enumerate(phases):
        axis.axvline(number * per_phase, color="grey", linewidth=0.5)
        axis.text(number * per_phase, axis.get_ylim()[1], task, va="bottom")
    axis.set_xlabel("round")
    axis.set_ylabel("E / (v + k c)")
    axis.legend()
    return figure


def markdown(document: dict[str, Any]) -> str:
    """Where each phase ended."""
    rows = []
    for number, task in enumerate(document["phases"]):
        for method in dict.fromkeys(row["method"] for row in document["rounds"]):
            own = [
                row
                for row in document["rounds"]
                if (row["phase"], row["method"]) == (number, method)
            ]
            rows.append(
                [
                    f"{number + 1}. {task}",
                    method,
                    *(
                        f"{mean(value(row) for row in part):.2f}"
                        for value in (first_acceptance, itemgetter("speed"))
                        for part in (own[:LAST], own[-LAST:])
                    ),
                ]
            )
    run = (
        f"`python benchmarks/online.py {document['model']} "
        f"--rounds {rounds_of(document)}`, "
        f"{document['date']}: {document['hardware']}; "
        f"vLLM {document['vllm']}, {document['model']}, float32, {document['streams']} "
        f"at a time; {document['candidates']} candidates were tried and "
        f"{document['adopted']} adopted, in "
        f"{document['seconds_scoring'] / document['seconds_serving']:.1%} of the time."
    )
    columns = ["phase", "method", "first token accepted, at first", "at last"]
    columns += ["E / (v + k c), at first", "at last"]
    parts = [run, "", *markdown_table(columns, rows), "", *recoveries(document)]
    return "\n".join(parts) + "\n"


def recoveries(document: dict[str, Any]) -> list[str]:
    """How long each phase took to come near its tuned plan."""
    rows = []
    for number, task in enumerate(document["phases"]):
        own, tuned = (
            [
                r
                for r in document["rounds"]
                if (r["phase"], r["method"]) == (number, method)
            ]
            for method in ("online", f"tuned for {task}")
        )
        ratios = [
            row["speed"] / of["speed"] for row, of in zip(own, tuned, strict=True)
        ]
        when = recovered_at(ratios)
        seconds = "" if when is None else f"{sum(r['seconds'] for r in own[:when]):.0f}"
        rows.append(
            [
                f"{number + 1}. {task}",
                *(f"{mean(part):.2f}" for part in (ratios[:LAST], ratios[-LAST:])),
                "never" if when is None else f"{when}",
                seconds,
            ]
        )
    columns = ["phase", "online over tuned, at first", "at last"]
    columns += ["rounds before within 5%", "seconds of serving"]
    return markdown_table(columns, rows)


def recovered_at(ratios: Sequence[float]) -> int | None:
    """Rounds before the first that is near, as the rest of the phase is on average."""
    for at, ratio in enumerate(ratios):
        if min(ratio, mean(ratios[at:])) >= NEAR:
            return at
    return None


def rounds_of(document: dict[str, Any]) -> int:
    """Of requests, a phase."""
    num_methods = len({row["method"] for row in document["rounds"]})
    return len(document["rounds"]) // num_methods // len(document["phases"])


def check_same(said: dict[str, list[Sequence[int]]], phase: int, at: int) -> None:
    """What drafts must not change what is said; in float32 not even a rounding does."""
    expected = said["auto"]
    for name, texts in said.items():
        if texts != expected:
            raise AssertionError(
                f"round {at} of phase {phase + 1}: the text of {name!r} is not that of "
                "'auto', but drafts must not change it"
            )


def first_acceptance(row: dict[str, Any]) -> float:
    """Of a round."""
    return float(row["acceptance"][0])


def main(
    model: Annotated[
        str, typer.Argument(help="A model of benchmarks/, or two_tasks_model.")
    ] = TWO_TASKS.name,
    tasks: Annotated[str, typer.Option(help="The two tasks.")] = "code,chat",
    rounds: Annotated[int, typer.Option(help="Rounds of requests a phase.")] = 40,
    streams: Annotated[int, typer.Option(help="Requests at a time.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="A request.")] = 96,
    share: Annotated[float, typer.Option(help="Of the time, for scoring.")] = 0.01,
    budget: Annotated[float, typer.Option(help="Seconds of tune's searches.")] = 60,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory of the results.")
    ] = Path("online-report"),
) -> None:
    """Switch tasks in the middle of a run."""
    prepare()
    console = Console(highlight=False)
    path = two_tasks_model() if model == TWO_TASKS.name else BENCHMARKS / model
    names = tasks.split(",")
    texts = {
        task: token_ids(load(task).prompts, path, MAX_PROMPT_TOKENS) for task in names
    }
    plans, known = {}, None
    for task in names:
        plan, known = tuned(path, texts[task][:NUM_TUNED], max_tokens, streams, budget)
        plans[task] = plan
        console.print(f"tuned for {task}: {plan}")
    auto = DraftPlan.skipping(SkipSet.evenly_spread(known.num_layers))
    fixed = {"auto": auto} | {f"tuned for {task}": plans[task] for task in names}
    methods = [
        Method.start(name, path, {"skip_layers": plan.skip_set.to_dict()})
        for name, plan in fixed.items()
    ]
    spec = {"skip_layers": "online", "online": {"share": share}}
    methods.append(Method.start("online", path, spec))
    tuner, phases = tuner_of(methods[-1].engine.llm), [names[0], names[1], names[0]]
    found: list[dict[str, Any]] = []
    serving = 0.0
    for number, task in enumerate(phases):
        held_out = texts[task][NUM_TUNED:]
        for at in range(rounds):
            first = at * streams % len(held_out)
            prompts = (held_out + held_out)[first : first + streams]
            said: dict[str, list[Sequence[int]]] = {}
            for method in methods:
                said[method.name], row = method.round(prompts, max_tokens)
                if method.name == "online":
                    plan, serving = tuner.search.incumbent, serving + row["seconds"]
                else:
                    plan = fixed[method.name]
                row["speed"] = speed_of(known, plan, row["acceptance"])
                row |= {"method": method.name, "phase": number, "task": task}
                found.append(row | {"plan": plan.to_dict()})
            check_same(said, number, at)
        console.print(f"{number + 1}. {task}: {tuner.search.incumbent}")
    document = {
        **provenance(command_line()),
        "model": model,
        "streams": streams,
        "max_tokens": max_tokens,
        "share": share,
        "phases": phases,
        "plans": {name: plan.to_dict() for name, plan in fixed.items()},
        "costs": {"verify": known.verify_costs, "draft": known.draft_costs.parts},
        "candidates": tuner.search.num_duels,
        "adopted": tuner.search.num_adopted,
        "changes": tuner.search.num_changes,
        "seconds_serving": serving,
        "seconds_scoring": tuner.seconds_spent,
        "rounds": found,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "online.json").write_text(json.dumps(document) + "\n")
    (output / "online.md").write_text(markdown(document))
    plot(found, phases).savefig(output / "online.svg", bbox_inches="tight")
    console.print(markdown(document))
    console.print(
        f"{document['candidates']} candidates, {document['adopted']} adopted; scoring "
        f"took {tuner.seconds_spent / serving:.2%} of {serving:.0f} s"
    )


if __name__ == "__main__":
    typer.run(main)
