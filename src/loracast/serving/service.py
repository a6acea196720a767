"""What the routes of one server share: its model, engine and settings, and its figures in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loracast.answering.model import Model
from loracast.serving.generation import Engine, Ticket
from loracast.serving.learning import Learning, Watcher
from loracast.serving.resolve import Names
from loracast.serving.settings import ServerSettings

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 200, 500, 1000)


class Metrics(Collector):
    """The figures of one server, those of its engine among them."""

    def __init__(self, engine: Engine):
        registry = self._registry = CollectorRegistry()
        registry.register(self)
        self._engine = engine
        self._requests = Counter(
            "loracast_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        seconds, rate = (partial(Histogram, registry=registry, buckets=one) for one in (_SECONDS, _RATES))
        self._first_token_s = seconds("loracast_first_token_seconds", "From a request to its first token")
        self._total_s = seconds("loracast_answer_seconds", "From a request to its last token")
        self._rate = rate("loracast_tokens_per_second", "Tokens per second of an answer, after its first")

    def count_request(self, route: str, status: int) -> None:
        """Count a request by its route's pattern, such as /v1/models/{id}, and the status of its response."""
        self._requests.labels(route, str(status)).inc()

    def count_answers(self, tickets: Iterable[Ticket]) -> None:
        """Count what the requests of an engine took, those that ended by themselves."""
        for ticket in tickets:
            if ticket.finish is None or ticket.first_token_s is None or ticket.total_s is None:
                continue
            self._first_token_s.observe(ticket.first_token_s)
            self._total_s.observe(ticket.total_s)
            after_first_s = ticket.total_s - ticket.first_token_s
            if ticket.n_tokens > 1 and after_first_s > 0:
                self._rate.observe((ticket.n_tokens - 1) / after_first_s)

    def collect(self) -> Iterator[Metric]:
        """The engine's own figures, read when Prometheus asks."""
        return self._engine.stats().metrics()

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)


@dataclass
class Service:
    """The model, the engine and the settings of a server, and what is kept for all of its requests."""

    model: Model
    engine: Engine
    settings: ServerSettings
    learning: Learning
    watcher: Watcher
    names: Names
    metrics: Metrics
    is_draining: bool = False
    """Set when the server is asked to stop: it finishes what runs and takes nothing new."""


async def _service(request: Request) -> Service:  # a function that is not async would be called in another thread
    return request.app.state.service


Shared = Annotated[Service, Depends(_service)]
"""The type of a route's argument that receives the service."""
