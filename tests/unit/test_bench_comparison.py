"""The figures of a comparison follow from what was run, and fair turns are kept."""

from collections.abc import Sequence
from typing import Any

import pytest

from vllm_selfspec.bench.comparison import (
    Comparison,
    Load,
    Result,
    compare,
    num_turns,
)
from vllm_selfspec.bench.engines import (
    DRAFT,
    TARGET,
    Request,
    Run,
    Sampling,
)
from vllm_selfspec.bench.methods import Method
from vllm_selfspec.bench.tasks import Prompt, Task
from vllm_selfspec.engine.spec_counters import Counts

PLAIN = Method("plain vLLM", "plain")
OURS = Method("ours", "selfspec", {"num_speculative_tokens": 2})
GREEDY = Sampling(0, 10)
NO_COUNTS = Counts(0, 0, 0)
ONE_LOAD = (Load(1, 4),)
TASK = Task("code", tuple(Prompt(str(n), f"p{n}") for n in range(20)))


class Scripted:
    """An engine whose times are known: `tokens` a second, the same text as the prompt.

    Remembers what it ran in `log`, which all engines of a test share.
    """

    tokenizer: Any = None

    def __init__(
        self,
        method: Method,
        log: list[tuple[str, int, tuple[str, ...]]],
        rate: float = 10.0,
        counts: Counts = NO_COUNTS,
        forwards: Any = None,
        max_streams: int | None = None,
    ) -> None:
        self.method, self.log, self.rate = method, log, rate
        self.counts, self.forwards = counts, forwards or {}
        self.max_streams = max_streams

    def run(self, prompts: Sequence[str], num_streams: int, sampling: Sampling) -> Run:
        self.log.append((self.method.name, num_streams, tuple(prompts)))
        requests = tuple(
            Request((len(self.log[0]), *map(ord, prompt)), prompt, 1.0, 0.1)
            for prompt in prompts
        )
        num_tokens = sum(len(request.token_ids) for request in requests)
        return Run(requests, num_tokens / self.rate, self.counts, self.forwards)


def compared(*engines: Scripted, loads: Any = ONE_LOAD) -> Comparison:
    def render(prompt: Prompt) -> str:
        return str(prompt.content)

    return compare(engines, [TASK], loads, [GREEDY], render, lambda what: None)


def result_of(comparison: Comparison, method: Method) -> Result:
    (found,) = [r for r in comparison.results() if r.method == method.name]
    return found


def test_speed_up_is_the_median_of_ratios_on_the_same_prompts() -> None:
    log: list[Any] = []
    comparison = compared(Scripted(PLAIN, log, 10), Scripted(OURS, log, 15))
    found = result_of(comparison, OURS)
    assert found.speed_up == pytest.approx(1.5)
    assert found.spread == pytest.approx((1.5, 1.5))
    assert found.same_texts == found.texts == 4
    assert result_of(comparison, PLAIN).speed_up == 1


def test_every_group_is_run_by_all_methods_before_the_next() -> None:
    log: list[Any] = []
    compared(Scripted(PLAIN, log), Scripted(OURS, log), loads=[Load(1, 3)])
    assert [(name, prompts) for name, _, prompts in log] == [
        (method, (f"p{n}",))
        for n in range(3)
        for method in (PLAIN.name, PLAIN.name, OURS.name)  # the first is not measured
    ]


def test_the_first_run_of_a_groups_prompts_is_not_measured() -> None:
    log: list[Any] = []

    class SlowOnNewPrompts(Scripted):
        def run(self, prompts: Sequence[str], *args: Any) -> Run:
            is_new = all(tuple(prompts) != entry[2] for entry in self.log)
            self.rate = 5.0 if is_new else 10.0
            return super().run(prompts, *args)

    engines = (SlowOnNewPrompts(PLAIN, log), SlowOnNewPrompts(OURS, log))
    for method in (PLAIN, OURS):
        found = result_of(compared(*engines), method)
        assert (found.speed_up, found.tokens_per_second) == (1.0, 10.0)


