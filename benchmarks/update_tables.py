"""Writes the tables of README.md and docs/ from the saved runs in benchmarks/results.

    python benchmarks/update_tables.py

Each table has a place, which names the runs that it is made of; a test fails where a
place holds anything else. The place of a run that is not saved yet says so.
"""

import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from vllm_selfspec.bench import report, serve_report

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
Document = dict[str, Any]
Markdown = Callable[..., str]


@dataclass(frozen=True)
class Table:
    """What stands in one place of a page.

    Attributes:
        page: Path of the page in the repository.
        runs: Paths of the JSON files below `RESULTS` that it is made of; none where it
            is worked out.
        markdown: Makes it, of one document for each run.
        script: That works it out, where no run does.
    """

    page: str
    runs: tuple[str, ...]
    markdown: Markdown
    script: str = ""

    def start(self, name: str) -> str:
        """The comment that opens the place."""
        runs = ", ".join(f"{RESULTS}/{run}" for run in self.runs)
        return f"<!-- {name}: {runs or self.script} -->"

    def text(self) -> str:
        """What belongs there."""
        files = [REPOSITORY / RESULTS / run for run in self.runs]
        missing = [
            run for run, file in zip(self.runs, files, strict=True) if not file.exists()
        ]
        if missing:
            return f"This run is not saved yet: `{RESULTS}/{missing[0]}` is missing."
        return self.markdown(*(json.loads(file.read_text()) for file in files)).strip()


def script(name: str) -> dict[str, Any]:
    """What another script of benchmarks/ defines."""
    return runpy.run_path(str(REPOSITORY / "benchmarks" / name))


SUPPORT = script("support_table.py")
REAL = script("real.py")


def bench(document: Document) -> str:
    """A run of `vllm-selfspec bench`; what its columns mean stands once in the page."""
    return report.markdown(document).replace(report.LEGEND, "")


DEMO, PLAIN_TWIN = "demo, trained to be exited early", "its twin, trained plainly"
QWEN, QWEN_LARGE = "Qwen2.5-Coder-0.5B", "Qwen2.5-Coder-1.5B"
SUFFIX = "vLLM suffix"
PEERS = ("n-grams", "suffix", "draft model")
# Measured on two cores by a run that was not saved.
UNSAVED = ((QWEN, "best skip set of `tune`", "1.05x", "", ""),)


# As it is written, and the method of `real.py` that it comes to.
OF_REAL = (
    ("the bare flag", "the bare flag"),
    ("with `draft_memory` 30%: int4", "int4 and copies"),
)


def speed_ups(
    demo: Document,
    exit_layer: Document,
    qwen: Document,
    qwen_large: Document,
) -> str:
    """The README's rows: a few of each saved run, beside the best of vLLM's own."""
    saved = (
        (demo, DEMO, "exit after layer 3", "selfspec exit_layer 3, goodput"),
        (
            exit_layer,
            PLAIN_TWIN,
            "trained exit layer",
            "selfspec trained exit layer 3, goodput",
        ),
    )
    rows = [
        (
            model,
            draft,
            *(mean_speed_up(run, method, n) for n in (1, 8)),
            _named("suffix", mean_speed_up(run, SUFFIX, 1)),
        )
        for run, model, draft, method in saved
    ]
    real = [
        (model, draft, *(of_real(run, method, n) for n in (1, 8))) + (best_peer(run),)
        for run, model in ((qwen, QWEN), (qwen_large, QWEN_LARGE))
        for draft, method in OF_REAL
        if of_real(run, method, 1)
    ]
    columns = ("model", "draft", "concurrency 1", "concurrency 8", "vLLM's best, 1")
    table: str = SUPPORT["table"](columns, (*real, *UNSAVED, *rows))
    return table


def gpu(*documents: Document) -> str:
    """Medians of ratios by method, task and concurrency."""
    return "\n\n".join(map(_gpu_run, documents))


def _gpu_run(document: Document) -> str:
    ((step, found),) = document["results"].items()
    how = "compiled" if "/compiled/" in step else "nothing compiled"
    cells, streams = found["cells"], document["scale"]["streams"]
    tasks = [*dict.fromkeys(cell.split(", ")[0] for cell in cells)]
    methods = [*next(iter(cells.values()))][1:]  # after plain vLLM
    rows = [
        [method, task, *(_gpu_cell(cells, method, task, num) for num in streams)]
        for method in methods
        for task in sorted(tasks)
    ]
    commit = f", commit {document['commit']}" if "commit" in document else ""
    head = (
        f"{document['model']}; {document['hardware']}, vLLM {document['vllm']}, "
        f"{document['date']}{commit}; T = 0, bfloat16; CUDA graphs, {how}"
    )
    table: str = SUPPORT["table"](("", "", *map(str, streams)), rows)
    return f"{head}:\n\n{table}"


def _gpu_cell(cells: Document, method: str, task: str, num: int) -> str:
    found = cells.get(f"{task}, {num}")
    return f"{found[method]['speed_up']:.2f}x" if found else ""


