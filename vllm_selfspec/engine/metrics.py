"""`MetricsCollector`: what the engines of a server count, as Prometheus metrics.

One rule: it reads `draft.stats`'s files when it is asked, and counts nothing. The
directory is made by the first process and known to those it starts; a file of anything
else in it is passed over.
"""

import atexit
import logging
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from pydantic import BaseModel, Field, NonNegativeFloat

from vllm_selfspec import whole_file
from vllm_selfspec.draft.stats import DIRECTORY
from vllm_selfspec.plan.keys import describe
from vllm_selfspec.plan.profile import MAX_NUM_SPECULATIVE_TOKENS
from vllm_selfspec.plan.source_context import MAX_COPIED

logger = logging.getLogger("vllm.selfspec")  # below vLLM's logger, so it is shown

PREFIX = "vllm:selfspec_"


@cache
def share_directory() -> "MetricsCollector":
    """Makes the directory for this process and all that it starts, and shows what is
    written there at vLLM's `/metrics`. Once a process; one that was started by another
    that serves has a directory of its own."""
    import prometheus_client

    os.environ.pop(DIRECTORY, None)  # that of the process that started this one
    failed_writes: Counter[str] = Counter()
    directory = _new_directory(failed_writes)
    if directory is not None:
        os.environ[DIRECTORY] = str(directory)
        atexit.register(_remove, str(directory), os.getpid())
    collector = MetricsCollector(directory, failed_writes)
    try:
        prometheus_client.REGISTRY.register(collector)
    except ValueError as error:  # another has these names
        logger.warning("selfspec's metrics are not shown at /metrics: %s", error)
    return collector


def _new_directory(failed_writes: Counter[str]) -> Path | None:
    """One for temporary files; None where there is no room for any."""
    try:
        return Path(tempfile.mkdtemp(prefix="selfspec-"))
    except OSError as error:
        whole_file.count_failure("metrics directory", error, failed_writes)
        return None


def _remove(directory: str, pid: int) -> None:
    if os.getpid() == pid:  # not a child that was forked
        shutil.rmtree(directory, ignore_errors=True)


# Beyond that a number is damage: it may not fit into a float, nor buckets into memory.
Length = Annotated[int, Field(ge=0, le=max(MAX_NUM_SPECULATIVE_TOKENS, MAX_COPIED))]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class Snapshot(BaseModel):
    """`DraftStats.to_dict`, as it was read; a file of anything else is none."""

    model_name: str
    lengths: dict[Length, Count]
    steps: dict[str, Count]
    drafted: dict[str, Count]
    accepted: dict[str, Count]
    drafted_at: dict[str, dict[Length, Count]]
    accepted_at: dict[str, dict[Length, Count]]
    stops: dict[str, Count]
    undrafted: dict[str, Count]
    draft_seconds: NonNegativeFloat
    gauges: dict[str, float]
    failed_writes: dict[str, Count]


class MetricsCollector:
    """Prometheus metrics of all engines that write to a directory."""

    def __init__(
        self, directory: Path | None, failed_writes: Mapping[str, int] | None = None
    ) -> None:
        """Shows what is in a directory, if there is one, and this process's failures to
        write."""
        self._directory, self._failed_writes = directory, failed_writes or {}
        self._passed_over: set[Path] = set()

    def collect(self) -> Iterator[Any]:
        """Called by `prometheus_client` for every scrape."""
        snapshots = [*self._snapshots()]
        yield from families(snapshots)
        failed = [snapshot.failed_writes for snapshot in snapshots]
        yield _failures([*failed, self._failed_writes])

    def _snapshots(self) -> Iterator[Snapshot]:
        if self._directory is None:
            return
        for file in sorted(self._directory.glob("*.json")):
            try:
                yield Snapshot.model_validate_json(file.read_bytes())
            except OSError:  # gone, with its engine
                continue
            except ValueError as error:
                self._pass_over(file, error)

    def _pass_over(self, file: Path, error: ValueError) -> None:
        """Once a file; it is asked for again at every scrape."""
        if file not in self._passed_over:
            self._passed_over.add(file)
            logger.warning("selfspec shows no metrics of %s: %s", file, describe(error))


