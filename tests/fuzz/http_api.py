"""Requests to the HTTP API in this process: every route with valid bodies, damaged by their structure."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import loracast
from fuzz import mutate
from fuzz.targets import Files, tiny_base
from loracast.errors import LoracastError
from loracast.library.library import Library
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine
from loracast.serving.settings import ServerSettings
from servers import fill
from tiny import make_hypernet

_FRESH_EVERY = 500
"""Cases after which the server begins again with the library that it had at first."""
_RESPONSE_S = 8.0
_JSON = "application/json"
_ASKED = [{"role": "user", "content": "How long is the warranty?"}]
_BODIES: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/v1/chat/completions", {
        "model": "manual", "messages": [{"role": "system", "content": "Be brief."}, *_ASKED], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9,
        "seed": 1, "n": 1, "stop": ["x"], "stream": False, "logprobs": True, "top_logprobs": 2, "route": 2, "tag": "town", "always": True,
        "adapters": [{"id": "museum", "scale": 0.5}], "user": "me",
    }),
    ("POST", "/v1/chat/completions", {"model": "manual+museum", "messages": _ASKED, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/chat/completions", {"model": "tiny", "messages": _ASKED, "max_tokens": 2, "memory": "mine", "style": "shout", "window": ["manual"]}),
    ("POST", "/v1/completions", {"model": "manual", "prompt": ["The lamp"], "max_tokens": 2, "logprobs": 1, "n": 1, "echo": False}),
    ("POST", "/v1/completions", {"model": "manual", "prompt": [5, 6, 7], "max_tokens": 2}),
    ("POST", "/v1/responses", {
        "model": "manual", "input": [{"role": "user", "content": [{"type": "input_text", "text": "How long?"}]}], "instructions": "Be brief.",
        "max_output_tokens": 2, "top_logprobs": 1, "include": ["message.output_text.logprobs"], "stream": False,
    }),
    ("POST", "/v1/responses", {"model": "manual", "input": "How long?", "max_output_tokens": 2, "tools": [{"type": "file_search", "vector_store_ids": ["STORE"], "max_num_results": 2,
        "filters": {"type": "and", "filters": [{"type": "eq", "key": "year", "value": 2026}]}}]}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "other", "lora_path": "other", "load_inplace": False}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "other"}),
    ("POST", "/v1/adapters", {"description": "Answer in capitals.", "name": "capitals", "tags": ["a"], "replace": True}),
    ("POST", "/v1/adapters/combine", {"name": "sum", "parts": [{"id": "manual", "scale": 1.0}, {"id": "museum", "scale": -0.5}], "tags": [], "replace": True}),
    ("POST", "/v1/adapters/route", {"question": "How long is the warranty?", "adapters": ["manual", "*"], "route": 2, "tag": ""}),
    ("PATCH", "/v1/adapters/museum", {"name": "museum", "tags": ["town"], "note": "in the centre"}),
    ("POST", "/v1/vector_stores", {"name": "papers", "file_ids": ["FILE"], "metadata": {"a": "b"}, "expires_after": {"anchor": "last_active_at", "days": 2},
        "chunking_strategy": {"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 0}}}),
    ("POST", "/v1/vector_stores/STORE", {"name": "papers", "metadata": {"a": "b"}, "expires_after": None}),
    ("POST", "/v1/vector_stores/STORE/search", {"query": ["warranty"], "max_num_results": 3, "filters": {"type": "gte", "key": "year", "value": 1},
        "ranking_options": {"ranker": "auto", "score_threshold": 0.1}, "rewrite_query": False}),
    ("POST", "/v1/vector_stores/STORE/files", {"file_id": "FILE", "attributes": {"year": 2026, "is_new": True}, "chunking_strategy": {"type": "auto"}}),
    ("POST", "/v1/vector_stores/STORE/files/FILE", {"attributes": {"year": 2025}}),
    ("POST", "/v1/vector_stores/STORE/file_batches", {"files": [{"file_id": "FILE", "attributes": {"year": 1}}]}),
    ("POST", "/v1/vector_stores/STORE/file_batches", {"file_ids": ["FILE"], "attributes": {"year": 1}}),
    ("POST", "/v1/memories/mine", {"message": "My cat is called Ada."}),
    ("POST", "/v1/jobs/JOB/cancel", {}),
)  # fmt: skip
_PATHS = (
    ("GET", "/"), ("GET", "/health"), ("GET", "/ready"), ("GET", "/metrics"), ("GET", "/v1/server"), ("GET", "/page/app.js"),
    ("GET", "/v1/models"), ("GET", "/v1/models/manual"), ("GET", "/v1/adapters?q=m&tag=town&limit=2&offset=0"), ("GET", "/v1/adapters/manual"),
    ("GET", "/v1/adapters/manual/chunks?limit=1&offset=0"), ("GET", "/v1/adapters/shout/export?to=peft&rank=2"), ("DELETE", "/v1/adapters/capitals"),
    ("GET", "/v1/files?purpose=assistants&limit=2&order=asc&after=FILE"), ("GET", "/v1/files/FILE"), ("GET", "/v1/files/FILE/content"), ("DELETE", "/v1/files/FILE"),
    ("GET", "/v1/vector_stores?limit=1&order=desc&before=STORE"), ("GET", "/v1/vector_stores/STORE"), ("DELETE", "/v1/vector_stores/STORE"),
    ("GET", "/v1/vector_stores/STORE/files?filter=completed"), ("GET", "/v1/vector_stores/STORE/files/FILE"), ("DELETE", "/v1/vector_stores/STORE/files/FILE"),
    ("GET", "/v1/vector_stores/STORE/files/FILE/content"), ("GET", "/v1/vector_stores/STORE/file_batches/BATCH"), ("GET", "/v1/vector_stores/STORE/file_batches/BATCH/files"),
    ("POST", "/v1/vector_stores/STORE/file_batches/BATCH/cancel"), ("GET", "/v1/memories/mine"), ("DELETE", "/v1/memories/mine/1"),
    ("GET", "/v1/jobs?limit=2"), ("GET", "/v1/jobs/JOB"), ("GET", "/v1/nothing"), ("OPTIONS", "/v1/models"), ("PUT", "/v1/adapters/manual"),
)  # fmt: skip
_FORM = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="note.txt"\r\nContent-Type: text/plain\r\n\r\nThe lamp is red.\r\n'
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nassistants\r\n'
    b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nnote\r\n--x\r\nContent-Disposition: form-data; name="replace"\r\n\r\ntrue\r\n--x--\r\n'
)  # fmt: skip
_HEADERS = (
    ("host", "evil.example"), ("origin", "https://evil.example"), ("content-type", "text/plain"), ("content-type", "multipart/form-data"),
    ("content-type", "application/json; charset=utf-16"), ("content-length", "-1"), ("content-length", "99999999999"), ("range", "bytes=0-,1-,2-"),
    ("range", "bytes=99-1"), ("authorization", "Bearer \xff"), ("last-event-id", "-9"), ("accept-encoding", "x" * 9000), ("transfer-encoding", "chunked"),
    ("if-none-match", '"x"'), ("cookie", "a=b"), ("content-type", "multipart/form-data; boundary=" + "y" * 300),
)  # fmt: skip


class Http:
    """The application of a server with a tiny model, two documents, a task, a file and a vector store."""

    def __init__(self, folder: Path):
        base = tiny_base(folder / "base")
        make_hypernet(base).save_pretrained(folder / "hypernetwork", storage="float32")
        self.library, self.first = folder / "library", folder / "first"
        self.model = loracast.load(folder / "base", folder / "hypernetwork", library=self.first, device="cpu")
        fill(self.model)
        self.model.library = Library(self.library)
        self.loop = asyncio.new_event_loop()
        self.running: tuple[Any, LocalEngine] | None = None
        self.n_cases = 0

    def make(self, rng: random.Random) -> Files:
        kind = rng.random()
        headers = {"host": "127.0.0.1:8000"}
        body = b""
        if kind < 0.7:
            method, path, value = rng.choice(_BODIES)
            for _ in range(rng.choice((0, 1, 1, 2, 3))):
                value = mutate.changed_json(rng, value)
            body = mutate.written_json(rng, value)
            headers["content-type"] = _JSON
        elif kind < 0.9:
            method, path = rng.choice(_PATHS)
        else:
            method, path, body = "POST", rng.choice(("/v1/files", "/v1/adapters")), _FORM
            headers["content-type"] = "multipart/form-data; boundary=x"
            for _ in range(rng.choice((0, 1, 2))):
                body = mutate.damaged(rng, body)
        if rng.random() < 0.06:
            body = mutate.damaged(rng, body)
        if rng.random() < 0.1:
            parts = path.split("/")
            parts[rng.randrange(1, len(parts))] = quote(
                rng.choice(mutate.TEXTS), safe=rng.choice(("", "/.%")), errors="surrogatepass"
            )
            path = "/".join(parts)
        if "?" in path and rng.random() < 0.7:
            place, _, query = path.partition("?")
            keys = [one.partition("=")[0] for one in query.split("&")]
            value = str(rng.choice((*mutate.NUMBERS, *mutate.TEXTS)))[:5000]
            path = f"{place}?{query}&{rng.choice(keys)}={quote(value, errors='surrogatepass')}"
        if rng.random() < 0.08:
            name, text = rng.choice(_HEADERS)
            headers[name] = text
        request = {"method": method, "path": path, "headers": headers}
        return {"request.json": json.dumps(request).encode(), "body": body}

    def read(self, folder: Path) -> None:
        if self.n_cases % _FRESH_EVERY == 0:
            self._begin_again()
        self.n_cases += 1
        request = json.loads((folder / "request.json").read_text())
        path = request["path"]
        for name, value in self.ids.items():
            path = path.replace(name, value)
        body = (folder / "body").read_bytes()
        for name, value in self.ids.items():
            body = body.replace(f'"{name}"'.encode(), f'"{value}"'.encode())
        status, _, received = self._send(request["method"], path, request["headers"], body)
        assert status < 500, f"status {status}: {received[:300]!r}"
        assert b"Traceback" not in received and b"root:x:" not in received, "the answer tells too much"
        if status >= 400:
            if "range" not in request["headers"]:  # whose errors Starlette tells by itself
                assert "error" in json.loads(received), f"no body of an error: {received[:200]!r}"
            raise LoracastError(f"status {status}")
        if self.n_cases % 50 == 1:
            self._see_ids()

    def _send(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        assert self.running is not None
        place, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": unquote(place, errors="replace"), "raw_path": place.encode(errors="surrogatepass"), "query_string": query.encode(errors="surrogatepass"), "root_path": "",
            "headers": [(key.encode("latin-1"), text.encode("latin-1")) for key, text in headers.items()],
            "client": ("127.0.0.1", 5000), "server": ("127.0.0.1", 8000), "state": {},
        }  # fmt: skip
        if "content-length" not in headers and body:
            scope["headers"].append((b"content-length", str(len(body)).encode()))
        return self.loop.run_until_complete(asyncio.wait_for(_exchange(self.running[0], scope, body), _RESPONSE_S))

    def _begin_again(self) -> None:
        """A new server with a copy of the first library, a file and a vector store."""
        self.close()
        shutil.rmtree(self.library, ignore_errors=True)
        shutil.copytree(self.first, self.library)
        engine = LocalEngine(self.model.base)
        app = create_app(
            self.model, engine, ServerSettings(max_tokens=3, max_answers=2, answer_timeout_s=6, lora_folder=self.first)
        )
        self.life = app.router.lifespan_context(app)
        self.loop.run_until_complete(self.life.__aenter__())
        self.running = (app, engine)
        self.ids = {"STORE": "vs_0", "FILE": "file-0", "BATCH": "vsfb_0", "JOB": "0"}
        host = {"host": "127.0.0.1:8000"}
        _, _, received = self._send(
            "POST", "/v1/files", host | {"content-type": "multipart/form-data; boundary=x"}, _form_of_file()
        )
        self.ids["FILE"] = json.loads(received)["id"]
        _, _, received = self._send(
            "POST",
            "/v1/vector_stores",
            host | {"content-type": _JSON},
            json.dumps({"file_ids": [self.ids["FILE"]]}).encode(),
        )
        self.ids["STORE"] = json.loads(received)["id"]
        self._see_ids()

    def _see_ids(self) -> None:
        """Put ids that exist by now in place of those that are gone."""
        host = {"host": "127.0.0.1:8000"}
        for name, path in (("FILE", "/v1/files"), ("STORE", "/v1/vector_stores"), ("JOB", "/v1/jobs")):
            _, _, received = self._send("GET", f"{path}?limit=1", host, b"")
            for one in json.loads(received).get("data", [])[:1]:
                self.ids[name] = one["id"]

    def close(self) -> None:
        """End the server."""
        if self.running is not None:
            self.loop.run_until_complete(self.life.__aexit__(None, None, None))
            self.running = None


def _form_of_file() -> bytes:
    return _FORM.split(b'--x\r\nContent-Disposition: form-data; name="name"')[0] + b"--x--\r\n"


async def _exchange(
    app: Callable[..., Awaitable[None]], scope: dict[str, Any], body: bytes
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the response of an application."""
    gave, has_ended = False, asyncio.Event()
    status, headers, pieces = 0, {}, []

    async def receive() -> dict[str, Any]:
        nonlocal gave
        if gave:
            await has_ended.wait()
            return {"type": "http.disconnect"}
        gave = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.update(
                (key.decode("latin-1"), value.decode("latin-1")) for key, value in message.get("headers", [])
            )
        elif message["type"] == "http.response.body":
            pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                has_ended.set()

    await app(scope, receive, send)
    return status, headers, b"".join(pieces)
