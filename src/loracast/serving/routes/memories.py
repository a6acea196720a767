"""`/v1/memories`: what users said in chats that name a memory, and taking a message out of it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.concurrency import run_in_threadpool

from loracast.serving.auth import needs
from loracast.serving.errors import ApiError
from loracast.serving.service import Shared

router = APIRouter(prefix="/v1/memories")
Name = Annotated[str, Path(max_length=64)]


@router.get("/{name}", dependencies=[needs("write")])
def list_messages(name: Name, service: Shared) -> dict[str, Any]:
    """The messages of a memory, the oldest first. Errors: 400 where the name is another adapter's."""
    return {"object": "list", "data": service.model.memory(name).messages()}


@router.delete("/{name}/{number}", dependencies=[needs("write")])
async def forget_message(name: Name, number: int, service: Shared) -> dict[str, Any]:
    """Take a message out, counted from 1. Errors: 400, 404 where there is none."""
    memory = await run_in_threadpool(service.model.memory, name)
    if not 1 <= number <= len(memory.messages()):
        raise ApiError(404, f"the memory has no message {number}")
    forgotten = await run_in_threadpool(memory.forget, number)
    return {"name": name, "deleted": True, "versions_removed": forgotten.n_removed, "still_in": forgotten.still_in}
