"""What does each way to draft bring on a real model, beside what vLLM offers?

Measured: tokens per second of plain vLLM, of its own methods and of selfspec, prompt by
prompt and in turns, so that a machine that slows down does so for all. A figure is the
median of the ratios to plain vLLM, with the quartiles and the number of samples; plain
vLLM against itself stands beside it. Of several requests at a time it is the pace of a
server where each request that ends makes room for another (`Pace.steady`). What bounds
a row is E / (v + k c): the *bound* is that, added up over the forwards of each run, so
it also is what was to be expected.

    python benchmarks/real.py MODEL --concurrency 1,8 --temperature 0,1 -o FILE.json

A cell (task, concurrency, temperature) is saved once it is measured. The same command
goes on where a former one was stopped, and takes what is saved as it is. Where there is
no memory for all engines at once, they come in groups, each in a process of its own and
beside a plain vLLM of its own, which its ratios are to.
"""

import importlib.util
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_tasks

from vllm_selfspec import whole_file
from vllm_selfspec.bench.engines import (
    Forwards,
    Run,
    Sampling,
    VllmEngine,
    run_by_turns,
)
from vllm_selfspec.bench.long_documents import QUESTIONS, asked, documents_of
from vllm_selfspec.bench.machine import prepare_environment
from vllm_selfspec.bench.methods import MODEL_ALONE, NGRAM, PLAIN, SUFFIX, Method
from vllm_selfspec.bench.own_models import OWN_MODELS, find_model
from vllm_selfspec.bench.page import markdown_table
from vllm_selfspec.bench.provenance import provenance
from vllm_selfspec.bench.tasks import SHIPPED, Prompt
from vllm_selfspec.chosen_plan import resolve_plan
from vllm_selfspec.config import METHOD, SelfSpecConfig
from vllm_selfspec.plan.cost import ModelWeights, decimal
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.target_model import TargetModel

AGAIN = f"{PLAIN}, again"
N_GRAMS, SUFFIXES, DRAFT_MODEL = "n-grams", "suffix", "draft model"
BARE_FLAG = "the bare flag"
WINDOW = {"draft_window": 512}
# By name, what is written beside the method.
OURS: dict[str, dict[str, Any]] = {
    BARE_FLAG: {},
    "copies": {"draft_source": "context"},
    "int8": {**MODEL_ALONE, "draft_weights": "int8"},
    "int4": {**MODEL_ALONE, "draft_weights": "int4"},
    "int4 and copies": {"draft_weights": "int4"},
    "window": {**MODEL_ALONE, **WINDOW},
    "int4, window": {**MODEL_ALONE, "draft_weights": "int4", **WINDOW},
    # As good as never right, on a model that was not trained to be exited there.
    "useless drafts": {**MODEL_ALONE, "exit_layer": 1},
}
SKIP_SET, SKIP_SET_INT4 = "skip set", "skip set in int4"
EXIT_LAYER, EXIT_LAYER_INT4 = "exit layer", "exit layer in int4, and copies"
NAMES = (
    *(N_GRAMS, SUFFIXES, DRAFT_MODEL, *OURS),
    *(SKIP_SET, SKIP_SET_INT4, EXIT_LAYER, EXIT_LAYER_INT4),
)
# Left out unless asked for: of the rest, on a small model, a machine has room for all.
NOT_USUAL = ("int8", "window", "int4, window", "useless drafts")
USUAL = tuple(name for name in NAMES if name not in NOT_USUAL)
# Requests of all tasks in turn, as a server gets them: what no task alone shows is that
# one of them pays for what another costs.
MIXED = "mixed"
LIMITS = {"top_k": "top-k", "top_p": "top-p"}
# What an engine takes, counted on models of 0.5 B and 1.5 B: so much, and the bytes of
# its weights so often (packed beside the file that they are read from).
ENGINE_BYTES, WEIGHTS_HELD = 1.5e9, 1.5
console = Console(stderr=True)


