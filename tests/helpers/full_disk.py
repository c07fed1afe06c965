"""A disk without room, by a limit on the size of files: `OSError` as on a full one."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def full_disk(num_bytes: int = 0) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes meanwhile.

    Python ignores the signal that comes with it. Pipes have no such limit, but what
    pytest captures is a file: print nothing, or allow for it.
    """
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
