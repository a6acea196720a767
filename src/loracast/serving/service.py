"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from loracast.serving.settings import ServerSettings
from loracast.serving.watching import Watcher

if TYPE_CHECKING:
    from loracast.model import Model
    from loracast.serving.learning import Learning


@dataclass
class Service:
    """The model, the engine and the settings of a server, what it learns, and the folders that it watches."""

    model: Model
    engine: Any
    settings: ServerSettings
    learning: Learning
    watcher: Watcher
    is_draining: bool = False
    """Set when the server is told to stop: it finishes what runs and takes nothing new."""


def _service(request: Request) -> Service:
    return request.app.state.service


Shared = Annotated[Service, Depends(_service)]
"""The type of a route's argument that receives the service."""
