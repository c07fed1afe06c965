"""Writes the README's numbers from benchmarks/results/quick/report.json.

    python benchmarks/update_readme.py

The figures are those of one run of `make bench-quick`; a test fails when they are not.
"""

import json
from pathlib import Path
from typing import Any

from vllm_selfspec.bench import report as bench_report

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "benchmarks" / "results" / "quick" / "report.json"
START, END = "<!-- numbers: ", "<!-- /numbers -->"


def updated(text: str, report: dict[str, Any]) -> str:
    """`text` with the numbers of `report` in their place."""
    head, rest = text.split(START, 1)
    mark, rest = rest.split("\n", 1)
    _, tail = rest.split(END, 1)
    numbers = bench_report.markdown(report).strip()
    return f"{head}{START}{mark}\n\n{numbers}\n\n{END}{tail}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(), json.loads(RESULTS.read_text())))
