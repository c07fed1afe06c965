"""Does selfspec keep its promises on a GPU? Eager, in CUDA graphs, and compiled.

    python benchmarks/gpu_smoke.py -o benchmarks/results/gpu.json
    python benchmarks/gpu_smoke.py --model SmolLM2-135M --factor 4 -o FILE.json
    python benchmarks/gpu_smoke.py --rehearse      # small, on whatever device is here

- agreement: in float32 the text is plain vLLM's, and CUDA graphs accept what eager
  drafting accepts. (A graph that replays stale metadata shows as lost acceptance, never
  as another text: verification hides it.)
- memory: weights, KV blocks and device memory in use, beside plain vLLM's.
- speed: the pace of a server that has 1, 8, 32 or 128 requests at a time, by task,
  engines in turns, medians of ratios; what a draft step costs, and so the bound
  E / (v + k c).

Models are widened, because a small one would time the engine around it: a widened model
writes what the small one writes, at the cost of a big one.

Every part starts its engines in a process of its own and is saved when it is done, so a
machine that goes away leaves what was measured; a part that is in the file is not
measured again.
"""

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from corpus import texts
from pydantic import BaseModel
from rich.console import Console

from vllm_selfspec import whole_file
from vllm_selfspec.bench.engines import Run, Sampling, VllmEngine, run_by_turns
from vllm_selfspec.bench.long_documents import documents_of
from vllm_selfspec.bench.methods import Method
from vllm_selfspec.bench.provenance import command_line, provenance
from vllm_selfspec.bench.tasks import load
from vllm_selfspec.bench.widen import widen
from vllm_selfspec.engine.measured_llm import Batch, MeasuredLLM, drafter_of
from vllm_selfspec.engine.spec_counters import Counts

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_MODEL = REPOSITORY / "benchmarks" / "demo_model"
CACHE = REPOSITORY / ".cache"
PLAIN = "plain vLLM"
ALONE = "plain vLLM, one request at a time"
NUM_DRAFTS, WINDOW = 4, 512
NGRAMS = {"prompt_lookup_max": 4, "num_speculative_tokens": 5}


def own(**keys: Any) -> dict[str, Any]:
    """The speculative configuration of selfspec with these keys."""
    return {"method": "selfspec", **keys}


def fixed(**keys: Any) -> dict[str, Any]:
    """The same, drafting `NUM_DRAFTS` tokens of the model alone."""
    return own(
        draft_source="model",
        draft_length="fixed",
        num_speculative_tokens=NUM_DRAFTS,
        **keys,
    )


# By name, what is compared. "synchronous" is what looking at the newest tokens on the
# host costs plain vLLM.
METHODS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "synchronous": None,
    "bare flag": own(),
    "bare flag, 30% of memory": own(draft_memory="30%"),
    "exit_layer 3": fixed(exit_layer=3),
    "probabilistic": fixed(exit_layer=3, draft_sample_method="probabilistic"),
    "int8": fixed(draft_weights="int8", skip_layers={}),
    "int4": fixed(draft_weights="int4", skip_layers={}),
    "int4, goodput": own(draft_source="model", draft_weights="int4", skip_layers={}),
    "int4, window": fixed(draft_weights="int4", draft_window=WINDOW),
    # Whether a step looks at the window or at all of the cache is chosen there.
    "int4 and copies, window": own(draft_weights="int4", draft_window=WINDOW),
    "copies": own(draft_source="context"),
    "int4 and copies": own(draft_weights="int4", skip_layers={}),  # by turns
    "int4 beside copies": own(draft_weights="int4", skip_layers={}),
    "n-grams": {"method": "ngram", **NGRAMS},
    "n-grams on the device": {"method": "ngram_gpu", **NGRAMS},
}
# Scheduled one step after the other, so that free sources see the newest tokens.
SYNCHRONOUS = ("synchronous", "int4 beside copies")
# Of engines that are compared in one process; each group has plain vLLM.
GROUPS = {
    "own": ("bare flag", "int8", "int4", "int4, goodput"),
    "copies": ("copies", "int4 and copies", "n-grams"),
    "synchronous": ("synchronous", "int4 and copies", "int4 beside copies"),
    "short": ("bare flag", "int4", "int4, goodput", "n-grams on the device"),
    "turns": (
        "bare flag",
        "int4, goodput",
        "int4 and copies",
        "n-grams on the device",
    ),
    "flag": ("bare flag", "bare flag, 30% of memory"),
    "big": ("int4", "int4, goodput", "int4 and copies"),
    "long": ("bare flag", "int4", "int4, window", "int4 and copies, window"),
    "demo": ("exit_layer 3", "probabilistic", "bare flag", "int4", "copies"),
}
AGREEING = (
    "exit_layer 3",
    "probabilistic",
    "int8",
    "int4",
    "bare flag",
    "copies",
    "int4 and copies",
    "int4 beside copies",
)
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "compiled": {},
}
PARTS = ("agreement", "memory", "speed")
PROMPT_CHARACTERS = 400
CONTEXT_LENGTH = 1024
DEMO_TASK = "held-out source"


