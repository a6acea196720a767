"""The HTTP API as one application: `create_app(model, engine, settings)`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from loracast import __version__
from loracast.library.shared import refreshing
from loracast.serving.errors import add_handlers
from loracast.serving.guard import Guard
from loracast.serving.learning import Learning
from loracast.serving.routes import (
    adapters,
    chat,
    completions,
    files,
    health,
    jobs,
    lora,
    memories,
    models,
    page,
    responses,
    server,
    vector_stores,
)
from loracast.serving.service import Service
from loracast.serving.settings import ServerSettings
from loracast.serving.watching import Watcher

if TYPE_CHECKING:
    from loracast.model import Model
    from loracast.serving.engine import Engine

ROUTERS = tuple(
    part.router
    for part in (
        health,
        page,
        server,
        models,
        chat,
        completions,
        responses,
        lora,
        files,
        vector_stores,
        adapters,
        memories,
        jobs,
    )
)


def create_app(model: Model, engine: Engine, settings: ServerSettings = ServerSettings()) -> FastAPI:
    """The HTTP API of a model whose answers an engine generates. When the application ends, the engine is drained."""
    service = Service(model, engine, settings, Learning(model, settings), Watcher(model, settings.watched))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with refreshing(model.library):
            service.learning.start()
            service.watcher.start()
            yield
            service.is_draining = True
            service.watcher.close()
            service.learning.close()
            engine.drain(settings.drain_timeout_s)
            engine.close()

    # Pages of docs would be fetched from a CDN.
    app = FastAPI(title="loracast", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    add_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(
        Guard, settings=settings, count=service.metrics.count_request
    )  # added after the routes' own, so that it sees a request before them
    if settings.cors_origins:  # around the guard: a page may read why it was refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],  # OpenAI's client sends X-Stainless-*
            expose_headers=["Retry-After", "Location"],
        )
    return app
