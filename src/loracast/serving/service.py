"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from loracast.serving.settings import ServerSettings

if TYPE_CHECKING:
    from loracast.model import Model


@dataclass
class Service:
    """The model, the engine and the settings of a server."""

    model: Model
    engine: Any
    settings: ServerSettings
    is_draining: bool = False
    """Set when the server is told to stop: it finishes what runs and takes nothing new."""


def _service(request: Request) -> Service:
    return request.app.state.service


Shared = Annotated[Service, Depends(_service)]
"""The type of a route's argument that receives the service."""
