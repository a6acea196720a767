"""`/v1/adapters`: the library over HTTP. Documents, images and descriptions come in, and adapters for others go out.

`/v1/memories` tells what users said in chats that name a memory, and takes a message out of it. vLLM's
`/v1/load_lora_adapter` keeps a LoRA that another tool trained in the library, under the name that is given.
"""

from __future__ import annotations

import tempfile
import threading
import zipfile
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import Field, StringConstraints
from starlette.background import BackgroundTask
from starlette.datastructures import UploadFile

from loracast.documents.task_spec import TaskSpec, as_examples
from loracast.errors import NoSuchAdapterError
from loracast.export import FORMATS, MERGED
from loracast.export.adapter import export_adapter
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks, read_sentences
from loracast.library.manifest import check_name
from loracast.library.register import Entry
from loracast.library.save import import_lora
from loracast.lora.quantize import Storage
from loracast.reading.matching import Route
from loracast.reading.routing import DEFAULT_ROUTE, route_adapters
from loracast.serving.errors import ApiError
from loracast.serving.guard import check_memories, needs
from loracast.serving.jobs import Job
from loracast.serving.schema import Body, KnownFields, LoadAdapterRequest, UnloadAdapterRequest
from loracast.serving.service import Shared

router = APIRouter()
Name = Annotated[str, StringConstraints(max_length=200)]
Format = Annotated[str, StringConstraints(pattern=f"^({'|'.join(name for name in FORMATS if name != MERGED)})$")]
_exports = threading.BoundedSemaphore(2)
"""Exports compute for seconds and take disk space meanwhile."""
_BLOCK = 1 << 20
"""Bytes of an export that are sent at once."""


class _Naming(KnownFields):
    name: Name | None = None
    tags: list[Name] = Field(default=[], max_length=32)
    replace: bool = False


class _NewDocument(_Naming):
    chunk_tokens: int | None = Field(default=None, ge=16, le=4096)
    storage: Storage | None = None


class _Example(KnownFields):
    input: str = Field(min_length=1, max_length=4096)
    output: str = Field(min_length=1, max_length=4096)


class _NewTask(_Naming):
    description: str = Field(default="", max_length=4096)
    examples: list[_Example] = Field(default=[], max_length=256)


class _Part(KnownFields):
    id: Name
    scale: float = Field(default=1.0, ge=-10, le=10)


class _Combination(_Naming):
    name: Name
    parts: list[_Part] = Field(min_length=1, max_length=32)


class _Changes(KnownFields):
    name: Name | None = None
    tags: list[Name] | None = Field(default=None, max_length=32)
    note: str | None = Field(default=None, max_length=2000)


class _Question(KnownFields):
    question: str = Field(min_length=1, max_length=4096)
    adapters: list[Name] = Field(default=["*"], min_length=1, max_length=32)
    route: int = Field(default=DEFAULT_ROUTE, ge=1, le=50)
    tag: Name = ""


