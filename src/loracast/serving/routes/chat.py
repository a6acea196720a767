"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from loracast.serving.answering import Answered, Asked, Call
from loracast.serving.generation import Token
from loracast.serving.guard import needs
from loracast.serving.responding import DONE, error_event, event, respond, token_dict, usage, with_account
from loracast.serving.schema import ChatRequest
from loracast.serving.service import Shared

router = APIRouter(dependencies=[needs("read")])


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatRequest, request: Request, service: Shared) -> Response:
    """Answer a chat. Errors: 400, 403, 404 for an unknown model, 408, 429 where the queue is full, 503."""
    call = Call(
        service,
        Asked(
            body.model,
            body,
            body.sampling(body.max_completion_tokens or body.max_tokens, body.seed),
            [message.turn() for message in body.messages],
            window=body.window,
            memory=body.memory,
            style=body.style,
            n=body.n or 1,
            stop=body.stops,
            n_logprobs=body.n_logprobs,
        ),
    )
    return await respond(request, call, bool(body.stream), lambda: _events(call, body), lambda: _whole(call))


def _whole(call: Call) -> dict[str, Any]:
    choices = [_choice(call, i, answer) for i, answer in enumerate(call.answers)]
    return {**_head(call, "chat.completion"), "choices": choices, "usage": usage(call), "loracast": call.account()}


def _head(call: Call, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid4().hex}", "object": kind, "created": call.created, "model": call.asked.model}


def _choice(call: Call, i: int, answer: Answered) -> dict[str, Any]:
    message = {
        "role": "assistant",
        "content": answer.text,
        "refusal": None,
        "annotations": call.citations(len(answer.text)),
    }
    logprobs = _logprobs(call, answer.tokens)
    return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}


def _logprobs(call: Call, tokens: Sequence[Token]) -> dict[str, Any] | None:
    if call.asked.n_logprobs is None:
        return None
    tokenizer = call.service.model.base.tokenizer
    return {"content": [token_dict(tokenizer, token) for token in tokens], "refusal": None}


async def _events(call: Call, body: ChatRequest) -> AsyncIterator[str]:
    """The chunks of a streamed completion: a role for each answer, pieces of text, ends, usage."""
    head = _head(call, "chat.completion.chunk")
    blank = {"usage": None} if body.includes_usage else {}

    def chunk(i: int, delta: dict[str, Any], finish: str | None = None, tokens: Sequence[Token] = ()) -> dict[str, Any]:
        choice = {"index": i, "delta": delta, "logprobs": _logprobs(call, tokens), "finish_reason": finish}
        return {**head, "choices": [choice], **blank}

    try:
        for i in range(len(call.answers)):
            yield event(chunk(i, {"role": "assistant", "content": "", "refusal": None}))
        async for i, token in call.pieces():
            if token.text or body.logprobs:
                yield event(chunk(i, {"content": token.text}, tokens=[token] if token.id is not None else []))
        ends = []
        for i, answer in enumerate(call.answers):
            citations = call.citations(len(answer.text))
            ends.append(chunk(i, {"annotations": citations} if citations else {}, answer.finish))
        for end in with_account(call, ends, head if body.includes_usage else None):
            yield event(end)
    except Exception as error:
        yield error_event(error)
    yield DONE
