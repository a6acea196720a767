"""Middleware of vLLM's server: requests name an adapter of a library or a shared store as their model.

    vllm serve BASE --enable-lora --middleware loracast.export.vllm_middleware.LibraryMiddleware

It writes the adapter's newest version, `manual@3f9a...`, in place of the name, so that vLLM never answers with weights
that were replaced, and holds the files until the answer is complete. `Replica` has the files: exported when they are
first asked for, under a byte budget, the least recently used ones going first. One that a running request uses stays:
vLLM reads its files whenever the LoRA has left memory, and ends when they are missing.

    LORACAST_STORE           URL of a shared store; without it, the library of this machine (LORACAST_HOME)
    LORACAST_REPLICA_BYTES   bytes of exported LoRAs that stay on the disk (10 GiB)
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loracast.errors import AdapterError, ConfigError, LoracastError, NoSuchAdapterError
from loracast.export.adapter import export_adapter
from loracast.export.formats import MOST_LOST, VLLM_RANKS, too_much_lost
from loracast.files import bytes_in, cache_dir, move_unless_there, tidy, try_lock, work_folder
from loracast.library.adapter import Adapter
from loracast.library.library import Library
from loracast.library.manifest import VERSION_DIGITS
from loracast.library.storage import REFRESH_S, fetch_whole
from loracast.library.store import SharedStore

PREFIX = "loracast:"
"""What a request may write before an adapter's name."""
_ASKED = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})(?:@([0-9a-f]{4,64}))?")
_KEPT = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,63}}@[0-9a-f]{{{VERSION_DIGITS}}}")
_RETRY_S = 30.0  # after a store could not be reached
_ID_DIGITS = 15
_GRACE_S = 10.0
"""Files stay so long after a request: the server may begin a step with it while its client is leaving."""


class FromLibrary:
    """Finds adapters in a library on this machine, shared or not."""

    def __init__(self, library: Library):
        self._library = library

    def versions(self, name: str) -> list[str]:
        """The versions of a name, newest first; none where there is no such name."""
        try:
            return [entry.version for entry in self._library.versions(name)]
        except NoSuchAdapterError:
            return []

    def open(self, name: str, version: str, folder: Path) -> Adapter:
        """An adapter with its files on this machine; `folder` is a new one for those that are fetched."""
        return self._library.open(f"{name}@{version}")


class FromStore:
    """Finds adapters in a store that libraries share, without a library: a name costs two requests every few seconds.

    Where the store cannot be reached, a name keeps the versions known last.
    """

    def __init__(self, url: str):
        self._store = SharedStore(url)
        self._known: dict[str, tuple[float, list[str]]] = {}  # when to look again, and the versions

    def versions(self, name: str) -> list[str]:
        due, known = self._known.get(name, (0.0, None))
        if known is not None and time.monotonic() < due:
            return known
        wait_s = REFRESH_S
        try:
            number = self._store.newest([name]).get(name)
            named = () if number is None else self._store.read(name, number).versions
            found = list(dict.fromkeys(version for version, _ in reversed(named)))  # one may have come back
        except LoracastError:
            if known is None:
                raise
            found, wait_s = known, _RETRY_S
        self._known.pop(name, None)
        if found:
            self._known[name] = time.monotonic() + wait_s, found
        return found

    def open(self, name: str, version: str, folder: Path) -> Adapter:
        fetched = fetch_whole(self._store, version, folder)
        fetched.name = name
        return fetched


Source = FromLibrary | FromStore


def export_for_vllm(adapter: Adapter, folder: Path, max_rank: int | None = None) -> None:
    """Export all of an adapter for vLLM into a folder, so that nobody sees half of it.

    Args:
        max_rank: of the server; None for the largest that vLLM takes.

    Raises:
        AdapterError: too much would be lost at that rank.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(folder.parent, "new") as work:
        (made,) = export_adapter(adapter, "vllm", work / folder.name, max_rank=max_rank)
        if made.error > MOST_LOST:
            remedy = "ask through `loracast serve --engine`, which gives a question its chunks"
            raise too_much_lost(adapter.lora(dense=False).rank, max_rank or max(VLLM_RANKS), made.error, remedy)
        move_unless_there(made.path, folder)


class Kept:
    """A LoRA on the disk."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        """The name is `manual@3f9a...`, which never means other weights, as vLLM's prefix cache demands."""
        self.number = 0
        self.n_bytes = bytes_in(folder)
        self.n_users = 0
        self.free_at = 0.0
        self.lock = Lock()
        """Held while it is exported, so that requests for the same LoRA export it once."""


