"""No module of the package, and no function in it, is too long to be read at once."""

import ast
from pathlib import Path

import vllm_selfspec

ROOT = Path(vllm_selfspec.__file__).parent
SOURCES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in ROOT.rglob("*.py")}
MAX_LINES_OF_A_MODULE, MAX_LINES_OF_A_FUNCTION = 400, 60


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of its statements: neither of the signature nor of the docstring, in which the
    options of a command are told."""
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(
        getattr(first.value, "value", None), str
    )
    statements = function.body[has_docstring:]
    if not statements:
        return 0
    return (function.end_lineno or 0) - statements[0].lineno + 1


def test_modules_are_short() -> None:
    lengths = {name: len(text.splitlines()) for name, text in SOURCES.items()}
    assert max(lengths.values()) > 300, "found the modules"
    long = {name: n for name, n in lengths.items() if n >= MAX_LINES_OF_A_MODULE}
    assert not long, f"split these by their nouns: {long}"


def test_functions_are_short() -> None:
    lengths = {
        f"{name}:{node.name}": lines_of(node)
        for name, text in SOURCES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert max(lengths.values()) > 40, "found the functions"
    long = {name: n for name, n in lengths.items() if n >= MAX_LINES_OF_A_FUNCTION}
    assert not long, f"give parts of these a name: {long}"


def test_only_statements_count() -> None:
    signature = "def f(\n    a,\n    b,\n):\n"
    docstring = '    """One.\n\n    Two."""\n'
    (function,) = ast.parse(f"{signature}{docstring}    x = 1\n\n    return x\n").body
    assert isinstance(function, ast.FunctionDef)
    assert lines_of(function) == 3
