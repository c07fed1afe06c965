"""Reads the source of a supported vLLM release, without importing it."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_selfspec.engine.versions import vllm_version

VERSIONS = ("0.32.0", "0.33.0")
# Of the releases that are not installed; `make sources`.
SOURCES = Path(__file__).resolve().parents[2] / ".cache" / "vllm-source"


def source_of(version: str) -> Path:
    """The directory that holds the package `vllm` of this version."""
    if vllm_version().split("+")[0] == version:
        spec = importlib.util.find_spec("vllm")
        assert spec is not None and spec.origin is not None
        return Path(spec.origin).parents[1]
    if not (SOURCES / version).exists():
        pytest.skip(f"no source of vLLM {version} here: make sources")
    return SOURCES / version


def signature(root: Path, module: str, target: str) -> tuple[str, ...] | None:
    """Parameter names of a function in the order of `inspect.signature`.

    Args:
        root: The directory that holds the package.
        module: Dotted name of a module.
        target: Attribute path of the function within it.

    Returns:
        The names, or None if there is no such function.
    """
    found = _defined(root, module, target.split("."))
    if not isinstance(found, ast.FunctionDef):
        return None
    args = found.args
    ordered = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return tuple(arg.arg for arg in ordered if arg is not None)


def exists(root: Path, module: str, name: str) -> bool:
    """Whether `from module import name` finds something."""
    return _defined(root, module, [name]) is not None


def _file(root: Path, module: str) -> Path:
    file = root.joinpath(*module.split("."))
    return file / "__init__.py" if file.is_dir() else file.with_suffix(".py")


def _defined(root: Path, module: str, path: list[str]) -> ast.AST | None:
    """The definition of a dotted name, in `module` or where that imports it from."""
    file = _file(root, module)
    if not file.exists():
        return None
    found: ast.AST | None = ast.parse(file.read_text())
    for name in path:
        body = list(_statements(found))
        named = [node for node in body if name in _names(node)]
        if not named:
            source = _imported_from(body, name)
            if source is not None:
                return _defined(root, _absolute(source, module, file), path)
            if _file(root, f"{module}.{name}").exists():
                return ast.parse(_file(root, f"{module}.{name}").read_text())
            return None
        found = named[-1]  # as in a running module, the last definition counts
    return found


def _statements(node: ast.AST | None) -> Iterator[ast.stmt]:
    """The statements of a module or class, those under an `if` or `try` included."""
    for statement in getattr(node, "body", []):
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements(statement)
        else:
            yield statement


def _names(node: ast.stmt) -> list[str]:
    """What a statement binds, imports of names from modules apart."""
    if isinstance(node, ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return [getattr(node, "name", "")]


def _imported_from(body: list[ast.stmt], name: str) -> ast.ImportFrom | None:
    for node in reversed(body):
        if isinstance(node, ast.ImportFrom) and name in [
            alias.asname or alias.name for alias in node.names
        ]:
            return node
    return None


def _absolute(node: ast.ImportFrom, module: str, file: Path) -> str:
    if node.level == 0:
        return node.module or ""
    package = module.split(".")
    drop = node.level - (file.name == "__init__.py")
    return ".".join([*package[: len(package) - drop], node.module or ""])
