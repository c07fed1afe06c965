"""`SpecCounters`: what speculation did in one engine, by vLLM's own counters.

One rule: nothing is counted here. vLLM exports its counters through Prometheus, and
takes those of earlier engines out of the registry when another starts in the process;
they go on counting, so they are remembered by engine.
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

PREFIX = "vllm:spec_decode_num_"


@dataclass(frozen=True)
class Counts:
    """vLLM's speculation counters over some time.

    Attributes:
        drafts: Verifications of a request that had draft tokens.
        draft_tokens: Tokens drafted.
        accepted_tokens: Drafted tokens that were accepted.
        accepted_at: Of these, how many at each draft position, from the first.
    """

    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_at: tuple[int, ...] = ()

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted; None if none was drafted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    def __add__(self, other: "Counts") -> "Counts":
        positions = zip_longest(self.accepted_at, other.accepted_at, fillvalue=0)
        return Counts(
            self.drafts + other.drafts,
            self.draft_tokens + other.draft_tokens,
            self.accepted_tokens + other.accepted_tokens,
            tuple(map(sum, positions)),
        )

    def __sub__(self, earlier: "Counts") -> "Counts":
        accepted_at = (
            now - before
            for now, before in zip(
                self.accepted_at,
                earlier.accepted_at or (0,) * len(self.accepted_at),
                strict=True,
            )
        )
        return Counts(
            self.drafts - earlier.drafts,
            self.draft_tokens - earlier.draft_tokens,
            self.accepted_tokens - earlier.accepted_tokens,
            tuple(accepted_at),
        )


class SpecCounters:
    """The counters of the engine that was started last in this process.

    To be made before another engine starts. The engine must count
    (`disable_log_stats=False`).
    """

    def __init__(self) -> None:
        import prometheus_client

        self._collectors = list(prometheus_client.REGISTRY._collector_to_names)

    def total(self, name: str) -> int:
        """Sum of a counter over its labels, by a name such as `vllm:num_preemptions`;
        0 if the engine has none."""
        return sum(value for _, value in self._samples(name))

    def read(self) -> Counts:
        """The counts since the engine started."""
        by_position: dict[int, int] = {}
        for labels, value in self._samples(f"{PREFIX}accepted_tokens_per_pos"):
            position = int(labels["position"])
            by_position[position] = by_position.get(position, 0) + value
        return Counts(
            self.total(f"{PREFIX}drafts"),
            self.total(f"{PREFIX}draft_tokens"),
            self.total(f"{PREFIX}accepted_tokens"),
            tuple(count for _, count in sorted(by_position.items())),
        )

    def _samples(self, name: str) -> list[tuple[dict[str, str], int]]:
        found: list[Any] = [
            sample
            for collector in self._collectors
            for metric in collector.collect()
            if metric.name == name
            for sample in metric.samples
            if sample.name == f"{name}_total"
        ]
        return [(sample.labels, int(sample.value)) for sample in found]
