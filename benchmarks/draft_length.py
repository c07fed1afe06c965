"""Is the goodput length as good as the best fixed one at every load, and never slower?

    python benchmarks/draft_length.py -o benchmarks/results/draft_length

In one process and in turns: plain vLLM, fixed lengths, the goodput length with the same
draft, and with a draft that is always wrong. At 1, 4, 8 and 16 streams, and with a load
that swings from 1 to 16 and back within a run. The bound of a fixed length is
E / (v + k c); goodput has none of its own, it should follow the best of them.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_selfspec.bench import report
from vllm_selfspec.bench.comparison import Load, compare, num_turns, to_dict
from vllm_selfspec.bench.engines import Engine, Sampling, VllmEngine
from vllm_selfspec.bench.inputs import MAX_MODEL_LEN
from vllm_selfspec.bench.methods import MODEL_ALONE, PLAIN, Method
from vllm_selfspec.bench.own_models import find_model
from vllm_selfspec.bench.page import new_plot
from vllm_selfspec.bench.run import (
    KV_CACHE_BYTES,
    BenchOptions,
    conditions,
    describe,
    engine_settings,
    measured_costs,
    prepare,
)
from vllm_selfspec.bench.tasks import load
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet

LENGTHS = (1, 2, 4, 8)
# Layer 3 of the demo model agrees with it, layer 1 of its twin hardly.
EXIT_LAYER, NUM_LAYERS = 3, 12
# A draft of one MLP and no attention knows nothing of the text.
WRONG = {
    "attention": list(range(NUM_LAYERS)),
    "mlp": list(range(1, NUM_LAYERS)),
}
SWING = (1, 16, 1)


def methods() -> list[Method]:
    """Plain vLLM first."""
    good = DraftPlan.skipping(SkipSet.early_exit(NUM_LAYERS, EXIT_LAYER))
    exits = {"method": "selfspec", **MODEL_ALONE, "exit_layer": EXIT_LAYER}
    most = {"draft_length": "goodput", "num_speculative_tokens": LENGTHS[-1]}
    found = [Method(PLAIN, "plain")]
    for k in LENGTHS:
        config = {**exits, "draft_length": "fixed", "num_speculative_tokens": k}
        found.append(Method(f"selfspec, k {k}", "selfspec", config, good))
    found.append(Method("selfspec, goodput", "selfspec", {**exits, **most}, good))
    wrong = {"method": "selfspec", **MODEL_ALONE, "skip_layers": WRONG, **most}
    plan = DraftPlan.skipping(SkipSet.from_dict(NUM_LAYERS, WRONG))
    found.append(Method("selfspec, goodput, wrong draft", "selfspec", wrong, plan))
    return found


def swing(engines: list[Any], prompts: list[str], sampling: Sampling) -> list[Any]:
    """A load from 1 to 16 streams and back, by every method in turn: tokens a second
    over plain vLLM's, and the times of the steps around each change."""
    swung(engines[0], prompts, sampling)  # not measured, as in `comparison`
    found = [swung(engine, prompts, sampling) for engine in engines]
    plain = found[0]["tokens_per_second"]
    return [{**row, "speed_up": row["tokens_per_second"] / plain} for row in found]


def swung(engine: Any, prompts: list[str], sampling: Sampling) -> dict[str, Any]:
    """The same by one method."""
    steps: list[float] = []
    changes, tokens, waiting = [], 0, list(prompts)
    started = time.perf_counter()
    for num_streams in SWING:
        changes.append(len(steps))
        num = 2 * num_streams
        chosen, waiting = waiting[:num], waiting[num:]
        with timed_steps(engine, steps):
            run = engine.run(chosen, num_streams, sampling)
        tokens += run.num_tokens
    seconds = time.perf_counter() - started
    return {
        "method": engine.method.name,
        "tokens_per_second": tokens / seconds,
        "changes_at_step": changes,
        "step_seconds": [round(t, 4) for t in steps],
    }


