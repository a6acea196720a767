"""/v1/responses: OpenAI's newer form of a chat, with file search in vector stores. Nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from loracast.serving.answering import Asked, Call
from loracast.serving.errors import as_api_error
from loracast.serving.guard import needs
from loracast.serving.responding import Json, event, respond, token_dict
from loracast.serving.schema import ResponsesRequest
from loracast.serving.service import Shared

router = APIRouter(dependencies=[needs("read")])


@router.post("/v1/responses", response_model=None)
async def create_response(body: ResponsesRequest, request: Request, service: Shared) -> Response:
    """Answer a chat. Errors as for /v1/chat/completions."""
    asked = Asked(
        body.model, body, body.sampling(body.max_output_tokens), body.turns(), searches=body.searches,
        memory=body.memory, style=body.style, n_logprobs=body.n_logprobs,
    )  # fmt: skip
    call = Call(service, asked)
    response = _Response(call, body)
    return await respond(request, call, bool(body.stream), response.events, response.whole)


class _Response:
    """The response object of a call, at its beginning and at its end, and the events between."""

    def __init__(self, call: Call, body: ResponsesRequest):
        self.call, self.body = call, body
        self.id, self.message_id, self.search_id = (f"{kind}_{uuid4().hex}" for kind in ("resp", "msg", "fs"))

    def _object(self, status: str, output: list[Json], **fields: Any) -> Json:
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.call.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **fields,
        }

    def whole(self) -> Json:
        """The response once all tokens are there."""
        call = self.call
        is_cut = call.answers[0].finish == "length"
        usage = {
            "input_tokens": call.n_prompt_tokens,
            "input_tokens_details": {"cached_tokens": call.n_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": call.n_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": call.n_prompt_tokens + call.n_tokens,
        }
        return self._object(
            "incomplete" if is_cut else "completed",
            [*self._searches(), self._message(self._part(), "incomplete" if is_cut else "completed")],
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            usage=usage,
            loracast=call.account(),
        )

    def _searches(self) -> list[Json]:
        """The item that tells of the search in vector stores, if there was one."""
        if not self.body.searches:
            return []
        shown = self.call.results() if "file_search_call.results" in (self.body.include or ()) else None
        query = self.body.turns()[-1]["content"]
        item = {"id": self.search_id, "type": "file_search_call", "status": "completed"}
        return [{**item, "queries": [query], "results": shown}]

    def _message(self, part: Json | None, status: str) -> Json:
        content = [] if part is None else [part]
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self) -> Json:
        text = self.call.answers[0].text
        logprobs = [self._logprob(token) for token in self.call.answers[0].tokens]
        return _text_part(
            text, self.call.citations(len(text)), logprobs if self.call.asked.n_logprobs is not None else []
        )

    def _logprob(self, token: Any) -> Json:
        return token_dict(self.call.service.model.base.tokenizer, token)

    async def events(self) -> AsyncIterator[str]:
        """The events of a streamed response, in OpenAI's order."""
        number = -1

        def numbered(kind: str, fields: Mapping[str, Any]) -> str:
            nonlocal number
            number += 1
            return event({"type": f"response.{kind}", "sequence_number": number, **fields}, f"response.{kind}")

        beginning = self._object("in_progress", [])
        try:
            yield numbered("created", {"response": beginning})
            yield numbered("in_progress", {"response": beginning})
            searches = self._searches()
            for item in searches:
                place = {"output_index": 0, "item_id": self.search_id}
                yield numbered("output_item.added", {"output_index": 0, "item": {**item, "status": "in_progress"}})
                for kind in ("in_progress", "searching", "completed"):
                    yield numbered(f"file_search_call.{kind}", place)
                yield numbered("output_item.done", {"output_index": 0, "item": item})
            at = {"output_index": len(searches)}
            inside = {"item_id": self.message_id, **at, "content_index": 0}
            yield numbered("output_item.added", {**at, "item": self._message(None, "in_progress")})
            yield numbered("content_part.added", {**inside, "part": _text_part("", [], [])})
            wants_logprobs = self.call.asked.n_logprobs is not None
            async for _, token in self.call.pieces():
                if token.text or wants_logprobs:
                    logprobs = [self._logprob(token)] if wants_logprobs and token.id is not None else []
                    yield numbered("output_text.delta", {**inside, "delta": token.text, "logprobs": logprobs})
            part, response = self._part(), self.whole()
            yield numbered("output_text.done", {**inside, "text": part["text"], "logprobs": part["logprobs"]})
            for i, citation in enumerate(part["annotations"]):
                fields = {**inside, "annotation_index": i, "annotation": citation}
                yield numbered("output_text.annotation.added", fields)
            yield numbered("content_part.done", {**inside, "part": part})
            yield numbered("output_item.done", {**at, "item": response["output"][-1]})
            yield numbered(response["status"], {"response": response})
        except Exception as error:
            refused = as_api_error(error)
            fault = {"code": refused.code or "server_error", "message": str(refused)}
            yield numbered("failed", {"response": self._object("failed", [], error=fault)})


def _text_part(text: str, annotations: list[Json], logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": annotations, "logprobs": logprobs}
