"""Whether the server lives, and whether it takes requests."""

from __future__ import annotations

from fastapi import APIRouter

from loracast.serving.errors import ApiError
from loracast.serving.service import Shared

router = APIRouter()


@router.get("/health")
async def health(service: Shared) -> dict[str, str]:
    """The process lives. The instance is another one each time that a server starts."""
    return {"status": "ok", "instance": service.settings.instance}


@router.get("/ready")
async def ready(service: Shared) -> dict[str, str]:
    """The base is loaded, and the server is not about to stop (503)."""
    if service.is_draining:
        raise ApiError(503, "the server is stopping")
    return {"status": "ok"}
