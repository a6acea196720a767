"""What a server learns: uploads, jobs and vector stores around one model, and how each kind of job is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loracast.cast.document import Progress
from loracast.documents import read_document
from loracast.documents.document import Document, Limits
from loracast.documents.images import ImageFile, is_image_file, read_image_file
from loracast.library.adapter import Adapter
from loracast.library.combine import Part, combined
from loracast.library.library import check_free, describe_adapter, find
from loracast.library.manifest import check_name, name_for_task, name_from
from loracast.library.save import save_lora
from loracast.serving.jobs import Job, Jobs
from loracast.serving.settings import ServerSettings
from loracast.serving.state import State
from loracast.serving.uploads import INTERNAL, Uploads
from loracast.serving.vector_stores import VectorStores

if TYPE_CHECKING:
    from loracast.data.task_examples import TaskSpec
    from loracast.model import Model


class Learning:
    """All that a server is given to learn. `start` begins to work on it; until then jobs only wait."""

    def __init__(self, model: Model, settings: ServerSettings):
        self._model, self._settings = model, settings
        self.library: Path = model.library
        self._state = State(self.library)
        self.uploads = Uploads(self._state, settings.max_stored_bytes)
        self.jobs = Jobs(
            self._state,
            {"document": self._learn, "task": self._cast_task, "combination": self._combine},
            self.tidy,
            settings.max_queued_jobs,
        )
        self.stores = VectorStores(self._state, self.uploads, self.jobs, self.library)

    def start(self) -> None:
        """Start the worker, which goes on with what a killed server left."""
        self.jobs.start()

    def close(self) -> None:
        """Stop the worker; what it works on goes on when a server starts again."""
        self.jobs.close()

    # ---- what is asked for

    def learn(
        self,
        source: BinaryIO,
        filename: str | None,
        name: str | None,
        *,
        tags: Sequence[str],
        replace: bool,
        options: Mapping[str, Any] = {},
    ) -> Job:
        """Take in a document or an image.

        Args:
            name: of the adapter; made from the file's name if None.
            options: `max_chunk_tokens` and `storage` of a document, where they are not the usual ones.

        Raises:
            NameTakenError, AdapterError: the name is taken, or a name or tag is not allowed.
            ApiError: there is no room for the file, or the queue is full.
        """
        upload = self.uploads.add(source, filename, INTERNAL)
        try:
            name = name or name_from(Path(upload.filename).stem)
            self._check(name, tags, upload.sha256, replace)
            return self.jobs.add("document", name, {"tags": [*tags], "replace": replace, **options}, file=upload.id)
        except BaseException:
            self.uploads.discard(upload.id)
            raise

    def cast_task(self, task: TaskSpec, name: str | None, *, tags: Sequence[str], replace: bool) -> Job:
        """Take in a task; name and errors as in `learn`."""
        name = name or name_for_task(task.title)
        self._check(name, tags, task.sha256, replace)
        examples = [(example.input, example.outputs[0]) for example in task.examples]
        work = {"description": task.description, "examples": examples, "tags": [*tags], "replace": replace}
        return self.jobs.add("task", name, work)

    def combine(self, parts: Sequence[tuple[str, float]], name: str, *, tags: Sequence[str], replace: bool) -> Job:
        """Add adapters up, each with its weight; errors as in `learn`, and NoSuchAdapterError for a part."""
        self._check(name, tags, None, replace)
        found = [(find(self.library, part), weight) for part, weight in parts]
        # The versions of now, whatever the names mean once it is the job's turn.
        fixed = [(f"{entry.name}@{entry.version}", weight) for entry, weight in found]
        return self.jobs.add("combination", name, {"parts": fixed, "tags": [*tags], "replace": replace})

    def _check(self, name: str, tags: Sequence[str], source_sha256: str | None, replace: bool) -> None:
        for one in (name, *tags):
            check_name(one)
        if not replace:
            check_free(self.library, name, unless_from=source_sha256)

    def delete_upload(self, id: str) -> None:
        """Delete an upload and take it out of all vector stores, with their adapters. Raises ApiError (404)."""
        with self._state.writing() as db:
            self.uploads.delete_in(db, id)
            self.stores.tidy(db)
        self.uploads.unlink([id])
        self.stores.adapters.remove_undone()

    def tidy(self) -> None:
        """Delete what has expired and what nobody needs any more, and note which files have lost their adapters."""
        self.stores.adapters.note_lost()
        with self._state.writing() as db:
            gone = self.uploads.drop_expired(db)
            self.stores.tidy(db)
            self.jobs.drop_old(db)
        self.uploads.unlink(gone)
        self.uploads.tidy()
        self.stores.adapters.remove_undone()

    # ---- how it is done, in the worker's thread

    def _learn(self, job: Job, progress: Progress) -> Adapter:
        assert job.file is not None
        source = self._read(job.file)
        options: dict[str, Any] = {}
        if isinstance(source, Document):
            options = {key: job.work[key] for key in ("max_chunk_tokens", "storage") if key in job.work}
        made = self._model.learn(source, job.adapter, replace=job.work["replace"], progress=progress, **options)
        return self._tagged(made, job)

    def _read(self, file: str) -> Document | ImageFile:
        """An upload as a document, which is parsed in a child process with limits, or as an image."""
        path, name = self.uploads.path(file), self.uploads.name_of(file)
        limits = Limits(max_bytes=self._settings.max_upload_bytes)
        if is_image_file(path):
            return read_image_file(path, file_name=name, limits=limits)
        return read_document(path, file_name=name, limits=limits)

    def _cast_task(self, job: Job, progress: Progress) -> Adapter:
        progress(0, 1)
        examples = job.work.get("examples", ())  # jobs of before have none
        made = self._model.task(job.work["description"], job.adapter, examples=examples, replace=job.work["replace"])
        return self._tagged(made, job)

    def _combine(self, job: Job, progress: Progress) -> Adapter:
        progress(0, 1)
        parts = [Part(self._model.adapter(name), weight) for name, weight in job.work["parts"]]
        summed = combined(parts)
        made = save_lora(
            summed.lora,
            self.library,
            job.adapter,
            kind="combined",
            title=" + ".join(map(str, parts)),
            made_for=parts[0].adapter.manifest.made_for,
            static=summed.static,
            replace=job.work["replace"],
        )
        return self._tagged(made, job)

    def _tagged(self, made: Adapter, job: Job) -> Adapter:
        if job.work["tags"]:
            describe_adapter(self.library, made.name, tags=job.work["tags"])
        return made
