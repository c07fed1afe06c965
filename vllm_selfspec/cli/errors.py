"""Errors of a command in one line, and the code that it exits with."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vllm_selfspec.bench.serve import ServerError
from vllm_selfspec.bench.tasks import TaskError
from vllm_selfspec.bench.widen import WidenError
from vllm_selfspec.config import ConfigError
from vllm_selfspec.engine import versions
from vllm_selfspec.packages import MissingPackageError
from vllm_selfspec.plan.cost import CheckpointError
from vllm_selfspec.plan.errors import PlanError
from vllm_selfspec.plan.families import UnsupportedModelError
from vllm_selfspec.plan.profile import ProfileError
from vllm_selfspec.training.errors import TextsError, TrainError
from vllm_selfspec.tuning.offline.tune import TuneError
from vllm_selfspec.whole_file import WriteError

# What the user wrote is wrong, like an unknown option; the rest is the model's fault.
USAGE_ERRORS = (ConfigError, PlanError, ProfileError, TaskError, WidenError)
FAILURES = (
    MissingPackageError,
    ServerError,
    TuneError,
    TextsError,
    TrainError,
    WriteError,
)
REFUSALS = (
    UnsupportedModelError,
    CheckpointError,
    versions.UnsupportedVersionError,
)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Without traceback: exits with 1 for a refused model, with 2 for wrong words."""
    try:
        yield
    except FAILURES as error:  # the first with lines of its log
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    except (*USAGE_ERRORS, *REFUSALS) as error:
        message = " ".join(str(error).split())
        typer.echo(f"Error: {message}", err=True)
        code = 2 if isinstance(error, USAGE_ERRORS) else 1
        raise typer.Exit(code) from error
