"""The HTTP API as one application, and the process that runs it.

SIGTERM lets running answers finish, Ctrl-C ends at once.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from loracast import __version__
from loracast.answering.model import Model
from loracast.base.load import Base
from loracast.serving.errors import add_handlers
from loracast.serving.generation import Engine, EngineConfig
from loracast.serving.guard import Guard
from loracast.serving.learning import Learning, Watcher
from loracast.serving.resolve import Names
from loracast.serving.routes import adapters, completions, files, server
from loracast.serving.service import Metrics, Service
from loracast.serving.settings import ServerSettings

ROUTERS = tuple(part.router for part in (server, completions, files, adapters))


def create_app(model: Model, engine: Engine, settings: ServerSettings = ServerSettings()) -> FastAPI:
    """The HTTP API of a model whose answers an engine generates. When the application ends, the engine is drained."""
    learning, watcher = Learning(model, settings), Watcher(model, settings.watched)
    service = Service(model, engine, settings, learning, watcher, Names(model, settings.max_adapters), Metrics(engine))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with model.library.refreshing():
            learning.jobs.start()
            watcher.start()
            yield
            service.is_draining = True
            watcher.close()
            learning.jobs.close()
            engine.drain(settings.drain_timeout_s)
            engine.close()

    # Pages of docs would be fetched from a CDN.
    app = FastAPI(title="loracast", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    add_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    # Added after the routes' own, so that it sees a request before them.
    app.add_middleware(Guard, settings=settings, count=service.metrics.count_request)
    if settings.cors_origins:  # around the guard: a page may read why it was refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],  # OpenAI's client sends X-Stainless-*
            expose_headers=["Retry-After", "Location"],
        )
    return app


_INTERRUPTED = 130
_KEEP_ALIVE_S = 75  # longer than clients keep an idle connection (httpx 5 s, proxies 60): who closes it loses nothing


def make_engine(base: Base, settings: ServerSettings) -> Engine:
    """The engine that the settings name. Raises ConfigError, or EngineFailed, where there is no such vLLM server."""
    sizes = EngineConfig(adapter_bytes=settings.adapter_memory_bytes, prefix_bytes=settings.prompt_cache_bytes)
    if settings.engine == "local":
        from loracast.serving.engine import LocalEngine

        return LocalEngine(base, sizes)
    from loracast.serving.vllm_server import vllm_engine

    return vllm_engine(settings.engine, base, sizes)


def run(
    app: FastAPI,
    settings: ServerSettings,
    sock: socket.socket,
    on_start: Callable[[], object] = lambda: None,
    on_stop: Callable[[], object] = lambda: None,
) -> None:
    """Serve until SIGTERM, or until nothing was asked for `idle_s`; SIGINT ends the process with 130.

    Requests that run at SIGTERM have `drain_timeout_s` to finish.

    Args:
        app: of `create_app`.
        sock: of `bound`.
        on_start: called when requests are taken.
        on_stop: called when no more are.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody in front is trusted to say who asks
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
    )

    class Server(uvicorn.Server):
        """uvicorn's server; its application knows from the signal on that it is about to stop."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and not self.should_exit:
                on_start()
                self._n_seen, self._active_at = -1, time.monotonic()

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or (settings.idle_s > 0 and self._ends_idle())

        def _ends_idle(self) -> bool:
            """Whether nothing was asked for long enough; the application then knows that it is about to stop."""
            state, service = self.server_state, app.state.service
            if state.total_requests != self._n_seen or state.tasks:
                self._n_seen, self._active_at = state.total_requests, time.monotonic()
            if time.monotonic() - self._active_at < settings.idle_s:
                return False
            if service.learning.jobs.n_active():
                self._active_at = time.monotonic()
                return False
            on_stop()
            service.is_draining = True
            return True

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """uvicorn's own would raise SIGTERM again in the end, so that the exit code were not 0."""
            on_stop()
            if sig == signal.SIGINT:
                os._exit(_INTERRUPTED)  # threads may be in the middle of a forward pass
            app.state.service.is_draining = True
            self.should_exit = True

    Server(config).run(sockets=[sock])
