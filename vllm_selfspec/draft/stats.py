"""`DraftStats`: what drafting did, for the log, and for `engine.metrics` to show.

One rule: the engine's process counts, the server's shows. vLLM carries statistics from
one to the other in types that know only its own, so ours go by a small file, which the
engine rewrites every second. That is no reason to stop serving: what cannot be written
is logged once and counted.
"""

import json
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vllm_selfspec import whole_file
from vllm_selfspec.draft_length.types import Ints

logger = logging.getLogger("vllm.selfspec")  # below vLLM's logger, so it is shown

DIRECTORY = "SELFSPEC_METRICS_DIR"
WRITE_EVERY_S, LOG_EVERY_S = 1.0, 10.0  # the second is vLLM's


class DraftStats:
    """Counts of one engine since it started.

    Attributes:
        lengths: How often a request had so many draft tokens verified in a step.
        steps: Decode steps by what was planned after them: `drafting`, `plain` (nothing
            was worth drafting) or `trial` (to find out whether it is again).
        drafted: Draft tokens that were verified, by source.
        accepted: How many of them were accepted, by source.
        drafted_at, accepted_at: Both by source and position, the first being 0.
        stops: Why rows stopped drafting: `rule` or `limit`.
        undrafted: `requests` that ask for what verification does not carry, and `steps`
            that verified nothing because of them.
        draft_seconds: What draft steps took, by measured costs.
        gauges: What a controller believes at present, by name.
        failed_writes: What could not be written, a file of these counts or another.
    """

    def __init__(self, vllm_config: Any) -> None:
        """For the model that `vllm_config` serves."""
        served = vllm_config.model_config.served_model_name
        self.model_name = served if isinstance(served, str) else served[0]
        self.lengths: Counter[int] = Counter()
        self.steps: Counter[str] = Counter()
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.drafted_at: dict[str, Counter[int]] = defaultdict(Counter)
        self.accepted_at: dict[str, Counter[int]] = defaultdict(Counter)
        self.stops: Counter[str] = Counter()
        self.undrafted: Counter[str] = Counter()
        self.draft_seconds = 0.0
        self.gauges: dict[str, float] = {}
        self.failed_writes: Counter[str] = Counter()
        self._written = self._logged = time.monotonic()
        self._last: dict[str, Any] = self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model_name": self.model_name,
            "lengths": dict(self.lengths),
            "steps": dict(self.steps),
            "drafted": dict(self.drafted),
            "accepted": dict(self.accepted),
            "drafted_at": {name: dict(n) for name, n in self.drafted_at.items()},
            "accepted_at": {name: dict(n) for name, n in self.accepted_at.items()},
            "stops": dict(self.stops),
            "undrafted": dict(self.undrafted),
            "draft_seconds": self.draft_seconds,
            "gauges": self.gauges,
            "failed_writes": dict(self.failed_writes),
        }

    def verified(self, source: str, drafted: Ints, accepted: Ints) -> None:
        """Counts drafts of a source.

        Args:
            source: Its name.
            drafted: Tokens of each that were verified, `[n]`.
            accepted: How many of them were accepted, `[n]`.
        """
        self.drafted[source] += int(drafted.sum())
        self.accepted[source] += int(accepted.sum())
        positions = np.arange(drafted.max(initial=0))
        for at, lengths in (
            (self.drafted_at[source], drafted),
            (self.accepted_at[source], accepted),
        ):
            reached = (lengths[:, None] > positions).sum(axis=0)
            at.update(dict(enumerate(reached.tolist())))

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
        if directory is None or not os.path.isdir(directory):
            return
        file = Path(directory) / f"{os.getpid()}-{name}-{id(self)}.json"
        # Not waited for: a step must not wait for the disk, and counts of a second are
        # worth nothing after a loss of power.
        whole_file.write_if_possible(
            json.dumps(self.to_dict()), file, "metrics", self.failed_writes, syncs=False
        )

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
