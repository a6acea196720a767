"""Whether the server lives, whether it takes requests, and its figures for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from loracast.serving.errors import ApiError
from loracast.serving.guard import needs
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


@router.get("/metrics", dependencies=[needs("read")], response_class=Response)
def metrics(service: Shared) -> Response:
    """Figures in Prometheus' text format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
