"""The source `context`: what it matches, and what it copies."""

import numpy as np
import pytest

from vllm_selfspec.plan.source_context import (
    KINDS,
    ContextSource,
    Copier,
    longest_match,
)


def row(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int32)


def by_hand(tokens: list[int], longest: int) -> tuple[int, int]:
    """Every match, tried one by one."""
    best = (0, 0)
    for end in range(1, len(tokens)):
        length = 0
        while (
            length < min(end, longest)
            and tokens[end - 1 - length] == tokens[len(tokens) - 1 - length]
        ):
            length += 1
        if length and length >= best[1]:
            best = (end, length)
    return best


@pytest.mark.parametrize("seed", range(200))
def test_the_longest_match_is_found_and_of_those_the_latest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, rng.integers(1, 5), rng.integers(1, 40)).tolist()
    longest = int(rng.integers(1, 8))
    assert longest_match(row(*tokens), longest) == by_hand(tokens, longest)


def copied(tokens: np.ndarray, shortest: int = 2, num_tokens: int = 4) -> list[int]:
    found: list[int] = (
        Copier(shortest, 16, num_tokens).propose("", tokens).token_ids.tolist()
    )
    return found


def test_what_followed_is_copied() -> None:
    assert copied(row(1, 2, 3, 4, 5, 6, 7, 1, 2)) == [3, 4, 5, 6]
    assert copied(row(1, 2, 3, 9, 2, 1, 2)) == [3, 9, 2, 1]


def test_a_loop_goes_on() -> None:
    assert copied(row(5, 1, 2, 3, 1, 2, 3), num_tokens=7) == [1, 2, 3, 1, 2, 3, 1]
    assert copied(row(8, 8, 8)) == [8, 8, 8, 8]


def test_nothing_is_copied_after_too_short_a_match() -> None:
    assert copied(row(1, 2, 3, 4, 2)) == []
    assert copied(row(1, 2, 3, 4, 2), shortest=1) == [3, 4, 2, 3]
    assert copied(row(1, 2, 3, 4)) == copied(row(1)) == copied(row()) == []


def test_longer_matches_are_of_later_kinds() -> None:
    copier = Copier(1, 16, 4)
    kinds = []
    for length in range(1, 20):
        tokens = [*range(50, 50 + length), 0, 1, *range(50, 50 + length)]
        kinds.append(copier.propose("", row(*tokens)).kind)
    assert kinds == sorted(kinds) and set(kinds) == set(range(len(KINDS)))
    assert len(ContextSource.guesses) == len(KINDS)


def test_a_row_is_read_afresh_each_time() -> None:
    """After an edit, a preemption or another request of the same name nothing is
    stale."""
    copier = Copier(2, 16, 2)
    assert copier.propose("a", row(1, 2, 3, 1, 2)).token_ids.tolist() == [3, 1]
    assert copier.propose("a", row(1, 2, 4, 1, 2)).token_ids.tolist() == [4, 1]
    assert copier.propose("a", row(7, 1, 2)).token_ids.tolist() == []
