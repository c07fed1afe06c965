"""The script that compares on real models: what it asks, and what it counts."""

import runpy
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from helpers.environment import REPOSITORY
from helpers.models import DEMO_MODEL

REAL = runpy.run_path(str(REPOSITORY / "benchmarks" / "real.py"))
SAMPLES = 3


def asked(task: str, concurrency: int, **keys: Any) -> list[str]:
    """All prompts of a cell."""
    key = {"task": task, "concurrency": concurrency, "temperature": 0.0, **keys}
    turns = REAL["_turns"](key, SAMPLES, tokenizer=None)
    assert len(turns) == 1 + SAMPLES, "one is not measured"
    return [str(prompt.content) for turn in turns for prompt in turn]


def test_nothing_is_asked_twice() -> None:
    task = "code"
    cells = [asked(task, 1), asked(task, 1, temperature=1.0), asked(task, 8)]
    assert [len(cell) for cell in cells] == [4, 4, 64]
    everything = [prompt for cell in cells for prompt in cell]
    assert len({*everything}) == len(everything)
    assert cells[0] == asked(task, 1), "the same on every run"


def test_own_models_are_asked_what_they_were_not_trained_on() -> None:
    key = {"task": "code", "concurrency": 1, "temperature": 0.0}
    theirs, ours = (REAL["_turns"](key, SAMPLES, None, held) for held in (False, True))
    assert theirs != ours
    assert REAL["_is_ours"](".cache/plain_model_x8")
    assert not REAL["_is_ours"](".cache/models/qwen2.5-coder-0.5b")


def test_only_tokens_of_full_batches_count() -> None:
    run = SimpleNamespace(busy=(120, 6.0), seconds=9.0)
    assert REAL["busy_seconds"](run) == pytest.approx(0.05)


def test_methods_come_in_groups_that_there_is_memory_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = SimpleNamespace(available=6e9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    assert REAL["_most_beside_plain"](str(DEMO_MODEL)) == 2, "three of 1.5 GB and more"
    free.available = 2e9
    with pytest.raises(typer.BadParameter, match="two engines .* end what takes"):
        REAL["_most_beside_plain"](str(DEMO_MODEL))
    words = ["real.py", "m", "--method", "suffix", "-o", "f", "--method=int4"]
    monkeypatch.setattr("sys.argv", words)
    again = REAL["_again_with"](["int4", "int4, window"])
    assert again[1:] == ["real.py", "m", "-o", "f", "--method=int4"] + [
        "--method=int4, window"
    ]


def test_a_cell_grows_by_the_methods_it_lacks() -> None:
    key = {"task": "code", "concurrency": 1, "temperature": 0.0}
    cells = [{**key, "plain vLLM": 1, "suffix": 2}]
    lacks = REAL["_lacks"]
    assert not lacks(cells, key, "suffix") and lacks(cells, key, "int4")
    assert lacks(cells, key | {"context": 4096}, "suffix"), "another cell"
    REAL["_keep"](cells, key, {"plain vLLM": 3, "int4": 4})
    assert cells == [{**key, "plain vLLM": 1, "suffix": 2, "int4": 4}]
    REAL["_keep"](cells, key | {"concurrency": 8}, {"int4": 5})
    assert len(cells) == 2
