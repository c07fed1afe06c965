"""Writes what `bench --serve` measured: JSON, a Markdown table, a page with plots.

One rule: the JSON is the result; table and page are made from it alone.
"""

from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from vllm_selfspec import whole_file
from vllm_selfspec.bench.page import (
    color,
    figure,
    legend,
    markdown_table,
    new_plot,
    page,
    paragraph,
    table,
)
from vllm_selfspec.bench.report import provenance

Report = dict[str, Any]
Row = dict[str, Any]

# Of vLLM's serving benchmark, with what they are called in the plots.
PLOTTED = {
    "p50_ttft_ms": "time to first token, median, ms",
    "p50_tpot_ms": "time per output token, median, ms",
    "p99_tpot_ms": "time per output token, 99th percentile, ms",
    "p50_e2el_ms": "latency of a request, median, s",
    "output_throughput": "output tokens per second",
    "request_goodput": "good requests per second",
}


def write(document: Report, output: Path, console: Console) -> None:
    """Writes `serve.json`, `serve.md` and `serve.html` into the directory `output`, and
    prints the table."""
    whole_file.write_json(document, output / "serve.json", indent=1)
    whole_file.write(markdown(document), output / "serve.md")
    whole_file.write(html(document), output / "serve.html")
    _show(markdown(document), console)
    console.print(f"Written to {output}: serve.json, serve.md, serve.html")


def _show(text: str, console: Console) -> None:
    """Prints Markdown: drawn where its tables fit, else as it is, nothing cut off."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    is_wide = console.width > max(map(len, rows), default=0)
    console.print(Markdown(text) if is_wide else text, soft_wrap=not is_wide)


def markdown(document: Report) -> str:
    """Provenance, the table, and what its columns mean."""
    return "\n".join(
        [provenance(document), "", *rows_of(document), "", explanation(document), ""]
    )


def explanation(document: Report) -> str:
    """What the columns mean."""
    limits = " and ".join(
        f"{name.upper()} of at most {limit:g} ms"
        for name, limit in document["goodput"].items()
    )
    repeats = 1 + max((point["repeat"] for point in document["points"]), default=0)
    return (
        f"vLLM's own serving benchmark (`vllm bench serve`): {document['num_prompts']} "
        "requests at each rate, arriving as a Poisson process, the same for every "
        f"method; T = {document['temperature']:g}; medians of {repeats} turns. TPOT "
        "gain and latency gain: plain vLLM's median over the method's, in the same "
        f"turn. Good requests: with {limits}. Identical: outputs identical to plain "
        "vLLM's, whose batches were others."
    )


def summary(document: Report) -> list[Row]:
    """A row for each rate and method: medians over the turns."""
    points = document["points"]
    plain = {
        (point["repeat"], point["rate"]): point
        for point in points
        if point["method"] == document["methods"][0]["name"]
    }
    found = []
    for rate in document["rates"]:
        for method in (method["name"] for method in document["methods"]):
            turns = [p for p in points if (p["method"], p["rate"]) == (method, rate)]
            pairs = [
                (p, plain[p["repeat"], rate])
                for p in turns
                if (p["repeat"], rate) in plain
            ]
            if pairs:
                found.append({"rate": rate, "method": method, **_summary(pairs)})
    return found


def _summary(pairs: list[tuple[Row, Row]]) -> Row:
    """Of the turns of one method at one rate, each with plain vLLM's."""
    turns = [own for own, _ in pairs]
    numbers = {
        key: median(turn[key] for turn in turns)
        for key in turns[0]
        if isinstance(turns[0][key], int | float) and key not in ("repeat", "rate")
    }
    return {
        **numbers,
        "tpot_gain": median(p["p50_tpot_ms"] / own["p50_tpot_ms"] for own, p in pairs),
        "latency_gain": median(
            p["p50_e2el_ms"] / own["p50_e2el_ms"] for own, p in pairs
        ),
        "same_texts": sum(turn["same_texts"] for turn in turns),
        "texts": sum(turn["texts"] for turn in turns),
    }


COLUMNS = (
    "requests/s",
    "method",
    "TTFT",
    "TPOT",
    "TPOT p99",
    "TPOT gain",
    "latency",
    "latency gain",
    "tokens/s",
    "good/s",
    "accepted",
    "identical",
)


def rows_of(document: Report) -> list[str]:
    """A Markdown table: a row for each rate and method."""
    lines = []
    for row in summary(document):
        accepted = row.get("spec_decode_acceptance_rate")
        values = [
            f"{row['rate']:g}",
            row["method"],
            f"{row['p50_ttft_ms']:.0f} ms",
            f"{row['p50_tpot_ms']:.0f} ms",
            f"{row['p99_tpot_ms']:.0f} ms",
            f"{row['tpot_gain']:.2f}x",
            f"{row['p50_e2el_ms'] / 1000:.2f} s",
            f"{row['latency_gain']:.2f}x",
            f"{row['output_throughput']:.1f}",
            f"{row['request_goodput']:.2f}",
            "" if accepted is None else f"{accepted / 100:.0%}",
            f"{row['same_texts']}/{row['texts']}",
        ]
        lines.append(values)
    return markdown_table(COLUMNS, lines)


def html(document: Report) -> str:
    """The page: table and plots."""
    return page(
        "vllm-selfspec bench --serve",
        [
            paragraph(provenance(document)),
            table(rows_of(document)),
            paragraph(explanation(document)),
            figure("Against the rate at which requests arrive.", plots(document)),
        ],
    )


def plots(document: Report) -> Any:
    """A panel for each figure, a line for each method."""
    rows = summary(document)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    plot, axes = new_plot(2, 3, 13, 8)
    for axis, (key, title) in zip(axes.flat, PLOTTED.items(), strict=True):
        scale = 1000 if title.endswith(" s") and key.endswith("_ms") else 1
        for method in methods:
            own = [row for row in rows if row["method"] == method]
            axis.plot(
                [row["rate"] for row in own],
                [row[key] / scale for row in own],
                ".-",
                color=color(method, methods),
                label=method,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("requests per second")
        axis.set_ylim(bottom=0)
    legend(plot, axes[0][:1])
    return plot
