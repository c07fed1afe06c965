"""The profile of a step counts every moment once."""

import runpy
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "step_profile.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_the_time_of_a_part_within_is_taken_off(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)

    class Step:
        def outer(self) -> str:
            clock.work(1)
            self.inner()
            self.inner()
            clock.work(2)
            return "done"

        def inner(self) -> None:
            clock.work(10)

    step, stopwatch = Step(), script["Stopwatch"]()
    stopwatch.watch(step, "outer", "outer")
    stopwatch.watch(step, "inner", "inner")
    assert step.outer() == "done"
    assert dict(stopwatch.parts) == {"inner": 20.0, "outer": 3.0}


def test_a_part_that_raises_is_closed(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    stopwatch = script["Stopwatch"]()
    part = stopwatch.part
    with pytest.raises(ZeroDivisionError), part("outer"), part("inner"):
        clock.work(5)
        _ = 1 / 0
    with stopwatch.part("next"):
        clock.work(1)
    assert dict(stopwatch.parts) == {"outer": 0.0, "inner": 5.0, "next": 1.0}
