"""/v1/completions: prompts that are continued as they stand, without the chat format."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from loracast.serving.answering import Asked, Call
from loracast.serving.generation import Token
from loracast.serving.guard import needs
from loracast.serving.responding import DONE, bounded, error_event, event, respond, text_of, usage, with_account
from loracast.serving.schema import CompletionRequest
from loracast.serving.service import Shared

router = APIRouter(dependencies=[needs("read")])
DEFAULT_TOKENS = 16
"""OpenAI's default of this route."""


@router.post("/v1/completions", response_model=None)
async def create_completion(body: CompletionRequest, request: Request, service: Shared) -> Response:
    """Continue prompts; the chunks of documents are chosen by the prompt's text. Errors as for
    chats.
    """
    sampling = body.sampling(body.max_tokens or DEFAULT_TOKENS, body.seed)
    asked = Asked(
        body.model, body, sampling, prompts=body.prompts, n=body.n or 1, stop=body.stops, n_logprobs=body.logprobs
    )
    call = Call(service, asked)
    return await respond(request, call, bool(body.stream), lambda: _events(call, body), lambda: _whole(call))


def _whole(call: Call) -> dict[str, Any]:
    choices = [_choice(call, i, answer.text, answer.tokens, answer.finish) for i, answer in enumerate(call.answers)]
    return {**_head(call), "choices": choices, "usage": usage(call), "loracast": call.account()}


def _head(call: Call) -> dict[str, Any]:
    asked = call.asked
    return {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": call.created, "model": asked.model}


def _choice(
    call: Call, i: int, text: str, tokens: Sequence[Token], finish: str | None, offset: int = 0
) -> dict[str, Any]:
    logprobs = None
    if call.asked.n_logprobs is not None:
        tokenizer = call.service.model.base.tokenizer
        texts = [text_of(tokenizer, token.id) for token in tokens]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [bounded(token.logprob) for token in tokens],
            "top_logprobs": [  # of tokens with one text, the likeliest stays
                {text_of(tokenizer, id): bounded(logprob) for id, logprob in reversed(token.top_logprobs)}
                for token in tokens
            ],
            "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
        }
    return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}


async def _events(call: Call, body: CompletionRequest) -> AsyncIterator[str]:
    """The chunks of a streamed completion."""
    head = _head(call) | ({"usage": None} if body.includes_usage else {})
    offsets = [0] * len(call.answers)
    try:
        async for i, token in call.pieces():
            tokens = [token] if token.id is not None else []
            if token.text or (body.logprobs is not None and tokens):
                yield event({**head, "choices": [_choice(call, i, token.text, tokens, None, offsets[i])]})
            offsets[i] += len(token.text)
        choices = [_choice(call, i, "", (), answer.finish, offsets[i]) for i, answer in enumerate(call.answers)]
        ends = [{**head, "choices": [choice]} for choice in choices]
        for end in with_account(call, ends, head if body.includes_usage else None):
            yield event(end)
    except Exception as error:
        yield error_event(error)
    yield DONE
