"""Servers for tests: an application behind a real uvicorn on a free port of 127.0.0.1, and documents to be learned."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from loracast.documents import Document
from loracast.library.save import save_lora
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine
from loracast.serving.settings import ServerSettings

T = TypeVar("T")


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The URL of an application while it is served."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def is_ready(url: str) -> bool:
    """Whether the server at a URL takes requests."""
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def eventually(look: Callable[[], T], timeout_s: float = 30.0) -> T:
    """What a function gives once that is true."""
    until = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < until, f"it did not come true in {timeout_s} s"
        time.sleep(0.02)
    return found


def manual(number: int, n_sections: int = 1) -> bytes:
    """A document about a machine of its own, with sections of about a chunk each."""
    sections = [
        f"# Part {i}\n\nThe warranty of the K{number}-{i} is {number + 10 * i} months. "
        f"The service line of the K{number}-{i} is 555-{number:04d}. " + "It must be descaled every month. " * 12
        for i in range(n_sections)
    ]
    return "\n\n".join(sections).encode()


TEXTS = {
    "manual": "# Kettle\n\nThe kettle holds 1.7 litres of water.\n\n## Warranty\n\nThe warranty is 24 months, and it begins in May.",
    "museum": "# Museum\n\nThe museum opens at nine on Tuesday mornings. Nobody knew who had built the old bridge.",
}


def fill(model) -> None:
    """Learn two documents, tag one of them, and keep a task."""
    for name, text in TEXTS.items():
        model.learn(Document.from_text(text, title=name.title()), name, max_chunk_tokens=24)
    model.library.describe("museum", tags=["town"])
    lora = model.adapter("museum").lora()
    save_lora(lora, model.library, "shout", kind="task", title="Shout.", made_for=model.base.fingerprint)


def in_process(model, engine=None, **settings) -> TestClient:
    """A client of an application in this process."""
    app = create_app(model, engine or LocalEngine(model.base), ServerSettings(**settings))
    return TestClient(app, base_url="http://127.0.0.1:8000")
