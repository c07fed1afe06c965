"""The table of draft sources.

To add one: a file beside this with a class that extends `Source`, and a row; or
`SOURCES.register`, from another package.
"""

from vllm_selfspec.plan.source import ModelSource, Source
from vllm_selfspec.plan.source_context import ContextSource
from vllm_selfspec.plan.source_suffix import SuffixSource
from vllm_selfspec.plan.table import Table

MODEL = ModelSource.name
SOURCES: Table[Source] = Table(
    "source", [ModelSource(), ContextSource(), SuffixSource()]
)
