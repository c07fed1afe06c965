"""Does the bare flag keep up with the better fixed choice when load and texts change?

A load that swings from one request at a time to many and back, and texts that turn from
summaries, which copy, to chat and back. Each method's engine goes through all phases in
turn with the others', phase by phase, and remembers what it has learnt; rounds repeat
all of that with new prompts. A figure is the median over rounds of the ratio to plain
vLLM in that phase.

    python benchmarks/changes.py MODEL -o FILE.json
"""

import itertools
import json
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))
import real

from vllm_selfspec import whole_file
from vllm_selfspec.bench.engines import Run, Sampling, VllmEngine
from vllm_selfspec.bench.machine import prepare_environment
from vllm_selfspec.bench.provenance import provenance

# Task and requests at a time, phase by phase.
CHANGES = {
    "load": (("chat", 1), ("chat", 16), ("chat", 1)),
    "texts": (("summarization", 1), ("chat", 1), ("summarization", 1)),
}
# Requests of a phase, by those at a time.
NUM_REQUESTS = {1: 3, 16: 32}
METHODS = (real.SUFFIXES, real.BARE_FLAG)
console = Console(stderr=True)


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint directory.")],
    output: Annotated[Path, typer.Option("-o", help="The JSON.")],
    method: Annotated[list[str], typer.Option(help="Some of real.py's.")] = [*METHODS],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Of all phases.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Of a request.")] = 64,
) -> None:
    """Prints each phase, and saves all of them."""
    prepare_environment()
    chosen = [*real.methods(method, None, None)]
    settings = real.settings_of(model, eager=False)
    engines = [VllmEngine(one, model, settings) for one in chosen]
    sampling, found = Sampling(0.0, max_tokens), []
    for change, phases in CHANGES.items():
        cells = [{"task": task, "concurrency": n} for task, n in phases]
        # The prompts of a task follow one another over phases and rounds.
        prompts = {
            task: real.prompts_of(task, 1 << 10, f"{change} {task}")
            for task, _ in phases
        }
        ratios: list[dict[str, list[float]]] = [{} for _ in phases]
        for number, (which, (task, streams)) in itertools.product(
            range(rounds), enumerate(phases)
        ):
            texts = [*itertools.islice(prompts[task], NUM_REQUESTS[streams])]
            runs = _by_turns(engines, texts, streams, sampling, number)
            plain = runs[real.PLAIN].steady
            for name, run in runs.items():
                ratio = plain / run.steady
                ratios[which].setdefault(name, []).append(ratio)
        for which, (cell, of_phase) in enumerate(zip(cells, ratios, strict=True)):
            medians = {name: round(median(r), 3) for name, r in of_phase.items()}
            spread = {name: [round(x, 3) for x in r] for name, r in of_phase.items()}
            found.append({"change": change, "phase": which, **cell, **medians})
            console.print(json.dumps(found[-1]))
            found[-1]["rounds"] = spread
    document = {
        **provenance(f"python benchmarks/changes.py {Path(model).name}"),
        "model": Path(model).name,
        "phases": found,
    }
    whole_file.write_json(document, output)


def _by_turns(
    engines: list[VllmEngine], texts: list[Any], streams: int, sampling: Any, turn: int
) -> dict[str, Run]:
    """By method; who is first changes."""
    order = engines[turn % len(engines) :] + engines[: turn % len(engines)]
    rendered = [text.render(engines[0].tokenizer) for text in texts]
    return {e.method.name: e.run(rendered, streams, sampling) for e in order}


if __name__ == "__main__":
    typer.run(main)