@router.get("/v1/adapters", dependencies=[needs("read")])
def list_adapters(
    service: Shared,
    q: Annotated[str, Query(max_length=200)] = "",
    tag: Annotated[str, Query(max_length=64)] = "",
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> dict[str, Any]:
    """The adapters by name: those with `q` in their name, title or note, and those with a tag."""
    found, total = service.model.library.entries(like=q, tag=tag, limit=limit, offset=offset)
    has_more = offset + len(found) < total
    return {"object": "list", "data": [_adapter(one) for one in found], "total": total, "has_more": has_more}


@router.post("/v1/adapters", status_code=202, dependencies=[needs("write")])
async def make_adapter(service: Shared, request: Request) -> JSONResponse:
    """Make an adapter of a document or an image, or of a task's description, examples of it, or both.

    Documents and images come as multipart: file, name, tags, replace, chunk_tokens, storage. The answer is a job, which
    is on the disk by then.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        task = _NewTask.model_validate_json(await request.body())
        spec = TaskSpec(task.description.strip(), as_examples([example.model_dump() for example in task.examples]))
        if not spec.title:
            raise ApiError(400, "send a `description`, `examples`, or both", param="description")
        job = await run_in_threadpool(service.learning.cast_task, spec, task.name, tags=task.tags, replace=task.replace)
        return _accepted(job)
    async with request.form(max_files=1, max_fields=40) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "send a `file`, or JSON with a `description`", param="file")
        given: dict[str, Any] = {key: form[key] for key in form if key not in ("file", "tags")}
        given["tags"] = [tag for text in form.getlist("tags") for tag in str(text).split(",") if tag]
        how = _NewDocument.model_validate(given)
        options = {"max_chunk_tokens": how.chunk_tokens, "storage": how.storage}
        job = await run_in_threadpool(
            service.learning.learn, file.file, file.filename, how.name, tags=how.tags, replace=how.replace,
            **{key: one for key, one in options.items() if one},
        )  # fmt: skip
    return _accepted(job)


@router.post("/v1/adapters/combine", status_code=202, dependencies=[needs("write")])
def combine_adapters(service: Shared, body: _Combination) -> JSONResponse:
    """Add adapters up into a new one, each with its scale. The answer is a job."""
    parts = [(part.id, part.scale) for part in body.parts]
    return _accepted(service.learning.combine(parts, body.name, tags=body.tags, replace=body.replace))


@router.post("/v1/adapters/route", dependencies=[needs("read")])
def route_question(service: Shared, request: Request, body: _Question) -> dict[str, Any]:
    """The chunks and sentences that a question would be answered with, and their weights.

    A sentence's start and end are characters of its chunk's text.
    """
    model = service.model
    routed = route_adapters(
        model.library, body.question, body.adapters, body.route, body.tag, model.adapter, model.reader
    )
    check_memories(request, (adapter for adapter, _ in routed))
    return {"question": body.question, "adapters": [_routed(adapter, route) for adapter, route in routed]}


@router.get("/v1/adapters/{name}", dependencies=[needs("read")])
def get_adapter(service: Shared, name: str) -> dict[str, Any]:
    """What is known of an adapter, with its manifest and its versions."""
    library = service.model.library
    adapter, entry = library.open(name), library.find(name)
    shown = ("version", "created", "added")
    there = [{key: getattr(one, key) for key in shown} for one in library.versions(entry.name)]
    manifest = {key: value for key, value in asdict(adapter.manifest).items() if key != "modules"}
    return {**_adapter(entry), "manifest": manifest, "versions": there}


@router.patch("/v1/adapters/{name}", dependencies=[needs("write")])
def change_adapter(service: Shared, name: str, body: _Changes) -> dict[str, Any]:
    """Change an adapter's tags or note, or give it another name. What it holds never changes."""
    library = service.model.library
    entry = library.find(name)
    for tag in body.tags or ():
        check_name(tag)  # before anything changes
    renamed = entry.name if body.name is None else body.name
    if renamed != entry.name:
        service.learning.stores.rename(entry.name, renamed)
    if body.tags is not None or body.note is not None:
        gone = [] if body.tags is None else [tag for tag in entry.tags if tag not in body.tags]
        library.describe(renamed, note=body.note, tags=body.tags or (), untag=gone)
    return _adapter(library.find(renamed))


@router.delete("/v1/adapters/{name}", dependencies=[needs("admin")])
def delete_adapter(service: Shared, name: str) -> dict[str, Any]:
    """Delete a name with all its versions, or one version (`name@hash`)."""
    service.model.library.remove(name)
    return {"id": name, "object": "adapter.deleted", "deleted": True}


@router.get("/v1/adapters/{name}/chunks", dependencies=[needs("read")])
def list_chunks(
    service: Shared,
    request: Request,
    name: str,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> dict[str, Any]:
    """The chunks of a document, in order, with their places in its text."""
    adapter = service.model.library.open(name)
    check_memories(request, [adapter])
    chunks = read_chunks(adapter.index)
    shown = [{"chunk": i, **asdict(chunk)} for i, chunk in enumerate(chunks)][offset : offset + limit]
    return {"object": "list", "data": shown, "total": len(chunks), "has_more": offset + len(shown) < len(chunks)}


@router.get("/v1/adapters/{name}/export", dependencies=[needs("read")])
def export(
    service: Shared,
    request: Request,
    name: str,
    to: Format,
    rank: Annotated[int | None, Query(ge=1, le=512)] = None,
    each_chunk: bool = False,
) -> StreamingResponse:
    """The adapter for another runtime, as a zip file."""
    adapter = service.model.adapter(name)
    check_memories(request, [adapter])
    if not _exports.acquire(blocking=False):
        raise ApiError(429, "other exports are running; try again in a moment", **{"Retry-After": "5"})
    # It has no name: nothing stays of it, however the request ends.
    archive = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with tempfile.TemporaryDirectory(prefix="loracast-export-") as folder:
            out = Path(folder)
            export_adapter(adapter, to, out, max_rank=rank, each_chunk=each_chunk, base=service.model.base.name)
            with zipfile.ZipFile(archive, "w") as file:  # stored as it is: numbers hardly compress
                for path in sorted(path for path in out.rglob("*") if path.is_file()):
                    file.write(path, path.relative_to(out))
    except BaseException:
        archive.close()
        raise
    finally:
        _exports.release()
    disposition = f'attachment; filename="{adapter.name}-{to}.zip"'
    headers = {"Content-Length": str(archive.tell()), "Content-Disposition": disposition}
    archive.seek(0)
    blocks = iter(partial(archive.read, _BLOCK), b"")
    return StreamingResponse(blocks, 200, headers, "application/zip", BackgroundTask(archive.close))


def _accepted(job: Job) -> JSONResponse:
    return JSONResponse(job.to_dict(), 202, headers={"Location": f"/v1/jobs/{job.id}"})


def _adapter(entry: Entry) -> dict[str, Any]:
    return {"id": entry.name, "object": "adapter", **asdict(entry)}


def _routed(adapter: Adapter, route: Route) -> dict[str, Any]:
    """What a question gets of an adapter; no chunks where it is taken as a whole, or not at all."""
    picked = route.chunks or ()
    places = read_sentences(adapter.index)
    chunks = []
    for i, (number, chunk) in enumerate(zip(picked, read_chunks(adapter.index, picked), strict=True)):
        described: dict[str, Any] = {
            "chunk": number,
            "weight": route.weights[i],
            **asdict(chunk),
        }
        if route.sentences is not None:
            n_heading = len(chunk.prompt) - len(chunk.text)  # sentences are numbered in both, and placed in the text
            spans = [(place.start - n_heading, place.end - n_heading) for place in places if place.chunk == number]
            described["sentences"] = [
                {"start": max(start, 0), "end": end, "weight": round(weight, 4)}
                for (start, end), weight in zip(spans, route.sentences[i], strict=True)
                if end > 0
            ]
        chunks.append(described)
    head = {"adapter": adapter.name, **{key: getattr(adapter.manifest, key) for key in ("version", "kind", "title")}}
    return {**head, "is_used": not route.is_empty, "reason": route.reason, "about": route.about, "chunks": chunks}


# ---- the memories of chats: what users said in those that name one

MemoryName = Annotated[str, PathParameter(max_length=64)]


@router.get("/v1/memories/{name}", dependencies=[needs("write")])
def list_messages(name: MemoryName, service: Shared) -> dict[str, Any]:
    """The messages of a memory, the oldest first. Errors: 400 where the name is another adapter's."""
    return {"object": "list", "data": service.model.memory(name).messages()}


class _Said(Body):
    message: str = Field(min_length=1, max_length=65_536)


@router.post("/v1/memories/{name}", dependencies=[needs("write")])
def remember_message(name: MemoryName, body: _Said, service: Shared) -> dict[str, Any]:
    """Add what a message states. A chat request with `memory` does so by itself, after its answer."""
    return {"name": name, "is_new": service.model.memory(name).remember(body.message) is not None}


@router.delete("/v1/memories/{name}/{number}", dependencies=[needs("write")])
async def forget_message(name: MemoryName, number: int, service: Shared) -> dict[str, Any]:
    """Take a message out, counted from 1. Errors: 400, 404 where there is none."""
    memory = await run_in_threadpool(service.model.memory, name)
    if not 1 <= number <= len(memory.messages()):
        raise ApiError(404, f"the memory has no message {number}")
    forgotten = await run_in_threadpool(memory.forget, number)
    removed = {"message": forgotten.message, "still_in": forgotten.still_in}
    return {"name": name, "deleted": True, **removed, "versions_removed": forgotten.n_removed}


# ---- LoRAs that other tools trained, by vLLM's routes: a request only chooses among the folders of --lora-folder


@router.post("/v1/load_lora_adapter", dependencies=[needs("admin")], response_class=PlainTextResponse)
def load_lora_adapter(body: LoadAdapterRequest, service: Shared) -> str:
    """Keep the LoRA of a folder under a name. Errors: 400 where the name is in use, 404 where there is no folder."""
    name = check_name(body.lora_name)
    folder = _folders(service.settings.lora_folder).get(body.lora_path)
    if folder is None:
        raise ApiError(404, "there is no such folder among the server's LoRAs (--lora-folder)", param="lora_path")
    with suppress(NoSuchAdapterError):
        is_imported = service.model.library.find(name).kind == "imported"
        if not (is_imported and body.load_inplace):
            raise ApiError(400, f"The lora adapter '{name}' has already been loaded.", param="lora_name")
    import_lora(service.model.base, folder, service.model.library, name, replace=body.load_inplace)
    return f"Success: LoRA adapter '{name}' added successfully."


@router.post("/v1/unload_lora_adapter", dependencies=[needs("admin")], response_class=PlainTextResponse)
def unload_lora_adapter(body: UnloadAdapterRequest, service: Shared) -> str:
    """Forget a LoRA that was loaded. What was learned here is deleted with DELETE /v1/adapters/{name} instead."""
    name, library = body.lora_name, service.model.library
    try:
        entry = library.find(check_name(name))
    except NoSuchAdapterError as error:
        raise ApiError(404, f"The lora adapter '{name}' cannot be found.", param="lora_name") from error
    if entry.kind != "imported":
        raise ApiError(400, f"'{name}' was not loaded but made here: DELETE /v1/adapters/{name} deletes it")
    library.remove(name)
    return f"Success: LoRA adapter '{name}' removed successfully."


def _folders(root: Path | None) -> dict[str, Path]:
    """The folders that may be read, by their names and by their whole paths."""
    if root is None or not root.is_dir():
        return {}
    found = [path for path in root.resolve().iterdir() if path.is_dir() and not path.is_symlink()]
    return {path.name: path for path in found} | {str(path): path for path in found}
