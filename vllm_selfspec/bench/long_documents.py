"""Long documents, and what is asked of them.

One rule: nothing is shipped or downloaded. They are pieces of Python's own library,
which lies beside every interpreter; another release of Python has others.
"""

import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

MODULES = (
    "argparse",
    "configparser",
    "contextlib",
    "dataclasses",
    "difflib",
    "doctest",
    "enum",
    "functools",
    "inspect",
    "ipaddress",
    "mailbox",
    "optparse",
    "pdb",
    "pickle",
    "pydoc",
    "random",
    "shutil",
    "statistics",
    "subprocess",
    "tarfile",
    "threading",
    "traceback",
    "turtle",
    "typing",
    "zipfile",
)
# How a name is introduced, and what else may be asked about where there is none.
DEFINED = re.compile(r"^ *(?:def|class) ([a-zA-Z]\w{3,})", re.MULTILINE)
WORD = re.compile(r"\b[a-zA-Z]\w{5,}\b")
# What is asked of a document, by task; nothing where it is to be continued.
QUESTIONS = {
    "question": "What is `{name}` in the text above for? Answer in a few sentences.",
    "summary": "Summarise the text above in {number} sentences.",
    "continuation": "",
}
# A token of any tokenizer here has fewer characters of code.
MOST_CHARACTERS = 6
# Characters that continuations of one document are apart.
APART = 300


@cache
def library() -> str:
    """The modules, one after the other."""
    directory = Path(sysconfig.get_paths()["stdlib"])
    files = [directory / f"{name}.py" for name in MODULES]
    return "\n".join(file.read_text("utf-8") for file in files if file.is_file())


def documents(num_characters: int) -> Iterator[str]:
    """The library, cut into pieces."""
    text = library()
    for start in range(0, len(text) - num_characters + 1, num_characters):
        yield text[start : start + num_characters]


def documents_of(num_tokens: int, tokenizer: Any) -> Iterator[str]:
    """The same, each of so many tokens."""
    for text in documents(MOST_CHARACTERS * num_tokens):
        yield tokenizer.decode(tokenizer.encode(text)[:num_tokens])


def asked(task: str, document: str, num: int) -> list[str]:
    """Texts of requests that begin with the same document.

    Args:
        task: One of `QUESTIONS`.
        document: What is asked about.
        num: How many, each with another question or from another place.

    Raises:
        ValueError: If so much cannot be asked of so short a document.
    """
    question = QUESTIONS[task]
    if not question:
        found = [document[: len(document) - APART * i] for i in range(num)]
        found = [text for text in found if text]
    elif "{name}" in question:
        words = [*WORD.findall(document), *DEFINED.findall(document)]
        names = islice(dict.fromkeys(reversed(words)), num)
        found = [f"{document}\n\n{question.format(name=name)}" for name in names]
    else:
        found = [f"{document}\n\n{question.format(number=2 + i)}" for i in range(num)]
    if len(found) < num:
        raise ValueError(
            f"{num} requests must be made of a document, but one of {len(document)} "
            f"characters has {len(found)}: make it longer"
        )
    return found
