"""`Result`: what the demo measured of one plan, and the table of all."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Result:
    """What was measured of one plan at one number of streams."""

    plan: str
    num_streams: int
    draft_share: float
    k: int
    tokens_per_second: float = 0.0
    speed_up: float = 0.0
    speed_up_spread: tuple[float, float] = (0.0, 0.0)
    acceptance: float = 0.0
    tokens_per_verification: float = 0.0
    bound: float = 0.0
    num_same: int = 0
    num_texts: int = 0
    ratios: list[float] = field(default_factory=list)

    @property
    def share_of_bound(self) -> float:
        return self.speed_up / self.bound if self.bound else 0.0


COLUMNS = (
    "concurrency",
    "plan",
    "c",
    "accepted",
    "E",
    "tokens/s",
    "speed-up",
    "bound",
    "share",
    "identical",
)
LEGEND = (
    "c: share of the model's weights that a draft step reads.",
    "E: tokens per verification; accepted: share of the drafted tokens.",
    "bound: E / (1 + k c). It takes verifying k + 1 tokens to cost one step, as it",
    "does while reading the weights is what takes the time: about so for one request",
    "at a time here, not for eight.",
    "speed-up: median of ratios to plain vLLM on the same prompt, run in turns.",
    "share: how much of the bound was reached.",
    "identical: outputs identical to plain vLLM's; in its own row, to its outputs one",
    "at a time. In bf16 near-ties flip when a step has other rows; in float32 all are",
    "identical.",
)


def cells(result: Result) -> tuple[str, ...]:
    """One row of the table."""
    head = (str(result.num_streams), result.plan)
    rate = f"{result.tokens_per_second:.1f}"
    same = f"{result.num_same}/{result.num_texts}"
    if not result.k:
        return (*head, "", "", "1.00", rate, "1.00x", "", "", same)
    return (
        *head,
        f"{result.draft_share:.2f}",
        f"{result.acceptance:.0%}",
        f"{result.tokens_per_verification:.2f}",
        rate,
        f"{result.speed_up:.2f}x",
        f"{result.bound:.2f}x",
        f"{result.share_of_bound:.2f}",
        same,
    )


def print_results(results: list[Result], console: Console) -> None:
    """The table, and what its columns mean."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in COLUMNS:
        table.add_column(
            name, justify="left" if name == "plan" else "right", no_wrap=True
        )
    for result in results:
        is_start = result.k == 0 and result is not results[0]
        if is_start:
            table.add_section()
        style = "green" if result.speed_up > 1 else ""
        table.add_row(*cells(result), style=style)
    console.print(table)
    console.print()
    for line in LEGEND:
        console.print(line, style="dim")
