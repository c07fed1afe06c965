"""The support table holds what tests showed, and nothing that one of them did not."""

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "support_table.py"
MODEL, REQUEST = ("Models", "A"), ("Requests", "seeds")
script = runpy.run_path(str(SCRIPT))


def results(path: Path, *rows: tuple[str, str, bool], words: str = "") -> Path:
    """As `--support` of conftest leaves them."""
    path.write_text(json.dumps([(*row, words) for row in rows]))
    return path


def test_a_row_with_a_failed_test_is_not_shown(tmp_path: Path) -> None:
    file = results(tmp_path / "V1", (*MODEL, True), (*REQUEST, False))
    assert script["shown"](file, ()) == {MODEL}
    assert script["shown"](file, [REQUEST]) == {MODEL}, "nor if it was before"


def test_rows_that_were_not_run_stay(tmp_path: Path) -> None:
    file = results(tmp_path / "V1", (*MODEL, True))
    assert script["shown"](file, [REQUEST]) == {MODEL, REQUEST}


def test_what_is_said_of_v2_is_kept_with_the_rows(tmp_path: Path) -> None:
    file = results(tmp_path / "V1", (*MODEL, True), words="smaller")
    assert script["words_for_v2"](file) == {"A": "smaller"}


def test_a_run_that_broke_off_ends_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="see .*support-V2.log"):
        script["shown"](tmp_path / "V2", ())


def test_the_table_is_what_was_saved() -> None:
    rows = {"V1": {MODEL, REQUEST, ("Refused", "this: that")}, "V2": {MODEL}}
    document = {
        "date": "today",
        "vllm": "0",
        "hardware": "here",
        "rows": script["merged"](rows),
        "in V2": {"A": "a smaller one", "seeds": "for a reason"},
    }
    assert script["rows_of"](document, "V2") == rows["V2"]
    assert script["rows_of"](document, "V1") == rows["V1"]
    table = script["markdown"](document)
    for line in (
        "| Models | A | ✓ | ✓ a smaller one |",
        "| Requests | seeds | ✓ | for a reason |",
        "| this | that |",
    ):
        assert line in table.splitlines()


@pytest.mark.skipif(
    not (script["TRITON"] / "installed").exists(), reason="needs .venv-v2: make test"
)
def test_ctrl_c_leaves_the_old_table_and_no_process() -> None:
    saved = script["OUTPUT"].read_bytes()
    logs = [script["LOGS"] / f"support-{name}.log" for name in ("V1", "V2")]
    for log in logs:
        log.unlink(missing_ok=True)
    command = [sys.executable, str(SCRIPT), "-k", "test_random_load"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not all(log.exists() and log.read_text() for log in logs):
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    started = children.read_text().split()
    assert len(started) == len(logs)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert "support.json is as it was" in error
    assert script["OUTPUT"].read_bytes() == saved
    assert not any(Path(f"/proc/{child}").exists() for child in started)
