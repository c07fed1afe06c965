"""What a search found: a table of the frontier, and plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_selfspec import whole_file
from vllm_selfspec.bench.page import new_plot
from vllm_selfspec.plan.cost import decimal
from vllm_selfspec.plan.skip_set import SUBLAYERS, SkipSet
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.tuning.offline.search import Found
from vllm_selfspec.tuning.score import Score


def frontier(found: Sequence[Found]) -> list[Found]:
    """Plans of which none is both cheaper and more often right at the first token; the
    dearest first."""
    best: list[Found] = []
    for one in sorted(found, key=lambda f: (f.draft_cost, -f.acceptance[0])):
        if not best or one.acceptance[0] > best[-1].acceptance[0]:
            best.append(one)
    return best[::-1]


def show(
    document: dict[str, Any],
    found: Sequence[Found],
    measured: Sequence[tuple[Found, Score]],
    console: Console,
) -> None:
    """Prints the frontier and what was measured."""
    table = Table(title="Frontier: agreement against cost", box=None, pad_edge=False)
    for name in ("c", "first right", "E", "k", "expected"):
        table.add_column(name, justify="right")
    table.add_column("plan", overflow="fold")
    for one in frontier(found):
        table.add_row(*_cells(one), str(one.plan))
    console.print(table)
    table = Table(title="Measured in the engine", box=None, pad_edge=False)
    for name in ("measured", "expected", "first right", "expected", "k"):
        table.add_column(name, justify="right")
    table.add_column("plan", overflow="fold")
    for one, score in measured:
        table.add_row(
            f"{score.speed_up:.2f}x",
            f"{one.speed_up:.2f}x",
            f"{score.walk.acceptance[0]:.0%}",
            f"{one.acceptance[0]:.0%}",
            str(one.k),
            str(one.plan),
        )
    if measured:  # Ctrl-C did not come before
        console.print(table)
    figures = document["figures"]
    console.print(
        f"Best: {_worth(figures)} of plain vLLM with "
        f"{figures['num_speculative_tokens']} draft tokens.",
        style="bold",
    )


def show_memory(found: Sequence[Found], step: StepCost, console: Console) -> None:
    """Prints what more memory brings: plans that are better than all that take less."""
    table = Table(title="Frontier: speed-up against memory", box=None, pad_edge=False)
    for name in ("memory", "of the weights", "expected", "c", "k"):
        table.add_column(name, justify="right")
    table.add_column("plan", overflow="fold")
    best = 0.0
    for one in sorted(found, key=lambda f: (f.plan.extra_bytes(step), -f.speed_up)):
        if one.speed_up > best:
            best, size = one.speed_up, one.plan.extra_bytes(step)
            cells = decimal(size), f"{size / step.total:.0%}", f"{best:.2f}x"
            figures = f"{one.draft_cost:.2f}", str(one.k)
            table.add_row(*cells, *figures, one.plan.outline())
    console.print(table)


def _worth(figures: dict[str, Any]) -> str:
    """As measured, unless Ctrl-C came before."""
    measured = figures.get("measured_speed_up")
    if measured is None:
        return f"{figures['speed_up']:.2f}x, expected,"
    return f"{measured:.2f}x, measured,"


def _cells(one: Found) -> tuple[str, ...]:
    return (
        f"{one.draft_cost:.2f}",
        f"{one.acceptance[0]:.0%}",
        f"{one.tokens_per_verification:.2f}",
        str(one.k),
        f"{one.speed_up:.2f}x",
    )


def write(document: dict[str, Any], found: Sequence[Found], output: Path) -> None:
    """Writes the plot of the frontier with a map of the sublayers, beside `output`."""
    plot, axes = new_plot(2, 1, 7, 6)
    _plot_frontier(axes[0][0], found, document)
    lists, num_layers = document["skip_layers"], document["num_layers"]
    _plot_map(axes[1][0], SkipSet.from_dict(num_layers, lists))
    with whole_file.replacing(output.with_suffix(".svg")) as partial:
        plot.savefig(partial, format="svg")


def _plot_frontier(axis: Any, found: Sequence[Found], document: dict[str, Any]) -> None:
    costs = [one.draft_cost for one in found]
    right = [one.acceptance[0] for one in found]
    dots = axis.scatter(costs, right, c=[one.speed_up for one in found], s=14)
    axis.figure.colorbar(dots, ax=axis, label="expected speed-up")
    best = frontier(found)
    axis.plot(
        [one.draft_cost for one in best],
        [one.acceptance[0] for one in best],
        color="gray",
        linewidth=1,
        zorder=0,
        label="frontier",
    )
    figures = document["figures"]
    axis.scatter(
        [figures["draft_cost"]],
        [figures["acceptance"][0]],
        s=90,
        facecolors="none",
        edgecolors="red",
        label=f"chosen, {_worth(figures)}",
    )
    axis.set_xlabel("c: a draft step over a plain step")
    axis.set_ylabel("share of first draft tokens that are right")
    axis.legend()


def _plot_map(axis: Any, skip_set: SkipSet) -> None:
    layers = range(skip_set.num_layers)
    runs = [[i not in getattr(skip_set, s) for i in layers] for s in SUBLAYERS]
    axis.imshow(runs, cmap="Greens", vmin=0, vmax=1.4, aspect="auto")
    axis.set_yticks(range(len(SUBLAYERS)), SUBLAYERS)
    axis.set_xlabel("layer; what is white is skipped")
    axis.set_xticks(range(0, skip_set.num_layers, max(1, skip_set.num_layers // 20)))
