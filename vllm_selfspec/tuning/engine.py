"""`TuningEngine`: a vLLM engine that scores plans on texts of the target's own.

One rule: the model is the one that vLLM serves, loaded once; a plan is tried by
exchanging the draft view, never by starting another engine.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from vllm_selfspec.draft_length.types import Floats, Ints
from vllm_selfspec.skip_set import SUBLAYERS, SkipSet
from vllm_selfspec.tuning.score import Score, best_score

# CPU attention takes multiples of 32; small blocks make a row's own blocks small.
BLOCK_SIZE = 32
NUM_TIMINGS = 5


@dataclass(frozen=True)
class Text:
    """A prompt and what the target makes of it.

    Attributes:
        token_ids: Of both.
        first: Where the target's own start.
    """

    token_ids: tuple[int, ...]
    first: int

    @property
    def prompt(self) -> dict[str, Any]:
        """The prompt, as vLLM takes it."""
        return {"prompt_token_ids": list(self.token_ids[: self.first])}


class TuningEngine:
    """Texts in the KV cache, and the costs of forwards.

    Attributes:
        num_layers: Of the model.
        texts: What plans are scored on.
        verify_costs: v for 1, 2, ... draft tokens.
    """

    def __init__(
        self,
        model: str,
        prompts: Sequence[Any],
        max_tokens: int,
        num_drafts: int,
        num_streams: int = 1,
        **settings: Any,
    ) -> None:
        """Starts vLLM, lets the target go on with every prompt, and measures costs.

        Args:
            model: Checkpoint directory or Hub name.
            prompts: As vLLM takes them, texts or token ids.
            max_tokens: Generated for each, greedily.
            num_drafts: The longest draft that is scored.
            num_streams: Concurrent requests to tune for.
            settings: Of `vllm.LLM`.
        """
        from vllm import LLM

        from vllm_selfspec.tuning.probe import MAX_ROWS

        self._num_drafts, self._num_streams = num_drafts, num_streams
        self._max_tokens = max_tokens
        config = {
            "method": "selfspec",
            "skip_layers": {},
            "num_speculative_tokens": num_drafts,
            "draft_length": "fixed",
            "num_speculative_tokens_per_batch_size": [[1, MAX_ROWS, num_drafts]],
        }
        self._llm: Any = LLM(
            model,
            speculative_config=config,
            enable_prefix_caching=False,  # the probe takes blocks as it likes
            block_size=BLOCK_SIZE,
            max_num_seqs=max(MAX_ROWS, num_streams),
            **settings,
        )
        (self.num_layers,) = self._ask(_num_layers)
        self.texts = [*self._generated(prompts)]
        self._read_texts()
        self.verify_costs = self._measure_verify()
        self._cost_of = self._fit_draft_cost()

    def _ask(self, function: Any, *args: Any) -> list[Any]:
        """What every worker answers."""
        found: list[Any] = self._llm.collective_rpc(function, args=args)
        return found

    def _generated(self, prompts: Sequence[Any]) -> Iterator[Text]:
        for out in self._generate(prompts):
            prompt, answer = out.prompt_token_ids, out.outputs[0].token_ids
            yield Text((*prompt, *answer), len(prompt))

    def _generate(self, prompts: Sequence[Any]) -> list[Any]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=self._max_tokens)
        found: list[Any] = self._llm.generate(list(prompts), params, use_tqdm=False)
        return found

    def _read_texts(self) -> None:
        texts = [text.token_ids for text in self.texts]
        self._ask(_start_probe, self._num_drafts, texts)

    def right(self, skip_set: SkipSet, numbers: Sequence[int]) -> list[Ints]:
        """Right drafts at every position of some texts: see `Probe.num_right`."""
        return [
            self._ask(_num_right, number, self.texts[number].first, skip_set)[0]
            for number in numbers
        ]

    def score(self, skip_set: SkipSet, numbers: Sequence[int]) -> Score:
        """What the plan gains on some texts."""
        right = self.right(skip_set, numbers)
        return best_score(right, self.draft_cost(skip_set), self.verify_costs)

    def draft_cost(self, skip_set: SkipSet) -> float:
        """c: a draft step over a plain step."""
        return float(_kept(skip_set) @ self._cost_of)

    def measure(self, plans: Sequence[tuple[SkipSet, int]]) -> list[float]:
        """D&V's objective: tokens per second of real generation over plain vLLM's.

        Args:
            plans: What the draft leaves out, and how many tokens it drafts.
        """
        arms: list[tuple[SkipSet | None, int]] = [(None, 0), *plans]
        seconds = np.zeros(len(arms))
        for start in range(0, len(self.texts), self._num_streams):
            texts = self.texts[start : start + self._num_streams]
            prompts = [text.prompt for text in texts]
            for which, (skip_set, k) in enumerate(arms):  # in turns
                seconds[which] += self._seconds(prompts, skip_set, k)
        self._read_texts()  # the requests have written over them
        found: list[float] = (seconds[0] / seconds[1:]).tolist()
        return found

    def _seconds(
        self, prompts: Sequence[Any], skip_set: SkipSet | None, k: int
    ) -> float:
        if skip_set is not None:
            self._ask(_use_skip_set, skip_set)
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.dynamic_sd_lookup = [k] * len(scheduler.dynamic_sd_lookup)
        started = time.perf_counter()
        self._generate(prompts)
        return time.perf_counter() - started

    def _measure_verify(self) -> list[float]:
        n = self._num_streams
        alone, *seconds = (
            max(self._ask(_time_step, n * (1 + k), 0))
            for k in range(self._num_drafts + 1)
        )
        return [one / alone for one in seconds]

    def _fit_draft_cost(self) -> Floats:
        """Cost of head, attention and MLP sublayer: the least-squares fit to the times
        of a few plans, which single times are too noisy to tell apart."""
        n = self.num_layers
        plans = [
            SkipSet.of(n),
            SkipSet.of(n, attention=range(n)),
            SkipSet.of(n, mlp=range(n)),
            SkipSet.early_exit(n, max(1, n // 4)),
            SkipSet.early_exit(n, max(1, n // 2)),
        ]
        rows = self._num_streams
        plain = max(self._ask(_time_step, rows, 0))
        kept = np.array([_kept(plan) for plan in plans])
        seconds = [max(self._ask(_time_draft_step, plan, rows)) for plan in plans]
        found, *_ = np.linalg.lstsq(kept, np.array(seconds) / plain, rcond=None)
        costs: Floats = np.maximum(found, 1e-4)
        return costs


def _kept(skip_set: SkipSet) -> Floats:
    """1 for the head, and how many sublayers of each kind run."""
    skipped = [len(getattr(skip_set, sublayer)) for sublayer in SUBLAYERS]
    return np.array([1.0, *(skip_set.num_layers - n for n in skipped)])


# What follows runs in the workers, by their probe.
_probes: dict[int, Any] = {}


def _num_layers(worker: Any) -> int:
    config = worker.model_runner.model_config
    return int(config.get_total_num_hidden_layers())


def _start_probe(worker: Any, num_drafts: int, texts: Sequence[Sequence[int]]) -> None:
    from vllm_selfspec.tuning.probe import Probe

    probe = _probes[id(worker.model_runner)] = Probe(worker, num_drafts)
    for text in texts:
        probe.read(text)


def _num_right(worker: Any, number: int, first: int, skip_set: SkipSet) -> Ints:
    found: Ints = _probes[id(worker.model_runner)].num_right(number, first, skip_set)
    return found


def _use_skip_set(worker: Any, skip_set: SkipSet) -> None:
    worker.model_runner.drafter.use_skip_set(skip_set)


def _time_step(worker: Any, num_rows: int, num_drafts: int) -> float:
    """Median seconds of a step of so many rows."""
    runner, times = worker.model_runner, []
    for _ in range(NUM_TIMINGS + 1):
        started = time.perf_counter()
        runner.drafter.dummy_step(runner, num_rows, num_drafts)
        _wait()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _time_draft_step(worker: Any, skip_set: SkipSet, num_rows: int) -> float:
    """Median seconds of one draft step of so many rows."""
    runner, num = worker.model_runner, 4
    runner.drafter.use_skip_set(skip_set)
    differences = [
        (_time_step(worker, num_rows, num) - _time_step(worker, num_rows, 0)) / num
        for _ in range(2)
    ]
    return median(differences)


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
