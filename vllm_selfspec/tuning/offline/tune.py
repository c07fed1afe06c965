"""`run_tune`: finds a plan for a model, measures the last candidates, and saves it.

One rule: what is saved says how it was found, so that anybody can find it again.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_selfspec import whole_file
from vllm_selfspec.bench.own_models import find_model
from vllm_selfspec.bench.provenance import provenance
from vllm_selfspec.bench.run import prepare
from vllm_selfspec.bench.tasks import load, token_ids
from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.packages import raise_if_lacking
from vllm_selfspec.plan.cost import ModelWeights, decimal
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel, weights_fingerprint
from vllm_selfspec.tuning.offline import report
from vllm_selfspec.tuning.offline.engines import Engines, LocalEngine, RayEngines
from vllm_selfspec.tuning.offline.search import Found, Search
from vllm_selfspec.tuning.offline.tuning_engine import Known
from vllm_selfspec.tuning.score import Score

KV_CACHE_BYTES = 1 << 30
NUM_MEASURED = 3  # candidates that generate for real in the end


class TuneError(RuntimeError):
    """A search that cannot be made or trusted, or that found nothing."""


@dataclass(frozen=True)
class TuneOptions:
    """What the user asked for.

    Attributes:
        model: As for `bench`.
        widen: As for `bench`.
        task: As `tasks.load` takes it.
        num_prompts: Of the task, drawn with `seed`.
        max_prompt_tokens: The last so many of a prompt are read.
        max_tokens: Generated for each prompt.
        budget_s: Seconds to search for.
        num_streams: Concurrent requests to tune for.
        max_drafts: The longest draft.
        memory: What a plan may keep beside the target, as `draft_memory` has it.
        objective: `predicted`, or `measured`: real generation of every plan.
        ray: Ray workers with an engine each; 0 for one engine in this process.
        tensor_parallel_size: vLLM's.
        dtype: vLLM's.
        seed: Of the search, and of the choice of prompts.
        output: The profile; the study and the plots lie beside it.
        command: How to do it again.
    """

    model: str
    widen: int | None
    task: str
    num_prompts: int
    max_prompt_tokens: int
    max_tokens: int
    budget_s: float
    num_streams: int
    max_drafts: int
    memory: int | str
    objective: str
    ray: int
    tensor_parallel_size: int
    dtype: str
    seed: int
    output: Path
    command: str


def run_tune(options: TuneOptions) -> None:
    """Searches, and writes the profile, its plots and the study.

    Ctrl-C ends the search early; the best so far is measured and saved.

    Raises:
        CheckpointError: If the model cannot be found or read.
        TaskError: If the prompts cannot be read.
        UnsupportedModelError: If the model cannot be drafted for.
        MissingPackageError: If a package is missing.
        TuneError: If the engine does not draft as the target says where nothing is
            skipped, or if nothing was found.
    """
    packages = ("matplotlib", "optuna", *["ray"] * bool(options.ray))
    raise_if_lacking("tune", packages, "tune")
    console = Console(highlight=False)
    prepare()
    # The probe is a part of the V1 runner's worker, with the engine in this process.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    whole_file.make_directory(options.output.parent)
    model = find_model(options.model, options.widen, console)
    task = load(options.task).sample(options.num_prompts, options.seed)
    prompts = token_ids(task.prompts, model, options.max_prompt_tokens)
    step = ModelWeights.from_checkpoint(model).step
    lengths = [len(prompt["prompt_token_ids"]) for prompt in prompts]
    start = _first_plan(options, step).for_contexts(int(np.median(lengths)))
    if start.values:
        size = decimal(start.extra_bytes(step))
        console.print(f"Every plan may draft with: {start}, {size} beside the target.")
    console.print(f"Starting vLLM, and {len(prompts)} texts of {options.task} ...")
    engines = _start(options, start, model, prompts)
    every = range(len(engines.known.texts))
    _check(engines, every)

    def measure(plans: Sequence[DraftPlan], numbers: Sequence[int]) -> list[Score]:
        return engines.measure([(plan, options.max_drafts) for plan in plans], numbers)

    search = Search(
        start,
        measure if options.objective == "measured" else engines.score,
        len(every),
        options.output.with_suffix(".study.db"),
        _study_name(options, model, engines.known),
        num_at_once=engines.num,
        seed=options.seed,
    )
    _search(search, options.budget_s, console)
    found = search.found()
    if not found:
        raise TuneError(
            "a search must score one plan at least, but the budget was over before: "
            "raise --budget"
        )
    measured = _measured(engines, found, every, console)
    ranked = sorted(measured, key=lambda pair: -pair[1].speed_up)
    best, score = ranked[0] if ranked else (found[0], None)
    document = _document(options, model, engines.known, best, score, search.num_tried)
    whole_file.write_json(document, options.output)
    report.write(document, found, options.output)
    report.show(document, found, measured, console)
    if start.extra_bytes(step):
        report.show_memory(found, step, console)


def _first_plan(options: TuneOptions, step: StepCost) -> DraftPlan:
    """What all others are made from: the target, with what `memory` has room for."""
    config = SelfSpecConfig.parse({"draft_memory": options.memory})
    plan = DraftPlan(step.num_layers)
    return plan.within_memory(step, config.memory_beside(step.total))


def _start(
    options: TuneOptions,
    start: DraftPlan,
    model: Path,
    prompts: Sequence[dict[str, Any]],
) -> Engines:
    from vllm.platforms import current_platform

    room = options.max_prompt_tokens + options.max_tokens + 1
    settings: dict[str, Any] = {
        "dtype": options.dtype,
        "max_model_len": room + options.max_drafts,
        "max_num_batched_tokens": max(2048, room),
        "tensor_parallel_size": options.tensor_parallel_size,
        "seed": options.seed,
        "start": start,
    }
    if current_platform.is_cpu():
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE_BYTES}
    lengths = (options.max_tokens, options.max_drafts, options.num_streams)
    if options.ray:
        return RayEngines(options.ray, str(model), prompts, *lengths, **settings)
    return LocalEngine(str(model), prompts, *lengths, **settings)


def _check(engines: Engines, numbers: Sequence[int]) -> None:
    """With nothing skipped, a draft is the target's own text."""
    right = engines.right(DraftPlan(engines.known.num_layers), numbers)
    share = float(np.mean(np.concatenate(right) > 0))
    # In low precision a row of a batch rounds otherwise than alone: near-ties flip.
    if share < 0.97:
        raise TuneError(
            "a draft that skips nothing must draft the target's own text, but only "
            f"{share:.1%} of its first tokens were: a bug, please report it"
        )


