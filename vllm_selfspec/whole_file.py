"""Files that are written whole or not at all.

One rule: until all of the new content is there, a file is what it was, whatever ends
the writing: a kill, a full disk, a limit on the size of files. What a write that failed
has left beside it is removed.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger("vllm.selfspec")  # below vLLM's logger, so it is shown

_logged: set[str] = set()  # kinds of files that this process has failed to write


class WriteError(OSError):
    """A file that could not be written; it is what it was before."""


@contextmanager
def replacing(file: Path, syncs: bool = True) -> Iterator[Path]:
    """Yields a path to write to; the file there takes the place of `file` at the end.

    Args:
        file: Its directory is made where it is missing.
        syncs: Whether to wait until the disk has the content. A file system may find
            only then that there is no room, and after a loss of power it may know the
            new name and not the content. That the name itself is on disk is not waited
            for: without it the old file is there, which is whole too.

    Raises:
        WriteError: For every `OSError`; others go through. The old file is kept.
    """
    file = Path(os.path.realpath(file))  # a link stays one
    is_replaced = os.path.isfile(file) or not os.path.exists(file)
    # A pipe or a device holds nothing. With the process's number, because another may
    # be writing the same file.
    name = f"{file.name}.{os.getpid()}.partial" if is_replaced else file.name
    partial = file.with_name(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if is_replaced:
            _move(partial, file, syncs)
    except OSError as error:
        raise WriteError(
            f"{str(file)!r} must be written whole, but that failed ({error}); it is as "
            "it was: make room there, or choose another place"
        ) from error
    finally:
        if is_replaced:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def make_directory(directory: Path) -> None:
    """Makes a directory, and those above it, where they are missing.

    Raises:
        WriteError: If that fails.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(
            f"{str(directory)!r} must be a directory to write to, but cannot be made "
            f"({error}): choose another place"
        ) from error


def _move(partial: Path, file: Path, syncs: bool) -> None:
    if syncs:
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
    partial.replace(file)


def write(content: bytes | str, file: Path, syncs: bool = True) -> None:
    """Writes all of a file; arguments and errors as of `replacing`."""
    with replacing(file, syncs) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(document: Mapping[str, Any], file: Path, indent: int = 2) -> None:
    """The same for a JSON document."""
    write(f"{json.dumps(document, indent=indent)}\n", file)


def write_if_possible(
    content: bytes | str,
    file: Path,
    what: str,
    failed_writes: Counter[str],
    syncs: bool = True,
) -> None:
    """Writes a file while serving, which a full disk is no reason to stop.

    Args:
        content: Of the file.
        file: To be written.
        what: Names such files in the log and in `failed_writes`.
        failed_writes: Counts failures; the first of each kind in a process is logged.
        syncs: As of `replacing`.
    """
    try:
        write(content, file, syncs)
    except OSError as error:
        count_failure(what, error, failed_writes)


def count_failure(what: str, error: OSError, failed_writes: Counter[str]) -> None:
    """Counts a failed write while serving, and logs the first of its kind."""
    failed_writes[what] += 1
    if what not in _logged:
        _logged.add(what)
        logger.warning(
            "selfspec serves on without its %s: %s. From now on failures are only "
            "counted, in vllm:selfspec_failed_writes",
            what,
            error,
        )
