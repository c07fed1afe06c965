"""`RayMetrics`: our metrics among Ray's, for each replica of Ray Serve LLM.

One rule: it shows what `MetricsCollector` collects, and counts nothing. A replica has
no `/metrics` of its own: vLLM's counters are Ray's there, labelled with the replica,
and so are ours where a `LLMConfig` names this class in its `callback_config`.
"""

import threading
import time
from collections.abc import Iterable
from typing import Any

from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.util.metrics import Gauge

from vllm_selfspec.engine.metrics import MetricsCollector, share_directory

SHOW_EVERY_S = 5.0  # Ray exports what it was last told every ten


class RayMetrics(CallbackBase):
    """What Ray calls in a replica, by `callback_config={"callback_class": ...}`."""

    async def on_before_node_init(self) -> None:
        """Starts to show them. The replica's engine, which starts later, inherits where
        to write; on GPUs nobody else tells it, for there the configuration is made in
        another process."""
        replica = serve.get_replica_context().replica_id.unique_id
        gauges = RayGauges({"ReplicaId": replica})  # vLLM's name of the label
        threading.Thread(
            target=_show_forever, args=(share_directory(), gauges), daemon=True
        ).start()


def _show_forever(collector: MetricsCollector, gauges: "RayGauges") -> None:
    while True:
        gauges.show(collector.collect())
        time.sleep(SHOW_EVERY_S)


class RayGauges:
    """A gauge of Ray's for each name among Prometheus samples.

    Counts, too: Ray's counters and histograms can be added to, but not set. To a query
    it makes no difference.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        """`labels` are added to every sample."""
        self._labels = labels
        self._gauges: dict[str, Gauge] = {}

    def show(self, families: Iterable[Any]) -> None:
        """Sets every sample of these Prometheus metrics."""
        for family in families:
            for sample in family.samples:
                labels = {**sample.labels, **self._labels}
                gauge = self._gauge(sample.name, family.documentation, tuple(labels))
                gauge.set(sample.value, tags=labels)

    def _gauge(self, name: str, description: str, keys: tuple[str, ...]) -> Gauge:
        if name not in self._gauges:
            # Ray refuses colons; vLLM replaces them in its own names in this way.
            self._gauges[name] = Gauge(name.replace(":", "_"), description, keys)
        return self._gauges[name]