def test_each_load_takes_prompts_that_no_other_has() -> None:
    log: list[Any] = []
    compared(Scripted(PLAIN, log), loads=[Load(1, 4), Load(2, 6), Load(4, 8)])
    seen: dict[int, set[str]] = {}
    for _, streams, prompts in log:
        seen.setdefault(streams, set()).update(prompts)
    alone = seen[1] - {f"p{n}" for n in range(4)}
    assert {len(seen[2]), len(seen[4])} == {6, 8} and not seen[2] & seen[4]
    assert alone <= seen[2] | seen[4], "plain vLLM alone, for the text's own spread"
    assert alone, "it was run"


def test_each_temperature_takes_prompts_that_no_other_has() -> None:
    log: list[Any] = []
    loads, samplings = [Load(1, 4), Load(1, 3)], [GREEDY, Sampling(1.0, 10)]
    plain = [Scripted(PLAIN, log)]
    compare(plain, [TASK], loads, samplings, lambda p: p.content, lambda what: None)
    asked = [prompt for _, _, prompts in log[::2] for prompt in prompts]
    assert asked == [f"p{n}" for n in range(14)]


def test_an_engine_is_not_asked_for_more_streams_than_it_has() -> None:
    log: list[Any] = []
    single = Scripted(OURS, log, max_streams=1)
    loads = [Load(1, 2), Load(4, 8)]
    comparison = compared(Scripted(PLAIN, log), single, loads=loads)
    assert {n for name, n, _ in log if name == OURS.name} == {1}
    found = [r for r in comparison.results() if r.method == OURS.name]
    assert [r.num_streams for r in found] == [1]


def test_the_number_of_turns_is_what_the_progress_bar_counts() -> None:
    log: list[Any] = []
    engines = [Scripted(PLAIN, log), Scripted(OURS, log, max_streams=1)]
    loads, samplings = [Load(1, 3), Load(4, 8)], [GREEDY, Sampling(1.0, 10)]
    turns: list[str] = []
    compare(engines, [TASK], loads, samplings, lambda p: p.content, turns.append)
    assert len(turns) == num_turns(engines, [TASK], loads, samplings) == len(log)


# Forwards for three tokens, of which the prefill brings the first: two plain steps, or
# one verification of two drafts.
PREFILL = 0.5
PLAIN_FORWARDS = {(TARGET, 7): [PREFILL], (TARGET, 1): [1.0, 1.0]}
OUR_FORWARDS = {(TARGET, 7): [PREFILL], (TARGET, 3): [1.2], (DRAFT, 1): [0.25] * 2}


def test_bound_is_tokens_a_verification_over_its_measured_cost() -> None:
    log: list[Any] = []
    no_prefill = [
        {key: times for key, times in found.items() if key != (TARGET, 7)}
        for found in (PLAIN_FORWARDS, OUR_FORWARDS)
    ]
    comparison = compared(
        Scripted(PLAIN, log, 10, forwards=no_prefill[0]),
        Scripted(OURS, log, 11, Counts(1, 2, 1, (1, 0)), no_prefill[1]),
    )
    found = result_of(comparison, OURS)
    assert found.tokens_per_verification == pytest.approx(2)
    assert found.acceptance == pytest.approx(0.5)
    assert found.accepted_at == pytest.approx((1, 0))
    assert found.bound == pytest.approx(2 / (1.2 + 2 * 0.25))
    assert found.share_of_bound == pytest.approx(1.1 * 1.7 / 2)
    costs = comparison.costs(1)
    assert costs is not None
    assert (costs.v(OURS), costs.c(OURS)) == pytest.approx((1.2, 0.25))


