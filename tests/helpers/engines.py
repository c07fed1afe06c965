"""`Engines`: vLLM engines that are started once, and what tests ask of them.

Engines run inside the test process (vLLM's own switch), so that one starts in a
fraction of a second. None is ever shut down: vLLM's shutdown tears down state that all
engines of a process share.
"""

import itertools
from typing import Any

import pytest

from helpers.models import VOCAB_SIZE
from vllm_selfspec.engine.spec_counters import Counts, SpecCounters

KV_CACHE_BYTES = 16 << 20
# Of a tiny model, whose text is to be compared to the token.
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": KV_CACHE_BYTES,
    "disable_log_stats": False,
}


class Engines:
    """vLLM engines by configuration, each started when first asked for.

    Attributes:
        others: Started elsewhere, to be kept with these.
    """

    def __init__(self) -> None:
        self.others: list[Any] = []
        self._engines: dict[str, Any] = {}

    def get(self, model: str, spec: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """The `vllm.LLM` of this configuration. `spec` is the speculative config.

        Unless it says otherwise the draft length is fixed, because on tiny models
        nothing is worth drafting; drafts are greedy, as most tests are; and the model
        alone drafts, because most tests are of that.
        """
        from vllm import LLM

        settings = {**SETTINGS, "seed": 0, **kwargs}
        key = repr((model, spec, sorted(settings.items(), key=str)))
        if key not in self._engines:
            config = None
            if spec is not None:
                config = {
                    "method": "selfspec",
                    "draft_length": "fixed",
                    "draft_source": "model",
                    "draft_sample_method": "greedy",
                    **spec,
                }
            llm = LLM(model, speculative_config=config, **settings)
            self._engines[key] = llm
            _counters[id(llm)] = SpecCounters()
        return self._engines[key]

    def end_workers(self) -> None:
        """Ends the processes of engines that have workers of their own, half a gigabyte
        each; whoever asks for such an engine again gets a new one."""
        for key, llm in [*self._engines.items()]:
            if _has_workers(llm):
                self.others.append(self._engines.pop(key))
        for llm in self.others:
            if _has_workers(llm):
                llm.llm_engine.engine_core.engine_core.model_executor.shutdown()

    def leave(self) -> None:
        """To the end of the process, but for those with workers of their own. An engine
        that shuts down collects garbage some times over, which takes minutes with
        dozens."""
        for llm in [*self._engines.values(), *self.others]:
            core = llm.llm_engine.engine_core
            if _has_workers(llm):
                core.shutdown()
            else:
                core._finalizer.detach()


def _has_workers(llm: Any) -> bool:
    return bool(llm.llm_engine.vllm_config.parallel_config.world_size > 1)


_counters: dict[int, SpecCounters] = {}


def counter(llm: Any, name: str) -> int:
    """Value of one of vLLM's own counters, such as `vllm:num_preemptions`."""
    return _counters[id(llm)].total(name)


def run(
    llm: Any, prompts: list[Any], params: Any, **kwargs: Any
) -> tuple[list[Any], Counts]:
    """Generates; returns vLLM's outputs and what speculation did meanwhile."""
    read = _counters[id(llm)].read
    before = read()
    outputs = llm.generate(prompts, params, use_tqdm=False, **kwargs)
    return outputs, read() - before


def scheduler_of(llm: Any) -> Any:
    """The engine's scheduler, in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def with_costs(llm: Any, costs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans by costs that a step's real time does not change: a tiny model's are no
    model's."""
    from vllm_selfspec.draft_length.costs import StepCosts

    scheduler = scheduler_of(llm)
    planner = planner_of(llm)
    if planner is getattr(scheduler, "planner", None):
        planner.goodput = scheduler.goodput_by(StepCosts(*costs))
    else:
        planner.use_costs(StepCosts(*costs))
    monkeypatch.setattr(StepCosts, "observe", lambda *_, **__: None)


def source_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the model and copies draft by turns where steps run ahead of the device,
    whatever they are worth."""
    from vllm_selfspec.draft_length.batch_goodput import BatchGoodput

    both, found, turns = BatchGoodput._sources, BatchGoodput._found, itertools.count()
    turn = 0

    def in_turn(goodput: BatchGoodput, *args: Any) -> Any:
        nonlocal turn
        turn = next(turns)
        return found(goodput, *args)

    def one(goodput: BatchGoodput) -> Any:
        sources = both(goodput)
        return sources[turn % len(sources) :][:1]

    monkeypatch.setattr(BatchGoodput, "_found", in_turn)
    monkeypatch.setattr(BatchGoodput, "_sources", one)


def planner_of(llm: Any) -> Any:
    """What plans draft lengths: the scheduler's where it runs ahead of the device, and
    otherwise the worker's."""
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    return getattr(scheduler_of(llm), "planner", None) or drafter_of(runner).planner


def drafter_of(runner: Any) -> Any:
    """Our part of vLLM's model runner, V1 or V2; None in a plain engine."""
    return getattr(runner, "speculator", None) or getattr(runner, "drafter", None)


def greedy(max_tokens: int) -> Any:
    """vLLM's `SamplingParams` of a request that generates so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def token_ids(outputs: list[Any]) -> list[list[list[int]]]:
    """Token ids by request and sample."""
    return [[list(sample.token_ids) for sample in out.outputs] for out in outputs]


def prompts_of(num: int, seed: int = 0, shortest: int = 3) -> list[dict[str, Any]]:
    """Random prompts of different lengths."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = [shortest + 7 * i for i in range(num)]
    return [
        {"prompt_token_ids": rng.integers(2, VOCAB_SIZE, size=n).tolist()}
        for n in lengths
    ]
