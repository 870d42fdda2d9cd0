"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.process_collector import ProcessCollector

from qformers.serving.cache import CachingPredictor


class Metrics:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        names = ("path", "status")
        self.requests = Counter("qformers_requests", "Requests answered.", names, registry=self.registry)
        self.request_seconds = Histogram(
            "qformers_request_seconds", "From a request's first byte to its answer's last.", ("path",),
            registry=self.registry,
        )  # fmt: skip
        self.in_flight = Gauge("qformers_requests_in_flight", "Requests waiting or running.", registry=self.registry)
        self.batch_rows = Histogram(
            "qformers_batch_rows", "Pictures or pairs in a forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )  # fmt: skip
        self.model_seconds = Counter("qformers_model_seconds", "Time the model has worked.", registry=self.registry)

    def watch(self, models: list[CachingPredictor]) -> None:
        """Count what the models find among the features that they kept."""
        self.registry.register(_KeptFeatures(models))  # pyright: ignore[reportArgumentType]

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)


class _KeptFeatures:
    """Read when asked, from the thread that serves."""

    def __init__(self, models: list[CachingPredictor]) -> None:
        self.models = models

    def collect(self) -> list[CounterMetricFamily]:
        found = CounterMetricFamily(
            "qformers_kept_features", "Pictures asked for, by whether encoded.", labels=["kept"]
        )
        found.add_metric(["yes"], sum(model.hits for model in self.models))
        found.add_metric(["no"], sum(model.misses for model in self.models))
        return [found]
