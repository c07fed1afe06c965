"""The command `vllm-selfspec`: its subcommands, each from a file of its own.

One rule: loading these modules imports neither torch nor vLLM; a subcommand that needs
them imports them itself.
"""

from typing import Annotated

import typer

from vllm_selfspec import __version__
from vllm_selfspec.cli import bench, catalogue, demo, show, train_exit, tune
from vllm_selfspec.engine import versions

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the script `vllm-selfspec`."""
    app()


def _print_version(is_asked: bool) -> None:
    if not is_asked:
        return
    found = versions.vllm_version()
    wanted = " or ".join(f"{v}.x" for v in versions.SUPPORTED_VLLM)
    is_supported = versions.is_supported(found)
    verdict = "supported" if is_supported else f"not supported: install {wanted}"
    typer.echo(f"vllm-selfspec {__version__}")
    typer.echo(f"vLLM {found}, {verdict}")
    raise typer.Exit


@app.callback(epilog="Example: vllm-selfspec show Qwen/Qwen3-8B --exit-layer 12")
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the versions of vllm-selfspec and vLLM, and whether they fit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Self-speculative decoding for vLLM: the same text faster, no second model."""


app.command(epilog=show.EPILOG)(show.show)
app.command(epilog=demo.EPILOG)(demo.demo)
app.command(epilog=bench.EPILOG)(bench.bench)
app.command(epilog=tune.EPILOG)(tune.tune)
app.command("train-exit", epilog=train_exit.EPILOG)(train_exit.train_exit)
app.command()(catalogue.catalogue)
