"""Every figure that is saved says how it was measured, by one function."""

import sys

import pytest

from helpers.environment import REPOSITORY
from vllm_selfspec.bench.provenance import command_line, provenance


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/usr/bin/vllm-selfspec", "vllm-selfspec tune 'a model'"),
        ("/a/vllm_selfspec/cli/__main__.py", "vllm-selfspec tune 'a model'"),
        ("/a/benchmarks/tune.py", "python benchmarks/tune.py tune 'a model'"),
    ],
)
def test_a_command_can_be_given_again_from_the_repository(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "tune", "a model"])
    assert command_line() == said


def test_what_nobody_asked_for_has_no_command() -> None:
    asked, unasked = provenance("make support"), provenance(None)
    assert asked.pop("command") == "make support"
    assert asked == unasked
    assert all(asked.values()), "each of them is known"


@pytest.mark.parametrize(
    ("reads", "place"),
    [
        ("date.today()", "bench/provenance.py"),
        ("_cpu_name()", "engine/hardware.py"),
        ("get_device_name(", "engine/hardware.py"),
    ],
)
def test_date_and_machine_are_read_in_one_place(reads: str, place: str) -> None:
    files = [
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("vllm_selfspec", "benchmarks")
        for path in (REPOSITORY / folder).rglob("*.py")
        if reads in path.read_text().replace(f"def {reads}", "")
    ]
    assert files == [f"vllm_selfspec/{place}"]
