"""Which routes a key of each scope may use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastapi import Depends, Request

from loracast.serving.errors import ApiError
from loracast.serving.keys import SCOPES, Scope

if TYPE_CHECKING:
    from loracast.library.adapter import Adapter


def needs(scope: Scope) -> Any:
    """A dependency of a route: refuses requests whose key has a smaller scope."""

    async def check(request: Request) -> None:  # one that is not async would be called in another thread
        check_scope(request, scope)

    check.scope = scope  # type: ignore[attr-defined]  # a test looks whether every route has one
    return Depends(check)


def check_memories(request: Request, adapters: Iterable[Adapter]) -> None:
    """Raise ApiError (403) where one of these is a chat's memory, which only keys that may write may read."""
    if any(adapter.manifest.is_memory for adapter in adapters):
        check_scope(request, "write")


def check_scope(request: Request, scope: Scope) -> None:
    """Raise ApiError (403) for a request whose key has a smaller scope."""
    if SCOPES.index(request.state.scope) < SCOPES.index(scope):
        raise ApiError(403, f"this needs a key of scope {scope!r}; yours has {request.state.scope!r}")