def test_prefill_gains_nothing_in_the_bound() -> None:
    log: list[Any] = []
    comparison = compared(
        Scripted(PLAIN, log, 10, forwards=PLAIN_FORWARDS),
        Scripted(OURS, log, 11, Counts(1, 2, 1, (1, 0)), OUR_FORWARDS),
    )
    found = result_of(comparison, OURS)
    assert found.bound == pytest.approx((PREFILL + 2) / (PREFILL + 1.7))
    assert result_of(comparison, PLAIN).bound is None, "it is the reference"


def test_a_verification_without_drafts_counts_as_one() -> None:
    log: list[Any] = []
    # Two decoded tokens, neither drafted, but in one of the steps something was tried.
    counts = Counts(1, 2, 0, (0, 0))
    comparison = compared(Scripted(PLAIN, log), Scripted(OURS, log, 10, counts))
    assert result_of(comparison, OURS).tokens_per_verification == pytest.approx(1)


def test_share_of_the_bound_is_taken_within_each_group() -> None:
    log: list[Any] = []

    class Drifting(Scripted):
        """Slower each time, forwards and all; its own work is a tenth of a run."""

        def run(self, *args: Any) -> Run:
            run, slower = super().run(*args), len(self.log)
            forwards = {(TARGET, 1): [0.9 * slower]}
            return Run(run.requests, float(slower), run.counts, forwards)

    class Steady(Drifting):
        """The same, without work of its own."""

        def run(self, *args: Any) -> Run:
            run = super().run(*args)
            return Run(run.requests, 0.9 * run.seconds, run.counts, run.forwards)

    found = result_of(compared(Steady(PLAIN, log), Drifting(OURS, log)), OURS)
    assert found.share_of_bound == pytest.approx(0.9)


def test_without_timed_forwards_there_is_no_bound() -> None:
    log: list[Any] = []
    comparison = compared(
        Scripted(PLAIN, log), Scripted(OURS, log, counts=Counts(1, 2, 2, (1, 1)))
    )
    assert result_of(comparison, OURS).bound is None
    assert result_of(comparison, OURS).share_of_bound is None
    assert comparison.times_of_a_token() == []


def test_where_a_tokens_time_goes_adds_up_to_it() -> None:
    log: list[Any] = []
    comparison = compared(
        Scripted(PLAIN, log, 1, forwards={(TARGET, 1): [0.5]}),
        Scripted(OURS, log, 1, forwards={(TARGET, 3): [0.5], (DRAFT, 1): [0.25]}),
    )
    for row in comparison.times_of_a_token():
        assert sum(v for k, v in row.items() if k != "method") == pytest.approx(1.0)
    assert [row["method"] for row in comparison.times_of_a_token()] == [
        PLAIN.name,
        OURS.name,
    ]


def test_what_is_finished_is_saved_block_by_block() -> None:
    log: list[Any] = []
    saved: list[int] = []
    loads = [Load(1, 2), Load(2, 4)]
    compare(
        [Scripted(PLAIN, log)],
        [TASK],
        loads,
        [GREEDY],
        lambda prompt: str(prompt.content),
        lambda what: None,
        lambda comparison: saved.append(len(comparison.blocks)),
    )
    assert saved == [1, 2]


@pytest.mark.parametrize("num_before", [0, 6])
def test_ctrl_c_leaves_the_blocks_that_were_finished(num_before: int) -> None:
    log: list[Any] = []

    class Interrupted(Scripted):
        def run(self, *args: Any) -> Run:
            if len(self.log) > num_before:
                raise KeyboardInterrupt
            return super().run(*args)

    engines = [Scripted(PLAIN, log), Interrupted(OURS, log)]
    loads = [Load(1, 2), Load(2, 4)]
    if not num_before:
        with pytest.raises(KeyboardInterrupt):
            compared(*engines, loads=loads)
        return
    comparison = compared(*engines, loads=loads)
    assert [block.load for block in comparison.blocks] == loads[:1]
    assert len([*comparison.results()]) == 2