@dataclass(frozen=True)
class _Counts:
    """One of `Snapshot`'s counters, as Prometheus shows it."""

    of: str
    name: str
    help: str
    label: str
    by_position: str = ""  # the same by position, too


COUNTS = (
    _Counts("steps", "steps", "Decode steps by what was planned after them.", "kind"),
    _Counts(
        "drafted",
        "source_draft_tokens",
        "Draft tokens that were verified, by where they came from.",
        "source",
        "drafted_at",
    ),
    _Counts(
        "accepted",
        "source_accepted_tokens",
        "Draft tokens that were accepted, by where they came from.",
        "source",
        "accepted_at",
    ),
    _Counts("stops", "stops", "Rows that stopped drafting, by reason.", "reason"),
    _Counts(
        "undrafted",
        "undrafted",
        "Requests that verification does not carry, and steps without drafts for them.",
        "what",
    ),
)


def families(snapshots: Sequence[Snapshot]) -> list[Any]:
    """The metrics, added up over the snapshots of each model."""
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    lengths = HistogramMetricFamily(
        PREFIX + "draft_length",
        "Draft tokens that a request had verified in a step.",
        labels=["model_name"],
    )
    counters = {
        one: CounterMetricFamily(
            PREFIX + one.name, one.help, labels=["model_name", one.label]
        )
        for one in COUNTS
    }
    at = {
        one: CounterMetricFamily(
            f"{PREFIX}{one.name}_per_pos",
            f"{one.help[:-1]}, and position.",
            labels=["model_name", one.label, "position"],
        )
        for one in COUNTS
        if one.by_position
    }
    seconds = CounterMetricFamily(
        PREFIX + "draft_seconds", "Time of draft steps.", labels=["model_name"]
    )
    beliefs = GaugeMetricFamily(
        PREFIX + "controller",
        "What the draft-length controller believes at present.",
        labels=["model_name", "what"],
    )
    for model, own in _by_model(snapshots).items():
        for what, value in _beliefs(own).items():
            beliefs.add_metric([model, what], value)
        counts = _total(snapshot.lengths for snapshot in own)
        total = sum(k * n for k, n in counts.items())
        lengths.add_metric([model], _buckets(counts), total)
        for one, family in counters.items():
            found = _total(getattr(snapshot, one.of) for snapshot in own)
            for label, value in found.items():
                family.add_metric([model, label], value)
        for one, family in at.items():
            for label, counts in _by_source(own, one.by_position).items():
                for position, value in sorted(counts.items()):
                    family.add_metric([model, label, str(position)], value)
        seconds.add_metric([model], sum(snapshot.draft_seconds for snapshot in own))
    return [lengths, *counters.values(), *at.values(), seconds, beliefs]


def _by_source(snapshots: Sequence[Snapshot], name: str) -> dict[str, Counter[int]]:
    """Of counts by source and position, the sums."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for snapshot in snapshots:
        for source, counts in getattr(snapshot, name).items():
            found[source].update(counts)
    return found


def _beliefs(snapshots: Sequence[Snapshot]) -> dict[str, float]:
    """The mean of each gauge, of those that have it."""
    believed: dict[str, list[float]] = {}
    for snapshot in snapshots:
        for what, value in snapshot.gauges.items():
            believed.setdefault(what, []).append(value)
    return {what: mean(values) for what, values in believed.items()}


def _failures(counts: Iterable[Mapping[str, int]]) -> Any:
    """Not by model: a disk that is full is full for all of them."""
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(
        PREFIX + "failed_writes",
        "Files that could not be written while serving.",
        labels=["what"],
    )
    for what, value in _total(counts).items():
        family.add_metric([what], value)
    return family


def _total(counts: Iterable[Mapping[Any, int]]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for one in counts:
        total.update(one)
    return total


def _buckets(counts: Counter[int]) -> list[tuple[str, int]]:
    """Cumulative, as Prometheus has them."""
    buckets, total = [], 0
    for k in range(max(counts, default=0) + 1):
        total += counts[k]
        buckets.append((str(float(k)), total))
    return [*buckets, ("+Inf", total)]


def _by_model(snapshots: Sequence[Snapshot]) -> dict[str, list[Snapshot]]:
    found: dict[str, list[Snapshot]] = {}
    for snapshot in snapshots:
        found.setdefault(snapshot.model_name, []).append(snapshot)
    return found
