"""What ``/metrics`` counts."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        kind = {"registry": self._registry, "namespace": "jax_mono"}
        self.requests = Counter("requests", "Answered requests", ["path", "status"], **kind)
        self.cancelled = Counter("cancelled", "Pieces of work whose client went away", **kind)
        self.tokens = Counter("generated_tokens", "Tokens generated", **kind)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **kind)
        self.cached_tokens = Counter("cached_prompt_tokens", "Tokens of prompts that a cache already held", **kind)
        self.queue_seconds = Histogram("queue_seconds", "Time in line", buckets=_SECONDS, **kind)
        self.first_token_seconds = Histogram(
            "first_token_seconds", "From getting in line to the first token", buckets=_SECONDS, **kind
        )
        self.token_seconds = Histogram("token_seconds", "Between tokens", buckets=_TOKEN_SECONDS, **kind)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read whenever somebody asks."""
        Gauge(name, about, registry=self._registry, namespace="jax_mono").set_function(value)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
