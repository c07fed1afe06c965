"""`run_bench`: makes or finds the models, starts the engines, compares, reports.

One rule: everything compared runs in one process, on the same cores, with the same
settings.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_selfspec.bench import own_models, report
from vllm_selfspec.bench.comparison import (
    Comparison,
    Load,
    compare,
    num_turns,
    to_dict,
)
from vllm_selfspec.bench.engines import (
    Engine,
    HuggingFaceEngine,
    Sampling,
    VllmEngine,
)
from vllm_selfspec.bench.inputs import (
    MAX_MODEL_LEN,
    check_packages,
    num_asked,
    positions_for,
    tell_what_is_asked_again,
    tell_what_is_left_out,
)
from vllm_selfspec.bench.machine import prepare_environment
from vllm_selfspec.bench.methods import Method, methods_of
from vllm_selfspec.bench.own_models import OWN_MODELS, find_model
from vllm_selfspec.bench.provenance import command_line, provenance
from vllm_selfspec.bench.tasks import Task, load_all
from vllm_selfspec.plan.axis_exit_layer import by_present_names
from vllm_selfspec.plan.cost import ModelWeights
from vllm_selfspec.plan.hub import locate

KV_CACHE_BYTES = 512 << 20
SEED = 0


@dataclass(frozen=True)
class BenchOptions:
    """What the user asked for.

    Attributes:
        model: `demo`, `plain`, or a checkpoint's path or Hub name.
        draft_model: For the `draft_model` methods; None for the repository's own, where
            `model` is of the repository.
        widen: How often a model of the repository is widened; None for what suits the
            machine.
        tasks: As `tasks.load` takes them.
        loads: Concurrent requests, and prompts at each.
        temperatures: 0 for greedy.
        groups: Which methods.
        lengths: Draft lengths of the grids, the best known first.
        max_tokens: Generated a request.
        dtype: vLLM's.
        output: Directory of the report; None to print the figures alone.
        configs: Of ours, in place of the usual ones.
        is_short: Whether of ours a few plans are enough, not a grid.
    """

    model: str
    draft_model: str | None
    widen: int | None
    tasks: tuple[str, ...]
    loads: tuple[Load, ...]
    temperatures: tuple[float, ...]
    groups: tuple[str, ...]
    lengths: tuple[int, ...]
    max_tokens: int
    dtype: str
    output: Path | None
    configs: tuple[Mapping[str, Any], ...] = ()
    is_short: bool = False


def run_bench(options: BenchOptions) -> None:
    """Runs the comparison and writes `report.json`, `report.md` and `report.html`.

    Ctrl-C stops after the block that was finished last, and reports what is there;
    `report.json` is written after every block.

    Raises:
        CheckpointError: If a model cannot be found or read.
        TaskError: If a task cannot be read, or its prompts are too long.
        UnsupportedModelError: If the model cannot be drafted for.
        MissingPackageError: If scores or plots need one that is not installed.
    """
    console = Console(highlight=False)
    prepare()
    tasks = load_all(options.tasks)
    check_packages(options, tasks)
    model = find_model(options.model, options.widen, console)
    num = num_asked(options)
    asked = [replace(task, prompts=task.prompts[:num]) for task in tasks]
    max_model_len = positions_for(asked, options, model)
    draft = find_draft_model(options, console)
    methods = find_methods(options, list(options.groups), model, draft)
    tell_what_is_left_out(options, methods, console)
    tell_what_is_asked_again(options, tasks, console)
    engines = start(methods, model, options, max_model_len, console)
    samplings = [
        Sampling(t, options.max_tokens, SEED if t else None)
        for t in options.temperatures
    ]
    started = time.monotonic()

    def document(comparison: Comparison) -> dict[str, Any]:
        num_blocks = len(tasks) * len(samplings) * len(options.loads)
        return {
            **conditions(options, model),
            "seconds": round(time.monotonic() - started),
            "is_complete": len(comparison.blocks) == num_blocks,
            "methods": [describe(method) for method in methods],
            "costs": measured_costs(comparison, options.loads),
            "steps": comparison.times_of_a_token(),
            "results": [to_dict(result) for result in comparison.results()],
        }

    def save(comparison: Comparison) -> None:
        if options.output is not None:
            report.write_json(document(comparison), options.output)

    comparison = _compare(engines, tasks, options.loads, samplings, console, save)
    found = document(comparison)
    if not found["is_complete"]:
        console.print("Stopped; this is what was finished.")
    report.show(found, console)
    if options.output is not None:
        report.write(found, options.output, console)


def prepare() -> None:
    """The environment that all methods run in."""
    prepare_environment()
    # Other plugins may patch vLLM (arctic-inference does), and so change the peers.
    os.environ.setdefault("VLLM_PLUGINS", "selfspec")


def find_draft_model(options: BenchOptions, console: Console) -> Path | None:
    """The draft model for vLLM's `draft_model`, if there is one."""
    if "draft_model" not in options.groups:
        return None
    if options.draft_model is not None:
        return locate(options.draft_model)
    return own_models.find_draft_model(options.model, options.widen, console)


def _for_model(
    keys: Mapping[str, Any], options: BenchOptions, model: Path
) -> Mapping[str, Any]:
    """With the exit layer of a model of our own widened as that is."""
    keys = by_present_names(keys)
    directory = keys.get("trained_exit_layer")
    if directory is None or options.model not in OWN_MODELS:
        return keys
    widened = own_models.widened_exit_layer(Path(directory), options.model, model)
    return {**keys, "trained_exit_layer": str(widened)}