class Replica:
    """Exported LoRAs in a folder of one server's own. Thread-safe."""

    def __init__(self, source: Source, folder: Path, *, max_bytes: int, max_rank: int, forget: Callable[[str], object]):
        """
        Args:
            folder: what an earlier server of the same rank left there is used again.
            max_bytes: of files; those that requests use now, or used in the last seconds, may exceed it.
            max_rank: of the server. A LoRA of a higher rank is compressed to it where that loses little.
            forget: called with a LoRA's name before its files go.

        Raises:
            ConfigError: another server uses the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._locked = try_lock(folder)
        if self._locked is None and os.name == "posix":
            raise ConfigError(f"another server uses {folder}: give each one a LORACAST_HOME of its own")
        for other in folder.glob("rank-*"):
            if other.name != f"rank-{max_rank}":
                shutil.rmtree(other)
        self._source, self._folder = source, folder / f"rank-{max_rank}"
        self._max_bytes, self._max_rank, self._forget = max_bytes, max_rank, forget
        self._folder.mkdir(exist_ok=True)
        tidy(self._folder)
        there = [path for path in self._folder.iterdir() if _KEPT.fullmatch(path.name)]
        there.sort(key=lambda path: path.stat().st_mtime)
        self._kept = OrderedDict((path.name, Kept(path.name, path)) for path in there)
        self._lock = Lock()

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(one.n_bytes for one in self._kept.values())

    def close(self) -> None:
        """Let another server use the folder."""
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def take(self, asked: str) -> Kept | None:
        """The LoRA of a name, exported in this thread if need be; `give_back` lets go of it.

        Args:
            asked: `manual` (its newest version) or `manual@3f9a`, with or without `loracast:` before it.

        Returns:
            None where no adapter has the name.

        Raises:
            AdapterError: the adapter is damaged, keeps no factors, or its rank is too high for the server.
            LoracastError: the store cannot be reached.
        """
        match = _ASKED.fullmatch(asked.removeprefix(PREFIX))
        if match is None:
            return None
        name, digits = match[1], match[2] or ""
        found = [version for version in self._source.versions(name) if version.startswith(digits)]
        if not found:
            return None
        if digits and len(found) > 1:
            raise AdapterError(f"{digits!r} begins several versions of {name!r}: give more digits")
        version = found[0]
        key = f"{name}@{version[:VERSION_DIGITS]}"
        with self._lock:
            one = self._kept.setdefault(key, Kept(key, self._folder / key))
            self._kept.move_to_end(key)
            one.n_users += 1
        with ExitStack() as failing:
            failing.callback(self.give_back, one)
            with one.lock:
                if not one.folder.is_dir():
                    self._export(one, name, version)
                one.number = lora_number(version)
                os.utime(one.folder)
            failing.pop_all()
        self._drop_over_budget()
        return one

    def give_back(self, one: Kept) -> None:
        """Let go of a LoRA."""
        with self._lock:
            one.n_users -= 1
            one.free_at = time.monotonic() + _GRACE_S
            if not one.n_users and not one.n_bytes:  # it could not be exported
                self._kept.pop(one.name, None)

    def _export(self, one: Kept, name: str, version: str) -> None:
        with work_folder(self._folder, "new") as work:
            export_for_vllm(self._source.open(name, version, work / "fetched"), one.folder, self._max_rank)
        with self._lock:
            one.n_bytes = bytes_in(one.folder)

    def _drop_over_budget(self) -> None:
        with ExitStack() as graves, self._lock:  # files are deleted once the lock is free again
            over, now = sum(one.n_bytes for one in self._kept.values()) - self._max_bytes, time.monotonic()
            for one in [*self._kept.values()]:
                if over > 0 and not one.n_users and one.free_at <= now:
                    del self._kept[one.name]
                    self._forget(one.name)
                    os.replace(one.folder, graves.enter_context(work_folder(self._folder, "rm")) / one.name)
                    over -= one.n_bytes


def lora_number(version: str) -> int:
    """The number by which vLLM tells LoRAs apart, from a version's hash: it is the same in every process, for ever."""
    return int(version[:_ID_DIGITS], 16) + 1


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
            forget=forget,
        )


def _error_response(error: Exception) -> JSONResponse:
    """An answer with an error in OpenAI's form."""
    status, kind = (400, "BadRequestError") if isinstance(error, AdapterError) else (503, "ServiceUnavailableError")
    return JSONResponse({"error": {"message": str(error), "type": kind, "param": "model", "code": status}}, status)
