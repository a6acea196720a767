"""Runs the application of a server until it is told to stop, and lets running answers finish then."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import uvicorn

from loracast.errors import ConfigError
from loracast.serving.settings import ServerSettings

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI


def run(app: FastAPI, settings: ServerSettings, on_start: Callable[[int], object] = lambda port: None) -> None:
    """Serve until SIGTERM or SIGINT; requests that run then have `drain_timeout_s` to finish.

    Args:
        app: of `create_app`.
        on_start: called with the port when requests are taken.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listening = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); give another --port"
        ) from error
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody in front is trusted to say who asks
        timeout_graceful_shutdown=round(settings.drain_timeout_s),
    )
    with closing(listening):
        _Server(config, app, lambda: on_start(listening.getsockname()[1])).run(sockets=[listening])


class _Server(uvicorn.Server):
    """uvicorn's server; its application knows from the signal on that it is about to stop."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, on_start: Callable[[], object]):
        super().__init__(config)
        self._app, self._on_start = app, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.service.is_draining = True
        super().handle_exit(sig, frame)
