"""The guard: middleware that looks at every request before a route does, at its host, origin, key, type and size.

The scope of the key (read, write or admin) is noted in the request; each route says with `needs` which one it takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loracast.library.adapter import Adapter
from loracast.serving.errors import ApiError, error_response
from loracast.serving.settings import SCOPES, KeyScope, ServerSettings, granted


def needs(scope: KeyScope) -> Any:
    """A dependency of a route: refuses requests whose key has a smaller scope."""

    async def check(request: Request) -> None:  # one that is not async would be called in another thread
        check_scope(request, scope)

    check.scope = scope  # type: ignore[attr-defined]  # a test looks whether every route has one
    return Depends(check)


def check_memories(request: Request, adapters: Iterable[Adapter]) -> None:
    """Raise ApiError (403) where one of these is a chat's memory, which only keys that may write may read."""
    if any(adapter.manifest.is_memory for adapter in adapters):
        check_scope(request, "write")


def check_scope(request: Request, scope: KeyScope) -> None:
    """Raise ApiError (403) for a request whose key has a smaller scope."""
    if SCOPES.index(request.state.scope) < SCOPES.index(scope):
        raise ApiError(403, f"this needs a key of scope {scope!r}; yours has {request.state.scope!r}")


OPEN = ("/", "/health", "/ready")
"""Paths that need no key: a browser has to load the page before it can ask for one."""
OPEN_FOLDER = "/page/"
_SAFE = ("GET", "HEAD", "OPTIONS")


class Guard:
    """ASGI middleware that refuses what no route should see, and counts all requests."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, count: Callable[[str, int], None]):
        """
        Args:
            count: called with each request's route, as a pattern, and the status of its response.
        """
        self.app, self.settings, self.count = app, settings, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            status = status or message.get("status", 0)
            await send(message)

        try:
            await self.app(scope, self._checked(scope, receive), watched)
        except Exception as error:
            response = error_response(error)
            if not status:
                await response(scope, receive, watched)
        finally:
            self.count(getattr(scope.get("route"), "path", "none"), status)

    def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """Raise ApiError for a request that is refused; else what receives its body, up to the limits."""
        headers, method, settings = Headers(scope=scope), scope["method"], self.settings
        if not settings.allows_host(headers.get("host", "")):
            raise ApiError(421, "this server is not called by that name (Host header); --allowed-host permits another")
        origin = headers.get("origin")
        is_own = origin in (None, *settings.cors_origins) or str(origin).partition("://")[2] == headers["host"]
        if method not in _SAFE and not is_own:
            raise ApiError(403, "pages of other origins may not call this server; --cors-origin permits one")
        is_preflight = method == "OPTIONS"  # a browser asks without the key whether it may send one
        scope.setdefault("state", {})["scope"] = None if is_preflight else self._scope(scope["path"], headers)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        length = headers.get("content-length", "")
        has_body = length not in ("", "0") or "transfer-encoding" in headers
        if has_body and kind not in ("application/json", "multipart/form-data"):
            raise ApiError(415, "send the body as application/json, or files as multipart/form-data")
        most = settings.max_upload_bytes if kind == "multipart/form-data" else settings.max_body_bytes
        if length.isdigit() and int(length) > most:
            raise _too_large(most)
        return _limited(receive, most, settings.body_timeout_s)

    def _scope(self, path: str, headers: Headers) -> str | None:
        """What the request's key allows. Raises ApiError where a key is needed and none is known."""
        if not self.settings.keys:
            return "admin"
        scope = granted(self.settings.keys, headers.get("authorization"))
        if scope is None and path not in OPEN and not path.startswith(OPEN_FOLDER):
            message = "this server wants an API key: send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", **{"WWW-Authenticate": "Bearer"})
        return scope


def _limited(receive: Receive, max_bytes: int, timeout_s: float) -> Receive:
    """What receives a body piece by piece, and refuses one that is too long or too slow."""
    n_bytes, is_whole = 0, False

    async def limited() -> Message:
        nonlocal n_bytes, is_whole
        if is_whole:  # from here on it tells when the client leaves
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), timeout_s)
        except TimeoutError as error:
            raise HTTPException(408, "the request's body came too slowly") from error
        n_bytes += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)
        if n_bytes > max_bytes:
            refused = _too_large(max_bytes)
            raise HTTPException(refused.status, str(refused))  # FastAPI lets only these pass while it reads
        return message

    return limited


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the request's body may have {max_bytes:,} bytes at most")
