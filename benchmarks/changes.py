"""Does the bare flag keep up with the better fixed choice when load and texts change?

A load that swings from one request at a time to many and back, and texts that turn from
summaries, which copy, to chat and back. Each method's engine goes through all phases in
turn with the others', phase by phase, and remembers what it has learnt; rounds repeat
all of that with new prompts. A figure is the median over rounds of the ratio to plain
vLLM in that phase, counted as in `real.py`, so that the bound beside it tells what was
drafted from what the machine did.

    python benchmarks/changes.py MODEL -o FILE.json
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))
import real

from vllm_selfspec import whole_file
from vllm_selfspec.bench.engines import Sampling, VllmEngine, run_by_turns
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
    rounds: Annotated[int, typer.Option(min=2, help="Of all phases.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Of a request.")] = 64,
) -> None:
    """Prints each phase, and saves all of them."""
    prepare_environment()
    chosen = [*real.methods(method, None, None)]
    settings = real.settings_of(model, eager=False)
    engines = {one.name: VllmEngine(one, model, settings) for one in chosen}
    engines[real.AGAIN] = engines[real.PLAIN]
    sampling, found = Sampling(0.0, max_tokens), []
    document = {
        **provenance(f"python benchmarks/changes.py {Path(model).name}"),
        "model": Path(model).name,
    }
    for change, phases in CHANGES.items():
        cells = [{"task": task, "concurrency": n} for task, n in phases]
        # The prompts of a task follow one another over phases and rounds.
        prompts = {
            task: real.prompts_of(task, 1 << 10, f"{change} {task}")
            for task, _ in phases
        }
        of_phases: list[dict[str, real.Found]] = [{} for _ in phases]
        for turn, (of_phase, (task, streams)) in itertools.product(
            range(rounds), zip(of_phases, phases, strict=True)
        ):
            prompts_now = itertools.islice(prompts[task], NUM_REQUESTS[streams])
            texts = [one.render(engines[real.PLAIN].tokenizer) for one in prompts_now]
            runs = run_by_turns(engines, texts, streams, sampling, turn)
            for name, run in runs.items():
                of_phase.setdefault(name, real.Found()).add(run, runs[real.PLAIN])
        for which, (cell, of_phase) in enumerate(zip(cells, of_phases, strict=True)):
            methods = {name: one.summary() for name, one in of_phase.items()}
            found.append({"change": change, "phase": which, **cell, **methods})
            console.print(json.dumps(found[-1]))
        whole_file.write_json({**document, "phases": found}, output)


if __name__ == "__main__":
    typer.run(main)