def methods(
    names: Sequence[str],
    draft_model: str | None,
    profile: str | None,
    int4_profile: str | None = None,
    exit_layer: str | None = None,
) -> Iterator[Method]:
    """Plain vLLM and the others of these names, in the order they are started; those
    that need what is not there are left out."""
    found = {N_GRAMS: Method(N_GRAMS, "ngram", {**NGRAM, "num_speculative_tokens": 5})}
    if importlib.util.find_spec("arctic_inference") is not None:
        found[SUFFIXES] = Method(SUFFIXES, "suffix", SUFFIX)
    if draft_model is not None:
        keys = {"method": "draft_model", "model": draft_model}
        keys |= {"num_speculative_tokens": 4}
        found[DRAFT_MODEL] = Method(DRAFT_MODEL, "draft_model", keys)
    ours = dict(OURS)
    if profile is not None:
        ours[SKIP_SET] = {**MODEL_ALONE, "skip_layers": profile}
    if int4_profile is not None:
        ours[SKIP_SET_INT4] = {**MODEL_ALONE, "skip_layers": int4_profile}
    if exit_layer is not None:
        trained = {"trained_exit_layer": exit_layer}
        ours[EXIT_LAYER] = {**MODEL_ALONE, **trained}
        ours[EXIT_LAYER_INT4] = {**trained, "draft_weights": "int4"}
    found |= {n: Method(n, METHOD, {"method": METHOD, **k}) for n, k in ours.items()}
    yield Method(PLAIN, "plain")
    yield from (found[name] for name in names if name in found)


