"""Writes what `bench` measured: JSON, a Markdown table, and one self-contained page.

One rule: the JSON is the result. Table and page are made from it alone, so they can be
made again from a saved run.
"""

import html
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

Row = dict[str, Any]
Report = dict[str, Any]

LEGEND = (
    "Speed-ups are medians of ratios to plain vLLM on the same prompts, run in turns; "
    "all: their geometric mean over the tasks. bound: what they would be if nothing "
    "but forwards took time, E / (v + k c) with v and c measured in the same run, "
    "prefill counted; of it: the share reached. E: tokens per verification; accepted: "
    "share of the drafted tokens. same text: as plain vLLM's; in its own row, as plain "
    "vLLM's one at a time. extra: weights read beside the target's."
)


def write(document: Report, output: Path, console: Console) -> None:
    """Writes `report.json`, `report.md` and `report.html` into the directory `output`,
    and prints the table."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    (output / "report.md").write_text(markdown(document))
    (output / "report.html").write_text(page(document))
    console.print(Markdown(markdown(document)))
    console.print(f"Written to {output}: report.json, report.md, report.html")


def markdown(document: Report) -> str:
    """One table for each temperature."""
    parts = [heading(document), ""]
    for temperature in temperatures(document):
        parts += [_title(temperature), "", *table(document, temperature), ""]
    return "\n".join([*parts, LEGEND, ""])


def heading(document: Report) -> str:
    """One sentence of provenance."""
    versions = document["versions"]
    size = document["model_bytes_per_step"] / 2e9
    return (
        f"`{document['command']}`, {document['date']}: {document['device']}, "
        f"{document['num_cores']} cores; vLLM {versions['vllm']}, {document['dtype']}, "
        f"model {document['model']} ({size:.2f} G weights a step), "
        f"{document['max_tokens']} tokens a prompt."
    )


def temperatures(document: Report) -> list[float]:
    """In the order they were run."""
    return list(dict.fromkeys(row["temperature"] for row in document["results"]))


def tasks(document: Report) -> list[str]:
    """In the order they were run."""
    return list(dict.fromkeys(row["task"] for row in document["results"]))


def _title(temperature: float) -> str:
    return "**Greedy**" if temperature == 0 else f"**Sampling, T = {temperature:g}**"


def table(document: Report, temperature: float) -> list[str]:
    """Markdown: a row for each load and arm."""
    names = tasks(document)
    has_scores = any(row["quality"] for row in document["results"])
    columns = ["streams", "arm", *names, "all", "E", "accepted", "bound", "of it"]
    columns += ["latency", "same text", "extra"] + (["quality"] if has_scores else [])
    lines = [f"| {' | '.join(columns)} |"]
    lines.append("|" + "|".join("---" if c == "arm" else "---:" for c in columns) + "|")
    for (num_streams, arm), rows in by_arm(document, temperature).items():
        values = [str(num_streams), arm]
        values += [f"{rows[name]['speed_up']:.2f}x" for name in names]
        values += _summary(list(rows.values()), document, arm, has_scores)
        lines.append(f"| {' | '.join(values)} |")
    return lines


def by_arm(
    document: Report, temperature: float
) -> dict[tuple[int, str], dict[str, Row]]:
    """Results by load and arm, then by task."""
    found: dict[tuple[int, str], dict[str, Row]] = defaultdict(dict)
    for row in document["results"]:
        if row["temperature"] == temperature:
            found[row["num_streams"], row["arm"]][row["task"]] = row
    order = [arm["name"] for arm in document["arms"]]
    loads = list(dict.fromkeys(key[0] for key in found))
    return {
        (n, arm): found[n, arm] for n in loads for arm in order if (n, arm) in found
    }


def _summary(
    rows: list[Row], document: Report, arm: str, has_scores: bool
) -> list[str]:
    """The columns that sum up over the tasks."""
    speed_up = geometric_mean(row["speed_up"] for row in rows)
    accepted = [row["acceptance"] for row in rows if row["acceptance"] is not None]
    bounds = [row["bound"] for row in rows if row["bound"] is not None]
    bound = geometric_mean(bounds) if bounds else None
    same = sum(row["same_texts"] for row in rows)
    extra = next(a["extra_bytes"] for a in document["arms"] if a["name"] == arm)
    scores = [value for row in rows for value in row["quality"].values()]
    return [
        f"{speed_up:.2f}x",
        f"{mean(row['tokens_per_verification'] for row in rows):.2f}",
        f"{mean(accepted):.0%}" if accepted else "",
        f"{bound:.2f}x" if bound else "",
        f"{speed_up / bound:.2f}" if bound else "",
        f"{mean(row['latency'] for row in rows):.2f} s",
        f"{same}/{sum(row['texts'] for row in rows)}",
        f"{extra / 2**20:.0f} MiB" if extra else "",
    ] + ([f"{mean(scores):.3f}" if scores else ""] if has_scores else [])


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
th { position: sticky; top: 0; background: #fff; }
tr.ours td { background: #eef6ee; }
.scroll { overflow-x: auto; }
svg { max-width: 100%; height: auto; }
figcaption { color: #555; }
"""


