"""`/v1/memories`: what users said in chats that name a memory, and taking a message out of it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from loracast.serving.errors import ApiError
from loracast.serving.guard import needs
from loracast.serving.schema import Body
from loracast.serving.service import Shared

router = APIRouter(prefix="/v1/memories")
Name = Annotated[str, Path(max_length=64)]


@router.get("/{name}", dependencies=[needs("write")])
def list_messages(name: Name, service: Shared) -> dict[str, Any]:
    """The messages of a memory, the oldest first. Errors: 400 where the name is another adapter's."""
    return {"object": "list", "data": service.model.memory(name).messages()}


class _Said(Body):
    message: str = Field(min_length=1, max_length=65_536)


@router.post("/{name}", dependencies=[needs("write")])
def remember_message(name: Name, body: _Said, service: Shared) -> dict[str, Any]:
    """Add what a message states. A chat request with `memory` does so by itself, after its answer."""
    return {"name": name, "is_new": service.model.memory(name).remember(body.message) is not None}


@router.delete("/{name}/{number}", dependencies=[needs("write")])
async def forget_message(name: Name, number: int, service: Shared) -> dict[str, Any]:
    """Take a message out, counted from 1. Errors: 400, 404 where there is none."""
    memory = await run_in_threadpool(service.model.memory, name)
    if not 1 <= number <= len(memory.messages()):
        raise ApiError(404, f"the memory has no message {number}")
    forgotten = await run_in_threadpool(memory.forget, number)
    removed = {"message": forgotten.message, "still_in": forgotten.still_in}
    return {"name": name, "deleted": True, **removed, "versions_removed": forgotten.n_removed}
