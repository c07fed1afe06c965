"""The look of a report: one HTML page, its tables, and plots as SVG within it.

One rule: a page loads nothing from elsewhere.
"""

import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 92rem; margin: 2rem auto;
       padding: 0 1rem; color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0;
        font-size: 13px; white-space: nowrap; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
th { position: sticky; top: 0; background: #fff; }
tr.ours td { background: #eef6ee; }
.scroll { overflow-x: auto; }
svg { max-width: 100%; height: auto; }
figcaption { color: #555; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of pieces of HTML."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def paragraph(text: str) -> str:
    """Text, with Markdown's backticks as code."""
    pieces = html.escape(text).split("`")
    inner = "".join(
        f"<code>{piece}</code>" if number % 2 else piece
        for number, piece in enumerate(pieces)
    )
    return f"<p>{inner}</p>"


def heading(text: str) -> str:
    """Of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; all columns but `method` are numbers."""
    sides = ["---" if name == "method" else "---:" for name in columns]
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(sides)}|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def table(lines: Sequence[str]) -> str:
    """A Markdown table as HTML; its second column names methods, ours are marked."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        f"<tr{' class=ours' if 'selfspec' in row[1] else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows[2:]
    )
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def figure(caption: str, plot: Any) -> str:
    """A matplotlib figure as SVG, with its caption."""
    text = io.StringIO()
    plot.savefig(text, format="svg", bbox_inches="tight")
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def new_plot(rows: int, columns: int, width: float, height: float) -> Any:
    """A matplotlib figure and its axes, `[rows][columns]`; sizes in inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    plot = Figure(figsize=(width, height), layout="constrained")
    return plot, plot.subplots(rows, columns, squeeze=False)


def color(method: str, methods: Sequence[str]) -> Any:
    """Ours in greens, plain vLLM in black, the others apart from them."""
    from matplotlib import colormaps

    ours = [name for name in methods if name.startswith("selfspec")]
    if method in ours:
        return colormaps["Greens"](
            0.4 + 0.55 * ours.index(method) / max(1, len(ours) - 1)
        )
    others = [name for name in methods if name not in ours and name != "plain vLLM"]
    if method not in others:
        return "black"
    return colormaps["tab10"]((1, 0, 3, 4, 5, 6, 7, 8, 9)[others.index(method) % 9])


def legend(plot: Any, axes: Sequence[Any]) -> None:
    """One legend below all `axes`, each label once."""
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    plot.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
