"""Server-sent events, and a response of them that ends its call when the client leaves."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.responses import StreamingResponse

from loracast.serving.answering import Call
from loracast.serving.errors import as_api_error, error_body

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

DONE = "data: [DONE]\n\n"
"""The last event of a completion."""


def event(data: Any, name: str | None = None) -> str:
    """One server-sent event of JSON."""
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {body}\n\n" if name else f"data: {body}\n\n"


def error_event(error: Exception) -> str:
    """What a stream that has begun tells of an error."""
    told = as_api_error(error)
    return event(error_body(told.status, str(told), told.param, told.code))


class EventStream(StreamingResponse):
    """The events of a call, which is closed when they end or the client leaves."""

    def __init__(self, call: Call, events: AsyncIterator[str]):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy hands events on at once
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.close()
