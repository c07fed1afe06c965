"""`measure_costs`: times a worker's forwards at start-up, for the draft lengths.

One rule: what is timed is what will run, on the live engine: the target's forward and
LM head, without and with draft steps after it, at growing numbers of rows; and, for one
request, at two lengths of context. Where steps are scheduled ahead of the device some
are run in a row, and waited for once.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_selfspec.draft_length.costs import ContextCosts
from vllm_selfspec.engine.measured_llm import drafter_of
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.served_config import num_model_tokens, plan_of

# Rows to measure; beyond, costs go on as between the last two. Costs rise in steps, as
# kernels change with the number of rows, and a draft is right at the edge of one: so
# there is a number between those that double. All workers of an engine must run the
# same forwards, so this does not depend on what was measured.
NUM_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
MAX_ROWS_GPU, MAX_ROWS_CPU = 768, 64
# One time says enough where it is long.
REPEATS, MAX_ROWS_REPEATED = 3, 16
# Of steps that are scheduled ahead of the device.
NUM_IN_A_ROW = 4
NUM_DRAFTS = 2
# Of plans, that few sublayers' cost stands out from the noise of the target's forward.
NUM_DRAFTS_PLAN = 6
MIN_SHARE, NO_SHARE = 0.01, 1e-6
# What a token adds is found between these lengths, or up to what there is room for.
SHORT_CONTEXT, LONG_CONTEXT = 16, 4096


def measure_costs(worker: Any) -> tuple[list[int], list[float], list[float]]:
    """Seconds of a verification and of a draft step, with nothing to attend to.

    Args:
        worker: vLLM's, after its KV cache was made.

    Returns:
        Numbers of rows, ascending, at least two, and the seconds of both at each.
    """
    runner = worker.model_runner
    drafter = drafter_of(runner)
    config = runner.vllm_config
    most = min(
        config.scheduler_config.max_num_batched_tokens,
        config.scheduler_config.max_num_seqs * (1 + config.num_speculative_tokens),
    )
    most = min(most, MAX_ROWS_GPU if torch.cuda.is_available() else MAX_ROWS_CPU)
    num_rows = [n for n in NUM_ROWS if n <= max(2, most)]
    drafts = _model_drafts(worker)
    verify, draft = [], []
    for n in num_rows:
        repeats = REPEATS if n <= MAX_ROWS_REPEATED else 1
        step = partial(drafter.dummy_step, runner, n)
        runs = [partial(step, 0), *[partial(step, NUM_DRAFTS)] * drafts]
        alone, *drafting = seconds_of(runs, repeats, num_in_a_row(config))
        verify.append(alone)
        # Noise must not make a draft step cost nothing; where there is none it does.
        least = MIN_SHARE if drafts else NO_SHARE
        of_drafts = (with_drafts - alone for with_drafts in drafting)
        draft.append(max(sum(of_drafts) / NUM_DRAFTS, least * alone))
    return num_rows, verify, draft


def measure_context(worker: Any) -> ContextCosts:
    """Seconds that a token of context adds; nothing where there is too little room for
    contexts that show it, or where the model keeps more than keys and values of its own
    tokens: states, or what an encoder has read, which dummy runs do not have.

    Args:
        worker: vLLM's, after its KV cache was made.
    """
    runner = worker.model_runner
    config, drafter = runner.vllm_config, drafter_of(runner)
    specs = [g.kv_cache_spec for g in runner.kv_cache_config.kv_cache_groups]
    if not all(isinstance(s, FullAttentionSpec | SlidingWindowSpec) for s in specs):
        return ContextCosts()
    block_size = min(spec.block_size for spec in specs)
    num_rows = 1 + config.num_speculative_tokens
    room = min(
        (runner.kv_cache_config.num_blocks - 1) * block_size,
        config.model_config.max_model_len - num_rows - NUM_DRAFTS,
    )
    longest = min(LONG_CONTEXT, room)
    if longest < 2 * SHORT_CONTEXT:
        return ContextCosts()
    shapes = [(1, 0), (2, 0), (num_rows, 0), *[(1, NUM_DRAFTS)] * _model_drafts(worker)]
    runs = [
        partial(drafter.dummy_step, runner, rows, drafts, context)
        for context in (SHORT_CONTEXT, longest)
        for rows, drafts in shapes
    ]
    times = seconds_of(runs, REPEATS, num_in_a_row(config))
    seconds = np.array(times).reshape(2, len(shapes))
    num_tokens = longest - SHORT_CONTEXT
    alone, two, many, *drafting = np.maximum(seconds[1] - seconds[0], 0.0)
    read = plan_of(config).tokens_read(np.array([SHORT_CONTEXT, longest]))
    num_read = max(int(read[1] - read[0]), 1)
    of_drafts = (with_drafts - alone for with_drafts in drafting)
    draft = max(sum(of_drafts), 0.0) / num_read / NUM_DRAFTS
    # Noise must not make reading earn time, nor a row more than a request.
    row = min(max(many - two, 0.0) / max(num_rows - 2, 1), alone) / num_tokens
    several = max((two - alone) / num_tokens - row, 0.0)
    return ContextCosts(alone / num_tokens - row, row, draft, several)


def _model_drafts(worker: Any) -> bool:
    """Whether there are draft steps to be timed."""
    planner = getattr(drafter_of(worker.model_runner), "planner", None)
    num = num_model_tokens(worker.model_runner.vllm_config)
    return num > 0 and (planner is None or planner.model_drafts)


def measure_sublayers(
    worker: Any,
    num_rows: int = 1,
    repeats: int = REPEATS,
    beside: DraftPlan | None = None,
) -> tuple[float, float, float]:
    """What the LM head, an attention and an MLP sublayer in a draft step take, over a
    plain step of as many rows: the least-squares fit to the times of some plans, which
    single ones are too short for.

    Args:
        worker: vLLM's, of a V1 runner, after its KV cache was made.
        num_rows: Rows of the draft step.
        repeats: Of each timing.
        beside: What such a step does beside leaving sublayers out; None for nothing.
    """
    runner = worker.model_runner
    drafter, before = runner.drafter, runner.drafter.plan
    n = before.num_layers
    base = beside or DraftPlan(n)
    skip_sets = [
        SkipSet.of(n),
        SkipSet.of(n, attention=range(n)),
        SkipSet.of(n, mlp=range(n)),
        SkipSet.early_exit(n, 1),
        SkipSet.early_exit(n, max(1, n // 4)),
        SkipSet.early_exit(n, max(1, n // 2)),
    ]
    step = partial(drafter.dummy_step, runner, num_rows)

    def drafting(skip_set: SkipSet) -> None:
        drafter.use_plan(base.with_value("skip_layers", skip_set))
        step(NUM_DRAFTS_PLAN)

    alone, *whole = seconds_of(
        [partial(step, 0), *(partial(drafting, one) for one in skip_sets)], repeats
    )
    drafter.use_plan(before)
    times = (np.array(whole) / alone - 1) / NUM_DRAFTS_PLAN
    kept = [[1, n - len(one.attention), n - len(one.mlp)] for one in skip_sets]
    found, *_ = np.linalg.lstsq(np.array(kept, float), times, rcond=None)
    # Noise must not make a part cost nothing.
    head, attention, mlp = np.maximum(found, MIN_SHARE / n)
    return float(head), float(attention), float(mlp)


def num_in_a_row(vllm_config: Any) -> int:
    """Steps that are timed as one: the host goes on where it does so in service."""
    on_device = torch.cuda.is_available()
    is_ahead = vllm_config.scheduler_config.async_scheduling
    return NUM_IN_A_ROW if on_device and is_ahead else 1


def seconds_of(
    runs: Sequence[Callable[[], Any]], repeats: int, in_a_row: int = 1
) -> list[float]:
    """Medians of `repeats` times of each, after one that is not counted.

    They take turns: a machine that is slow for a while is so for all of them, and only
    their ratios matter.

    Args:
        runs: What to time.
        repeats: Times of each.
        in_a_row: Of these, as many runs as one time is the mean of.
    """
    for run in runs:
        run()  # kernels and caches of its size
        _wait()  # what the next one writes may be read until then
    times = [[_seconds_of(run, in_a_row) for run in runs] for _ in range(repeats)]
    return [median(of_run) for of_run in zip(*times, strict=True)]


def _seconds_of(run: Callable[[], Any], in_a_row: int) -> float:
    _wait()
    started = time.perf_counter()
    for _ in range(in_a_row):
        run()
    _wait()
    return (time.perf_counter() - started) / in_a_row


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
