"""What a search asks of an engine's workers, by `collective_rpc`: probes, and what
forwards take.

One rule: all workers run the same forwards, in the same order; of what they find alike
the first one's is taken, and of times the longest. Workers alone import vLLM.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_selfspec.draft_length.costs import ContextCosts
from vllm_selfspec.draft_length.types import Ints
from vllm_selfspec.plan.draft_plan import DraftPlan

if TYPE_CHECKING:
    from vllm_selfspec.tuning.probe import Probe

_probes: dict[int, "Probe"] = {}  # by model runner


def num_layers(worker: Any) -> int:
    """Decoder layers of the model."""
    return int(worker.model_runner.model_config.get_total_num_hidden_layers())


def start_probe(worker: Any, num_drafts: int, texts: Sequence[Sequence[int]]) -> None:
    """Reads texts, for drafts of at most `num_drafts` tokens."""
    probe = _new_probe(worker, num_drafts)
    for text in texts:
        probe.read(text)


def start_probe_on(
    worker: Any, num_tokens: int, prompts: Sequence[Sequence[int]]
) -> list[Ints]:
    """Goes on with prompts for `num_tokens` tokens, as the target does, and reads what
    comes of it, which is returned: of as many as the KV cache has room for."""
    from vllm_selfspec.tuning.probe import ProbeError

    try:
        probe = _new_probe(worker, num_tokens)
        found = probe.continued(prompts, num_tokens)
    except ProbeError:
        return []
    num_read = 0
    with suppress(ProbeError):
        for text in found:
            probe.read(text)
            num_read += 1
    return found[:num_read]


def _new_probe(worker: Any, num_drafts: int) -> "Probe":
    from vllm_selfspec.tuning.probe import Probe

    found = _probes[id(worker.model_runner)] = Probe(worker, num_drafts)
    return found


def stop_probe(worker: Any) -> None:
    """Forgets the texts."""
    _probes.pop(id(worker.model_runner), None)


def num_right(
    worker: Any, numbers: Ints, positions: Ints, plan: DraftPlan, num_drafts: int
) -> Ints:
    """See `Probe.num_right`."""
    probe = _probes[id(worker.model_runner)]
    return probe.num_right(np.asarray(numbers), positions, plan, num_drafts)


def time_steps(worker: Any, num_rows: Sequence[int], repeats: int) -> list[float]:
    """Seconds of a step of so many rows, for each."""
    from vllm_selfspec.engine.measure import seconds_of

    runner = worker.model_runner
    step = partial(runner.drafter.dummy_step, runner, num_drafts=0)
    return seconds_of([partial(step, num) for num in num_rows], repeats)


def time_sublayers(
    worker: Any, num_rows: int, repeats: int, beside: DraftPlan | None = None
) -> tuple[float, float, float]:
    """See `measure_sublayers`."""
    from vllm_selfspec.engine.measure import measure_sublayers

    return measure_sublayers(worker, num_rows, repeats, beside)


def time_context(worker: Any) -> ContextCosts:
    """See `measure_context`."""
    from vllm_selfspec.engine.measure import measure_context

    return measure_context(worker)
