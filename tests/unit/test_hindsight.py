"""What copies would have said, where nobody drafted any."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_selfspec.draft_length.looks import LOOK_SHARE
from vllm_selfspec.engine import hindsight
from vllm_selfspec.engine.hindsight import Hindsight
from vllm_selfspec.plan.source_context import Copier

NUM_TOKENS, PROMPT, LONG = 4, [9, 8, 7, 1, 2, 3, 4, 5, 6, 7], 1000.0


def request(name: str, said: list[int]) -> Any:
    token_ids = PROMPT + said
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=len(PROMPT),
        num_tokens=len(token_ids),
        all_token_ids=token_ids,
    )


def looking() -> Hindsight:
    return Hindsight(Copier(2, 5, 16), NUM_TOKENS)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ([2, 3, 4, 5, 6, 7], 4),
        ([2, 3, 4, 5, 0, 0], 2),
        ([2, 3, 0, 4, 5, 6], 0),
        ([20, 21, 22, 23, 24, 25], 0),  # no match
    ],
)
def test_says_how_far_a_copy_of_some_tokens_ago_was_right(
    said: list[int], right: int
) -> None:
    assert looking().look([request("a", said)], LONG) == {"a": right}


def test_looks_at_the_output_alone_and_at_no_token_twice() -> None:
    found = looking()
    assert found.look([request("a", [2, 3, 4])], LONG) == {}, "too few"
    assert found.look([request("a", [2, 3, 4, 5])], LONG) == {"a": 0}, "7 alone matches"
    assert found.look([request("a", [2, 3, 4, 5, 6])], LONG) == {}
    more = [2, 3, 4, 5, 6, 7, 1, 2]
    assert found.look([request("a", more)], LONG) == {"a": 2}, "6, 7 and then 1"


def test_those_that_said_most_come_first() -> None:
    both = [request("a", [2, 3, 4, 5]), request("b", [2, 3, 4, 5, 6, 7])]
    found = looking()
    assert found.look(both, LONG).keys() == {"b"}
    assert found.look(both, LONG).keys() == {"a"}
    assert found.look(both, LONG) == {}
    assert found.look([], LONG) == {}


def test_takes_no_more_than_a_share_of_the_time(monkeypatch: Any) -> None:
    """With a clock on which every look takes a second."""
    seconds = iter(np.arange(0.0, 1e6, 1.0))
    monkeypatch.setattr(
        hindsight, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    )
    found, looks, said = looking(), 0, [2, 3, 4, 5, 6, 7]
    for step in range(3000):
        said = [*said, *range(step, step + NUM_TOKENS)]
        looks += bool(found.look([request("a", said)], seconds=10.0))
    assert 0.5 < looks / (3000 * 10.0 * LOOK_SHARE) < 1.1


def test_what_was_not_looked_at_is_no_measure_of_a_look(monkeypatch: Any) -> None:
    """Between two looks at one request nothing is there to be looked at."""
    now = 0.0

    def propose(*_: Any) -> Any:
        nonlocal now
        now += 1.0  # a long context
        return SimpleNamespace(token_ids=np.zeros(0, np.int32))

    monkeypatch.setattr(hindsight, "time", SimpleNamespace(perf_counter=lambda: now))
    proposer: Any = SimpleNamespace(propose=propose)
    found, looks, said, of_step = Hindsight(proposer, NUM_TOKENS), 0, [2], 0.5
    for _ in range(4000):
        said.append(2)
        looks += bool(found.look([request("a", said)], of_step))
    assert looks <= 4 + LOOK_SHARE * 4000 * of_step
