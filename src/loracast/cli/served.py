"""Learning through a running server: a file or a task's description goes there, and the library has the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.cli.options import Learning
from loracast.documents import Limits
from loracast.documents.read import read_bytes
from loracast.errors import LoracastError
from loracast.library.adapter import Adapter
from loracast.library.library import open_adapter

if TYPE_CHECKING:
    from loracast.data.task_examples import TaskSpec
    from loracast.serving.client import Client
    from loracast.serving.found import Running

Progress = Callable[[int, int], object]


def learn_file(
    server: Running, path: str | Path, name: str | None, learning: Learning, *, replace: bool, progress: Progress
) -> Adapter | None:
    """Have a server learn a document; None where it refuses or fails, so that the caller tries and says why."""
    content, file_name, _ = read_bytes(path, None, Limits())
    fields = {"replace": str(replace).lower(), "storage": learning.document_storage}
    fields |= {"name": name} if name else {}
    fields |= {"chunk_tokens": str(learning.chunk_tokens)} if learning.chunk_tokens else {}
    return _made(
        server, learning.library, lambda client: client.upload("/v1/adapters", fields, file_name or "file", content),
        progress,
    )  # fmt: skip


def cast_task(server: Running, library: Path, task: TaskSpec, name: str | None, *, replace: bool) -> Adapter | None:
    """Have a server cast a task; None as in `learn_file`."""
    examples = [{"input": example.input, "output": example.outputs[0]} for example in task.examples]
    body = {"description": task.description, "examples": examples, "name": name, "replace": replace}
    return _made(server, library, lambda client: client.post("/v1/adapters", body), lambda done, total: None)


def _made(
    server: Running, library: Path, begin: Callable[[Client], Mapping[str, Any]], progress: Progress
) -> Adapter | None:
    """The adapter of a job. After Ctrl-C the job is cancelled."""
    from loracast.serving.client import Refused

    client = server.client()
    try:
        begun = job = begin(client)
    except Refused as refused:
        if refused.status == 429 or refused.status >= 500:
            raise
        return None
    try:
        for job in client.stream(f"/v1/jobs/{begun['id']}/events"):
            progress(job["done"], job["total"])
    except KeyboardInterrupt:
        client.post(f"/v1/jobs/{begun['id']}/cancel", {})
        raise
    if job["status"] == "failed":
        return None
    if job["status"] != "completed":
        raise LoracastError(
            f"the server did not finish {job['adapter']!r} (it is {job['status']}); it goes on when the server runs "
            "again, and `loracast list` shows it then"
        )
    return open_adapter(library, f"{job['adapter']}@{job['version']}")
