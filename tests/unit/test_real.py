"""The script that compares on real models: what it asks, and what it counts."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from helpers.environment import REPOSITORY
from helpers.models import DEMO_MODEL
from vllm_selfspec.bench.engines import Pace

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


@pytest.mark.parametrize("streams", [1, 4, 6])
def test_a_sample_of_mixed_tasks_has_as_many_of_each(streams: int) -> None:
    key = {"task": REAL["MIXED"], "concurrency": streams, "temperature": 0.0}
    turns = REAL["_turns"](key, SAMPLES, tokenizer=None)
    assert len(turns) == 1 + SAMPLES
    num = {1: 4, 4: 8, 6: 12}[streams]
    for turn in turns:
        ids = [prompt.id for prompt in turn]
        tasks = [task for one in ids for task in REAL["SHIPPED"] if task in one]
        assert tasks == [*REAL["SHIPPED"]] * (num // 4), ids


def test_own_models_are_asked_what_they_were_not_trained_on() -> None:
    key = {"task": "code", "concurrency": 1, "temperature": 0.0}
    theirs, ours = (REAL["_turns"](key, SAMPLES, None, held) for held in (False, True))
    assert theirs != ours
    assert REAL["_is_ours"](".cache/plain_model_x8")
    assert not REAL["_is_ours"](".cache/models/qwen2.5-coder-0.5b")


def test_a_batch_counts_as_if_it_were_refilled() -> None:
    even, uneven = Pace(), Pace()
    for pace in (even, uneven):
        pace.add(2.0, 16, num_begun=16, is_full=True)
        for _ in range(10):
            pace.add(0.08, 16, num_begun=0, is_full=True)
        # A request that ended makes room: its prompt takes 0.1 s beside fifteen rows.
        pace.add(0.18, 16, num_begun=1, is_full=True)
    for _ in range(5):
        uneven.add(0.05, 2, num_begun=0, is_full=False)
    assert even.steady == pytest.approx(0.005 + (2.18 - 32 * 0.005) / 192)
    assert uneven.steady == pytest.approx(0.005 + (2.18 - 32 * 0.005) / 202)
    one = Pace()
    one.add(0.5, 1, num_begun=1, is_full=True)
    one.add(0.1, 3, num_begun=0, is_full=True)
    assert one.steady == pytest.approx(0.6 / 4), "of one request it is the mean"
    one = Pace()
    one.add(0.5, 1, num_begun=1, is_full=False)
    assert one.steady == 0.5, "nothing was ever full"


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


def test_a_file_is_of_one_model_and_as_many_tokens(tmp_path: Path) -> None:
    file, same = tmp_path / "f.json", {"model": "m", "eager": False, "max_tokens": 64}
    assert REAL["_saved"](file, same)["cells"] == []
    file.write_text(json.dumps({**same, "cells": [{"task": "code"}]}))
    assert REAL["_saved"](file, same)["cells"] == [{"task": "code"}]
    with pytest.raises(typer.BadParameter, match="have max_tokens 64 in place of 256"):
        REAL["_saved"](file, {**same, "max_tokens": 256})


def test_quartiles_lie_among_the_samples() -> None:
    assert REAL["_quartiles"]([1.5, 1.0]) == [1.0, 1.5]
    assert REAL["_quartiles"]([4.0, 1.0, 2.0, 3.0]) == [1.25, 3.75]
