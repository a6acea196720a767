"""What a server tells of itself: its health, figures, base, models and jobs; and the page at `/`."""

from __future__ import annotations

import asyncio
import json
import mimetypes
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST

from loracast import __version__
from loracast.export import FORMATS, MERGED
from loracast.library.adapter import Adapter
from loracast.library.manifest import VERSION_DIGITS
from loracast.serving.engine import token_bytes
from loracast.serving.errors import ApiError
from loracast.serving.guard import needs
from loracast.serving.routes.files import listing
from loracast.serving.schema import ChatRequest, NumberedAdapter
from loracast.serving.service import Service, Shared
from loracast.serving.state import Paging

router = APIRouter()
_POLL_S = 0.1
_KEEP_ALIVE_S = 15.0


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


@router.get("/v1/server", dependencies=[needs("read")])
def describe_server(service: Shared) -> dict[str, Any]:
    """The base, and what else a client has to know to show what a request costs and what can be asked for."""
    base = service.model.base
    return {
        "object": "server",
        "version": __version__,
        "base": service.names.base,
        "window": base.window,
        "kv_bytes_per_token": token_bytes(base),
        "export_formats": [{"name": name, "label": label} for name, label in FORMATS.items() if name != MERGED],
        "has_memory": "memory" in ChatRequest.model_fields,
        "has_styles": "style" in ChatRequest.model_fields,
        "watched": [asdict(folder) for folder in service.watcher.states],
    }


# ---- models


@router.get("/v1/models", dependencies=[needs("read")])
def list_models(service: Shared) -> dict[str, Any]:
    """The base, and the newest version of each adapter that was made for it."""
    found = [_card(service, service.names.base, None, 0)]
    for entry in service.names.adapters():
        root = f"{entry.name}@{entry.version[:VERSION_DIGITS]}"
        found.append(_card(service, entry.name, root, _seconds(entry.created)))
    return {"object": "list", "data": found}


@router.get("/v1/models/{model:path}", dependencies=[needs("read")])
def find_model(model: str, service: Shared) -> dict[str, Any]:
    """One model, by any name that requests may give. Errors: 404."""
    adapters = [one for one in service.names.resolve(model)[0] if isinstance(one, Adapter)]
    created = max((_seconds(adapter.manifest.created) for adapter in adapters), default=0)
    return _card(service, model, "+".join(adapter.version for adapter in adapters) or None, created)


@router.get("/lora-adapters", dependencies=[needs("read")])
def list_lora_adapters(service: Shared) -> list[dict[str, Any]]:
    """The adapters by number, each with its factor in requests for the base that name none, as llama.cpp tells them."""
    defaults = dict(service.names.defaults)
    numbered = sorted(service.names.numbered().items())
    return [{"id": number, "path": name, "scale": defaults.get(name, 0.0)} for number, name in numbered]


@router.post("/lora-adapters", dependencies=[needs("admin")])
def set_lora_adapters(service: Shared, body: list[NumberedAdapter]) -> dict[str, bool]:
    """Set the adapters, with their factors, of requests for the base that name none; others are left out from then on.

    As llama.cpp's. Errors: 400 for a number that no adapter has.
    """
    service.names.defaults = service.names.by_number((one.id, one.scale) for one in body)
    return {"success": True}


def _card(service: Service, id: str, root: str | None, created: int) -> dict[str, Any]:
    """A model as vLLM tells it. `root` is the version that the name stands for; the base is its own."""
    base = service.names.base
    return {
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "loracast",
        "root": root or base,
        "parent": base if root else None,
        "max_model_len": service.model.base.window,
    }


def _seconds(created: str) -> int:
    return int(datetime.fromisoformat(created).timestamp())


# ---- jobs


@router.get("/v1/jobs", dependencies=[needs("read")])
def list_jobs(service: Shared, paging: Annotated[Paging, Query()]) -> dict[str, Any]:
    """The jobs of the last week, newest first."""
    found, has_more = service.learning.jobs.page(paging)
    return listing([job.to_dict() for job in found], has_more)


@router.get("/v1/jobs/{job_id}", dependencies=[needs("read")])
def get_job(service: Shared, job_id: str) -> dict[str, Any]:
    """What is known of a job."""
    return service.learning.jobs.find(job_id).to_dict()


@router.post("/v1/jobs/{job_id}/cancel", dependencies=[needs("write")])
def cancel_job(service: Shared, job_id: str) -> dict[str, Any]:
    """Cancel a job; one that runs stops before its next chunks."""
    return service.learning.jobs.cancel(job_id).to_dict()


@router.get("/v1/jobs/{job_id}/events", dependencies=[needs("read")])
async def follow_job(
    service: Shared, job_id: str, last_event_id: Annotated[str | None, Header(max_length=20)] = None
) -> Response:
    """The job whenever it changes, up to its end, as server-sent events.

    Each event holds the whole job, so a client that comes back with Last-Event-ID gets the newest one unless it has
    seen it. 204, which tells a browser not to come back, where it has seen the last one.
    """
    job = await run_in_threadpool(service.learning.jobs.find, job_id)
    seen = int(last_event_id) if last_event_id and last_event_id.isdecimal() else 0
    if job.has_ended and job.revision <= seen:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store"}
    return StreamingResponse(_job_events(service, job_id, seen), 200, headers, "text/event-stream")


async def _job_events(service: Service, job_id: str, seen: int) -> AsyncIterator[str]:
    silent_s = 0.0
    while not service.is_draining:
        job = await run_in_threadpool(service.learning.jobs.find, job_id)
        if job.revision > seen:
            seen, silent_s = job.revision, 0.0
            yield f"id: {job.revision}\ndata: {json.dumps(job.to_dict())}\n\n"
        if job.has_ended:
            return
        if silent_s >= _KEEP_ALIVE_S:
            silent_s = 0.0
            yield ": the job goes on\n\n"
        await asyncio.sleep(_POLL_S)
        silent_s += _POLL_S


# ---- the page, which loads nothing from elsewhere and runs no script but its own

_PAGE = StaticFiles(packages=[("loracast.serving", "page")])
mimetypes.add_type("text/javascript", ".js")  # whatever this system calls it
_POLICY = {
    "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self'",
    "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
}  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser asks whether its copy is still good
}


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """The page."""
    return await page_file("index.html", request)


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str, request: Request) -> Response:
    """A style sheet, a module or the icon of the page. Raises HTTPException (404) for any other name."""
    file = await _PAGE.get_response(name, request.scope)
    file.headers.update(_HEADERS)
    return file
