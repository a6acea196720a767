"""`/v1/files`: uploads, as in OpenAI's API; and how this and other lists of that API are paged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, Query, UploadFile
from fastapi.responses import FileResponse

from loracast.serving.errors import ApiError
from loracast.serving.guard import needs
from loracast.serving.service import Shared
from loracast.serving.state import Paging
from loracast.serving.uploads import Upload

router = APIRouter(prefix="/v1/files")
Cursor = Annotated[str | None, Query(max_length=80)]


def _paging(
    after: Cursor = None,
    before: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Paging:
    return Paging(after, before, limit, order)


Page = Annotated[Paging, Depends(_paging)]
"""The type of a route's argument that receives the part of a list that a client wants."""


def listing(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of objects that have ids."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]


@router.post("", dependencies=[needs("write")])
def upload_file(
    service: Shared,
    file: UploadFile,
    purpose: Annotated[Purpose, Form()],
    expires_anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
    expires_s: Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=2_592_000)] = None,
) -> dict[str, Any]:
    """Keep a file. It is on the disk when this is answered."""
    if (expires_anchor is None) != (expires_s is None):
        raise ApiError(400, "expires_after needs both an anchor and seconds", param="expires_after")
    return _object(service.learning.uploads.add(file.file, file.filename, purpose, expires_s))


@router.get("", dependencies=[needs("read")])
def list_files(
    service: Shared,
    purpose: Annotated[str | None, Query(max_length=40)] = None,
    after: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The files, newest first."""
    found, has_more = service.learning.uploads.page(Paging(after, None, limit, order), purpose)
    return listing([_object(upload) for upload in found], has_more)


@router.get("/{file_id}", dependencies=[needs("read")])
def get_file(service: Shared, file_id: str) -> dict[str, Any]:
    """What is known of a file."""
    return _object(service.learning.uploads.find(file_id))


@router.get("/{file_id}/content", dependencies=[needs("read")])
def get_content(service: Shared, file_id: str) -> FileResponse:
    """The bytes of a file. A browser saves them, whatever they are, and does not run them."""
    upload = service.learning.uploads.find(file_id)
    return FileResponse(
        service.learning.uploads.path(upload.id),
        media_type="application/octet-stream",
        filename=upload.filename,
        headers={"X-Content-Type-Options": "nosniff"},
    )


@router.delete("/{file_id}", dependencies=[needs("admin")])
def delete_file(service: Shared, file_id: str) -> dict[str, Any]:
    """Delete a file, and take it out of all vector stores."""
    service.learning.delete_upload(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def _object(upload: Upload) -> dict[str, Any]:
    head = {"id": upload.id, "object": "file", "bytes": upload.n_bytes}
    shown = {key: getattr(upload, key) for key in ("created_at", "expires_at", "filename", "purpose")}
    return {**head, **shown, "status": "processed", "status_details": None}
