"""The table of draft sources.

To add one: a file beside this with a class that extends `Source`, and a row. Another
package adds its own by `register`, from a general plugin of vLLM, which runs in every
process.
"""

from vllm_selfspec.plan.source import ModelSource, Source
from vllm_selfspec.plan.source_context import ContextSource
from vllm_selfspec.plan.source_suffix import SuffixSource

MODEL = ModelSource.name
SOURCES: list[Source] = [ModelSource(), ContextSource(), SuffixSource()]


def register(source: Source) -> None:
    """Adds a row; again is idle."""
    if source.name not in {known.name for known in SOURCES}:
        SOURCES.append(source)


def source_named(name: str) -> Source:
    """The row of that name.

    Raises:
        KeyError: If there is none.
    """
    for source in SOURCES:
        if source.name == name:
            return source
    raise KeyError(f"there is no source {name!r}, only {[s.name for s in SOURCES]}")
