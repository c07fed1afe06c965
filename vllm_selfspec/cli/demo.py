"""`vllm-selfspec demo`: plain vLLM and selfspec, compared by text and speed."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_selfspec.cli.errors import errors_in_one_line
from vllm_selfspec.config import DEFAULT_NUM_SPECULATIVE_TOKENS
from vllm_selfspec.packages import raise_if_no_vllm
from vllm_selfspec.plan.profile import MAX_NUM_SPECULATIVE_TOKENS

EPILOG = "Example: vllm-selfspec demo my_model --max-tokens 64"


def demo(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model directory, or name on the Hugging Face Hub. "
            "Default: the demo model of the repository, widened."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to generate per prompt.")
    ] = 64,
    num_speculative_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_NUM_SPECULATIVE_TOKENS,
            metavar="K",
            help="Tokens drafted per verification.",
        ),
    ] = DEFAULT_NUM_SPECULATIVE_TOKENS,
    repeats: Annotated[
        int, typer.Option(min=1, metavar="N", help="Run everything N times.")
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Write a report, as `bench` does."
        ),
    ] = None,
) -> None:
    """Generate with plain vLLM and with selfspec, and compare text and speed: a short
    `bench` of the bare flag and two plans."""
    from vllm_selfspec.bench.demo import run_demo

    with errors_in_one_line():
        raise_if_no_vllm("demo")
        run_demo(
            model=model,
            max_tokens=max_tokens,
            num_speculative_tokens=num_speculative_tokens,
            repeats=repeats,
            output=output,
        )
