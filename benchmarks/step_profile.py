"""Where does a step's time go? The parts of one decode step, plain and drafting.

Measured: seconds of each part of a step in vLLM's V1 runner on a CPU, the time of the
parts within it taken off, as the median over the steps that run all requests; in turns
between engines. What bounds a step is its forwards (`c` and `v` of `vllm-selfspec
bench`); everything else here is overhead.

    python benchmarks/step_profile.py --streams 8 --exit-layer 3
"""

import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_selfspec.bench.machine import prepare_environment
from vllm_selfspec.bench.own_models import OWN_MODELS, find_model
from vllm_selfspec.bench.provenance import command_line, provenance
from vllm_selfspec.bench.tasks import load
from vllm_selfspec.engine.measured_llm import MeasuredLLM

ROUNDS = 3
NUM_TOKENS = 64

# Part, and the attribute paths of the functions that it is made of; `engine` is vLLM's
# engine core, `runner` its model runner, `drafter` ours, `view` the draft view.
PARTS = {
    "scheduler": ("engine.scheduler.schedule", "engine.scheduler.update_from_output"),
    "prepare inputs": (
        "runner._update_states",
        "runner._prepare_inputs",
        "runner._build_attention_metadata",
        "runner._preprocess",
    ),
    "target forward": ("runner._model_forward",),
    "target LM head": ("runner.model.compute_logits",),
    "sampler": ("runner._sample",),
    "bookkeeping": ("runner._bookkeeping_sync",),
    "rest of the runner": ("runner.execute_model", "runner.sample_tokens"),
    "draft: rows, slots": ("drafter._draft_batch",),
    "draft: metadata": ("batch.attention_inputs",),
    "draft: forward": ("view.model.forward",),
    "draft: LM head": ("view.compute_logits",),
    "draft: sampling": ("drafter.sampler.sample",),
    "draft: the rest": ("drafter.propose_for_runner",),
}
ENGINE = "rest of the engine"


class Stopwatch:
    """Adds up the time of each part, that of the parts within it taken off.

    Attributes:
        parts: Seconds by part since it was last cleared.
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self._within = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what runs inside."""
        start = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.parts[name] += seconds - self._within.pop()
            self._within[-1] += seconds

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Times every call of `owner.attribute`."""
        function: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)


def watched(llm: Any) -> Stopwatch:
    """A stopwatch on every part that this engine has."""
    from vllm_selfspec.draft.batch import DraftBatch

    stopwatch = Stopwatch()
    core = llm.llm_engine.engine_core.engine_core
    runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
    owners = {"engine": core, "runner": runner}
    if getattr(runner, "drafter", None) is not None:
        owners |= {"drafter": runner.drafter, "view": runner.drafter._view}
        owners["batch"] = DraftBatch  # one is made each step
    for name, paths in PARTS.items():
        for path in paths:
            first, *between, attribute = path.split(".")
            if first in owners:
                owner = functools.reduce(getattr, between, owners[first])
                stopwatch.watch(owner, attribute, name)
    stopwatch.watch(llm.llm_engine, "step", ENGINE)
    return stopwatch


def steps(llm: Any, stopwatch: Stopwatch, prompts: list[str]) -> list[dict[str, float]]:
    """The parts of every step in which all `prompts` were decoding."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{time.monotonic_ns()}-{number}", prompt, params)
    found = []
    num_started = 0
    while engine.has_unfinished_requests():
        stopwatch.parts.clear()
        outputs = engine.step()
        has_all = len(outputs) == len(prompts) and not any(o.finished for o in outputs)
        num_started += has_all
        if has_all and num_started > 1:  # the first of them was prefill's last
            found.append(dict(stopwatch.parts))
    return found


def main(
    model: Annotated[
        str, typer.Argument(help="As for `vllm-selfspec bench`.")
    ] = "demo",
    streams: Annotated[int, typer.Option(help="Concurrent requests.")] = 1,
    exit_layer: Annotated[int, typer.Option(help="The draft's layers.")] = 3,
    k: Annotated[int, typer.Option(help="Draft tokens a step.")] = 4,
    output: Annotated[Path | None, typer.Option("-o", help="Save as JSON.")] = None,
) -> None:
    """Profile a decode step of plain vLLM and of selfspec, side by side."""
    prepare_environment()
    console = Console(highlight=False)
    path = find_model(model, None, console)
    config = {"method": "selfspec", "draft_source": "model", "exit_layer": exit_layer}
    config |= {"num_speculative_tokens": k, "draft_length": "fixed"}
    engines = {}
    for name, spec in {"plain": None, "selfspec": config}.items():
        engines[name] = MeasuredLLM(
            str(path),
            spec,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=streams,
            kv_cache_memory_bytes=512 << 20,
        ).llm
    stopwatches = {name: watched(llm) for name, llm in engines.items()}
    prompts = [str(prompt.content) for prompt in load("code").sample(streams).prompts]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for number in range(1 + ROUNDS):
        for name, llm in engines.items():
            seen = steps(llm, stopwatches[name], prompts)
            found[name] += seen if number else []
    report = {
        **provenance(command_line()),
        "model": model if model in OWN_MODELS else str(path),
        "streams": streams,
        "k": k,
        "exit_layer": exit_layer,
        "steps": {name: len(rows) for name, rows in found.items()},
        "milliseconds": {
            name: {
                part: round(1000 * median(row.get(part, 0.0) for row in rows), 3)
                for part in (*PARTS, ENGINE)
            }
            for name, rows in found.items()
        },
    }
    _print(report, console)
    if output:
        output.write_text(json.dumps(report, indent=1) + "\n")


def _print(report: dict[str, Any], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("part", "plain", "selfspec"):
        table.add_column(column, justify="left" if column == "part" else "right")
    columns = report["milliseconds"].values()
    for part in (*PARTS, ENGINE):
        table.add_row(part, *(f"{column[part]:.2f} ms" for column in columns))
    table.add_row("all", *(f"{sum(column.values()):.2f} ms" for column in columns))
    console.print(table)
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
