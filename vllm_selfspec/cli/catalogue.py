"""`vllm-selfspec catalogue`: the plans that ship."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def catalogue(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the profiles as JSON.")
    ] = False,
) -> None:
    """List the plans that ship, which 'auto' takes for the models they are named by."""
    from vllm_selfspec.plan.catalogue import DIRECTORY, entries

    if as_json:
        found = {name: entry.model_dump() for name, entry in entries().items()}
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("model", "layers", "plan", "found by"):
        table.add_column(column, overflow="fold")
    for entry in entries().values():
        num_layers = entry.num_layers or 0
        plan = entry.plan(num_layers)
        table.add_row(entry.model, str(num_layers), plan.outline(), entry.note)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"Files: {DIRECTORY}", style="dim")
