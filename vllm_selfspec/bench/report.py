"""Writes what `bench` measured: JSON, a Markdown table, and one self-contained page.

One rule: the JSON is the result. Table and page are made from it alone, so they can be
made again from a saved run.
"""

from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_selfspec import whole_file
from vllm_selfspec.bench.methods import PLAIN
from vllm_selfspec.bench.page import (
    color,
    figure,
    heading,
    legend,
    markdown_table,
    new_plot,
    page,
    paragraph,
    table,
)
from vllm_selfspec.config import METHOD

Row = dict[str, Any]
Report = dict[str, Any]

LEGEND = (
    "Speed-ups are medians of ratios to plain vLLM on the same prompts, run in turns; "
    "all: their geometric mean over the tasks. E: tokens per verification; accepted: "
    "share of the drafted tokens; v and c: cost of a verification and of a draft step "
    "over a plain step, at full batches. bound: what the speed-up would be if nothing "
    "but forwards took time, E / (v + k c) added up over all forwards of the same run, "
    "prefill included; share: how much of the bound was reached. identical: outputs "
    "identical to plain vLLM's; in its own row, to its outputs one at a time. extra: "
    "weights read beside the target's."
)


LEGEND_SHOWN = (
    "speed-up: median of ratios to plain vLLM on the same prompts, run in turns. E: "
    "tokens per verification; accepted: share of the drafted tokens. bound: what the "
    "speed-up would be if nothing but forwards took time; share: how much of it was "
    "reached. identical: outputs identical to plain vLLM's; in its own row, to its "
    "outputs one at a time: in bf16 near-ties flip when a step has other rows."
)


def write(document: Report, output: Path, console: Console) -> None:
    """Writes `report.json`, `report.md` and `report.html` into the directory `output`,
    and says so."""
    write_json(document, output)
    whole_file.write(markdown(document), output / "report.md")
    whole_file.write(html(document), output / "report.html")
    console.print(f"Written to {output}: report.json, report.md, report.html")


def write_json(document: Report, output: Path) -> None:
    """Writes `report.json` alone: what there is so far."""
    whole_file.write_json(document, output / "report.json", indent=1)


# Of `rows_of`, what a terminal has room for.
SHOWN = ("concurrency", "method", "all", "E", "accepted", "bound", "share", "identical")


def show(document: Report, console: Console) -> None:
    """Prints the main columns."""
    for temperature in temperatures(document):
        printed = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        columns, rows = columns_and_rows(document, temperature)
        for name in SHOWN:
            justify: Any = "left" if name == "method" else "right"
            header = {"all": "speed-up"}.get(name, name)
            printed.add_column(header, justify=justify, overflow="fold")
        for row in rows:
            values = dict(zip(columns, row, strict=True))
            is_plain = values["method"] == PLAIN
            if is_plain and row is not rows[0]:
                printed.add_section()
            is_faster = not is_plain and float(values["all"].rstrip("x")) > 1
            values["method"] = values["method"].removeprefix(f"{METHOD} ")
            printed.add_row(
                *(values[name] for name in SHOWN), style="green" if is_faster else ""
            )
        console.print(f"{_title(temperature)}, {', '.join(tasks(document))}:")
        console.print(printed)
    console.print(f"\n{LEGEND_SHOWN}", style="dim")


def markdown(document: Report) -> str:
    """One table for each temperature."""
    parts = [provenance(document), ""]
    for temperature in temperatures(document):
        title = f"**{_title(temperature)}**"
        parts += [title, "", *rows_of(document, temperature), ""]
    return "\n".join([*parts, LEGEND, ""])


def provenance(document: Report) -> str:
    """One sentence: what was run, and on what."""
    size = document["model_bytes_per_step"] / 2e9
    return (
        f"`{document['command']}`, {document['date']}: {document['hardware']}, "
        f"{document['num_cores']} cores; vLLM {document['vllm']}, {document['dtype']}, "
        f"model {document['model']} ({size:.2f} G weights a step), "
        f"{document['max_tokens']} tokens a prompt"
        f"{'.' if document.get('is_complete', True) else '; stopped before its end.'}"
    )


