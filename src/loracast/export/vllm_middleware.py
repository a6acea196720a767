"""Middleware of vLLM's server: requests name an adapter of a library or a shared store as their model.

    vllm serve BASE --enable-lora --middleware loracast.export.vllm_middleware.LibraryMiddleware

It writes the adapter's newest version, `manual@3f9a...`, in place of the name, so that vLLM never answers with weights
that were replaced, and holds the files until the answer is complete.

    LORACAST_STORE           URL of a shared store; without it, the library of this machine (LORACAST_HOME)
    LORACAST_REPLICA_BYTES   bytes of exported LoRAs that stay on the disk (10 GiB)
"""

from __future__ import annotations

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loracast.errors import AdapterError, ConfigError, LoracastError
from loracast.export.replica import FromLibrary, FromStore, Kept, Replica
from loracast.files import cache_dir
from loracast.library.library import Library

STORE_VARIABLE, BYTES_VARIABLE = "LORACAST_STORE", "LORACAST_REPLICA_BYTES"
_DEFAULT_BYTES = 10 * 2**30
_THREADS = 16
"""How many adapters are looked up or fetched at once."""


class LibraryMiddleware:
    """ASGI middleware. It acts when the endpoint reads the body, so after vLLM has checked the request's key."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._replica: Replica | None = None
        self._loaded: dict[str, Any] = {}
        """The requests by which vLLM knows our LoRAs, by their names."""
        self._made, self._loading = Lock(), asyncio.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="loracast-replica")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        kept: list[Kept] = []
        is_read, failed = False, None

        async def read() -> Message:
            nonlocal is_read, failed
            if is_read:
                return await receive()
            is_read, body, goes_on = True, b"", True
            while goes_on:
                message = await receive()
                if message["type"] != "http.request":  # the client has left
                    return message
                body += message.get("body", b"")
                goes_on = message.get("more_body", False)
            try:
                body = await self._named(body, scope["app"].state, kept)
            except (LoracastError, OSError) as error:
                body, failed = b"{", error  # no endpoint takes that
            return {"type": "http.request", "body": body, "more_body": False}

        async def answer(message: Message) -> None:
            if failed is None:
                await send(message)
            elif message["type"] == "http.response.start":
                await _error_response(failed)(scope, receive, send)

        try:
            await self._app(scope, read, answer)
        finally:
            for one in kept:
                self._give_back(one)

    async def _named(self, body: bytes, state: Any, kept: list[Kept]) -> bytes:
        """The body with an adapter's version in place of its name, loaded; as it is where it names no adapter."""
        try:
            asked = json.loads(body)
            name = asked["model"]
        except (ValueError, TypeError, LookupError):
            return body
        models = state.openai_serving_models
        if not isinstance(name, str) or models.is_base_model(name):
            return body
        if name in models.lora_requests and name not in self._loaded:  # of --lora-modules
            return body
        one = await self._taken(name, state)
        if one is None:
            return body  # vLLM says that there is no such model
        kept.append(one)
        async with self._loading:
            if one.name not in self._loaded:
                await self._load(one, models)
        return json.dumps({**asked, "model": one.name}).encode()

    async def _load(self, one: Kept, models: Any) -> None:
        """Have vLLM read a LoRA now, where a failure is an answer; in the middle of a batch it would end the server."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(lora_name=one.name, lora_int_id=one.number, lora_path=str(one.folder))
        try:
            await models.engine_client.add_lora(request)
        except Exception as error:  # whatever the engine's process raised
            raise AdapterError(f"vLLM does not load {one.name}: {error}") from error
        self._loaded[one.name] = models.lora_requests[one.name] = request

    async def _taken(self, name: str, state: Any) -> Kept | None:
        taking = asyncio.get_running_loop().run_in_executor(self._pool, self._take, name, state)
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:  # the client left; the thread goes on
            taking.add_done_callback(self._give_back_taken)
            raise

    def _give_back_taken(self, taken: asyncio.Future[Kept | None]) -> None:
        if not taken.cancelled() and taken.exception() is None:
            self._give_back(taken.result())

    def _give_back(self, one: Kept | None) -> None:
        if one is not None and self._replica is not None:
            self._replica.give_back(one)

    def _take(self, name: str, state: Any) -> Kept | None:
        with self._made:
            if self._replica is None:
                self._replica = self._make(state)
        return self._replica.take(name)

    def _make(self, state: Any) -> Replica:
        config = state.vllm_config.lora_config
        if config is None:
            raise ConfigError("vLLM was started without --enable-lora")
        try:
            max_bytes = int(os.environ.get(BYTES_VARIABLE, _DEFAULT_BYTES))
        except ValueError as error:
            raise ConfigError(f"{BYTES_VARIABLE} is no number of bytes") from error
        url = os.environ.get(STORE_VARIABLE)

        def forget(name: str) -> None:
            self._loaded.pop(name, None)
            state.openai_serving_models.lora_requests.pop(name, None)

        return Replica(
            FromStore(url) if url else FromLibrary(Library()),
            cache_dir("exports") / "replica",
            max_bytes=max_bytes,
            max_rank=config.max_lora_rank,
            on_drop=forget,
        )


def _error_response(error: Exception) -> JSONResponse:
    """An answer with an error in OpenAI's form."""
    status, kind = (400, "BadRequestError") if isinstance(error, AdapterError) else (503, "ServiceUnavailableError")
    return JSONResponse({"error": {"message": str(error), "type": kind, "param": "model", "code": status}}, status)
