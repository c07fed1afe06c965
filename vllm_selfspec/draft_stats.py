"""`DraftStats`: what drafting did, for Prometheus and the log.

One rule: the engine's process counts, the server's shows. vLLM carries statistics from
one to the other in types that know only its own, so ours go by a small file: the engine
rewrites it every second, and a collector in the server reads it when it is asked. The
directory is made by the first process and known to those it starts.
"""

import atexit
import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

logger = logging.getLogger("vllm.selfspec")  # below vLLM's logger, so it is shown

DIRECTORY = "SELFSPEC_METRICS_DIR"
WRITE_EVERY_S, LOG_EVERY_S = 1.0, 10.0  # the second is vLLM's
PREFIX = "vllm:selfspec_"


class DraftStats:
    """Counts of one engine since it started.

    Attributes:
        lengths: How often a request had so many draft tokens verified in a step.
        steps: Decode steps by what was planned after them: `drafting`, `plain` (nothing
            was worth drafting) or `trial` (to find out whether it is again).
        stops: Why rows stopped drafting: `rule` or `limit`.
        draft_seconds: What draft steps took, by measured costs.
        gauges: What a controller believes at present, by name.
    """

    def __init__(self, vllm_config: Any) -> None:
        """For the model that `vllm_config` serves."""
        served = vllm_config.model_config.served_model_name
        self.model_name = served if isinstance(served, str) else served[0]
        self.lengths: Counter[int] = Counter()
        self.steps: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.draft_seconds = 0.0
        self.gauges: dict[str, float] = {}
        self._written = self._logged = time.monotonic()
        self._last: dict[str, Any] = self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model_name": self.model_name,
            "lengths": dict(self.lengths),
            "steps": dict(self.steps),
            "stops": dict(self.stops),
            "draft_seconds": self.draft_seconds,
            "gauges": self.gauges,
        }

    def publish(
        self, name: str, beliefs: Callable[[], dict[str, float]] = dict
    ) -> None:
        """Writes the counts for the server, and a line for the log, if it is time.

        Args:
            name: Tells the parts of an engine apart that count for themselves.
            beliefs: The gauges; asked when it is time, for this is called each step.
        """
        now = time.monotonic()
        if now - self._written >= WRITE_EVERY_S:
            self._written = now
            self.gauges = beliefs()
            self._write(name)
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            line, self._last = self._line(), self.to_dict()
            if line:
                logger.info(line)

    def _write(self, name: str) -> None:
        directory = os.environ.get(DIRECTORY)
        if directory is None or not Path(directory).is_dir():
            return
        file = Path(directory) / f"{os.getpid()}-{name}-{id(self)}.json"
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(self.to_dict()))
        partial.replace(file)  # whoever reads sees the old one or the new one

    def _line(self) -> str:
        """What was done since the last line; empty if that is nothing."""
        before: Counter[int] = Counter(self._last["lengths"])
        lengths = Counter(
            {k: n - before[k] for k, n in self.lengths.items() if n > before[k]}
        )
        num = sum(lengths.values())
        if not num:
            return ""
        mean_length = sum(k * n for k, n in lengths.items()) / num
        seconds = self.draft_seconds - self._last["draft_seconds"]
        found = {
            "mean draft length": f"{mean_length:.2f}",
            "no drafts": f"{lengths[0] / num:.0%}",
            "drafting": f"{seconds:.2f} s",
            **{what: f"{value:.2f}" for what, value in self.gauges.items()},
        }
        return "selfspec: " + ", ".join(f"{k}: {v}" for k, v in found.items())


@cache
def share_directory() -> None:
    """Makes the directory for this process and all that it starts, and shows what is
    written there at vLLM's `/metrics`. Once a process; one that was started by another
    that serves has a directory of its own."""
    import prometheus_client

    directory = tempfile.mkdtemp(prefix="selfspec-")
    os.environ[DIRECTORY] = directory
    atexit.register(_remove, directory, os.getpid())
    prometheus_client.REGISTRY.register(MetricsCollector(Path(directory)))


def _remove(directory: str, pid: int) -> None:
    if os.getpid() == pid:  # not a child that was forked
        shutil.rmtree(directory, ignore_errors=True)


class MetricsCollector:
    """Prometheus metrics of all engines that write to a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Any]:
        """Called by `prometheus_client` for every scrape."""
        return iter(families([*self._snapshots()]))

    def _snapshots(self) -> Iterator[dict[str, Any]]:
        for file in sorted(self._directory.glob("*.json")):
            try:
                yield json.loads(file.read_text())
            except (OSError, ValueError):  # gone, with its engine
                continue


def families(snapshots: Sequence[Mapping[str, Any]]) -> list[Any]:
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
    steps = CounterMetricFamily(
        PREFIX + "steps",
        "Decode steps by what was planned after them.",
        labels=["model_name", "kind"],
    )
    stops = CounterMetricFamily(
        PREFIX + "stops",
        "Rows that stopped drafting, by reason.",
        labels=["model_name", "reason"],
    )
    seconds = CounterMetricFamily(
        PREFIX + "draft_seconds", "Time of draft steps.", labels=["model_name"]
    )
    beliefs = GaugeMetricFamily(
        PREFIX + "controller",
        "What the draft-length controller believes at present.",
        labels=["model_name", "what"],
    )
    for model, own in _by_model(snapshots).items():
        counts: Counter[int] = Counter()
        believed: dict[str, list[float]] = {}
        for snapshot in own:
            counts.update({int(k): n for k, n in snapshot["lengths"].items()})
            for what, value in snapshot["gauges"].items():
                believed.setdefault(what, []).append(value)
        for what, values in believed.items():
            beliefs.add_metric([model, what], mean(values))
        buckets, total = [], 0
        for k in range(max(counts, default=0) + 1):
            total += counts[k]
            buckets.append((str(float(k)), total))
        buckets.append(("+Inf", total))
        lengths.add_metric([model], buckets, sum(k * n for k, n in counts.items()))
        for family, key in ((steps, "steps"), (stops, "stops")):
            added: Counter[str] = Counter()
            for snapshot in own:
                added.update(snapshot[key])
            for kind, value in added.items():
                family.add_metric([model, kind], value)
        seconds.add_metric([model], sum(s["draft_seconds"] for s in own))
    return [lengths, steps, stops, seconds, beliefs]


def _by_model(
    snapshots: Sequence[Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for snapshot in snapshots:
        found.setdefault(snapshot["model_name"], []).append(snapshot)
    return found
