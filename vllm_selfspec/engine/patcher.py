"""Attaches a seam to vLLM, once, as soon as vLLM imports the module it names.

A seam whose target is missing or has another signature is not attached; it is kept in
`problems`, and plain vLLM goes on working.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import wrapt

from vllm_selfspec.engine import versions

Function = Callable[..., Any]
ATTACHED = "__selfspec_seam__"

# Findings that make selfspec unusable in this process: "target: what is wrong".
problems: list[str] = []


class SeamError(RuntimeError):
    """vLLM is not as the seams expect it."""


@dataclass(frozen=True)
class Seam:
    """One rebind.

    Attributes:
        module: vLLM module that holds the target.
        target: Attribute path within it.
        parameters: Names of the target's parameters, as recorded.
        replace: Makes the replacement from the original function.
        why: The reason it is needed.
        remove_when: What upstream must offer for the row to go.
        kind: What the target is: a function, a staticmethod or a property.
        is_entry: Whether the user comes in here; installed for any vLLM version, so
            that an unsupported one is refused in words.
        in_registry: Whether vLLM's registry of speculative methods does the same, where
            there is one; the row is then left out.
        only_in: The vLLM releases that need the row; None for every one.
    """

    module: str
    target: str
    parameters: tuple[str, ...]
    replace: Callable[[Function], Function]
    why: str
    remove_when: str
    kind: type = FunctionType
    is_entry: bool = False
    in_registry: bool = False
    only_in: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.module}:{self.target}"

    def is_for(self, vllm: str) -> bool:
        """Whether `vllm`, a version such as `0.32.1+cpu`, needs the row."""
        return self.only_in is None or versions.release(vllm) in self.only_in


def when_imported(seam: Seam) -> None:
    """Attaches `seam` now, or when vLLM imports its module."""
    if seam.module in sys.modules:
        attach(seam, sys.modules[seam.module])
    else:
        wrapt.register_post_import_hook(functools.partial(attach, seam), seam.module)


def attach(seam: Seam, module: ModuleType) -> None:
    """Rebinds the target of `seam` in `module`; idle if that was done before."""
    *path, attribute = seam.target.split(".")
    try:
        owner = functools.reduce(getattr, path, module)
        found = vars(owner)[attribute]
    except (AttributeError, KeyError):
        _report(f"{seam.name} does not exist")
        return
    if not isinstance(found, seam.kind):
        _report(f"{seam.name} is a {type(found).__name__}, not a {seam.kind.__name__}")
        return
    function = _function_of(found)
    if hasattr(function, ATTACHED):
        return
    parameters = tuple(inspect.signature(function).parameters)
    if parameters != seam.parameters:
        _report(f"{seam.name} has parameters {parameters}, not {seam.parameters}")
        return
    setattr(owner, attribute, _rebuilt(seam, found, function))


def _report(problem: str) -> None:
    if problem not in problems:
        problems.append(problem)


def _function_of(found: Any) -> Any:
    if isinstance(found, property):
        return found.fget
    return found.__func__ if isinstance(found, staticmethod) else found


def _rebuilt(seam: Seam, found: Any, function: Function) -> Any:
    """The replacement, of the same kind as what was found (property, static, plain)."""
    if isinstance(found, property):
        new = seam.replace(found)  # type: ignore[arg-type]
        setattr(new.fget, ATTACHED, seam)  # type: ignore[attr-defined]
        return new
    replacement = functools.wraps(function)(seam.replace(function))
    setattr(replacement, ATTACHED, seam)
    return staticmethod(replacement) if isinstance(found, staticmethod) else replacement