def _study_name(options: TuneOptions, model: Path, known: Known) -> str:
    """Studies can be gone on with where model, texts and objective are the same."""
    what = [options.objective, weights_fingerprint(model), texts_fingerprint(known)]
    what += [f"k{options.max_drafts}", f"streams{options.num_streams}"]
    what += [f"memory{options.memory}"] if options.memory else []
    return "-".join(what)


def _search(search: Search, budget_s: float, console: Console) -> None:
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=budget_s)

        def say(search: Search, line: str) -> None:
            best = search.found()[:1]
            text = f"{search.num_tried} plans, best {best[0].speed_up:.2f}x" * len(best)
            spent = time.monotonic() - started
            progress.update(bar, completed=spent, description=text)
            if not console.is_terminal:  # a log has no bar
                console.print(f"{spent:.0f} s: {line}")

        try:
            search.run(budget_s, say)
        except KeyboardInterrupt:
            console.print("Stopped; the best so far is kept.")


def _measured(
    engines: Engines, found: Sequence[Found], numbers: Sequence[int], console: Console
) -> list[tuple[Found, Score]]:
    """The best as they generate; nothing after Ctrl-C."""
    console.print("Measuring the best of them in the engine ...")
    finalists = _finalists(found, engines.known.num_layers)
    plans = [(one.plan, one.k) for one in finalists]
    try:
        return [*zip(finalists, engines.measure(plans, numbers), strict=True)]
    except KeyboardInterrupt:
        console.print("Stopped; the plan that is expected to be best is kept.")
        return []


def _finalists(found: Sequence[Found], num_layers: int) -> list[Found]:
    """The best, and the plan that `auto` has without a search."""
    usual = DraftPlan.skipping(SkipSet.evenly_spread(num_layers))
    chosen = list(found[:NUM_MEASURED])
    chosen += [one for one in found[NUM_MEASURED:] if one.plan == usual]
    return chosen


def _document(
    options: TuneOptions,
    model: Path,
    known: Known,
    best: Found,
    measured: Score | None,
    num_tried: int,
) -> dict[str, Any]:
    """The profile; what its keys mean is told in `profile`."""
    return {
        **best.plan.to_dict(),
        "model": options.model,
        "architecture": dict(TargetModel.read(model, options.model).architecture),
        "figures": {
            "num_speculative_tokens": best.k,
            "acceptance": [round(share, 4) for share in best.acceptance],
            "tokens_per_verification": round(best.tokens_per_verification, 4),
            "draft_cost": round(best.draft_cost, 4),
            "verify_cost": round(best.verify_cost, 4),
            "speed_up": round(best.speed_up, 4),
        }
        | ({"measured_speed_up": round(measured.speed_up, 4)} if measured else {}),
        "provenance": {
            "weights": weights_fingerprint(model),
            "objective": options.objective,
            "task": options.task,
            "texts": texts_fingerprint(known),
            "num_texts": len(known.texts),
            "num_streams": options.num_streams,
            "num_plans": num_tried,
            "seed": options.seed,
            "dtype": options.dtype,
            **provenance(options.command),
        },
    }


def texts_fingerprint(known: Known) -> str:
    """Of prompts and what the target made of them."""
    texts = json.dumps([[text.first, text.token_ids] for text in known.texts])
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def parse_budget(text: str) -> float:
    """Seconds of a time such as `90s`, `20m` or `2h`.

    Raises:
        ConfigError: If it is none.
    """
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"--budget takes a time such as 90s, 20m or 2h, but it is {text!r}: "
            "correct it"
        ) from error
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--budget must be above 0, but it is {text!r}: raise it")
    return seconds