class Scale(BaseModel, frozen=True):
    """How much is run.

    Attributes:
        streams: Concurrent requests.
        num_tokens: Generated a request.
        rounds: Turns a number of streams.
        kv_cache_bytes: Of each engine, where the blocks are not what is measured.
    """

    streams: tuple[int, ...] = (1, 8, 32, 128)
    num_tokens: int = 128
    rounds: int = 3
    kv_cache_bytes: int = 0


SMALL = Scale(streams=(1, 4), num_tokens=16, rounds=1, kv_cache_bytes=64 << 20)


class Setup(BaseModel, frozen=True):
    """What every process of a run is told.

    Attributes:
        model: Checkpoint directory.
        factor: How often it is widened, for memory and speed.
        scale: How much is run.
        tasks: Shipped prompts; the demo model goes on with source files.
        backend: vLLM's attention backend, if not its own choice.
        context: Tokens of the document that each request goes on from; 0 for the
            shipped prompts.
    """

    model: Path
    factor: int
    scale: Scale
    tasks: tuple[str, ...]
    backend: str | None
    context: int = 0

    @property
    def is_demo(self) -> bool:
        """Whether it is the model that was trained to be exited early."""
        return self.model == DEMO_MODEL

    def widened(self, factor: int, dtype: str) -> Path:
        """The model, made once."""
        if factor == 1:
            return self.model
        return widen(
            self.model, CACHE / f"{self.model.name}_x{factor}_{dtype}", factor, dtype
        )

    def prompts(self, task: str, num: int, tokenizer: Any, seed: int = 0) -> list[str]:
        """Of a task; pieces of files that the demo model was not trained on; the
        beginnings of long documents."""
        if self.context:
            every = itertools.cycle(documents_of(self.context, tokenizer))
            return [*itertools.islice(every, seed, seed + num)]
        if task != DEMO_TASK:
            found = [prompt.render(tokenizer) for prompt in load(task).prompts]
            return [found[i % len(found)] for i in range(seed, seed + num)]
        rng = random.Random(seed)
        held_out = [text for _, text in texts(held_out=True)]
        pieces: list[str] = []
        while len(pieces) < num:
            text = rng.choice(held_out)
            start = rng.randrange(max(1, len(text) - PROMPT_CHARACTERS))
            pieces.append(text[start : start + rng.randint(40, PROMPT_CHARACTERS)])
        return pieces


def measured(method: str, settings: dict[str, Any]) -> MeasuredLLM:
    """One of `METHODS`."""
    return MeasuredLLM(
        speculative_config=METHODS[method], **settings | scheduled(method)
    )


def timed(method: str, settings: dict[str, Any]) -> VllmEngine:
    """The same, driven step by step."""
    settings = settings | scheduled(method)
    model = settings.pop("model")
    return VllmEngine(Method(method, method, METHODS[method]), model, settings)


def scheduled(method: str) -> dict[str, Any]:
    """How, where that is not vLLM's own choice."""
    return {"async_scheduling": False} if method in SYNCHRONOUS else {}


def gaps_of(output: Any) -> list[float]:
    """Between the two likeliest logprobs, by position."""
    found = []
    for of_position in output.outputs[0].logprobs:
        best, second = sorted(one.logprob for one in of_position.values())[-1:-3:-1]
        found.append(best - second)
    return found


