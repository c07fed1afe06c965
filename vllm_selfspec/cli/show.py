"""`vllm-selfspec show`: what a draft would run, and how much faster that can be."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_selfspec.cli.errors import errors_in_one_line
from vllm_selfspec.cli.options import json_object, parse_skip_layers
from vllm_selfspec.cli.preview import Preview

EPILOG = """Example: vllm-selfspec show my_model --skip-layers '{"mlp": [3, 4]}'"""


def show(
    model: Annotated[
        str, typer.Argument(help="Model directory, or name on the Hugging Face Hub.")
    ],
    skip_layers: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="'auto' (the default), a skip set as JSON, or the path of a JSON "
            "profile.",
        ),
    ] = None,
    exit_layer: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draft with layers 0 to N-1 instead."),
    ] = None,
    trained_exit_layer: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Draft with a trained exit layer."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="Any keys, as under vLLM's --speculative-config."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the same as JSON.")
    ] = False,
) -> None:
    """Show what a draft of MODEL would run, and how much faster that can be.

    Reads config.json and the headers of the weights; loads no weights.
    """
    with errors_in_one_line():
        keys: dict[str, Any] = {} if config is None else json_object("--config", config)
        if skip_layers is not None:
            keys["skip_layers"] = parse_skip_layers(skip_layers)
        if exit_layer is not None:
            keys["exit_layer"] = exit_layer
        if trained_exit_layer is not None:
            keys["trained_exit_layer"] = trained_exit_layer
        preview = Preview.of(model, keys)
    if as_json:
        typer.echo(json.dumps(preview.to_dict(), indent=2))
    else:
        preview.print(Console(highlight=False))