def find_methods(
    options: BenchOptions, groups: list[str], model: Path, draft: Path | None
) -> list[Method]:
    """What is compared, as far as it is installed.

    Raises:
        ConfigError, PlanError, ProfileError: If a configuration is
            not allowed, or does not fit the model.
    """
    configs = [_for_model(keys, options, model) for keys in options.configs]
    lengths = list(options.lengths)
    methods = methods_of(model, draft, groups, lengths, configs, options.is_short)
    return available(methods)


def available(methods: list[Method]) -> list[Method]:
    """Without the methods whose package is not installed."""
    import importlib.util

    if importlib.util.find_spec("arctic_inference") is not None:
        return methods
    return [method for method in methods if method.group != "suffix"]


def start(
    methods: Sequence[Method],
    model: Path,
    options: BenchOptions,
    max_model_len: int,
    console: Console,
) -> list[Engine]:
    """An engine for each method, in this process."""
    settings = {
        **engine_settings(options, max_model_len),
        "kv_cache_memory_bytes": _kv_cache_bytes(max_model_len),
        "gpu_memory_utilization": 0.8 / len(methods),  # checked even so
    }
    engines: list[Engine] = []
    for number, method in enumerate(methods, 1):
        console.print(f"Starting engine {number} of {len(methods)}: {method.name}")
        if method.group == "hf":
            engines.append(_hugging_face(method, model, options.dtype, engines))
        else:
            engines.append(VllmEngine(method, str(model), settings))
    return engines


def engine_settings(options: BenchOptions, max_model_len: int) -> dict[str, Any]:
    """What every method is started with, by vLLM's names."""
    from vllm.platforms import current_platform

    settings: dict[str, Any] = {
        "dtype": options.dtype,
        "max_num_seqs": max(load.num_streams for load in options.loads),
        "max_model_len": max_model_len,
        "enable_prefix_caching": False,  # a prompt is run by each method, all of it
        "seed": SEED,
    }
    if current_platform.is_cpu():
        cache = _kv_cache_bytes(max_model_len)
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": cache}
    return settings


def _kv_cache_bytes(max_model_len: int) -> int:
    """More where requests are longer than usual."""
    return KV_CACHE_BYTES * -(-max_model_len // MAX_MODEL_LEN)


def _hugging_face(
    method: Method, model: Path, dtype: str, engines: Sequence[Engine]
) -> HuggingFaceEngine:
    """The methods of Hugging Face share one model."""
    for engine in engines:
        if isinstance(engine, HuggingFaceEngine):
            return engine.with_method(method)
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()  # it warns of its own defaults
    logging.disable_progress_bar()
    target: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return HuggingFaceEngine(method, target.eval(), tokenizer)


def progress_bar(console: Console) -> Progress:
    """How far it is, how long it will take, and what is being done."""
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, transient=True)


def _compare(
    engines: list[Engine],
    tasks: list[Task],
    loads: Sequence[Load],
    samplings: list[Sampling],
    console: Console,
    save: Callable[[Comparison], None],
) -> Comparison:
    tokenizer = engines[0].tokenizer
    with progress_bar(console) as progress:
        total = num_turns(engines, tasks, loads, samplings)
        bar = progress.add_task("", total=total, completed=-1)

        def advance(what: str) -> None:
            progress.update(bar, advance=1, description=what)
            if not console.is_terminal and what.endswith(f": {engines[0].method.name}"):
                done = int(progress.tasks[0].completed)
                console.print(f"{done} of {total}: {what}")  # a log has no bar

        return compare(
            engines,
            tasks,
            loads,
            samplings,
            lambda prompt: prompt.render(tokenizer),
            advance,
            save,
        )


def conditions(options: BenchOptions, model: Path) -> dict[str, Any]:
    """What is needed to measure it again."""
    return {
        **provenance(command_line()),
        "model": options.model,
        "model_bytes_per_step": ModelWeights.from_checkpoint(model).streamed,
        "dtype": options.dtype,
        "max_tokens": options.max_tokens,
        "loads": [asdict(load) for load in options.loads],
    }


def describe(method: Method) -> dict[str, Any]:
    """A method for JSON."""
    config = dict(method.speculative_config or {})
    for key in {"model", "trained_exit_layer"} & {*config}:
        config[key] = Path(config[key]).name  # where it lies is nobody's business
    return {
        "name": method.name,
        "group": method.group,
        "k": method.k,
        "extra_bytes": method.extra_bytes,
        "speculative_config": config or None,
        "generate": method.generate,
    }


def measured_costs(
    comparison: Comparison, loads: Sequence[Load]
) -> list[dict[str, Any]]:
    """Measured seconds, v and c, by load and method."""
    found = []
    for one in loads:
        costs = comparison.costs(one.num_streams)
        if costs is None:
            continue
        for method in comparison.methods[1:]:
            v, c = costs.v(method), costs.c(method)
            if v is not None and method.has_one_length:
                found.append(
                    {
                        "num_streams": one.num_streams,
                        "method": method.name,
                        "plain_seconds": costs.plain,
                        "v": v,
                        "c": c,
                    }
                )
    return found
