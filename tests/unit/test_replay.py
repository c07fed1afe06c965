"""Who drafts, and how far, decided over what real models said: in recorded time, so
that a few per cent are no noise."""

import runpy
from itertools import product
from statistics import geometric_mean
from typing import Any

import numpy as np
import pytest

from helpers.environment import REPOSITORY

REPLAY = runpy.run_path(str(REPOSITORY / "benchmarks" / "replay.py"))
RECORDINGS = sorted((REPOSITORY / "benchmarks" / "results" / "replay").glob("*.npz"))
MODEL, COPIES, BOTH = REPLAY["MODEL"], REPLAY["COPIES"], REPLAY["BOTH"]
# Of the better source, or of plain steps: what finding out may cost, when so few
# requests follow those of another task. 0.94 where it costs most, chat after code.
LEAST = 0.93
PER_TASK = 12


def paces(recording: Any, num_streams: int, sources: str) -> dict[str, float]:
    """Tokens per second over plain steps', task after task."""
    times = max(1, num_streams // 4)
    tasks = [np.tile(of[:PER_TASK], times) for of in recording.by_task()]
    found = REPLAY["Replay"](recording, num_streams, sources).run(np.concatenate(tasks))
    plain = recording.plain_pace(num_streams)
    return {task: tally.pace / plain for task, tally in found.items()}


@pytest.mark.parametrize(
    ("file", "num_streams"),
    product(RECORDINGS, (1, 4)),
    ids=lambda of: getattr(of, "stem", of),
)
def test_two_sources_are_no_worse_than_the_better(file: Any, num_streams: int) -> None:
    recording = REPLAY["Recording"].load(file)
    how = recording, num_streams
    model, copies, both = (paces(*how, of) for of in (MODEL, COPIES, BOTH))
    better = {task: max(model[task], copies[task]) for task in both}
    shares = {task: both[task] / better[task] for task in both}
    assert min(shares.values()) >= LEAST, shares
    if num_streams == 1:
        assert geometric_mean(shares.values()) >= 1.1, shares


@pytest.mark.parametrize("file", RECORDINGS, ids=lambda of: of.stem)
def test_drafting_is_left_alone_where_rows_cost(file: Any) -> None:
    found = paces(REPLAY["Recording"].load(file), 16, BOTH)
    assert min(found.values()) >= LEAST, found


def test_a_recording_is_what_was_saved(tmp_path: Any) -> None:
    file = RECORDINGS[0]
    recording = REPLAY["Recording"].load(file)
    recording.save(tmp_path / "again.npz")
    again = REPLAY["Recording"].load(tmp_path / "again.npz")
    for name, value in vars(recording).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    lengths = [len(recording.prompt(n)) for n in range(len(recording.task))]
    assert lengths == recording.num_prompt_tokens.tolist()