def of_real(document: Document, method: str, concurrency: int) -> str:
    """Of a run of `real.py`: over code and chat, greedy."""
    found: str = REAL["mean_speed_up"](document, method, concurrency, ("code", "chat"))
    return found


def best_peer(document: Document) -> str:
    """Of vLLM's own methods that were run, the fastest at one request."""
    found = [_named(name, of_real(document, name, 1)) for name in PEERS]
    return max(found, key=lambda text: float(text.split()[-1][:-1]) if text else 0.0)


def _named(method: str, speed_up: str) -> str:
    return f"{method} {speed_up}" if speed_up else ""


def mean_speed_up(document: Document, method: str, concurrency: int) -> str:
    """The geometric mean over the tasks, greedy; empty where that was not run."""
    rows = report.by_method(document, 0).get((concurrency, method))
    if rows is None:
        return ""
    return f"{geometric_mean(row['speed_up'] for row in rows.values()):.2f}x"


def counts(document: Document) -> str:
    """How much the support table shows, in a sentence for each model runner."""
    return "\n".join(
        f"- {runner} runner: {_counted(SUPPORT['rows_of'](document, runner))}"
        for runner in ("V1", "V2")
    )


def _counted(rows: set[tuple[str, str]]) -> str:
    models, requests, engine = (
        sum(kind == wanted for kind, _ in rows)
        for wanted in ("Models", "Requests", "Engine")
    )
    return (
        f"{models} models, {requests} things that a request may ask for, and {engine} "
        "ways to run the engine."
    )


BENCHMARKS = "docs/benchmarks.md"


def _bench(run: str) -> Table:
    return Table(BENCHMARKS, (f"{run}/report.json",), bench)


REAL_RUNS = (
    "real/qwen2.5-coder-0.5b.json",
    "real/qwen2.5-coder-1.5b.json",
    "real/smollm2-135m.json",
)
MIXED_RUNS = ("real/mixed/qwen2.5-coder-0.5b.json",)
# By the name of the place.
TABLES: dict[str, Table] = {
    "speed-ups": Table(
        "README.md",
        (
            "quick/report.json",
            "exit_layer/bench_plain/report.json",
            *REAL_RUNS[:2],
        ),
        speed_ups,
    ),
    "counts": Table("README.md", ("support.json",), counts),
    "support": Table("docs/support.md", ("support.json",), SUPPORT["markdown"]),
    "quick": _bench("quick"),
    "all": _bench("demo"),
    "sampling": _bench("sampling"),
    "plain": _bench("plain"),
    "serve": Table(BENCHMARKS, ("serve/serve.json",), serve_report.markdown),
    "starts": Table(BENCHMARKS, ("starts.json",), script("starts.py")["markdown"]),
    "float32": _bench("float32"),
    "lengths": _bench("draft_length"),
    "real": Table(BENCHMARKS, REAL_RUNS, REAL["markdown"]),
    "mixed": Table(BENCHMARKS, MIXED_RUNS, REAL["markdown"]),
    "twin": Table(BENCHMARKS, ("real/plain-twin.json",), REAL["markdown"]),
    "replay": Table(
        BENCHMARKS, ("replay/replay.json",), script("replay.py")["markdown"]
    ),
    "long": Table(BENCHMARKS, ("real/qwen2.5-coder-0.5b-long.json",), REAL["markdown"]),
    "window_on_paper": Table(
        BENCHMARKS,
        (),
        script("window_on_paper.py")["markdown"],
        "benchmarks/window_on_paper.py",
    ),
    "gpu": Table(
        BENCHMARKS,
        ("gpu/speed-7b-before.json", "gpu/speed-7b.json", "gpu/flag-7b.json"),
        gpu,
    ),
    "seeds": Table(BENCHMARKS, ("seeds.json",), script("seeds.py")["markdown"]),
    "tune": Table(BENCHMARKS, ("tune/tune.json",), script("tune.py")["markdown"]),
    "online": Table(
        BENCHMARKS, ("online/online.json",), script("online.py")["markdown"]
    ),
    "exit_bench_plain": _bench("exit_layer/bench_plain"),
    "exit_bench_demo": _bench("exit_layer/bench_demo"),
    "exit": Table(
        BENCHMARKS, ("exit_layer/demo.json",), script("exit_layers.py")["markdown"]
    ),
    "exit_plain": Table(
        BENCHMARKS, ("exit_layer/plain.json",), script("exit_layers.py")["markdown"]
    ),
}


def updated(path: str, text: str) -> str:
    """The text of a page with its tables as they must be."""
    for name, table in TABLES.items():
        if table.page == path:
            head, rest = text.split(table.start(name))
            _, tail = rest.split(end(name))
            text = f"{head}{table.start(name)}\n\n{table.text()}\n\n{end(name)}{tail}"
    return text


def end(name: str) -> str:
    """The comment that closes a place."""
    return f"<!-- /{name} -->"


if __name__ == "__main__":
    for path in sorted({table.page for table in TABLES.values()}):
        file = REPOSITORY / path
        file.write_text(updated(path, file.read_text()))