def temperatures(document: Report) -> list[float]:
    """In the order they were run."""
    return list(dict.fromkeys(row["temperature"] for row in document["results"]))


def tasks(document: Report) -> list[str]:
    """In the order they were run."""
    return list(dict.fromkeys(row["task"] for row in document["results"]))


def _title(temperature: float) -> str:
    return "Greedy" if temperature == 0 else f"Sampling, T = {temperature:g}"


def rows_of(document: Report, temperature: float) -> list[str]:
    """A Markdown table: a row for each concurrency and method."""
    return markdown_table(*columns_and_rows(document, temperature))


def columns_and_rows(
    document: Report, temperature: float
) -> tuple[list[str], list[list[str]]]:
    """The cells of that table, and the names of its columns."""
    names = tasks(document)
    has_scores = any(row["quality"] for row in document["results"])
    columns = ["concurrency", "method", *names, "all", "E", "accepted", "v", "c"]
    columns += ["bound", "share", "latency", "identical", "extra"]
    columns += ["quality"] if has_scores else []
    lines = []
    for (num_streams, method), rows in by_method(document, temperature).items():
        values = [str(num_streams), method]
        values += [_speed_up(rows.get(name)) for name in names]
        values += _summary(list(rows.values()), document, method)
        values += [_quality(list(rows.values()))] if has_scores else []
        lines.append(values)
    return columns, lines


def _speed_up(row: Row | None) -> str:
    """Shows nothing where Ctrl-C came before it was run."""
    return "" if row is None else f"{row['speed_up']:.2f}x"


def by_method(
    document: Report, temperature: float
) -> dict[tuple[int, str], dict[str, Row]]:
    """Results by load and method, then by task."""
    found: dict[tuple[int, str], dict[str, Row]] = defaultdict(dict)
    for row in document["results"]:
        if row["temperature"] == temperature:
            found[row["num_streams"], row["method"]][row["task"]] = row
    order = [method["name"] for method in document["methods"]]
    loads = list(dict.fromkeys(key[0] for key in found))
    return {
        (n, method): found[n, method]
        for n in loads
        for method in order
        if (n, method) in found
    }


def _summary(rows: list[Row], document: Report, method: str) -> list[str]:
    """The columns that sum up over the tasks."""

    def over(key: str, average: Any, form: str) -> str:
        values = [row[key] for row in rows if row[key] is not None]
        return format(average(values), form) if values else ""

    extra = next(a["extra_bytes"] for a in document["methods"] if a["name"] == method)
    same, texts = (sum(row[key] for row in rows) for key in ("same_texts", "texts"))
    bound = over("bound", geometric_mean, ".2f")
    return [
        over("speed_up", geometric_mean, ".2f") + "x",
        over("tokens_per_verification", mean, ".2f"),
        over("acceptance", mean, ".0%"),
        *_costs(document, rows[0]["num_streams"], method),
        f"{bound}x" if bound else "",
        over("share_of_bound", geometric_mean, ".2f"),
        over("latency", mean, ".2f") + " s",
        f"{same}/{texts}",
        f"{extra / 2**20:.0f} MiB" if extra else "",
    ]


def _costs(document: Report, num_streams: int, method: str) -> list[str]:
    """v and c."""
    for row in document["costs"]:
        if (row["num_streams"], row["method"]) == (num_streams, method):
            return ["" if row[key] is None else f"{row[key]:.2f}" for key in "vc"]
    return ["", ""]


def _quality(rows: list[Row]) -> str:
    scores = [value for row in rows for value in row["quality"].values()]
    return f"{mean(scores):.3f}" if scores else ""


def html(document: Report) -> str:
    """The page: tables and plots."""
    parts = [paragraph(provenance(document))]
    for temperature in temperatures(document):
        parts += [heading(_title(temperature)), table(rows_of(document, temperature))]
    parts.append(paragraph(LEGEND))
    parts += [figure(caption, plot) for caption, plot in figures(document)]
    return page("vllm-selfspec bench", parts)


