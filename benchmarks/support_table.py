"""Which models, requests and deployments are shown to work, by the tests themselves?

    python benchmarks/support_table.py && python benchmarks/update_tables.py

Runs every test that is marked as the proof of a row of the support table, with
vLLM's V1 model runner and, under Triton's interpreter, with V2; both at once, as each
is bound by one core. A row is shown where a test of it passed and none failed. Most of
an hour on two cores.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pytest
import typer

from vllm_selfspec.bench.provenance import provenance

REPOSITORY = Path(__file__).resolve().parents[1]
OUTPUT = REPOSITORY / "benchmarks" / "results" / "support.json"
TRITON = REPOSITORY / ".venv-v2"  # beside vLLM's CPU build it would break the V1 runner
PATHS = filter(None, [os.environ.get("PYTHONPATH")])  # the user's own
LOGS = REPOSITORY / ".cache"
REFUSED = "Refused"
KINDS = ("Models", "Requests", "Engine", REFUSED)
Row = tuple[str, str]


@dataclass(frozen=True)
class Runner:
    """One of vLLM's model runners, and how its tests are run.

    Attributes:
        name: Of its column.
        marks: What pytest is to select.
        environment: Beside the usual.
    """

    name: str
    marks: str
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, results: Path, only: str) -> subprocess.Popen[str]:
        """Runs the tests; what they show is then in `results`."""
        command = [sys.executable, "-m", "pytest", "-v", "-m", self.marks]
        return subprocess.Popen(
            [*command, "-k", only, "--support", str(results)],
            cwd=REPOSITORY,
            env={**os.environ, "SELFSPEC_TEST_ALL": "shown", **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # one interruption ends it and all it started
        )


RUNNERS = (
    Runner("V1", "shows"),
    Runner(
        "V2",
        "shows and v2",
        {
            "PYTHONPATH": os.pathsep.join([str(TRITON), *PATHS]),
            "TRITON_INTERPRET": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "1",
        },
    ),
)


def follow(runner: Runner, process: subprocess.Popen[str]) -> int:
    """Prints a line a test and keeps the rest; returns pytest's exit status."""
    assert process.stdout is not None
    with (LOGS / f"support-{runner.name}.log").open("w", buffering=1) as log:
        for line in process.stdout:
            log.write(line)
            if line.rstrip().endswith("%]"):
                print(f"{runner.name}  {line.rstrip()}", flush=True)
    status = process.wait()
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status


def run_tests(folder: Path, only: str) -> dict[str, int]:
    """Both runners' tests at once; pytest's exit status of each."""
    LOGS.mkdir(exist_ok=True)
    started: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(len(RUNNERS)) as pool:
        try:
            for runner in RUNNERS:
                started.append(runner.start(folder / runner.name, only))
            statuses = pool.map(follow, RUNNERS, started)
            names = [runner.name for runner in RUNNERS]
            return dict(zip(names, statuses, strict=True))
        except KeyboardInterrupt:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)
            raise


def shown(results: Path, before: Iterable[Row]) -> set[Row]:
    """The rows that are shown by now, of these `results` and those of `before`."""
    if not results.exists():
        sys.exit(f"pytest broke off: see {LOGS / f'support-{results.name}.log'}")
    found = dict.fromkeys(before, True)
    for kind, what, passed, _ in json.loads(results.read_text()):
        found[kind, what] = passed
    return {row for row, passed in found.items() if passed}


def words_for_v2(results: Path) -> dict[str, str]:
    """What V2's place says of a row: how the test is smaller, or why not there."""
    return {what: words for _, what, _, words in json.loads(results.read_text())}


def rows_of(document: dict[str, Any], runner: str) -> set[Row]:
    """What is shown with a model runner."""
    return {
        (kind, what)
        for kind, rows in document.get("rows", {}).items()
        for what, runners in rows.items()
        if runner in runners
    }


def merged(rows: dict[str, set[Row]]) -> dict[str, dict[str, list[str]]]:
    """By kind and row: the model runners that have it."""
    every = sorted(set().union(*rows.values()))
    return {
        kind: {
            row[1]: [runner for runner in rows if row in rows[runner]]
            for row in every
            if row[0] == kind
        }
        for kind in KINDS
    }


def markdown(document: dict[str, Any]) -> str:
    """The support table, and what is refused."""
    names = [runner.name for runner in RUNNERS]
    words = document.get("in V2", {})
    checked = [
        (kind, what, *places(runners, words.get(what, "")))
        for kind in KINDS
        if kind != REFUSED
        for what, runners in document["rows"][kind].items()
    ]
    refused = [what.split(": ", 1) for what in document["rows"][REFUSED]]
    run = (
        f"By the tests, {document['date']}: vLLM {document['vllm']}, "
        f"{document['hardware']}."
    )
    tables = [table(("", "", *names), checked), table((REFUSED, "because"), refused)]
    return "\n\n".join([run, *tables])


def places(runners: Sequence[str], words_for_v2: str) -> list[str]:
    """A row's places in the columns of the model runners."""
    return [
        ("✓ " * (runner.name in runners) + words_for_v2 * (runner.name == "V2")).strip()
        for runner in RUNNERS
    ]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    rule = ["---"] * len(columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def failures(runner: str) -> list[str]:
    """What pytest says of them at the end."""
    log = (LOGS / f"support-{runner}.log").read_text().splitlines()
    return [line for line in log if line.startswith(("FAILED", "ERROR"))]


def main(
    only: Annotated[
        str,
        typer.Option(
            "-k",
            metavar="EXPRESSION",
            help="Only tests whose names match, as pytest's -k; other rows stay.",
        ),
    ] = "",
) -> None:
    """Writes benchmarks/results/support.json: which rows of the support table
    the tests show, by model runner.

    Prints a line a test; whole logs are in .cache/support-V1.log and -V2.log. Stopped
    with Ctrl-C, it leaves the file as it was.
    """
    if not (TRITON / "installed").exists():
        sys.exit("the V2 runner's tests need Triton, in .venv-v2: run make support")
    before = json.loads(OUTPUT.read_text()) if only and OUTPUT.exists() else {}
    with TemporaryDirectory() as folder:
        try:
            statuses = run_tests(Path(folder), only)
        except KeyboardInterrupt:
            sys.exit(f"stopped; {OUTPUT.name} is as it was")
        rows = {
            name: shown(Path(folder) / name, rows_of(before, name)) for name in statuses
        }
        words = before.get("in V2", {})
        for name in statuses:
            words |= words_for_v2(Path(folder) / name)
    document = {
        **provenance("make support"),
        "rows": merged(rows),
        "in V2": {what: said for what, said in sorted(words.items()) if said},
    }
    partial = OUTPUT.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    partial.replace(OUTPUT)
    for name, found in rows.items():
        print(f"{name}: {len(found)} rows", *failures(name), sep="\n  ")
    sys.exit(max(statuses.values()))


if __name__ == "__main__":
    typer.run(main)
