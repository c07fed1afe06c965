"""Do copies and the model's own drafts together bring more than either alone?

Measured: tokens per second of plain vLLM, of what it offers for free (n-grams, suffix
decoding where `make .venv/peers` was run), and of selfspec with the model alone, with
copies alone and with both, prompt by prompt and in turns, so that a machine that slows
down does so for all. A figure is the median over the prompts of the ratio to plain
vLLM, with the quartiles; plain vLLM against itself stands beside it. What bounds a row
is E / (v + k c) for what it drafts, where a copy has c = 0.

    python benchmarks/sources.py MODEL --task code --task chat -o FILE.json

"Both" must not be below the better of its parts; where it is, the decision is wrong.
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_selfspec import whole_file
from vllm_selfspec.bench.engines import Sampling, VllmEngine
from vllm_selfspec.bench.machine import prepare_environment
from vllm_selfspec.bench.methods import NGRAM, PLAIN, SUFFIX, Method
from vllm_selfspec.bench.provenance import provenance
from vllm_selfspec.bench.tasks import load
from vllm_selfspec.config import METHOD

AGAIN = f"{PLAIN}, again"
METHODS = (AGAIN, "n-grams", "suffix", "model", "context", "both")
console = Console(stderr=True)


def methods(keys: dict[str, Any]) -> Iterator[Method]:
    """In the order they are started; `keys` are the model's draft plan."""
    yield Method(PLAIN, "plain")
    yield Method("n-grams", "ngram", {**NGRAM, "num_speculative_tokens": 5})
    if importlib.util.find_spec("arctic_inference") is not None:
        yield Method("suffix", "suffix", SUFFIX)
    own = {"method": METHOD}
    yield Method("model", "selfspec", {**own, "draft_source": "model", **keys})
    yield Method("context", "selfspec", {**own, "draft_source": "context"})
    yield Method("both", "selfspec", {**own, **keys})


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint directory.")],
    task: Annotated[list[str], typer.Option(help="Shipped prompts.")] = [  # noqa: B006
        "code",
        "chat",
        "summarization",
        "text",
    ],
    keys: Annotated[str, typer.Option(help="The model's plan, as JSON.")] = "{}",
    concurrency: Annotated[str, typer.Option(help="Requests at a time.")] = "1",
    temperature: Annotated[str, typer.Option(help="Of all requests.")] = "0",
    num_prompts: Annotated[int, typer.Option(help="Of a task, per stream.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Of a request.")] = 128,
    eager: Annotated[bool, typer.Option(help="Nothing is compiled.")] = True,
    output: Annotated[Path | None, typer.Option("-o", help="For the JSON.")] = None,
) -> None:
    """Prints a line a cell, and JSON last."""
    prepare_environment()
    engines = [
        VllmEngine(method, model, settings_of(eager))
        for method in methods(json.loads(keys))
    ]
    cells = []
    for streams in map(int, concurrency.split(",")):
        for degrees in map(float, temperature.split(",")):
            for name in task:
                sampling = Sampling(degrees, max_tokens, seed=None)
                cell = {"task": name, "concurrency": streams, "temperature": degrees}
                cell |= measured(engines, name, streams, num_prompts, sampling)
                console.print(json.dumps(cell))
                cells.append(cell)
    command = f"python benchmarks/sources.py {Path(model).name}"
    command += f" --keys '{keys}'" if keys != "{}" else ""
    sizes = {"num_prompts": num_prompts, "max_tokens": max_tokens}
    document = {**provenance(command), **sizes, "cells": cells}
    print(json.dumps(document, indent=1))
    if output is not None:
        whole_file.write_json(document, output)


def settings_of(eager: bool) -> dict[str, Any]:
    """The same for every engine."""
    return {
        "dtype": "bfloat16",
        "enforce_eager": eager,
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 512 << 20,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }


def measured(
    engines: Sequence[VllmEngine],
    task: str,
    streams: int,
    num_prompts: int,
    sampling: Sampling,
) -> dict[str, Any]:
    """Ratios to plain vLLM, by method, and what was drafted and accepted."""
    # The first ones warm up, and are not measured: suffix decoding remembers answers.
    prompts = load(task).sample(streams + num_prompts).prompts
    rendered = [prompt.render(engines[0].tokenizer) for prompt in prompts]
    first, texts = rendered[:streams], rendered[streams:]
    order = [*engines, engines[0]]
    names = [*(engine.method.name for engine in engines), AGAIN]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    counts: dict[str, list[int]] = {name: [0, 0, 0] for name in names}
    for turn in range(1 + len(texts)):
        chosen = [texts[(turn - 1 + i) % len(texts)] for i in range(streams)]
        if not turn:
            chosen = first
        speeds = {}
        for i in range(len(order)):
            which = (i + turn) % len(order)
            run = order[which].run(chosen, streams, sampling)
            speeds[names[which]] = run.num_tokens / run.seconds
            found = counts[names[which]]
            for j, num in enumerate(
                (
                    run.counts.drafts,
                    run.counts.draft_tokens,
                    run.counts.accepted_tokens,
                )
            ):
                found[j] += num
        if turn:
            for name, speed in speeds.items():
                ratios[name].append(speed / speeds[PLAIN])
    return {
        name: {
            "speed_up": round(median(found), 3),
            "quartiles": [round(q, 3) for q in quantiles(found, n=4)[::2]],
            "drafts, drafted, accepted": counts[name],
        }
        for name, found in ratios.items()
        if name != PLAIN
    }


def markdown(*documents: dict[str, Any]) -> str:
    """A table for each saved run: medians, and quartiles where it matters."""
    return "\n\n".join(map(_table, documents))


def _table(document: dict[str, Any]) -> str:
    names = [name for name in METHODS if name in document["cells"][0]]
    head = ["concurrency", "T", "task", *names]
    lines = [
        f"`{document['command']}`, {document['date']}: {document['hardware']}, "
        f"{document['num_cores']} cores; vLLM {document['vllm']}, bfloat16, "
        f"{document['num_prompts']} prompts a task, {document['max_tokens']} tokens "
        "each.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---:|' * 2}---|{'---:|' * len(names)}",
    ]
    for cell in document["cells"]:
        row = [cell["concurrency"], f"{cell['temperature']:g}", cell["task"]]
        row += [_figure(cell[name]) for name in names]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def _figure(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{found['speed_up']:.2f}x ({low:.2f} to {high:.2f})"


def mean_speed_up(
    document: dict[str, Any], method: str, concurrency: int, tasks: Sequence[str]
) -> str:
    """The geometric mean over tasks, greedy; empty where that was not run."""
    found = [
        cell[method]["speed_up"]
        for cell in document["cells"]
        if method in cell
        and (cell["concurrency"], cell["temperature"]) == (concurrency, 0)
        and cell["task"] in tasks
    ]
    return f"{geometric_mean(found):.2f}x" if len(found) == len(tasks) else ""


if __name__ == "__main__":
    typer.run(main)
