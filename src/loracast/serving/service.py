"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from loracast.serving.learning import Watcher
from loracast.serving.metrics import Metrics
from loracast.serving.resolve import Names
from loracast.serving.settings import ServerSettings

if TYPE_CHECKING:
    from loracast.answering.model import Model
    from loracast.serving.engine import Engine
    from loracast.serving.learning import Learning


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
