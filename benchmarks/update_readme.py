"""Writes the README's numbers from saved runs in benchmarks/results.

    python benchmarks/update_readme.py

Each table is that of one run, named in its first line; a test fails when it is not.
"""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_selfspec.bench import report, serve_report

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "benchmarks" / "results"
Markdown = Callable[[dict[str, Any]], str]


def markdown_of(script: str) -> Markdown:
    """What a script of benchmarks/ makes of its run."""
    found: Markdown = runpy.run_path(str(REPOSITORY / "benchmarks" / script))[
        "markdown"
    ]
    return found


# By the name of the place in the README: the run, and what is made of it.
TABLES: dict[str, tuple[str, Markdown]] = {
    "support": ("support.json", markdown_of("support_table.py")),
    "quick": ("quick/report.json", report.markdown),
    "all": ("demo/report.json", report.markdown),
    "sampling": ("sampling/report.json", report.markdown),
    "plain": ("plain/report.json", report.markdown),
    "lengths": ("draft_length/report.json", report.markdown),
    "serve": ("serve/serve.json", serve_report.markdown),
    "float32": ("float32/report.json", report.markdown),
    "tune": ("tune/tune.json", markdown_of("tune.py")),
    "online": ("online/online.json", markdown_of("online.py")),
    "exit_bench_plain": ("exit_layer/bench_plain/report.json", report.markdown),
    "exit_bench_demo": ("exit_layer/bench_demo/report.json", report.markdown),
    "exit": ("exit_layer/demo.json", markdown_of("exit_heads.py")),
    "exit_plain": ("exit_layer/plain.json", markdown_of("exit_heads.py")),
    "budget": ("exit_layer/budget.json", markdown_of("exit_budget.py")),
}


def updated(text: str) -> str:
    """`text` with the figures of the saved runs in their places."""
    for name, (path, markdown) in TABLES.items():
        start, end = f"<!-- {name}: benchmarks/results/{path} -->", f"<!-- /{name} -->"
        if start not in text:
            continue
        head, rest = text.split(start, 1)
        _, tail = rest.split(end, 1)
        figures = markdown(json.loads((RESULTS / path).read_text())).strip()
        text = f"{head}{start}\n\n{figures}\n\n{end}{tail}"
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
