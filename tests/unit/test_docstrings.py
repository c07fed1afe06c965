"""What docstrings promise to raise exists."""

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_selfspec

PACKAGE = Path(vllm_selfspec.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# A line of a section that begins with names of classes: `ConfigError, PlanError: If`.
NAMES = re.compile(r"^\s+((?:[A-Z]\w+(?:, )?)+): ", re.MULTILINE)


def raised(docstring: str) -> Iterator[str]:
    """The classes that a docstring's `Raises:` names."""
    _, found, section = docstring.partition("Raises:\n")
    if found:
        section = re.split(r"\n\s*\n", section)[0]
        for names in NAMES.findall(section):
            yield from names.split(", ")


def docstrings(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, DOCUMENTED):
            yield ast.get_docstring(node, clean=False) or ""


CLASSES = {
    node.name
    for module in MODULES
    for node in ast.walk(ast.parse(module.read_text()))
    if isinstance(node, ast.ClassDef)
} | {*vars(builtins)}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_every_class_that_is_said_to_be_raised_exists(module: Path) -> None:
    said = {name for text in docstrings(module) for name in raised(text)}
    assert said <= CLASSES, f"{said - CLASSES} is no class of ours or of Python's"


def test_a_class_that_does_not_exist_would_be_noticed() -> None:
    text = "Does.\n\n    Raises:\n        XyzError, ValueError: If so.\n    "
    assert [*raised(text)] == ["XyzError", "ValueError"]
    assert sum(len([*raised(t)]) for m in MODULES for t in docstrings(m)) > 60
