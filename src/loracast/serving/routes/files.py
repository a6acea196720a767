"""`/v1/files` and `/v1/vector_stores`: uploads, and sets of them that questions are answered from, as in OpenAI's API.

Also how these and other lists of that API are paged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, UploadFile
from fastapi.responses import FileResponse
from pydantic import Field, StringConstraints

from loracast.serving.errors import ApiError
from loracast.serving.guard import needs
from loracast.serving.schema import Filter, KnownFields
from loracast.serving.service import Shared
from loracast.serving.state import Paging, Upload, encode
from loracast.serving.vector_stores import Attributes, Chunking, FileStatus, Id, Key, NewFile, Text

router = APIRouter()


class _UploadPaging(Paging):
    limit: int = Field(10_000, ge=1, le=10_000)
    purpose: str | None = Field(None, max_length=40)


class _FilePaging(Paging):
    filter: FileStatus | None = None


FilePage = Annotated[_FilePaging, Query()]
"""Which files of a vector store a client wants."""


def listing(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of objects that have ids."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]


@router.post("/v1/files", dependencies=[needs("write")])
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


@router.get("/v1/files", dependencies=[needs("read")])
def list_files(service: Shared, paging: Annotated[_UploadPaging, Query()]) -> dict[str, Any]:
    """The files, newest first."""
    found, has_more = service.learning.uploads.page(paging, paging.purpose)
    return listing([_object(upload) for upload in found], has_more)


@router.get("/v1/files/{file_id}", dependencies=[needs("read")])
def get_file(service: Shared, file_id: str) -> dict[str, Any]:
    """What is known of a file."""
    return _object(service.learning.uploads.find(file_id))


@router.get("/v1/files/{file_id}/content", dependencies=[needs("read")])
def get_content(service: Shared, file_id: str) -> FileResponse:
    """The bytes of a file. A browser saves them, whatever they are, and does not run them."""
    upload = service.learning.uploads.find(file_id)
    path, headers = service.learning.uploads.path(upload.id), {"X-Content-Type-Options": "nosniff"}
    return FileResponse(path, 200, headers, "application/octet-stream", filename=upload.filename)


@router.delete("/v1/files/{file_id}", dependencies=[needs("admin")])
def delete_file(service: Shared, file_id: str) -> dict[str, Any]:
    """Delete a file, and take it out of all vector stores."""
    service.learning.delete_upload(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def _object(upload: Upload) -> dict[str, Any]:
    head = {"id": upload.id, "object": "file", "bytes": upload.n_bytes}
    shown = {key: getattr(upload, key) for key in ("created_at", "expires_at", "filename", "purpose")}
    return {**head, **shown, "status": "processed", "status_details": None}


# ---- vector stores

_MAX_FILES = 2000
Metadata = Annotated[dict[Key, Text], Field(max_length=16)]


class _ExpiresAfter(KnownFields):
    anchor: Literal["last_active_at"]
    days: int = Field(ge=1, le=365)


class _Files(KnownFields):
    file_ids: Annotated[list[Id], Field(min_length=1, max_length=_MAX_FILES)] | None = None
    files: Annotated[list[NewFile], Field(min_length=1, max_length=_MAX_FILES)] | None = None
    attributes: Attributes | None = None
    chunking_strategy: Chunking | None = None


class _NewStore(KnownFields):
    name: Annotated[str, StringConstraints(max_length=256)] = ""
    description: Annotated[str, StringConstraints(max_length=512)] | None = None
    file_ids: list[Id] = Field(default=[], max_length=_MAX_FILES)
    metadata: Metadata | None = None
    expires_after: _ExpiresAfter | None = None
    chunking_strategy: Chunking | None = None


class _StoreChanges(KnownFields):
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    metadata: Metadata | None = None
    expires_after: _ExpiresAfter | None = None


class _FileChanges(KnownFields):
    attributes: Attributes | None


class _Ranking(KnownFields):
    ranker: str | None = None
    score_threshold: float = Field(default=0.0, ge=0, le=1)


_Query = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class _Search(KnownFields):
    query: _Query | Annotated[list[_Query], Field(min_length=1, max_length=16)]
    filters: Filter | None = None
    max_num_results: int = Field(default=10, ge=1, le=50)
    ranking_options: _Ranking = _Ranking()
    rewrite_query: bool = False


@router.post("/v1/vector_stores", dependencies=[needs("write")])
def create_store(service: Shared, body: _NewStore) -> dict[str, Any]:
    """Make a vector store and attach files to it."""
    days = None if body.expires_after is None else body.expires_after.days
    files = [NewFile(file_id=id, chunking_strategy=body.chunking_strategy) for id in body.file_ids]
    return service.learning.stores.create(body.name, files, body.metadata or {}, days)


@router.get("/v1/vector_stores", dependencies=[needs("read")])
def list_stores(service: Shared, paging: Annotated[Paging, Query()]) -> dict[str, Any]:
    """The vector stores, newest first."""
    return listing(*service.learning.stores.page(paging))


@router.get("/v1/vector_stores/{store_id}", dependencies=[needs("read")])
def get_store(service: Shared, store_id: str) -> dict[str, Any]:
    """What is known of a vector store."""
    return service.learning.stores.find(store_id)


@router.post("/v1/vector_stores/{store_id}", dependencies=[needs("write")])
def update_store(service: Shared, store_id: str, body: _StoreChanges) -> dict[str, Any]:
    """Change a vector store's name, metadata or expiry."""
    changes: dict[str, Any] = {}
    if body.name is not None:
        changes["name"] = body.name
    if "metadata" in body.model_fields_set:
        changes["metadata"] = encode(body.metadata or {})
    if "expires_after" in body.model_fields_set:
        changes["expires_days"] = None if body.expires_after is None else body.expires_after.days
    return service.learning.stores.update(store_id, changes)


