"""Writes the README's numbers from benchmarks/results/demo.json.

    python benchmarks/update_readme.py

The figures are those of one run of `make demo`; a test fails when they are not.
"""

import json
from pathlib import Path
from typing import Any

from vllm_selfspec.demo import COLUMNS, Result, cells

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "benchmarks" / "results" / "demo.json"
START, END = "<!-- numbers: ", "<!-- /numbers -->"


def numbers(report: dict[str, Any]) -> str:
    """The Markdown between the two marks."""
    versions = report["versions"]
    lines = [
        f"`{report['command']}`, {report['date']}: {report['cpu']}, "
        f"{report['num_cores']} cores; vLLM {versions['vllm']}, bf16, greedy, "
        f"{report['max_tokens']} tokens a prompt; the demo model widened to "
        f"{report['model_bytes_per_step'] / 2e9:.2f} B parameters. One process, in "
        "turns, medians of ratios.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'|'.join('---' if c == 'plan' else '---:' for c in COLUMNS)}|",
    ]
    for row in report["results"]:
        lines.append(f"| {' | '.join(cells(Result(**row)))} |")
    return "\n".join(lines)


def updated(text: str, report: dict[str, Any]) -> str:
    """`text` with the numbers of `report` in their place."""
    head, rest = text.split(START, 1)
    mark, rest = rest.split("\n", 1)
    _, tail = rest.split(END, 1)
    return f"{head}{START}{mark}\n\n{numbers(report)}\n\n{END}{tail}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(), json.loads(RESULTS.read_text())))
