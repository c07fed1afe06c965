"""Data-parallel ranks agree on the steps of a draft before it begins."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ParallelConfig
from vllm.distributed.utils import (
    stateless_destroy_torch_distributed_process_group as destroy,
)
from vllm.distributed.utils import (
    stateless_init_torch_distributed_process_group as new_group,
)
from vllm.utils.network_utils import get_open_port

from vllm_selfspec.draft import dp_ranks
from vllm_selfspec.draft.dp_ranks import DPRanks

NUM_RANKS = 2
Together = Callable[[Callable[[int], Any]], list[Any]]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[Together]:
    """Calls a function for every rank at once, each with its end of a gloo group."""
    port, groups = get_open_port(), threading.local()
    monkeypatch.setattr(
        dp_ranks, "get_dp_group", lambda: SimpleNamespace(cpu_group=groups.own)
    )

    def with_group(rank: int, function: Callable[[int], Any]) -> Any:
        groups.own = new_group("127.0.0.1", port, rank, NUM_RANKS, "gloo")
        try:
            return function(rank)
        finally:
            destroy(groups.own)

    with ThreadPoolExecutor(NUM_RANKS) as pool:
        yield lambda function: [
            *pool.map(with_group, range(NUM_RANKS), [function] * NUM_RANKS)
        ]


def ranks_of(rank: int) -> DPRanks:
    config: Any = SimpleNamespace(data_parallel_size=NUM_RANKS, data_parallel_rank=rank)
    return DPRanks(config)


def test_all_ranks_run_as_many_steps_as_the_one_with_the_most(
    together: Together,
) -> None:
    # Steps and rows: one rank is idle, each wants more in turn, nobody drafts.
    wanted = [((4, 3), (0, 0)), ((1, 8), (3, 2)), ((0, 0), (0, 5))]

    def agree(rank: int) -> list[tuple[int, list[int], int]]:
        ranks, found = ranks_of(rank), []
        for of_ranks in wanted:
            num_steps = ranks.agree(*of_ranks[rank])
            assert ranks.num_rows_across_dp is not None
            found.append((num_steps, ranks.num_rows_across_dp.tolist(), ranks.num_rows))
        return found

    first, second = together(agree)
    assert first == [(4, [3, 1], 3), (3, [8, 2], 8), (0, [1, 5], 1)]
    assert second == [(4, [3, 1], 1), (3, [8, 2], 2), (0, [1, 5], 5)]


def test_a_rank_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_ranks, "get_dp_group", None)
    ranks = DPRanks(ParallelConfig())
    assert ranks.is_alone
    assert [ranks.agree(steps, 2) for steps in (3, 0)] == [3, 0]
    assert ranks.num_rows_across_dp is None