def settings_of(
    setup: Setup, mode: str, factor: int, dtype: str, num_engines: int
) -> dict[str, Any]:
    """What all engines of a process have in common; `num_engines` share the device, in
    KV caches of fixed size."""
    settings: dict[str, Any] = {
        "model": str(setup.widened(factor, dtype)),
        "dtype": dtype,
        "max_model_len": CONTEXT_LENGTH + setup.context,
        "max_num_seqs": max(setup.scale.streams),
        "seed": 0,
        **MODES[mode],
    }
    if setup.backend:
        settings["attention_config"] = {"backend": setup.backend}
    if num_engines:
        settings["kv_cache_memory_bytes"] = setup.scale.kv_cache_bytes
        settings["gpu_memory_utilization"] = 0.9 / (1 + num_engines)
    return settings


def agreement(setup: Setup, mode: str) -> dict[str, Any]:
    """Texts that are plain vLLM's, and acceptance, by method and number of streams.

    Where a text differs, the two likeliest tokens may have been as likely but for
    rounding, which depends on the rows of a forward: plain vLLM's texts of one request
    at a time stand beside.
    """
    methods = [
        method
        for method in AGREEING
        if setup.is_demo or method not in GROUPS["demo"][:2]
    ]
    settings = settings_of(setup, mode, 1, "float32", 1 + len(methods))
    engines = {method: measured(method, settings) for method in (PLAIN, *methods)}
    report: dict[str, Any] = {method: {} for method in (*methods, ALONE)}
    num_tokens = setup.scale.num_tokens
    for num_streams in setup.scale.streams:
        batch = setup.prompts(setup.tasks[0], num_streams, engines[PLAIN].tokenizer)
        plain = engines[PLAIN].generate(batch, num_tokens, logprobs=2)
        alone = [engines[PLAIN].generate([one], num_tokens) for one in batch]
        report[ALONE][num_streams] = compared([b.token_ids[0] for b in alone], plain)
        for method in methods:
            greedy = engines[method].generate(batch, num_tokens)
            sampled = engines[method].generate(
                batch, num_tokens, 0.7, seeds=[1] * num_streams
            )
            report[method][num_streams] = {
                **compared(greedy.token_ids, plain),
                "acceptance": greedy.counts.acceptance,
                "acceptance_at_temperature_0.7": sampled.counts.acceptance,
            }
    return report


def compared(token_ids: Sequence[Sequence[int]], plain: Batch) -> dict[str, Any]:
    """Same texts, and how much likelier plain vLLM held its token where one differs."""
    differing = []
    for found, expected, output in zip(
        token_ids, plain.token_ids, plain.outputs, strict=True
    ):
        if found != expected:
            pairs = enumerate(zip(found, expected, strict=True))
            first = next(i for i, (a, b) in pairs if a != b)
            differing.append(gaps_of(output)[first])
    return {
        "texts": len(token_ids),
        "same_texts": len(token_ids) - len(differing),
        "gaps_in_logprob": differing,
    }


def memory(setup: Setup, mode: str, method: str) -> dict[str, Any]:
    """What one engine takes, alone on the device at vLLM's default settings."""
    import torch

    on_gpu = torch.cuda.is_available()
    num_engines = 0 if on_gpu else 1
    settings = settings_of(setup, mode, setup.factor, "bfloat16", num_engines)
    engine = measured(method, settings)
    streams = max(setup.scale.streams)
    batch = setup.prompts(setup.tasks[0], streams, engine.tokenizer)
    engine.generate(batch, setup.scale.num_tokens)
    report = {
        "weight_bytes": weight_bytes(engine.runner),
        "kv_blocks": engine.vllm_config.cache_config.num_gpu_blocks,
        "start_up_seconds": round(engine.start_up, 1),
    }
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        report |= {
            "device_bytes_in_use": total - free,
            "torch_peak_bytes": torch.cuda.max_memory_allocated(),
        }
    return report


def weight_bytes(runner: Any) -> int:
    """Bytes of all distinct parameters, those that drafts read included."""
    view = getattr(drafter_of(runner), "_view", None)
    models = [runner.model, *([] if view is None else [view.model])]
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for model in models
        for p in model.parameters()
    }
    return sum(storages.values())