@router.delete("/v1/vector_stores/{store_id}", dependencies=[needs("admin")])
def delete_store(service: Shared, store_id: str) -> dict[str, Any]:
    """Delete a vector store, and the adapters that no other one needs; the files stay."""
    service.learning.stores.delete(store_id)
    return {"id": store_id, "object": "vector_store.deleted", "deleted": True}


@router.post("/v1/vector_stores/{store_id}/search", dependencies=[needs("read")])
def search_store(service: Shared, store_id: str, body: _Search) -> dict[str, Any]:
    """The chunks of a vector store that match a query best."""
    queries = [body.query] if isinstance(body.query, str) else body.query
    data = service.learning.stores.search(
        store_id, queries, body.max_num_results, body.filters, body.ranking_options.score_threshold
    )
    page = {"object": "vector_store.search_results.page", "search_query": queries, "data": data}
    return {**page, "has_more": False, "next_page": None}


# ---- their files


@router.post("/v1/vector_stores/{store_id}/files", dependencies=[needs("write")])
def attach_file(service: Shared, store_id: str, body: NewFile) -> dict[str, Any]:
    """Attach a file, which is cast into an adapter from now on."""
    service.learning.stores.attach(store_id, [body])
    return service.learning.stores.file(store_id, body.file_id)


@router.get("/v1/vector_stores/{store_id}/files", dependencies=[needs("read")])
def list_store_files(service: Shared, store_id: str, paging: FilePage) -> dict[str, Any]:
    """The files of a vector store, newest first."""
    return listing(*service.learning.stores.files(store_id, paging, paging.filter))


@router.get("/v1/vector_stores/{store_id}/files/{file_id}", dependencies=[needs("read")])
def get_store_file(service: Shared, store_id: str, file_id: str) -> dict[str, Any]:
    """What is known of a file of a vector store."""
    return service.learning.stores.file(store_id, file_id)


@router.post("/v1/vector_stores/{store_id}/files/{file_id}", dependencies=[needs("write")])
def update_store_file(service: Shared, store_id: str, file_id: str, body: _FileChanges) -> dict[str, Any]:
    """Change the attributes that a file is filtered by."""
    return service.learning.stores.set_attributes(store_id, file_id, body.attributes or {})


@router.delete("/v1/vector_stores/{store_id}/files/{file_id}", dependencies=[needs("admin")])
def detach_file(service: Shared, store_id: str, file_id: str) -> dict[str, Any]:
    """Take a file out of a vector store; the file itself stays."""
    service.learning.stores.detach(store_id, file_id)
    return {"id": file_id, "object": "vector_store.file.deleted", "deleted": True}


@router.get("/v1/vector_stores/{store_id}/files/{file_id}/content", dependencies=[needs("read")])
def get_store_file_content(service: Shared, store_id: str, file_id: str) -> dict[str, Any]:
    """The chunks that a file was cut into."""
    data = [{"type": "text", "text": text} for text in service.learning.stores.chunks(store_id, file_id)]
    return {"object": "vector_store.file_content.page", "data": data, "has_more": False, "next_page": None}


# ---- batches


@router.post("/v1/vector_stores/{store_id}/file_batches", dependencies=[needs("write")])
def create_batch(service: Shared, store_id: str, body: _Files) -> dict[str, Any]:
    """Attach several files at once."""
    if (body.file_ids is None) == (body.files is None):
        raise ApiError(400, "give either file_ids or files", param="file_ids")
    how: dict[str, Any] = {"attributes": body.attributes, "chunking_strategy": body.chunking_strategy}
    files = body.files or [NewFile(file_id=id, **how) for id in body.file_ids or ()]
    return service.learning.stores.attach(store_id, files)


@router.get("/v1/vector_stores/{store_id}/file_batches/{batch_id}", dependencies=[needs("read")])
def get_batch(service: Shared, store_id: str, batch_id: str) -> dict[str, Any]:
    """How far a batch is."""
    return service.learning.stores.batch(store_id, batch_id)


@router.post("/v1/vector_stores/{store_id}/file_batches/{batch_id}/cancel", dependencies=[needs("write")])
def cancel_batch(service: Shared, store_id: str, batch_id: str) -> dict[str, Any]:
    """Cancel what of a batch has not been cast yet."""
    return service.learning.stores.cancel_batch(store_id, batch_id)


@router.get("/v1/vector_stores/{store_id}/file_batches/{batch_id}/files", dependencies=[needs("read")])
def list_batch_files(service: Shared, store_id: str, batch_id: str, paging: FilePage) -> dict[str, Any]:
    """The files of a batch, newest first."""
    service.learning.stores.batch(store_id, batch_id)
    return listing(*service.learning.stores.files(store_id, paging, paging.filter, batch_id))
