"""What the server counts, for Prometheus. No prompt, text, token or session name is in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("hope_requests", "answered requests", ["endpoint", "status"], **options)
        self.tokens = Counter("hope_tokens", "tokens read and drawn", ["kind"], **options)
        self.seconds = Histogram("hope_request_seconds", "time of a request", ["endpoint"], buckets=_SECONDS, **options)
        self.first = Histogram(
            "hope_first_token_seconds", "time to the first piece of text", buckets=_SECONDS, **options
        )
        self.step = Histogram("hope_step_seconds", "time of a step of the batch", buckets=_SECONDS, **options)
        self.rows = Histogram("hope_step_streams", "streams in a step", buckets=(1, 2, 4, 8, 16, 32, 64), **options)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A number that is looked up when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def observe_step(self, seconds: float, rows: int) -> None:
        """One step of the engine."""
        self.step.observe(seconds)
        self.rows.observe(rows)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
