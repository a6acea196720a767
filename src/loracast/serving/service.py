"""What the routes of one server share: its model, engine and settings, and its figures in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from loracast.serving.learning import Learning, Watcher
from loracast.serving.resolve import Names
from loracast.serving.settings import ServerSettings

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from loracast.answering.model import Model
    from loracast.serving.engine import Engine
    from loracast.serving.generation import Ticket

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 200, 500, 1000)


class _EngineCollector(Collector):
    """Reads an engine's own figures when Prometheus asks."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = {
            "queued_requests": ("Requests that wait for a slot", stats.n_queued),
            "running_requests": ("Requests that are being answered: the size of the batch", stats.n_running),
            "slots": ("Requests that can be answered at the same time", stats.n_slots),
            "adapters_in_memory": ("LoRAs in memory", stats.n_adapters_in_memory),
            "adapter_bytes": ("Bytes of the LoRAs in memory", stats.adapter_bytes),
            "prefix_cache_bytes": ("Bytes of the cached prompts", stats.prefix_bytes),
        }
        counters = {
            "engine_steps": ("Forward passes of the base", stats.n_steps),
            "decoded_rows": ("Rows of all forward passes; over engine_steps: the mean batch", stats.n_decoded_rows),
            "generated_tokens": ("Tokens generated", stats.n_generated_tokens),
            "prompt_tokens": ("Tokens of prompts", stats.n_prompt_tokens),
            "prompt_tokens_saved": ("Tokens of prompts that the prefix cache had", stats.n_cached_tokens),
            "prefix_cache_hits": ("Prompts whose beginning was in the prefix cache", stats.n_prefix_hits),
            "prefix_cache_misses": ("Prompts whose beginning was not in the prefix cache", stats.n_prefix_misses),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"loracast_{name}", what, value)
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(f"loracast_{name}", what, value)


class Metrics:
    """The figures of one server."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._requests = Counter(
            "loracast_requests", "Requests by route and status", ["route", "status"], registry=self._registry
        )
        self._first_token_s = Histogram(
            "loracast_first_token_seconds", "From a request to its first token", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._total_s = Histogram(
            "loracast_answer_seconds", "From a request to its last token", buckets=_SECONDS, registry=self._registry
        )
        self._rate = Histogram(
            "loracast_tokens_per_second", "Tokens per second of an answer, after its first", buckets=_RATES,
            registry=self._registry,
        )  # fmt: skip

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
    is_draining: bool = False
    """Set when the server is asked to stop: it finishes what runs and takes nothing new."""

    @cached_property
    def names(self) -> Names:
        """What the models of requests mean."""
        return Names(self.model, self.settings.max_adapters)

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics(self.engine)


async def _service(request: Request) -> Service:  # a function that is not async would be called in another thread
    return request.app.state.service


Shared = Annotated[Service, Depends(_service)]
"""The type of a route's argument that receives the service."""