def main(
    model: Annotated[
        str, typer.Argument(help="Checkpoint directory, or demo or plain.")
    ],
    output: Annotated[Path, typer.Option("-o", help="The JSON, cell by cell.")],
    task: Annotated[
        list[str],
        typer.Option(help="What is asked; mixed for all four in turn."),
    ] = [*SHIPPED],  # noqa: B006
    concurrency: Annotated[str, typer.Option(help="Requests at a time.")] = "1",
    temperature: Annotated[str, typer.Option(help="Of all requests.")] = "0",
    method: Annotated[list[str], typer.Option(help="Some of them.")] = [*USUAL],  # noqa: B006
    draft_model: Annotated[
        str | None, typer.Option(help="A small model of the same family.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="A skip set that `tune` found.")
    ] = None,
    int4_profile: Annotated[
        str | None, typer.Option(help="What `tune --memory 30%` found.")
    ] = None,
    exit_layer: Annotated[
        str | None, typer.Option(help="One that `train-exit` trained.")
    ] = None,
    context: Annotated[
        str,
        typer.Option(
            help="Tokens of a document, for the tasks question, summary, continuation."
        ),
    ] = "0",
    samples: Annotated[int, typer.Option(min=2, help="Of a cell: ratios.")] = 6,
    max_tokens: Annotated[int, typer.Option(help="Of a request.")] = 64,
    top_k: Annotated[
        int, typer.Option(help="Of requests that are drawn; 0 for all tokens.")
    ] = 0,
    top_p: Annotated[float, typer.Option(help="Of requests that are drawn.")] = 1.0,
    ends: Annotated[
        bool,
        typer.Option("--ends", help="Requests end where the model ends them."),
    ] = False,
    eager: Annotated[bool, typer.Option(help="Nothing is compiled.")] = False,
) -> None:
    """Prints a line a cell, and keeps all of them."""
    prepare_environment()
    model = str(find_model(model, None, console))
    limits = {"top_k": top_k} if top_k else {}
    limits |= {"top_p": top_p} if top_p < 1 else {}
    wanted: list[dict[str, Any]] = [
        {"task": name, "concurrency": streams, "temperature": degrees}
        | ({"context": length} if length else {})
        | ({"ends": max_tokens} if ends else {})
        | (limits if degrees else {})
        for degrees, length, streams, name in itertools.product(
            map(float, temperature.split(",")),
            map(int, context.split(",")),
            map(int, concurrency.split(",")),
            task,
        )
    ]
    plain, *others = methods(method, draft_model, profile, int4_profile, exit_layer)
    same = {"model": Path(model).name, "eager": eager}
    # How long requests are that run to their own ends their cells say themselves.
    same |= {} if ends else {"max_tokens": max_tokens}
    saved = _saved(output, same)
    cells: list[dict[str, Any]] = saved["cells"]
    others = [o for o in others if any(_lacks(cells, key, o.name) for key in wanted)]
    if not others:
        console.print(f"{output} has all of these cells already.")
        return
    most = _most_beside_plain(model)
    if len(others) > most:
        for first in range(0, len(others), most):
            names = [one.name for one in others[first : first + most]]
            console.print(f"There is room for {most} methods: {', '.join(names)}")
            subprocess.run(_again_with(names), check=True)
        return
    chosen = [plain, *others]
    engines = []
    longest = max(key.get("context", 0) for key in wanted)
    settings = settings_of(model, eager, longest)
    for number, one in enumerate(chosen, 1):
        console.print(f"Engine {number} of {len(chosen)}: {one.name}")
        engines.append(VllmEngine(one, model, settings))
    document = {
        **provenance(_command(model, draft_model, eager)),
        "max_tokens": saved.get("max_tokens", max_tokens),
        **same,
        "extra_bytes": saved["extra_bytes"]
        | {one.name: _extra_bytes(one, model) for one in chosen},
        "byte_costs": saved["byte_costs"]
        | {one.name: _byte_cost(one, model) for one in chosen},
    }
    missing = [k for k in wanted if any(_lacks(cells, k, one.name) for one in others)]
    for number, key in enumerate(missing, 1):
        drawn = {name: key[name] for name in LIMITS if name in key}
        ends = "ends" in key
        sampling = Sampling(key["temperature"], max_tokens, ends=ends, **drawn)
        turns = _turns(key, samples, engines[0].tokenizer, _is_ours(model))
        how = key["concurrency"], sampling, len(turns) - samples
        found = _measured(engines, turns, *how, is_long="context" in key)
        _keep(cells, key, found)
        whole_file.write_json({**document, "cells": cells}, output)
        console.print(f"{number} of {len(missing)}: {json.dumps(key | found)}")


def _most_beside_plain(model: str) -> int:
    """All engines are there at once; the system ends a process that takes too much."""
    held = ModelWeights.from_checkpoint(Path(model)).streamed
    of_each = ENGINE_BYTES + WEIGHTS_HELD * held
    free = psutil.virtual_memory().available
    most = int(free / of_each) - 1
    if most < 1:
        raise typer.BadParameter(
            "two engines must be there at once, which take about "
            f"{decimal(int(2 * of_each))} with {Path(model).name}, but {decimal(free)} "
            "are free: end what takes memory, or measure a smaller model"
        )
    return most


def _again_with(names: Sequence[str]) -> list[str]:
    """This command, of these methods alone."""
    words, kept = iter(sys.argv), []
    for word in words:
        if word == "--method":
            next(words)
        elif not word.startswith("--method="):
            kept.append(word)
    return [sys.executable, *kept, *(f"--method={name}" for name in names)]


def _saved(output: Path, same: dict[str, Any]) -> dict[str, Any]:
    """What former commands have measured, which must be of the same."""
    nothing: dict[str, Any] = {"cells": [], "extra_bytes": {}, "byte_costs": {}}
    if not output.exists():
        return nothing
    found = json.loads(output.read_text())
    for key, value in same.items():
        if found.get(key) != value:
            raise typer.BadParameter(
                "the cells of a file are of one model, run in one way, but those of "
                f"{str(output)!r} have {key} {found.get(key)!r} in place of "
                f"{value!r}: name another file"
            )
    return {**nothing, **found}


def _keep(
    cells: list[dict[str, Any]], key: dict[str, Any], found: dict[str, Any]
) -> None:
    """Adds what was measured of a cell to what is known of it; plain vLLM beside itself
    stays that of the first group."""
    for cell in cells:
        if _is_of(cell, key):
            cell.update({**found, **cell})
            return
    cells.append(key | found)


def _lacks(cells: Sequence[dict[str, Any]], key: dict[str, Any], method: str) -> bool:
    return not any(_is_of(cell, key) and method in cell for cell in cells)


def _is_of(cell: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(cell.get(n) == key.get(n) for n in ("context", "ends", *LIMITS, *key))


def _command(model: str, draft_model: str | None, eager: bool) -> str:
    """Without what only says which cells: several commands may have made them."""
    words = ["python benchmarks/real.py", Path(model).name]
    words += [f"--draft-model {Path(draft_model).name}"] if draft_model else []
    words += ["--eager"] * eager
    return " ".join(words)


def _extra_bytes(method: Method, model: str) -> int:
    """Weights that are kept beside the target's."""
    keys = method.speculative_config or {}
    if keys.get("method") == "draft_model":
        return int(ModelWeights.from_checkpoint(Path(keys["model"])).streamed)
    plan = _plan_of(method, model)
    if plan is None:
        return 0
    return plan.extra_bytes(ModelWeights.from_checkpoint(Path(model)).step)


def _byte_cost(method: Method, model: str) -> float:
    """c, if only what a draft step reads took time; 0 where no model drafts."""
    keys, target = method.speculative_config or {}, Path(model)
    whole = ModelWeights.from_checkpoint(target)
    if keys.get("method") == "draft_model":
        draft = ModelWeights.from_checkpoint(Path(keys["model"]))
        return round(draft.streamed / whole.streamed, 3)
    plan = _plan_of(method, model)
    return 0.0 if plan is None else round(plan.share(whole.step), 3)


def _plan_of(method: Method, model: str) -> DraftPlan | None:
    """What the target drafts by; None where it does not, or finds that out itself."""
    keys = dict(method.speculative_config or {})
    if keys.pop("method", None) != METHOD or not keys:
        return None
    if keys.get("draft_source") == "context":
        return None
    target = TargetModel.read(Path(model), model)
    return resolve_plan(SelfSpecConfig.parse(keys), target).plan


def settings_of(model: str, eager: bool, context: int = 0) -> dict[str, Any]:
    """The same for every engine; `context` is that of the longest prompts."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    return {
        "dtype": "bfloat16",
        "enforce_eager": eager,
        "max_model_len": min(4096 + context, config.max_position_embeddings),
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": (512 << 20) + context * (40 << 10),
        # Requests of one sample read the same long document, once.
        "enable_prefix_caching": context > 0,
        "disable_log_stats": False,
    }


def _is_ours(model: str) -> bool:
    """Whether it was trained on a part of what prompts are made of."""
    return Path(model).name.startswith(tuple(OWN_MODELS.values()))


def _turns(
    key: dict[str, Any], samples: int, tokenizer: Any, held_out: bool = False
) -> list[list[Prompt]]:
    """The prompts of each sample, one more that is not measured first where no document
    has to be read: one, or two for each of several streams, as in `bench`. With one
    each, the time of a sample would be that of the slowest request, which others that
    end sooner do not shorten. A sample of mixed tasks has as many of each. Nothing is
    asked twice, in any cell of short prompts: suffix decoding remembers answers."""
    streams, task = key["concurrency"], key["task"]
    if "context" in key:
        texts = itertools.islice(documents_of(key["context"], tokenizer), samples)
        return [_long_prompts(task, text, streams) for text in texts]
    tasks = SHIPPED if task == MIXED else (task,)
    of_each = -(-(2 * streams if streams > 1 else 1) // len(tasks))
    num, seed = of_each * (1 + samples), f"{task} {streams} {key['temperature']}"
    by_task = [prompts_of(one, num, seed, held_out) for one in tasks]
    in_turn = itertools.chain.from_iterable(zip(*by_task, strict=True))
    size = of_each * len(tasks)
    return [[*itertools.islice(in_turn, size)] for _ in range(1 + samples)]


def prompts_of(
    task: str, num: int, seed: str, held_out: bool = False
) -> Iterator[Prompt]:
    """Made as the shipped ones are, of texts that our own models were trained on or of
    those `held_out` from them: to a real model both are alike, and they are more."""
    make = {one.__name__: one for one in make_tasks.TASKS}[task]
    for row in make(_sources(held_out), random.Random(seed), num):
        yield Prompt(row["id"], row.get("messages") or row["prompt"])


@cache
def _sources(held_out: bool) -> dict[str, str]:
    return make_tasks.sources_of(held_out)


def _long_prompts(task: str, document: str, num: int) -> list[Prompt]:
    """Requests about one document."""
    is_chat = bool(QUESTIONS[task])
    return [
        Prompt(f"{task} {n}", [{"role": "user", "content": t}] if is_chat else t)
        for n, t in enumerate(asked(task, document, num))
    ]


@dataclass
class Found:
    """Of one method in a cell."""

    ratios: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)  # of all the time of a sample
    bounds: list[float] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def add(self, run: Run, plain: Run, is_long: bool = False) -> None:
        """One sample. Where prompts are long their forwards are most of the time: no
        bound of what follows them, and none where another has just read the same."""
        seconds_of = _decode_seconds if is_long else attrgetter("steady")
        self.runs.append(run)
        self.ratios.append(seconds_of(plain) / seconds_of(run))
        if is_long:
            return
        self.whole.append(plain.seconds / run.seconds)
        if run.steady_forwards and plain.steady_forwards:
            self.bounds.append(plain.steady_forwards / run.steady_forwards)

    def summary(self) -> dict[str, Any]:
        """As it is saved."""
        counts = [run.counts for run in self.runs]
        drafts = sum(one.drafts for one in counts)
        drafted = sum(one.draft_tokens for one in counts)
        accepted = sum(one.accepted_tokens for one in counts)
        depths = itertools.zip_longest(*(c.accepted_at for c in counts), fillvalue=0)
        return {
            "speed_up": round(median(self.ratios), 3),
            "quartiles": [round(q, 3) for q in _quartiles(self.ratios)],
            "samples": len(self.ratios),
            "speed_up_whole": round(median(self.whole), 3) if self.whole else None,
            "bound": round(median(self.bounds), 3) if self.bounds else None,
            "drafts, drafted, accepted": [drafts, drafted, accepted],
            "accepted_at": [round(sum(d) / drafts, 3) for d in depths if drafts][:8],
            "num_forwards": self._num_forwards(),
            "forward_ms": self._forward_ms(),
        }

    def _num_forwards(self) -> dict[str, int]:
        """By role."""
        found: Counter[str] = Counter()
        for (role, _), seconds in self._forwards().items():
            found[role] += len(seconds)
        return dict(found)

    def _forward_ms(self) -> dict[str, float]:
        """Median times of single forwards of few rows, by role and rows."""
        return {
            f"{role} {rows}": round(1e3 * median(seconds), 2)
            for (role, rows), seconds in sorted(self._forwards().items())
            if rows <= 32 and len(seconds) >= 5
        }

    def _forwards(self) -> Forwards:
        """Of all runs."""
        times: Forwards = {}
        for run in self.runs:
            for key, seconds in run.forwards.items():
                times.setdefault(key, []).extend(seconds)
        return times


def _quartiles(ratios: Sequence[float]) -> list[float]:
    """The first and the third; of less than four samples the least and the greatest,
    beyond which `quantiles` would go."""
    if len(ratios) < 4:
        return [min(ratios), max(ratios)]
    return quantiles(ratios, n=4)[::2]


def _decode_seconds(run: Run) -> float:
    """From first tokens to last ones, added up over the requests: the prefill of a long
    prompt takes longer than all that follows it here."""
    return sum(request.latency - request.first_token for request in run.requests)


def _measured(
    engines: Sequence[VllmEngine],
    turns: Sequence[Sequence[Any]],
    streams: int,
    sampling: Sampling,
    first_measured: int,
    is_long: bool,
) -> dict[str, Any]:
    """What was found, by method."""
    named = {engine.method.name: engine for engine in engines}
    named[AGAIN] = engines[0]
    found = {name: Found() for name in named}
    for turn, prompts in enumerate(turns):
        texts = [prompt.render(engines[0].tokenizer) for prompt in prompts]
        runs = run_by_turns(named, texts, streams, sampling, turn)
        if turn < first_measured:
            continue
        for name, run in runs.items():
            found[name].add(run, runs[PLAIN], is_long)
    return {name: one.summary() for name, one in found.items()}


def markdown(*documents: dict[str, Any]) -> str:
    """For each saved run a table of medians, the bounds that were to be expected by the
    forwards, where drafts were, and quartiles; and one of what bounds are made of."""
    tables = [make(one) for one in documents for make in (_table, _factors)]
    return "\n\n".join(filter(None, tables))


def _factors(document: dict[str, Any]) -> str:
    """Of methods by which a model drafts, greedily and for one request: medians over
    the tasks."""
    rows = []
    for name in (one for one in NAMES if document.get("byte_costs", {}).get(one)):
        cells = [
            cell
            for cell in document["cells"]
            if (cell["concurrency"], cell["temperature"]) == (1, 0.0) and name in cell
        ]
        costs = [
            cell[name]["forward_ms"]["draft 1"] / cell[PLAIN]["forward_ms"]["target 1"]
            for cell in cells
            if "draft 1" in cell[name]["forward_ms"]
        ]
        if not costs:
            continue
        depths = zip(*(cell[name]["accepted_at"] for cell in cells), strict=False)
        accepted = ", ".join(f"{median(shares):.2f}" for shares in depths)
        extra = decimal(document["extra_bytes"][name])
        cost = document["byte_costs"][name]
        rows.append((name, f"{cost:.2f}", f"{median(costs):.2f}", accepted, extra))
    head = (
        "method",
        "c by bytes",
        "c",
        "accepted at depth 1, 2, ...",
        "memory",
    )
    return "\n".join(markdown_table(head, rows)) if rows else ""


def _table(document: dict[str, Any]) -> str:
    known = {name for cell in document["cells"] for name in cell}
    names = [name for name in (AGAIN, *NAMES) if name in known]
    has_context = any("context" in cell for cell in document["cells"])
    head = [*["context"] * has_context, "concurrency", "T", "task", *names]
    how = "eager" if document["eager"] else "compiled, as vLLM does by default"
    lines = [
        f"`{document['command']}`, {document['date']}: {document['hardware']}, "
        f"{document['num_cores']} cores; vLLM {document['vllm']}, bfloat16, {how}; "
        f"{document['max_tokens']} tokens a request.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---:|' * (2 + has_context)}---|{'---:|' * len(names)}",
    ]
    for cell in document["cells"]:
        row = [cell.get("context", "")] * has_context
        task = cell["task"]
        if "ends" in cell:
            task += f", to its end or {cell['ends']} tokens"
        drawn = [
            f"{word} {cell[name]:g}" for name, word in LIMITS.items() if name in cell
        ]
        drawn = ", ".join([f"{cell['temperature']:g}", *drawn])
        row += [cell["concurrency"], drawn, task]
        row += [_figure(cell[name]) if name in cell else "" for name in names]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def _figure(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    has_bound = found.get("bound") and found.get("drafts, drafted, accepted", [0])[0]
    expected = f" of {found['bound']:.2f}x" if has_bound else ""
    return f"{found['speed_up']:.2f}x{expected} ({low:.2f} to {high:.2f})"


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