def page(document: Report) -> str:
    """The HTML page: tables and plots, nothing loaded from elsewhere."""
    parts = [f"<p>{_inline(heading(document))}</p>"]
    for temperature in temperatures(document):
        title = _title(temperature).strip("*")
        parts.append(f"<h2>{html.escape(title)}</h2>")
        parts.append(_html_table(table(document, temperature)))
    parts.append(f"<p>{html.escape(LEGEND)}</p>")
    for caption, figure in figures(document):
        parts.append(
            f"<figure>{figure}<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>vllm-selfspec bench</title><style>{STYLE}</style></head>"
        f"<body><h1>vllm-selfspec bench</h1>{''.join(parts)}</body></html>\n"
    )


def _inline(text: str) -> str:
    """Markdown's backticks as code."""
    pieces = html.escape(text).split("`")
    return "".join(
        f"<code>{piece}</code>" if number % 2 else piece
        for number, piece in enumerate(pieces)
    )


def _html_table(lines: list[str]) -> str:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        f"<tr{' class=ours' if 'selfspec' in row[1] else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows[2:]
    )
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def figures(document: Report) -> list[tuple[str, str]]:
    """Captions and SVG of the plots.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    found = [
        (
            f"Speed-up by task, {_title(t).strip('*').lower()}; 1 is plain vLLM.",
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


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _new(rows: int, columns: int, width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _color(arm: str, arms: Sequence[str]) -> Any:
    """Ours in greens, the others apart from them."""
    from matplotlib import colormaps

    ours = [name for name in arms if name.startswith("selfspec")]
    if arm in ours:
        return colormaps["Greens"](0.4 + 0.55 * ours.index(arm) / max(1, len(ours) - 1))
    others = [name for name in arms if name not in ours]
    return colormaps["tab10"]((1, 0, 3, 4, 5, 6, 7, 8, 9)[others.index(arm) % 9])


def _speed_ups(document: Report, temperature: float) -> str:
    """Horizontal bars: a panel for each load, a group of bars for each task."""
    found = by_arm(document, temperature)
    arms = [arm["name"] for arm in document["arms"][1:]]
    names = tasks(document)
    loads = list(dict.fromkeys(n for n, _ in found))
    height = 0.7 + 0.17 * (len(arms) + 1) * len(names)
    figure, axes = _new(1, len(loads), 3.4 * len(loads) + 1, height)
    for axis, num_streams in zip(axes[0], loads, strict=True):
        for index, arm in enumerate(arms):
            rows = found.get((num_streams, arm))
            if rows is None:
                continue
            at = [-(task * (len(arms) + 1) + index) for task in range(len(names))]
            values = [rows[name]["speed_up"] for name in names]
            axis.barh(at, values, color=_color(arm, arms), label=arm)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{num_streams} at a time")
        axis.set_xlabel("speed-up")
        middles = [
            -(t * (len(arms) + 1) + (len(arms) - 1) / 2) for t in range(len(names))
        ]
        axis.set_yticks(middles, names if axis is axes[0][0] else [""] * len(names))
    handles = dict(
        pair[::-1]
        for axis in axes[0]
        for pair in zip(*axis.get_legend_handles_labels(), strict=True)
    )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return _svg(figure)


def _positions(document: Report) -> str:
    """A line for each arm, a panel for each task; greedy, at the lowest load."""
    temperature = temperatures(document)[0]
    found = by_arm(document, temperature)
    lowest = min(n for n, _ in found)
    arms = [arm["name"] for arm in document["arms"][1:]]
    names = tasks(document)
    figure, axes = _new(1, len(names), 3.2 * len(names) + 1, 3.4)
    for axis, name in zip(axes[0], names, strict=True):
        for arm in arms:
            accepted_at = found.get((lowest, arm), {}).get(name, {}).get("accepted_at")
            if accepted_at:
                at = range(1, len(accepted_at) + 1)
                axis.plot(at, accepted_at, ".-", color=_color(arm, arms), label=arm)
        axis.set_title(name)
        axis.set_xlabel("draft position")
        axis.set_ylim(0, 1.02)
        axis.set_xlim(0.5, 8.5)
    axes[0][0].set_ylabel("accepted")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return _svg(figure)


def _predicted(document: Report) -> str:
    """Every result that has a bound, by load."""
    figure, axes = _new(1, 1, 6, 5)
    axis = axes[0][0]
    rows = [row for row in document["results"] if row["bound"]]
    arms = [arm["name"] for arm in document["arms"][1:]]
    markers = dict(
        zip(dict.fromkeys(r["num_streams"] for r in rows), "osD^v<>", strict=False)
    )
    for row in rows:
        axis.plot(
            row["bound"],
            row["speed_up"],
            markers[row["num_streams"]],
            color=_color(row["arm"], arms),
            markersize=4,
        )
    for num_streams, marker in markers.items():
        axis.plot([], [], marker, color="grey", label=f"{num_streams} at a time")
    top = max([1.0, *(max(r["bound"], r["speed_up"]) for r in rows)]) * 1.05
    axis.plot([0, top], [0, top], color="black", linewidth=0.8)
    axis.set_xlabel("bound")
    axis.set_ylabel("measured speed-up")
    axis.legend()
    return _svg(figure)


def _times(document: Report) -> str:
    """Stacked bars of seconds per generated token."""
    figure, axes = _new(1, 1, 8, 0.8 + 0.3 * len(document["steps"]))
    axis = axes[0][0]
    parts = [key for key in document["steps"][0] if key != "arm"]
    left = [0.0] * len(document["steps"])
    names = [row["arm"] for row in document["steps"]]
    for part in parts:
        values = [1000 * row[part] for row in document["steps"]]
        axis.barh(names, values, left=left, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("ms per generated token")
    axis.legend()
    return _svg(figure)