def figures(document: Report) -> list[tuple[str, Any]]:
    """Captions and plots.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    found = [
        (
            f"Speed-up by task, {_title(t).lower()}; 1 is plain vLLM.",
            _speed_ups(document, t),
        )
        for t in temperatures(document)
    ]
    found.append(("Share of drafts accepted at each position.", _positions(document)))
    found.append(
        (
            "Predicted (bound) against measured speed-up; below the line is overhead.",
            _predicted(document),
        )
    )
    if document.get("steps"):
        found.append(("Where the time of a run goes, in one stream.", _times(document)))
    return found


def _speed_ups(document: Report, temperature: float) -> Any:
    """Horizontal bars: a panel for each load, a group of bars for each task."""
    found = by_method(document, temperature)
    methods = [method["name"] for method in document["methods"][1:]]
    names = tasks(document)
    loads = list(dict.fromkeys(n for n, _ in found))
    height = 0.7 + 0.17 * (len(methods) + 1) * len(names)
    plot, axes = new_plot(1, len(loads), 3.4 * len(loads) + 1, height)
    for axis, num_streams in zip(axes[0], loads, strict=True):
        for index, method in enumerate(methods):
            rows = found.get((num_streams, method))
            if rows is None:
                continue
            at = [
                -(task * (len(methods) + 1) + index)
                for task, name in enumerate(names)
                if name in rows
            ]
            values = [rows[name]["speed_up"] for name in names if name in rows]
            axis.barh(at, values, color=color(method, methods), label=method)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{num_streams} at a time")
        axis.set_xlabel("speed-up")
        middles = [
            -(t * (len(methods) + 1) + (len(methods) - 1) / 2)
            for t in range(len(names))
        ]
        axis.set_yticks(middles, names if axis is axes[0][0] else [""] * len(names))
    legend(plot, axes[0])
    return plot


def _positions(document: Report) -> Any:
    """A line for each method, a panel for each task; greedy, at the lowest load."""
    temperature = temperatures(document)[0]
    found = by_method(document, temperature)
    lowest = min(n for n, _ in found)
    methods = [method["name"] for method in document["methods"][1:]]
    names = tasks(document)
    plot, axes = new_plot(1, len(names), 3.2 * len(names) + 1, 3.4)
    for axis, name in zip(axes[0], names, strict=True):
        for method in methods:
            accepted_at = (
                found.get((lowest, method), {}).get(name, {}).get("accepted_at")
            )
            if accepted_at:
                at = range(1, len(accepted_at) + 1)
                axis.plot(
                    at, accepted_at, ".-", color=color(method, methods), label=method
                )
        axis.set_title(name)
        axis.set_xlabel("draft position")
        axis.set_ylim(0, 1.02)
        axis.set_xlim(0.5, 8.5)
    axes[0][0].set_ylabel("accepted")
    legend(plot, axes[0])
    return plot


def _predicted(document: Report) -> Any:
    """Every result that has a bound, by load."""
    plot, axes = new_plot(1, 1, 6, 5)
    axis = axes[0][0]
    rows = [row for row in document["results"] if row["bound"]]
    methods = [method["name"] for method in document["methods"][1:]]
    markers = dict(
        zip(dict.fromkeys(r["num_streams"] for r in rows), "osD^v<>", strict=False)
    )
    for row in rows:
        axis.plot(
            row["bound"],
            row["speed_up"],
            markers[row["num_streams"]],
            color=color(row["method"], methods),
            markersize=4,
        )
    for num_streams, marker in markers.items():
        axis.plot([], [], marker, color="grey", label=f"{num_streams} at a time")
    top = max([1.0, *(max(r["bound"], r["speed_up"]) for r in rows)]) * 1.05
    axis.plot([0, top], [0, top], color="black", linewidth=0.8)
    axis.set_xlabel("bound")
    axis.set_ylabel("measured speed-up")
    axis.legend()
    return plot


def _times(document: Report) -> Any:
    """Stacked bars of seconds per generated token."""
    plot, axes = new_plot(1, 1, 8, 0.8 + 0.3 * len(document["steps"]))
    axis = axes[0][0]
    parts = [key for key in document["steps"][0] if key != "method"]
    left = [0.0] * len(document["steps"])
    names = [row["method"] for row in document["steps"]]
    for part in parts:
        values = [1000 * row[part] for row in document["steps"]]
        axis.barh(names, values, left=left, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("ms per generated token")
    axis.legend()
    return plot
