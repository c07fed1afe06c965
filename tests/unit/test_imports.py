"""Imports of the package point one way, and in no circle."""

import ast
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import vllm_selfspec
from helpers.environment import REPOSITORY

ROOT = Path(vllm_selfspec.__file__).parent
NAME = ROOT.name
# Folders and modules, each of which may import those of its own line and above.
ORDER = (
    ("whole_file", "packages"),
    ("plan",),
    ("draft_length",),
    ("config", "chosen_plan", "served_config"),
    ("draft",),
    ("engine",),
    ("bench",),
    ("tuning",),
    ("training",),
    ("cli", "plugin"),
)
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names}
# Of these neither torch nor vLLM is imported, not even within a function.
PURE = ("plan", "draft_length", "config", "chosen_plan", "served_config")
# Imports against the order, all within functions, and why each is needed.
AGAINST_THE_ORDER = {
    ("draft.v1_proposer", "tuning.online.tuner"): "only where 'online' is asked for",
    ("engine.scheduler", "tuning.online.tuner"): "only where 'online' is asked for",
    ("engine.scheduler", "tuning.calibration"): "only at a model's first start",
}
LOADING, LAZY, TYPING = "loading", "lazy", "typing"


class Import(NamedTuple):
    """One imported module; `when` is `LOADING`, `LAZY` or `TYPING`."""

    name: str
    when: str


def imports_of(source: str) -> Iterator[Import]:
    """What `source` imports, wherever it does."""
    waiting: list[tuple[ast.AST, str]] = [(ast.parse(source), LOADING)]
    while waiting:
        node, when = waiting.pop()
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", when)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, when)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when = LAZY
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when = TYPING
        waiting += [(child, when) for child in ast.iter_child_nodes(node)]


def own_name(path: Path) -> str:
    """`draft.view` of a file; `` of the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {own_name(path): path.read_text() for path in ROOT.rglob("*.py")}


def module_of(name: str) -> str | None:
    """The module of ours that is imported by a name; None if it is not ours."""
    if name.split(".")[0] != NAME:
        return None
    own = name.removeprefix(NAME).removeprefix(".")
    while own not in SOURCES:  # the name of something within a module
        own = own.rpartition(".")[0]
    return own


def edges(*kinds: str) -> set[tuple[str, str]]:
    """Which module imports which, both ours."""
    return {
        (module, target)
        for module, source in SOURCES.items()
        for found in imports_of(source)
        if found.when in kinds and (target := module_of(found.name))
    }


def rank(module: str) -> int:
    return RANKS[module.split(".")[0]]


def circle(pairs: set[tuple[str, str]]) -> list[str]:
    """One circle among them, if there is any."""
    graph: dict[str, set[str]] = {}
    for source, target in pairs:
        if source != target:
            graph.setdefault(source, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def folder_of(module: str) -> str:
    """Of a module within a folder; a module of the package itself is its own."""
    return module.rpartition(".")[0] or module


def test_every_module_has_a_place_in_the_order() -> None:
    assert {module.split(".")[0] for module in SOURCES} == {"", *RANKS}
    assert len(SOURCES) > 60


@pytest.mark.parametrize("kind", [LOADING, LAZY, TYPING])
def test_imports_point_to_what_comes_before(kind: str) -> None:
    wrong = {(a, b) for a, b in edges(kind) if a and rank(b) > rank(a)}
    if kind != LOADING:
        wrong -= set(AGAINST_THE_ORDER)
    assert not wrong, f"against the order of folders: {sorted(wrong)}"


def test_what_is_excused_is_there() -> None:
    assert set(AGAINST_THE_ORDER) <= edges(LAZY)


def test_files_load_each_other_in_no_circle() -> None:
    assert not circle(edges(LOADING))


def test_folders_import_each_other_in_no_circle() -> None:
    pairs = edges(LOADING, LAZY, TYPING) - set(AGAINST_THE_ORDER)
    assert not circle({(folder_of(a), folder_of(b)) for a, b in pairs if a})


def test_pure_modules_import_neither_torch_nor_vllm() -> None:
    wrong = {
        (module, found.name)
        for module, source in SOURCES.items()
        if module.split(".")[0] in PURE
        for found in imports_of(source)
        if found.name.split(".")[0] in ("torch", "vllm")
    }
    assert not wrong


def test_a_package_loads_nothing_but_what_is_asked_for() -> None:
    for path in ROOT.rglob("__init__.py"):
        assert not [*imports_of(path.read_text())], path


def test_every_package_is_in_the_wheel() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = {path.parent for path in (REPOSITORY / NAME).rglob("__init__.py")}
    names = {path.relative_to(REPOSITORY).as_posix() for path in packages}
    listed = project["tool"]["setuptools"]["packages"]
    assert {name.replace(".", "/") for name in listed} == names


def test_the_reader_tells_when_an_import_happens() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import a.b\n"
        "try:\n    import c\nexcept ImportError:\n    pass\n"
        "class D:\n    from e import f\n\n    def g(self):\n        from h import i\n"
    )
    assert {*imports_of(source)} == {
        Import("typing.TYPE_CHECKING", LOADING),
        Import("a.b", TYPING),
        Import("c", LOADING),
        Import("e.f", LOADING),
        Import("h.i", LAZY),
    }
    assert circle({("a", "b"), ("b", "c"), ("c", "a"), ("a", "d")})
    assert not circle({("a", "b"), ("b", "c"), ("a", "c"), ("a", "a")})


def test_the_package_runs_nothing_of_the_benchmarks() -> None:
    """What is installed has no such folder; their models are data that it looks for."""
    running = ("runpy", "spec_from_file_location", "exec_module")
    found = [name for name, s in SOURCES.items() if any(word in s for word in running)]
    assert not found
