"""`MeasuredLLM`: a `vllm.LLM` in this process, and what its requests took.

One rule: nothing of vLLM is changed. Time is taken from outside, and what speculation
did is read from vLLM's own counters.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm_selfspec.engine.spec_counters import Counts, SpecCounters


@dataclass(frozen=True)
class Batch:
    """Requests that ran together.

    Attributes:
        outputs: vLLM's `RequestOutput` of each, in the order of the prompts.
        seconds: From the call to the last token.
        counts: What speculation did.
    """

    outputs: list[Any]
    seconds: float
    counts: Counts

    @property
    def token_ids(self) -> list[list[int]]:
        """What each request generated."""
        return [list(out.outputs[0].token_ids) for out in self.outputs]

    @property
    def num_tokens(self) -> int:
        """Of all requests."""
        return sum(map(len, self.token_ids))


class MeasuredLLM:
    """A `vllm.LLM` in this process.

    Attributes:
        llm: The engine.
        start_up: Seconds that it took to start.
    """

    def __init__(
        self, model: str, speculative_config: Any = None, **settings: Any
    ) -> None:
        """Starts vLLM, by default with counters and without caching prefixes: prompts
        repeat in whatever is measured, and each run is to do all of it.

        Args:
            model: Checkpoint directory or Hub name.
            speculative_config: vLLM's; None for plain vLLM.
            settings: Of `vllm.LLM`.
        """
        from vllm import LLM

        usual = {
            "disable_log_stats": False,  # the counters
            "enable_prefix_caching": False,
            "use_tqdm_on_load": False,
        }
        started = time.perf_counter()
        with _hidden("llvmlite.binding.ffi"):
            self.llm: Any = LLM(
                model, speculative_config=speculative_config, **usual | settings
            )
        self.start_up = time.perf_counter() - started
        self._counters = SpecCounters()

    @property
    def tokenizer(self) -> Any:
        """vLLM's."""
        return self.llm.get_tokenizer()

    @property
    def vllm_config(self) -> Any:
        """What it was started with."""
        return self.llm.llm_engine.vllm_config

    @property
    def runner(self) -> Any:
        """The model runner of its only worker."""
        return self.ask(_runner_of)[0]

    def ask(self, function: Any, *args: Any) -> list[Any]:
        """What every worker answers."""
        found: list[Any] = self.llm.collective_rpc(function, args=args)
        return found

    def counts(self) -> Counts:
        """What speculation did since the process started."""
        return self._counters.read()

    def generate(
        self,
        prompts: Sequence[Any],
        max_tokens: int,
        temperature: float = 0,
        ignore_eos: bool = True,
        seeds: Sequence[int | None] | None = None,
        **sampling: Any,
    ) -> Batch:
        """Runs prompts as concurrent requests.

        Args:
            prompts: As vLLM takes them, texts or token ids.
            max_tokens: Generated for each.
            temperature: 0 is greedy.
            ignore_eos: Whether each generates all of `max_tokens`.
            seeds: One a request.
            sampling: The rest of vLLM's `SamplingParams`.
        """
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=temperature,
                max_tokens=max_tokens,
                ignore_eos=ignore_eos,
                seed=seed,
                **sampling,
            )
            for seed in seeds or [None] * len(prompts)
        ]
        before, started = self.counts(), time.perf_counter()
        outputs = self.llm.generate(list(prompts), params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return Batch(outputs, seconds, self.counts() - before)


def drafter_of(runner: Any) -> Any:
    """What drafts in a model runner: V2's speculator, V1's drafter; None where nothing
    does."""
    return getattr(runner, "speculator", None) or getattr(runner, "drafter", None)


def _runner_of(worker: Any) -> Any:
    return worker.model_runner


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Takes a module out of `sys.modules` for a while.

    vLLM's CPU platform looks through every imported module when a worker starts, and
    fails on an object of llvmlite's, which an engine with n-grams has imported: a
    second engine in the process would not start (`triton_utils/dispatcher.py`, 0.32).
    """
    found = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if found is not None:
            sys.modules[module] = found
