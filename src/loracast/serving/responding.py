"""How routes answer with what a call generated: at once or as server-sent events, with tokens as OpenAI shows them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.responses import StreamingResponse

from loracast.serving.answering import Call
from loracast.serving.generation import Token
from loracast.serving.guard import check_memories, check_scope

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

Json = dict[str, Any]


def token_dict(tokenizer: Any, token: Token) -> Json:
    """A token of a chat's answer: text, bytes, logprob, and the likeliest tokens in its place."""
    top = [_one(tokenizer, id, logprob) for id, logprob in token.top_logprobs]
    return {**_one(tokenizer, token.id, token.logprob), "top_logprobs": top}


def _one(tokenizer: Any, id: int | None, logprob: float | None) -> Json:
    text = text_of(tokenizer, id)
    return {"token": text, "logprob": bounded(logprob), "bytes": list(text.encode())}


def text_of(tokenizer: Any, id: int | None) -> str:
    """The text of one token; bytes that are no whole character are shown as U+FFFD."""
    return tokenizer.decode([id])


def bounded(logprob: float | None) -> float | None:
    """A logprob that JSON can hold: OpenAI tells -9999 for what is as good as impossible."""
    return None if logprob is None else max(logprob, -9999.0)


_LEFT = 499
"""nginx' status for a client that left, which nobody receives."""


def event(data: Any, name: str | None = None) -> str:
    """One server-sent event of JSON."""
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {body}\n\n" if name else f"data: {body}\n\n"


async def respond(
    request: Request,
    call: Call,
    is_streamed: bool,
    events: Callable[[], AsyncIterator[str]],
    whole: Callable[[], Json],
) -> Response:
    """Begin a call and give its answers.

    Args:
        events: the events of a streamed answer.
        whole: the body of a whole answer, once all tokens are there.

    Raises:
        ApiError: what the call is refused with; 403 where the key may not write to its memory, or read one.
    """
    if call.asked.memory:
        check_scope(request, "write")
    with ExitStack() as stack:
        stack.callback(call.close)
        await call.begin()
        check_memories(request, call.asked_of)
        if is_streamed:
            stack.pop_all()  # the stream closes it
            return _EventStream(call, events())
        return JSONResponse(whole()) if await _unless_left(request, call) else Response(status_code=_LEFT)


class _EventStream(StreamingResponse):
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


async def _unless_left(request: Request, call: Call) -> bool:
    """Wait for all answers of a call; False where the client leaves before."""
    finished = asyncio.ensure_future(call.finish())
    left = asyncio.ensure_future(request.receive())  # the body is read: what comes next is that the client leaves
    try:
        await asyncio.wait({finished, left}, return_when=asyncio.FIRST_COMPLETED)
        if finished.done():
            await finished
            return True
        return False
    finally:
        finished.cancel()
        left.cancel()