@contextmanager
def timed_steps(engine: Any, steps: list[float]) -> Iterator[None]:
    """Appends the seconds of every engine step to a list."""
    core = engine.measured.llm.llm_engine
    step = core.step

    def timed() -> Any:
        started = time.perf_counter()
        found = step()
        steps.append(time.perf_counter() - started)
        return found

    core.step = timed  # before the class's own
    try:
        yield
    finally:
        del core.step


def plot(turn: list[dict[str, Any]]) -> Any:
    """Step times of a swinging load: plain vLLM's, and those of changing lengths."""
    figure, axes = new_plot(1, 1, 10, 4)
    axis = axes[0][0]
    for row in turn:
        if row["method"] == PLAIN or "goodput" in row["method"]:
            milliseconds = [1000 * t for t in row["step_seconds"]]
            axis.plot(milliseconds, linewidth=0.8, label=row["method"])
            for at in row["changes_at_step"][1:]:
                axis.axvline(at, color="grey", linewidth=0.5)
    axis.set_xlabel("step")
    axis.set_ylabel("ms")
    axis.set_yscale("log")
    axis.legend()
    return figure


def main(
    model: Annotated[str, typer.Argument(help="'demo' or 'plain'.")] = "demo",
    task: Annotated[str, typer.Option(help="Prompts.")] = "chat",
    streams: Annotated[str, typer.Option(help="Loads.")] = "1,4,8,16",
    groups: Annotated[
        int,
        typer.Option(
            help="Turns of every method at a load; thrice that at one stream."
        ),
    ] = 3,
    swings: Annotated[int, typer.Option(help="Turns with a swinging load.")] = 2,
    max_tokens: Annotated[int, typer.Option(help="A prompt.")] = 48,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory of the report.")
    ] = Path("draft-length"),
) -> None:
    """Compare fixed and goodput lengths with plain vLLM at several loads."""
    prepare()
    console = Console(highlight=False)
    # One prompt of a few dozen steps says little; more than one stream has many.
    loads = tuple(
        Load(n, groups * (3 if n == 1 else 2 * n)) for n in map(int, streams.split(","))
    )
    options = BenchOptions(
        model=model,
        draft_model=None,
        widen=None,
        tasks=(task,),
        loads=loads,
        temperatures=(0.0,),
        groups=(),
        lengths=LENGTHS,
        max_tokens=max_tokens,
        dtype="bfloat16",
        output=output,
    )
    path = find_model(model, None, console)
    settings = engine_settings(options, MAX_MODEL_LEN) | {
        "disable_log_stats": False,
        "use_tqdm_on_load": False,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "max_num_seqs": max(SWING),
    }
    engines: list[Engine] = []
    for method in methods():
        console.print(f"Starting {method.name}")
        engines.append(VllmEngine(method, str(path), settings))
    sampling = Sampling(0.0, max_tokens)
    tasks = [load(task)]
    tokenizer = engines[0].tokenizer
    warm = [prompt.render(tokenizer) for prompt in load("text").prompts]
    for engine in engines:  # what a controller knows after its first requests
        engine.run(warm[:2], 1, sampling)
    total, done = num_turns(engines, tasks, loads, [sampling]), 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        console.print(f"{done} of {total}: {what}")

    comparison = compare(
        engines, tasks, loads, [sampling], lambda p: p.render(tokenizer), advance
    )
    document = {
        **conditions(options, path),
        "methods": [describe(method) for method in methods()],
        "costs": measured_costs(comparison, loads),
        "steps": comparison.times_of_a_token(),
        "results": [to_dict(result) for result in comparison.results()],
    }
    report.write(document, output, console)
    prompts = [prompt.render(tokenizer) for prompt in tasks[0].prompts]
    turns = []
    for turn in range(swings):
        console.print(f"Swing {turn + 1} of {swings}")
        turns.append(swing(engines, prompts, replace(sampling, max_tokens=32)))
    (output / "swing.json").write_text(json.dumps(turns) + "\n")
    plot(turns[-1]).savefig(output / "swing.svg", bbox_inches="tight")
    for number, method in enumerate(methods()):
        gain = median(turn[number]["speed_up"] for turn in turns)
        console.print(f"load {SWING}: {method.name}: {gain:.2f}x")


if __name__ == "__main__":
    typer.run(main)
