"""Metrics: what Prometheus reads at /metrics; no text, id or address of anybody is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: Seconds between the buckets of a duration: a dense search on a GPU to a swap.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one process."""

    def __init__(
        self,
        describe: Callable[[], dict[str, Any]],
        waiting: Callable[[], dict[str, int]],
        watch: Callable[[dict[str, Any]], dict[str, Any] | None],
    ) -> None:
        """Count from 0.

        Args:
            describe: `LiveIndex.status`.
            waiting: calls under way by pool.
            watch: `Watching.look`.
        """
        self.registry = CollectorRegistry()
        ours: dict[str, Any] = {"registry": self.registry, "namespace": "ultrarag"}
        self.requests = Counter("http_requests", "Requests answered", ("method", "route", "status"), **ours)
        self.seconds = Histogram("http_request_seconds", "From request to answer", ("route",), buckets=BUCKETS, **ours)
        self.active = Gauge("http_requests_active", "Requests under way", **ours)
        self.refused = Counter("http_refused", "Requests refused before they were read", ("reason",), **ours)
        self.answers = Counter("search_answers", "Queries answered, by generation", ("generation",), **ours)
        self.hits = Counter("search_hits", "Passages found", **ours)
        self.written = Counter("passages_written", "Passages written or deleted", ("what",), **ours)
        self.embedded = Counter("texts_encoded", "Texts embedded or reranked for clients", ("what",), **ours)
        self.feedback = Counter("feedback", "Events of feedback that were kept", ("action",), **ours)
        self.swaps = Counter("swaps", "Generations that went live by this process", ("how",), **ours)
        self.jobs = Counter("jobs", "Jobs that ended in this process", ("kind", "state"), **ours)
        self.registry.register(_Index(describe, waiting, watch))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format; reads the index's status."""
        return generate_latest(self.registry)


class _Index(Collector):
    """What the index says of itself, at the moment it is asked."""

    def __init__(self, *told: Callable[..., Any]) -> None:
        self._describe, self._waiting, self._watch = told

    def describe(self) -> Iterator[Metric]:
        """Nothing: else the registry would read the status to find the names."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        found = self._describe()
        live, watch = found["live"] or {}, self._watch(found)
        values = {
            "passages": ("Passages in the index", found["passages"]),
            "writes": ("Number of the last write", found["writes"]),
            "index_bytes": ("Bytes on the disk", found["bytes"]),
            "live_generation": ("Number of the live generation", live.get("id", 0)),
            "live_behind": ("Writes that the live vectors lack", live.get("behind", 0)),
            "unencoded_passages": ("Passages without vectors", len(live.get("unencoded", ()))),
            "watch_worse": (
                "Measures that are worse since a swap",
                len((watch or {}).get("worse", ())),
            ),
        }
        for name, (help, value) in values.items():
            yield GaugeMetricFamily(f"ultrarag_{name}", help, value=value)
        info = GaugeMetricFamily("ultrarag_live_info", "The live encoder", labels=("fingerprint",))
        info.add_metric([live.get("fingerprint", "")[:12]], 1)
        yield info
        waiting = GaugeMetricFamily("ultrarag_calls_pending", "Calls that run or wait, by pool", labels=("pool",))
        for pool, number in self._waiting().items():
            waiting.add_metric([pool], number)
        yield waiting