def speed(setup: Setup, mode: str, group: str) -> dict[str, Any]:
    """Tokens per second and the median ratio to plain vLLM, run in turns."""
    methods = (PLAIN, *GROUPS[group])
    settings = settings_of(setup, mode, setup.factor, "bfloat16", len(methods))
    engines = {method: timed(method, settings) for method in methods}
    started = {method: engine.measured for method, engine in engines.items()}
    report: dict[str, Any] = {
        "start_up_seconds": {m: round(e.start_up, 1) for m, e in started.items()},
        "costs": {method: costs_of(engine) for method, engine in started.items()},
        "cells": {},
    }
    for task in setup.tasks:
        for num_streams in setup.scale.streams:
            cell = f"{task}, {num_streams}"
            report["cells"][cell] = in_turns(setup, engines, task, num_streams)
            print(json.dumps({cell: report["cells"][cell]}), flush=True)
    return report


def costs_of(engine: MeasuredLLM) -> dict[str, Any] | None:
    """Milliseconds of a verification and of a draft step by rows, without a context."""
    from vllm_selfspec.draft.v2_speculator import SelfSpecSpeculator
    from vllm_selfspec.engine.measure import measure_costs
    from vllm_selfspec.served_config import num_model_tokens

    if not isinstance(drafter_of(engine.runner), SelfSpecSpeculator):
        return None
    if not num_model_tokens(engine.vllm_config):
        return None
    (found,) = engine.ask(measure_costs)
    rows, verify, draft = found
    return {
        "rows": rows,
        "verify": [round(1e3 * seconds, 3) for seconds in verify],
        "draft": [round(1e3 * seconds, 3) for seconds in draft],
    }


def in_turns(
    setup: Setup, engines: dict[str, VllmEngine], task: str, num_streams: int
) -> dict[str, Any]:
    """One cell: every engine runs the same prompts, in an order that rotates; of
    several streams two prompts each, so that those that end make room for others."""
    num_prompts = num_streams if num_streams == 1 else 2 * num_streams
    sampling = Sampling(0.0, setup.scale.num_tokens)
    samples: dict[str, list[Run]] = {method: [] for method in engines}
    for turn in range(1 + setup.scale.rounds):
        tokenizer, seed = engines[PLAIN].tokenizer, turn * num_prompts
        prompts = setup.prompts(task, num_prompts, tokenizer, seed)
        runs = run_by_turns(engines, prompts, num_streams, sampling, turn)
        for method, run in runs.items() if turn else ():  # the first one warms up
            samples[method].append(run)
    return {method: cell_of(found, samples[PLAIN]) for method, found in samples.items()}


