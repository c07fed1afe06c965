"""Writes the four task sets that ship with the package, from Python's own library.

    python benchmarks/make_tasks.py        # vllm_selfspec/bench/data/*.jsonl

All of it is text that the models of the benchmarks were not trained on
(`corpus.is_held_out`): source files, docstrings and the language reference of Python,
under the PSF license. Prompts are cut at random with a seed; the same Python version
gives the same files.

- summarization: a document, and its beginning once more; what follows copies.
- code: a piece of a source file up to the start of a line.
- chat: a question about a documented function, as messages.
- text: a piece of prose.
"""

import ast
import json
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus import texts

OUTPUT = Path(__file__).resolve().parents[1] / "vllm_selfspec" / "bench" / "data"
NUM_PROMPTS = 56
SEED = 20261121
REFERENCE_CHARACTERS = 400
# Short, because a CPU takes seconds to prefill a page.
DOCUMENT_CHARACTERS = (300, 700)
CODE_CHARACTERS = (120, 400)
PROSE_CHARACTERS = (80, 400)
COPY_START_CHARACTERS = 60

EXCLUDED = {"locale.py"}  # for the most part one long table

QUESTIONS = (
    "What does `{name}` in {file} do?",
    "Explain `{name}` from {file} in a few sentences.",
    "When would I use `{name}`, which is in {file}?",
    "Please document `{name}` ({file}).",
)


def sources_of(held_out: bool) -> dict[str, str]:
    """Text by name, that of tests last: the library itself reads better."""
    found = sorted(texts(held_out), key=lambda item: ("test" in item[0], item[0]))
    return {
        name: text
        for name, text in found
        if len(text) > 2 * REFERENCE_CHARACTERS and name not in EXCLUDED
    }


def docstrings(sources: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """`(file, name, docstring)` of every documented function and class."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for file, source in sources.items():
        if not file.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield file, node.name, text


def summarization(
    sources: dict[str, str], rng: random.Random, num: int
) -> list[dict[str, Any]]:
    """Documents whose beginning is repeated, for a model to go on with."""
    found = []
    for number in range(num):
        name, text, start = _cut(sources, rng, DOCUMENT_CHARACTERS)
        length = rng.randint(*DOCUMENT_CHARACTERS)
        document = textwrap.dedent(text[start : start + length]).strip()
        begin, rest = document[:COPY_START_CHARACTERS], document[COPY_START_CHARACTERS:]
        found.append(
            {
                "id": f"summarization/{number}",
                "prompt": f"{document}\n\n# The same once more:\n\n{begin}",
                "reference": rest[:REFERENCE_CHARACTERS],
                "source": name,
            }
        )
    return found


def code(sources: dict[str, str], rng: random.Random, num: int) -> list[dict[str, Any]]:
    """Pieces of source files, cut at lines."""
    modules = {name: text for name, text in sources.items() if name.endswith(".py")}
    return [
        _continuation("code", number, modules, rng, CODE_CHARACTERS)
        for number in range(num)
    ]


def text(sources: dict[str, str], rng: random.Random, num: int) -> list[dict[str, Any]]:
    """Pieces of prose: the language reference and long docstrings."""
    prose = {n: t for n, t in sources.items() if not n.endswith(".py")}
    for file, name, docstring in docstrings(sources):
        if len(docstring) > 2 * REFERENCE_CHARACTERS:
            prose[f"{file}:{name}"] = docstring
    return [
        _continuation("text", number, prose, rng, PROSE_CHARACTERS)
        for number in range(num)
    ]


def chat(sources: dict[str, str], rng: random.Random, num: int) -> list[dict[str, Any]]:
    """Questions about functions, answered by their docstrings."""
    known = [item for item in docstrings(sources) if len(item[2]) > 60]
    found = []
    for number, (file, name, docstring) in enumerate(rng.sample(known, num)):
        question = rng.choice(QUESTIONS).format(name=name, file=file)
        found.append(
            {
                "id": f"chat/{number}",
                "messages": [{"role": "user", "content": question}],
                "reference": docstring[:REFERENCE_CHARACTERS],
                "source": file,
            }
        )
    return found


def _cut(
    sources: dict[str, str], rng: random.Random, characters: tuple[int, int]
) -> tuple[str, str, int]:
    """A random text, the longer the likelier, and the start of a line in it."""
    names = list(sources)
    name = rng.choices(names, [min(len(sources[n]), 20_000) for n in names])[0]
    whole = sources[name]
    last = max(1, len(whole) - characters[1] - REFERENCE_CHARACTERS)
    return name, whole, whole.rfind("\n", 0, rng.randrange(last)) + 1


def _continuation(
    task: str,
    number: int,
    sources: dict[str, str],
    rng: random.Random,
    characters: tuple[int, int],
) -> dict[str, Any]:
    """A piece of text to go on with, ending at the end of a word or line."""
    name, whole, start = _cut(sources, rng, characters)
    end = start + rng.randint(*characters)
    end = max(whole.rfind("\n", start, end), whole.rfind(" ", start, end), start + 20)
    return {
        "id": f"{task}/{number}",
        "prompt": whole[start:end],
        "reference": whole[end : end + REFERENCE_CHARACTERS],
        "source": name,
    }


TASKS = (summarization, code, chat, text)


def main() -> None:
    """Write one file a task."""
    sources = sources_of(held_out=True)
    for make in TASKS:
        rows = make(sources, random.Random(f"{SEED} {make.__name__}"), NUM_PROMPTS)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path = OUTPUT / f"{make.__name__}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path.name}: {len(rows)} prompts, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
