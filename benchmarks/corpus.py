"""Text for the demo model: Python's own standard library, source and documentation.

One rule: what is training text and what is held out depends on nothing but the file's
name, so a prompt cut from a held-out file was never seen in training on any machine.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tables of code points, generated parsers and deliberately broken sources: megabytes of
# text that teach a language model nothing.
EXCLUDED_PARTS = frozenset(
    {
        "site-packages",
        "__pycache__",
        "encodings",
        "lib2to3",
        "bad_coding",
        "cjkencodings",
    }
)
MAX_FILE_BYTES = 400_000
HELD_OUT_PERCENT = 4


def stdlib_files() -> list[Path]:
    """Every readable source file of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if not EXCLUDED_PARTS.intersection(path.relative_to(root).parts)
        and path.stat().st_size <= MAX_FILE_BYTES
        and path.name != "topics.py"
    )


def is_held_out(name: str) -> bool:
    """Whether the text called `name` is kept away from training."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def texts(held_out: bool) -> Iterator[tuple[str, str]]:
    """Yields `(name, text)` of the training or of the held-out part."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in stdlib_files():
        name = path.relative_to(root).as_posix()
        if is_held_out(name) != held_out:
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a test file in another encoding
    for name, text in documentation().items():
        if is_held_out(name) == held_out:
            yield name, text


def documentation() -> dict[str, str]:
    """The language reference that ships with `pydoc`, one text per topic."""
    from pydoc_data.topics import topics

    return {f"topics/{name}": text for name, text in sorted(topics.items())}
