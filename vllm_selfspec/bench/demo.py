"""The demo: the same prompts with plain vLLM and with selfspec, side by side.

One rule: everything compared runs in one process, on the same cores, in turns, prompt
by prompt, so that a machine that drifts hits all alike; what is printed are medians of
ratios to plain vLLM, with the bound of each plan beside them.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_selfspec import whole_file
from vllm_selfspec.bench.arms import MODEL_ALONE
from vllm_selfspec.bench.demo_result import Result, print_results
from vllm_selfspec.bench.machine import prepare_environment
from vllm_selfspec.bench.own_models import find_model
from vllm_selfspec.bench.provenance import command_line, provenance
from vllm_selfspec.config import METHOD, SelfSpecConfig, resolve_plan
from vllm_selfspec.engine.spec_counters import Counts, SpecCounters
from vllm_selfspec.engine.workers import use_plan
from vllm_selfspec.plan.cost import ModelWeights, bound
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.target_model import TargetModel

# Streams at a time, and how often the prompts are run so: one stream gives a sample a
# prompt, eight give one for all of them.
ROUNDS = {1: 1, 8: 3}
KV_CACHE_BYTES = 512 << 20

PLAIN = "plain vLLM"

PROMPTS = (
    "class LRUCache:\n    def __init__(self, maxsize=128):\n        self.",
    "def read_config(path):\n    with open(path) as f:\n        for line in f:\n",
    "import unittest\n\nclass TestQueue(unittest.TestCase):\n    def test_empty(self):",
    "def parse_args(argv):\n    parser = argparse.ArgumentParser()\n    parser.add_",
    "async def connect(self, host, port):\n    try:\n        reader, writer = await ",
    "    def __repr__(self):\n        return '<%s at %#x>' % (",
    "def merge(left, right):\n    result = []\n    i = j = 0\n    while i < len(left)",
    "try:\n    import ssl\nexcept ImportError:\n    ssl = None\n\nclass HTTPServer(",
)


@dataclass(frozen=True)
class Sample:
    """One run of one or more prompts.

    Attributes:
        token_ids: What was generated, by prompt.
        seconds: From the first emitted token to the last: decoding alone.
        num_tokens: Tokens emitted in that time.
        counts: What speculation did.
    """

    token_ids: tuple[tuple[int, ...], ...]
    seconds: float
    num_tokens: int
    counts: Counts = Counts(0, 0, 0)


def run_demo(
    model: str | None,
    max_tokens: int,
    num_speculative_tokens: int,
    repeats: int = 1,
    output: Path | None = None,
) -> None:
    """Runs the comparison and prints it; see the command's help.

    Raises:
        CheckpointError: If the model cannot be found or read, or none was named and
            this is not a clone of the repository.
        UnsupportedModelError: If the model cannot be drafted for.
    """
    console = Console(highlight=False)
    prepare_environment()
    path = find_model(model or "demo", None, console)
    arms = Arms(str(path), num_speculative_tokens, max_tokens, console)
    results = compare(arms, repeats, console)
    print_results(results, console)
    if output:
        save(results, output, arms)
        console.print(f"Saved to {output}")


def fixed_plans(target: TargetModel) -> dict[str, DraftPlan]:
    """The plans the demo compares, by the words a user would write."""
    num_layers = target.num_layers
    plans = {"auto": resolve_plan(SelfSpecConfig.parse({}), target).plan}
    for part in (6, 4, 2):
        if exit_layer := num_layers // part:
            skip_set = SkipSet.early_exit(num_layers, exit_layer)
            plan = DraftPlan.skipping(skip_set)
            plans[f"exit_layer {exit_layer}"] = plan
    return plans


class Arms:
    """Two engines: plain vLLM, and one with selfspec that changes plans between runs.

    Attributes:
        weights: Of the model, for the draft's share.
        plans: The plans to compare.
    """

    def __init__(self, model: str, k: int, max_tokens: int, console: Console) -> None:
        self.model, self.k, self.max_tokens = model, k, max_tokens
        self.weights = ModelWeights.from_checkpoint(Path(model))
        self.plans = fixed_plans(TargetModel.read(Path(model), model))
        console.print("Starting plain vLLM and vLLM with selfspec ...")
        from vllm import LLM
        from vllm.platforms import current_platform

        self.settings: dict[str, Any] = {
            "max_num_seqs": max(ROUNDS),
            "max_model_len": 1024,
            "enable_prefix_caching": False,  # prompts repeat; each run does all of it
            "disable_log_stats": False,  # the counters
            "use_tqdm_on_load": False,
            "enforce_eager": current_platform.is_cpu(),
        }
        if current_platform.is_cpu():
            self.settings["kv_cache_memory_bytes"] = KV_CACHE_BYTES
        else:
            self.settings["gpu_memory_utilization"] = 0.42  # two engines, one GPU
        self.plain = LLM(model, **self.settings)
        config = {"method": METHOD, **MODEL_ALONE, "num_speculative_tokens": k}
        config |= {"draft_length": "fixed"}  # so that a plan's bound can be told
        self.drafting = LLM(model, speculative_config=config, **self.settings)
        self._counters = SpecCounters()

    def run_plain(self, prompts: list[str]) -> Sample:
        """Generates with plain vLLM."""
        return self._run(self.plain, prompts)

    def run_plan(self, plan: str, prompts: list[str]) -> Sample:
        """Generates with selfspec under one of `plans`."""
        self.drafting.collective_rpc(use_plan, args=(self.plans[plan],))
        before = self._counters.read()
        sample = self._run(self.drafting, prompts)
        return replace(sample, counts=self._counters.read() - before)

    def _run(self, llm: Any, prompts: list[str]) -> Sample:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=self.max_tokens, ignore_eos=True
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        token_ids = tuple(tuple(out.outputs[0].token_ids) for out in outputs)
        first = min(out.metrics.first_token_ts for out in outputs)
        last = max(out.metrics.last_token_ts for out in outputs)
        return Sample(token_ids, last - first, sum(map(len, token_ids)) - len(prompts))


def rounds(num_streams: int) -> Iterator[list[str]]:
    """The prompts in groups of `num_streams`."""
    for start in range(0, len(PROMPTS), num_streams):
        yield list(PROMPTS[start : start + num_streams])


def compare(arms: Arms, repeats: int, console: Console) -> list[Result]:
    """Runs every plan and plain vLLM in turns, at each number of streams."""
    plain: dict[int, list[Sample]] = {}
    results = []
    turns = {n: [*rounds(n)] * (times * repeats) for n, times in ROUNDS.items()}
    total = sum(map(len, turns.values())) * (1 + len(arms.plans))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Generating", total=total)

        def advance() -> None:
            progress.advance(task)
            done = round(progress.tasks[task].completed)
            if not console.is_terminal and done % max(1, total // 10) == 0:
                console.print(f"Generating: {done} of {total} runs")  # no bar in a log

        for num_streams in ROUNDS:
            samples = _run_in_turns(arms, turns[num_streams], advance)
            plain[num_streams] = samples.pop(PLAIN)
            # Plain vLLM's own texts at one stream are what its others are held to.
            same = _num_same(plain[1], plain[num_streams])
            results.append(_plain_result(plain[num_streams], num_streams, same))
            for plan, drafted in samples.items():
                results.append(
                    _result(plan, arms, num_streams, plain[num_streams], drafted)
                )
    return results


def _run_in_turns(
    arms: Arms, turns: list[list[str]], advance: Callable[[], None]
) -> dict[str, list[Sample]]:
    """Each group of prompts with plain vLLM, then with every plan; the samples."""
    samples: dict[str, list[Sample]] = {name: [] for name in (PLAIN, *arms.plans)}
    arms.run_plan("auto", turns[0])
    for prompts in turns:
        arms.run_plain(prompts)  # whoever is the first with its prompts is slower
        samples[PLAIN].append(arms.run_plain(prompts))
        advance()
        for plan in arms.plans:
            samples[plan].append(arms.run_plan(plan, prompts))
            advance()
    return samples


def _num_same(expected: list[Sample], found: list[Sample]) -> int:
    """Texts of `found` that are those of `expected`, which may repeat itself."""
    pool = cycle(ids for sample in expected for ids in sample.token_ids)
    texts = (ids for sample in found for ids in sample.token_ids)
    return sum(a == b for a, b in zip(texts, pool, strict=False))


def _rate(samples: list[Sample]) -> float:
    return median(s.num_tokens / s.seconds for s in samples)


def _plain_result(plain: list[Sample], num_streams: int, num_same: int) -> Result:
    return Result(
        plan=PLAIN,
        num_streams=num_streams,
        draft_share=0,
        k=0,
        tokens_per_second=_rate(plain),
        speed_up=1,
        speed_up_spread=(1, 1),
        tokens_per_verification=1,
        num_same=num_same,
        num_texts=sum(len(s.token_ids) for s in plain),
    )


def _result(
    plan: str,
    arms: Arms,
    num_streams: int,
    plain: list[Sample],
    drafted: list[Sample],
) -> Result:
    drafts = sum(s.counts.drafts for s in drafted)
    accepted = sum(s.counts.accepted_tokens for s in drafted)
    emitted = sum(s.num_tokens for s in drafted) / drafts
    c = arms.plans[plan].share(arms.weights.step)
    ratios = [
        (b.num_tokens / b.seconds) / (a.num_tokens / a.seconds)
        for a, b in zip(plain, drafted, strict=True)
    ]
    return Result(
        plan=plan,
        num_streams=num_streams,
        draft_share=c,
        k=arms.k,
        tokens_per_second=_rate(drafted),
        speed_up=median(ratios),
        speed_up_spread=(min(ratios), max(ratios)),
        acceptance=accepted / sum(s.counts.draft_tokens for s in drafted),
        tokens_per_verification=emitted,
        bound=bound(emitted, arms.k, c),
        num_same=_num_same(plain, drafted),
        num_texts=sum(len(s.token_ids) for s in drafted),
        ratios=ratios,
    )


def save(results: list[Result], output: Path, arms: Arms) -> None:
    """Writes the results as JSON, with what is needed to measure them again."""
    report = {
        **provenance(command_line()),
        "threads": os.environ["VLLM_CPU_OMP_THREADS_BIND"],
        "model_bytes_per_step": arms.weights.streamed,
        "max_tokens": arms.max_tokens,
        "engine": arms.settings,
        "results": [
            {**asdict(r), "ratios": [round(x, 4) for x in r.ratios]} for r in results
        ],
    }
    whole_file.write_json(report, output, indent=1)
