"""`/v1/jobs`: how far the making of an adapter is, once or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from loracast.serving.guard import needs
from loracast.serving.routes.lists import Page, listing
from loracast.serving.service import Service, Shared

router = APIRouter(prefix="/v1/jobs")
_POLL_S = 0.1
_KEEP_ALIVE_S = 15.0


@router.get("", dependencies=[needs("read")])
def list_jobs(service: Shared, paging: Page) -> dict[str, Any]:
    """The jobs of the last week, newest first."""
    found, has_more = service.learning.jobs.page(paging)
    return listing([job.to_dict() for job in found], has_more)


@router.get("/{job_id}", dependencies=[needs("read")])
def get_job(service: Shared, job_id: str) -> dict[str, Any]:
    """What is known of a job."""
    return service.learning.jobs.find(job_id).to_dict()


@router.post("/{job_id}/cancel", dependencies=[needs("write")])
def cancel_job(service: Shared, job_id: str) -> dict[str, Any]:
    """Cancel a job; one that runs stops before its next chunks."""
    return service.learning.jobs.cancel(job_id).to_dict()


@router.get("/{job_id}/events", dependencies=[needs("read")])
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
    return StreamingResponse(
        _events(service, job_id, seen), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _events(service: Service, job_id: str, seen: int) -> AsyncIterator[str]:
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