def cell_of(samples: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """Medians over the turns."""
    pairs = [*zip(samples, plain, strict=True)]
    ratios = [b.steady / a.steady for a, b in pairs]
    same = [
        a.token_ids == b.token_ids
        for one, other in pairs
        for a, b in zip(one.requests, other.requests, strict=True)
    ]
    return {
        "tokens_per_second": round(1 / median(s.steady for s in samples), 1),
        "speed_up": round(median(ratios), 4),
        "speed_ups": [round(ratio, 4) for ratio in ratios],
        "speed_up_whole": round(median(b.seconds / a.seconds for a, b in pairs), 4),
        "acceptance": [sample.counts.acceptance for sample in samples],
        "tokens_per_verification": [emitted(sample.counts) for sample in samples],
        "same_texts": round(sum(same) / len(same), 4),  # in bfloat16 they may differ
    }


def emitted(counts: Counts) -> float | None:
    """Tokens per verification that had a draft."""
    return 1 + counts.accepted_tokens / counts.drafts if counts.drafts else None


def steps(
    setup: Setup, parts: list[str], modes: list[str], wanted: list[str]
) -> dict[str, list[str]]:
    """The processes to run, by the name of what they measure: function, arguments."""
    groups = tuple(wanted) or (("demo",) if setup.is_demo else ("own", "copies"))
    choices: dict[str, tuple[str, ...]] = {
        "agreement": (),
        "memory": (PLAIN, "int4", "bare flag"),
        "speed": groups,
    }
    words = [
        [part, mode, *rest]
        for part in parts
        for mode in modes
        for rest in ([[choice] for choice in choices[part]] or [[]])
    ]
    return {"/".join(of_one): of_one for of_one in words}


def run_step(setup: Setup, words: list[str], log: Path | None) -> Any:
    """One process of this script; what it measured, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        return _run_step(setup, words, log, Path(folder) / "result.json")


def _run_step(setup: Setup, words: list[str], log: Path | None, result: Path) -> Any:
    command = [sys.executable, __file__, "--step", json.dumps(words)]
    command += ["--setup", setup.model_dump_json(), "-o", str(result)]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **env}
    with open(log or os.devnull, "w") as stream:
        told = stream if log else None
        done = subprocess.run(command, env=env, stdout=told, stderr=told)
    if done.returncode:
        return {"failed": done.returncode}
    return json.loads(result.read_text())


def numbers(text: str) -> tuple[int, ...]:
    """Of a list with commas."""
    return tuple(map(int, text.split(",")))


def main(
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="JSON file; goes on with what is missing in it."
        ),
    ] = None,
    model: Annotated[Path, typer.Option(help="Checkpoint of a Llama.")] = DEMO_MODEL,
    factor: Annotated[int, typer.Option(help="How often it is widened.")] = 16,
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(PARTS)}; all by default."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(MODES)}; all by default."),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help=f"Of engines, for the speed: of {', '.join(GROUPS)}."),
    ] = None,
    streams: Annotated[str, typer.Option(help="Concurrent requests.")] = "1,8,32,128",
    kv_gib: Annotated[
        int, typer.Option(help="KV cache of an engine that shares the device.")
    ] = 6,
    context: Annotated[
        int, typer.Option(help="Tokens of a document, in place of the short prompts.")
    ] = 0,
    attention_backend: Annotated[
        str | None, typer.Option(help="vLLM's, such as TRITON_ATTN; its choice.")
    ] = None,
    rehearse: Annotated[
        bool, typer.Option(help="The model as it is, few tokens, on any device.")
    ] = False,
    logs: Annotated[
        Path | None, typer.Option(help="Folder for what the processes print.")
    ] = None,
    step: Annotated[str | None, typer.Option(hidden=True)] = None,
    setup: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Check identity, acceptance, memory and speed on this machine's GPU."""
    if step is not None:
        name, *words = json.loads(step)
        measures: dict[str, Any] = {
            "agreement": agreement,
            "memory": memory,
            "speed": speed,
        }
        assert output is not None
        told = Setup.model_validate_json(setup)
        whole_file.write_json(measures[name](told, *words), output)
        return
    console = Console(stderr=True, highlight=False)
    import torch

    if not torch.cuda.is_available() and not rehearse:
        raise typer.BadParameter(
            "there is no CUDA device here: run it where there is one, or add --rehearse"
        )
    parts, modes = part or list(PARTS), mode or list(MODES)
    for said, known in ((parts, PARTS), (modes, (*MODES,))):
        if unknown := {*said} - {*known}:
            raise typer.BadParameter(
                f"one of {', '.join(known)} is needed, but it is {', '.join(unknown)}"
            )
    is_demo = model == DEMO_MODEL
    tasks = (DEMO_TASK,) if is_demo else ("code", "chat", "summarization")
    tasks = ("continuation",) if context else tasks
    full = Scale(streams=numbers(streams), kv_cache_bytes=kv_gib << 30)
    chosen = Setup(
        model=model,
        factor=1 if rehearse else factor,
        scale=SMALL if rehearse else full,
        tasks=tasks,
        backend=attention_backend,
        context=context,
    )
    report: dict[str, Any] = {
        **provenance(command_line()),
        "attention_backend": attention_backend,
        "factor": factor,
        "context": context,
        "scale": chosen.scale.model_dump(),
        "results": {},
    }
    if output and output.exists():
        report["results"] = json.loads(output.read_text())["results"]
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    todo = {
        name: words
        for name, words in steps(chosen, parts, modes, group or []).items()
        if "failed" in report["results"].get(name, {"failed": None})
    }
    for number, (name, words) in enumerate(todo.items(), 1):
        console.print(f"{number} of {len(todo)}: {name}")
        log = logs / f"{name.replace('/', '-').replace(' ', '_')}.log" if logs else None
        report["results"][name] = run_step(chosen, words, log)
        if output:
            whole_file.write_json(report, output)
    print(json.dumps(report["results"], indent=1))
    failed = [name for name, found in report["results"].items() if "failed" in found]
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/red]")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
