"""What a training came to: a table, and the loss curve as a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_selfspec import whole_file
from vllm_selfspec.bench.page import new_plot

CURVE, PLOT = "loss.json", "loss.svg"
COLUMNS = (
    "N",
    "shared head",
    "untrained",
    "trained",
    "E",
    "k",
    "c",
    "expected",
    "without",
)
SMOOTHED_OVER = 50  # steps at most


def write_curve(curve: Sequence[float], directory: Path) -> None:
    """Writes the loss of every step, and a plot of it."""
    content = {"by_step": [round(value, 5) for value in curve]}
    whole_file.write(json.dumps(content) + "\n", directory / CURVE)
    plot, axes = new_plot(1, 1, 7, 4)
    axis = axes[0][0]
    steps = np.arange(1, len(curve) + 1)
    axis.plot(steps, curve, color="lightgray", linewidth=1, label="of a step")
    width = max(1, min(SMOOTHED_OVER, len(curve) // 10))
    smooth = np.convolve(curve, np.ones(width) / width, "valid")
    axis.plot(steps[width - 1 :], smooth, color="green", label=f"mean of {width}")
    axis.set_xlabel("step")
    axis.set_ylabel("KL divergence from the target, nats a token")
    axis.legend()
    with whole_file.replacing(directory / PLOT) as partial:
        plot.savefig(partial, format="svg")


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints what was measured on held-out texts.

    Args:
        rows: The `held_out` of a card's `training`, with `exit_layer`.
        console: To print to.
    """
    table = Table(
        title="Agreement with the target on held-out text", box=None, pad_edge=False
    )
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["exit_layer"]),
            *(f"{row[name]['all']:.1%}" for name in ("before", "untrained", "after")),
            f"{row['tokens_per_verification']:.2f}",
            str(row["num_speculative_tokens"]),
            f"{row['draft_cost']:.2f}",
            f"{row['speed_up']:.2f}x",
            f"{row['shared_head']['speed_up']:.2f}x",
        )
    console.print(table)
    console.print(
        "shared head: the target's norm and LM head after N layers; untrained: with "
        "its last layer between. E, k: tokens a verification, at the best draft "
        "length; c: bytes of a draft step over a plain step's; expected: "
        "E / (1 + k c); without: of the shared head",
        style="dim",
    )
