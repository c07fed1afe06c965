"""Writes the list of files in docs/architecture.md, from their docstrings.

python docs/update_file_list.py
"""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "architecture.md"
START, END = "<!-- files -->", "<!-- /files -->"
FOLDERS = ("vllm_selfspec", "benchmarks", "tests")
# A distribution of its own, which tests install.
LEFT_OUT = ("tests/triton_cpu_stub",)


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if not docstring:
        raise SystemExit(f"every module begins with a docstring, but {path} does not")
    return " ".join(docstring.split("\n\n")[0].split())


def rows_of(folder: Path) -> list[str]:
    """A folder's heading and its files, then those of the folders within it."""
    name = folder.relative_to(REPOSITORY).as_posix()
    files = sorted(folder.glob("*.py"))
    if name in LEFT_OUT:
        return []
    rows = []
    if files:
        about = [summary(file) for file in files if file.name == "__init__.py"]
        rows += [f"### `{name}/`", "", *(f"{text}\n" for text in about)]
        rows += [
            f"- `{file.name}`: {summary(file)}"
            for file in files
            if file.name != "__init__.py"
        ]
        rows += [""]
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        rows += rows_of(inner)
    return rows


def updated(page: str) -> str:
    """`page` with the list as it must be."""
    before, rest = page.split(START)
    after = rest.split(END)[1]
    rows = [row for name in FOLDERS for row in rows_of(REPOSITORY / name)]
    return f"{before}{START}\n" + "\n".join(rows) + f"{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
