"""`compare`: every method on the same prompts, in turns, at each load and temperature.

One rule: a figure is a ratio. Prompts are split into groups; a group is run by plain
vLLM and then by each method before the next group, so that a machine that drifts hits
all alike; what is kept are medians of ratios over the groups, with their spread. Plain
vLLM has run the group once before, unmeasured: whoever is the first with its prompts is
2 to 3 percent slower, which would be a gain of all the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from vllm_selfspec.bench.engines import (
    DRAFT,
    TARGET,
    Engine,
    Request,
    Run,
    Sampling,
)
from vllm_selfspec.bench.methods import Method
from vllm_selfspec.bench.quality import scores
from vllm_selfspec.bench.tasks import Task

NUM_ALONE = 4  # prompts that plain vLLM runs once more, one at a time


@dataclass(frozen=True)
class Load:
    """A number of concurrent requests, and of prompts to run at it."""

    num_streams: int
    num_prompts: int


@dataclass
class Result:
    """One method on one task, at one load and temperature.

    Attributes:
        speed_up: Median ratio of tokens per second to plain vLLM's, over the groups.
        spread: The smallest and largest of these ratios.
        tokens_per_verification: E, of those that are emitted.
        acceptance: Share of the drafted tokens that were accepted.
        accepted_at: The same by draft position, of the verifications that had a draft.
        bound: What `speed_up` would be if nothing but forwards took time; None where
            they were not timed.
        share_of_bound: Median over the groups of the ratio to the group's own bound.
        latency: Median seconds of a request.
        same_texts: Requests whose tokens are plain vLLM's; in its own row, those that
            are the same when they run alone (of the first few).
        quality: The task's scores.
    """

    task: str
    num_streams: int
    temperature: float
    method: str
    tokens_per_second: float
    speed_up: float
    spread: tuple[float, float]
    tokens_per_verification: float
    acceptance: float | None
    accepted_at: tuple[float, ...]
    bound: float | None
    share_of_bound: float | None
    latency: float
    same_texts: int
    texts: int
    quality: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """Measured seconds of single forwards at one number of streams.

    Attributes:
        plain: The target's, one row a request.
        verify: The target's, one row and k draft rows a request; by method.
        draft: One draft step; by method.
    """

    plain: float
    verify: dict[str, float]
    draft: dict[str, float]

    def v(self, method: Method) -> float | None:
        """Cost of a verification over that of a plain step."""
        return (
            self.verify[method.name] / self.plain
            if method.name in self.verify
            else None
        )

    def c(self, method: Method) -> float | None:
        """Cost of a draft step over that of a plain step."""
        return (
            self.draft[method.name] / self.plain if method.name in self.draft else None
        )


@dataclass
class Block:
    """All methods on one task at one load and temperature.

    Attributes:
        runs: By method, group by group.
        alone: Plain vLLM on the first prompts, one request at a time: in bf16 its text
            depends on what else is in a batch, and this says how often.
    """

    task: Task
    load: Load
    sampling: Sampling
    runs: dict[str, list[Run]]
    alone: Run | None = None


@dataclass
class Comparison:
    """Everything that was run.

    Attributes:
        methods: In the order of the report, plain vLLM first.
        blocks: One for each task, load and temperature.
    """

    methods: list[Method]
    blocks: list[Block] = field(default_factory=list)

    def costs(self, num_streams: int) -> Costs | None:
        """Median forward times at a load, over all tasks; None if none were timed."""
        runs: dict[str, list[Run]] = {method.name: [] for method in self.methods}
        for block in self.blocks:
            if block.load.num_streams == num_streams:
                for name, found in block.runs.items():
                    runs[name] += found
        plain = _seconds(runs[self.methods[0].name], TARGET, num_streams)
        if plain is None:
            return None
        verify, draft = {}, {}
        for method in self.methods[1:]:
            rows = num_streams * (method.k + 1)
            verify[method.name] = _seconds(runs[method.name], TARGET, rows)
            draft[method.name] = _seconds(runs[method.name], DRAFT, num_streams)
        return Costs(plain, _known(verify), _known(draft))

    def times_of_a_token(self) -> list[dict[str, Any]]:
        """Seconds for one generated token by where they go, at the lowest load, greedy
        if that was run: one entry for each method whose forwards were timed."""
        if not self.blocks:
            return []
        lowest = min(block.load.num_streams for block in self.blocks)
        coldest = min(block.sampling.temperature for block in self.blocks)
        runs: dict[str, list[Run]] = {method.name: [] for method in self.methods}
        for block in self.blocks:
            at = (block.load.num_streams, block.sampling.temperature)
            if at == (lowest, coldest):
                for name, found in block.runs.items():
                    runs[name] += found
        return [
            {"method": name, **_times_of_a_token(found)}
            for name, found in runs.items()
            if any(run.forwards for run in found)
        ]

    def results(self) -> Iterator[Result]:
        """One for each block and method."""
        for block in self.blocks:
            for method in self.methods:
                if block.runs[method.name]:
                    yield _result(block, method, self.methods[0])


def _times_of_a_token(runs: list[Run]) -> dict[str, float]:
    total = sum(run.seconds for run in runs)
    num_tokens = sum(run.num_tokens for run in runs)
    target, draft = (
        sum(run.forward_seconds(role) for run in runs) for role in (TARGET, DRAFT)
    )
    return {
        "target forwards": target / num_tokens,
        "draft forwards": draft / num_tokens,
        "the rest": (total - target - draft) / num_tokens,
    }


def _seconds(runs: list[Run], role: str, num_rows: int) -> float | None:
    times = [t for run in runs for t in run.forwards.get((role, num_rows), ())]
    return median(times) if times else None


def _known(times: dict[str, float | None]) -> dict[str, float]:
    return {name: seconds for name, seconds in times.items() if seconds is not None}


def _result(block: Block, method: Method, reference: Method) -> Result:
    plain, runs = block.runs[reference.name], block.runs[method.name]
    pairs = list(zip(runs, plain, strict=True))
    ratios = [_rate(run) / _rate(base) for run, base in pairs]
    bounds = [
        found for run, base in pairs if (found := forwards_bound(run, base)) is not None
    ]
    if method is reference or len(bounds) < len(pairs):
        bounds = []
    requests = [request for run in runs for request in run.requests]
    expected = [request for run in plain for request in run.requests]
    same, texts = _num_same(requests, expected)
    if method is reference and block.alone is not None:
        same, texts = _num_same(block.alone.requests, expected)
    drafts = sum(run.counts.drafts for run in runs)
    drafted = sum(run.counts.draft_tokens for run in runs)
    accepted = sum(run.counts.accepted_tokens for run in runs)
    positions = zip(*(run.counts.accepted_at for run in runs), strict=False)
    return Result(
        task=block.task.name,
        num_streams=block.load.num_streams,
        temperature=block.sampling.temperature,
        method=method.name,
        tokens_per_second=median(_rate(run) for run in runs),
        speed_up=median(ratios),
        spread=(min(ratios), max(ratios)),
        tokens_per_verification=_tokens_per_verification(runs),
        acceptance=accepted / drafted if drafted else None,
        accepted_at=tuple(sum(at) / drafts for at in positions) if drafts else (),
        bound=median(bounds) if bounds else None,
        share_of_bound=(
            median(r / b for r, b in zip(ratios, bounds, strict=True))
            if bounds
            else None
        ),
        latency=median(request.latency for request in requests),
        same_texts=same,
        texts=texts,
        quality=scores(
            Task(block.task.name, block.task.prompts, block.task.metric),
            [request.text for request in requests],
        ),
    )


def _num_same(found: Sequence[Request], expected: Sequence[Request]) -> tuple[int, int]:
    """How many have the tokens that are expected, and of how many."""
    pairs = zip(found, expected, strict=False)  # the first group of several
    return sum(a.token_ids == b.token_ids for a, b in pairs), len(found)


def _rate(run: Run) -> float:
    return run.num_tokens / run.seconds


def _tokens_per_verification(runs: Sequence[Run]) -> float:
    """E: decoded tokens, the first of each request (from its prefill) left out, over
    verifications of one request each; a step without drafts counts as one."""
    tokens = sum(run.num_tokens - len(run.requests) for run in runs)
    drafts = sum(run.counts.drafts for run in runs)
    accepted = sum(run.counts.accepted_tokens for run in runs)
    # Tokens accepted beyond a request's last are counted by vLLM, but not emitted;
    # where every step drafts, the number of drafts is the better count.
    return tokens / max(drafts, tokens - accepted, 1)


def forwards_bound(run: Run, plain: Run) -> float | None:
    """The ratio of two runs if forwards were all that takes time.

    For decoding that is E / (v + k c): with t the time of a plain step, plain vLLM
    spends t a token, and a verification of v t after k drafts of c t each brings E
    tokens. Added up over all forwards it holds for steps of any width and number of
    drafts, prefill included.
    """
    seconds, reference = (
        one.forward_seconds(TARGET) + one.forward_seconds(DRAFT) for one in (run, plain)
    )
    if not seconds or not reference:
        return None
    return (reference / plain.num_tokens) / (seconds / run.num_tokens)


def compare(
    engines: Sequence[Engine],
    tasks: Sequence[Task],
    loads: Sequence[Load],
    samplings: Sequence[Sampling],
    render: Callable[[Any], str],
    advance: Callable[[str], None],
    save: Callable[[Comparison], None] = lambda comparison: None,
) -> Comparison:
    """Runs everything.

    Args:
        engines: Plain vLLM first.
        tasks: What to run.
        loads: How many requests at a time. Every load and temperature takes other
            prompts of a task, as far as there are some, so that what remembers answers
            (suffix decoding) has not seen them.
        samplings: How to generate.
        render: The text of a `Prompt`.
        advance: Called before each group that a method runs, with what it is.
        save: Called after each block, with all that was run so far.

    Returns:
        What was run: everything, or after Ctrl-C the blocks that were finished.

    Raises:
        KeyboardInterrupt: If that came before the first was.
    """
    comparison = Comparison([engine.method for engine in engines])
    first = 0
    for sampling in samplings:
        for load in loads:
            for task in tasks:
                block = _empty_block(engines, task, load, sampling, first)
                try:
                    _run_block(engines, block, render, advance)
                except KeyboardInterrupt:
                    if not comparison.blocks:
                        raise
                    return comparison
                comparison.blocks.append(block)
                save(comparison)
            first += load.num_prompts
    return comparison


def _empty_block(
    engines: Sequence[Engine], task: Task, load: Load, sampling: Sampling, first: int
) -> Block:
    """The prompts from `first` on, from the start again when they run out."""
    num = len(task.prompts)
    chosen = tuple(task.prompts[(first + i) % num] for i in range(load.num_prompts))
    runs: dict[str, list[Run]] = {engine.method.name: [] for engine in engines}
    return Block(Task(task.name, chosen, task.metric), load, sampling, runs)


def _run_block(
    engines: Sequence[Engine],
    block: Block,
    render: Callable[[Any], str],
    advance: Callable[[str], None],
) -> None:
    streams = block.load.num_streams
    able = [e for e in engines if e.max_streams is None or streams <= e.max_streams]
    where = f"{block.task.name}, {streams} at a time, T={block.sampling.temperature:g}"
    for group in _groups(block.task.prompts, streams):
        texts = [render(prompt) for prompt in group]
        advance(f"{where}: {engines[0].method.name}, unmeasured")
        engines[0].run(texts, streams, block.sampling)
        for engine in able:
            advance(f"{where}: {engine.method.name}")
            run = engine.run(texts, streams, block.sampling)
            block.runs[engine.method.name].append(run)
        if block.alone is None and _shows_batching(block):
            advance(f"{where}: {engines[0].method.name}, alone")
            block.alone = engines[0].run(texts[:NUM_ALONE], 1, block.sampling)


def _shows_batching(block: Block) -> bool:
    return block.load.num_streams > 1 and block.sampling.temperature == 0


def _groups(prompts: Sequence[Any], num_streams: int) -> list[Sequence[Any]]:
    """The prompts as they are run: one by one, or two for each stream. With just one,
    the last requests of a group would run with ever fewer others."""
    size = 1 if num_streams == 1 else 2 * num_streams
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


def num_turns(
    engines: Sequence[Engine],
    tasks: Sequence[Task],
    loads: Sequence[Load],
    samplings: Sequence[Sampling],
) -> int:
    """How often `compare` will call `advance`."""
    total = 0
    for load in loads:
        able = [
            e
            for e in engines
            if e.max_streams is None or load.num_streams <= e.max_streams
        ]
        groups = len(_groups(range(load.num_prompts), load.num_streams))
        total += groups * (1 + len(able)) * len(samplings)
        if load.num_streams > 1:
            total += sum(sampling.temperature == 0 for sampling in samplings)
    return total * len(tasks)


def to_dict(result: Result) -> dict[str, Any]:
    """For JSON."""
    return asdict(result)
