"""What a server learns while it runs, and how: uploads, jobs, vector stores and folders that it watches.

`Learning` takes requests to learn in as jobs and does them, one at a time, in the worker's thread (jobs.py).
`Watcher` learns the documents of folders as they change, in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, BinaryIO

from loracast.documents import read_document
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.documents.file_types import Limits
from loracast.documents.images import is_image_file, read_image_file
from loracast.errors import LoracastError
from loracast.files import cache_dir
from loracast.library.adapter import Adapter
from loracast.library.combine import Part, save_combined
from loracast.library.manifest import check_name, name_for_task, name_from
from loracast.library.save import Progress
from loracast.library.sync import BulkReport, learn_folder
from loracast.lora.quantize import DEFAULT_STORAGE
from loracast.serving.errors import log_failure
from loracast.serving.jobs import Job, Jobs
from loracast.serving.settings import ServerSettings
from loracast.serving.state import INTERNAL, State, Uploads
from loracast.serving.vector_stores import VectorStores

if TYPE_CHECKING:
    from loracast.answering.model import Model
    from loracast.documents.task_spec import TaskSpec


_LOOK_EVERY_MS = 10_000
"""Milliseconds after which a folder is looked at without a sign of change: some file systems give none."""


@dataclass(frozen=True)
class WatchedFolder:
    """What became of a folder's files."""

    folder: str
    """Its name, without the folders above it: clients need not know where it lies."""
    is_learning: bool = False
    n_documents: int = 0
    """Files whose adapters are in the library."""
    failed: tuple[tuple[str, str], ...] = ()
    """Files that could not be learned, relative to the folder, each with what is wrong."""
    error: str | None = None
    """Why the folder as a whole could not be read at the last look, or gets no notice of changes."""


class Watcher:
    """Watches folders in a thread of its own, in the way of `loracast watch`."""

    def __init__(self, model: Model, folders: Sequence[Path]):
        self._model, self._folders = model, tuple(folder.resolve() for folder in folders)
        self.states = [WatchedFolder(folder.name) for folder in self._folders]
        self._fault: str | None = None
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        if self._folders:
            self._thread.start()

    def close(self) -> None:
        """Stop after the file that is being learned; the next start goes on with the others."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        import watchfiles

        self._look()
        there = [folder for folder in self._folders if folder.is_dir()]
        try:
            for _ in watchfiles.watch(
                *there, stop_event=self._stopping, yield_on_timeout=True, rust_timeout=_LOOK_EVERY_MS,
                raise_interrupt=False, ignore_permission_denied=True,
            ):  # fmt: skip
                self._look()
        except Exception as error:  # the system's limit of watches, for one; its message may name any of the folders
            log_failure(error)
            self._fault = (
                f"watching failed, and changes are looked for every {_LOOK_EVERY_MS // 1000} s until the server starts "
                f"again: {error}"
            )
            for folder in self._folders:
                self._fault = _shortened(self._fault, folder)
            while not self._stopping.is_set():
                self._look()
                self._stopping.wait(_LOOK_EVERY_MS / 1000)

    def _look(self) -> None:
        """Learn what is new in each folder. What goes wrong becomes the folder's state and ends no thread."""
        for i, folder in enumerate(self._folders):
            self.states[i] = state = replace(self.states[i], is_learning=True)
            try:
                report = self._learn(folder)
                faults = {file.path: file.error or "" for file in report.files if file.outcome == "failed"}
                failed = tuple((path, _shortened(error, folder)) for path, error in faults.items())
                n_documents = report.count("learned") + report.count("unchanged")
                state = replace(state, n_documents=n_documents, failed=failed, error=self._fault)
            except LoracastError as error:
                state = replace(state, error=_shortened(str(error), folder))
            except Exception as error:
                log_failure(error)
                state = replace(state, error="the folder could not be read; the server's log says why")
            self.states[i] = replace(state, is_learning=False)

    def _learn(self, folder: Path) -> BulkReport:
        def learn(path: Path, name: str) -> None:
            if self._stopping.is_set():
                raise KeyboardInterrupt  # so `learn_folder` ends early and keeps its journal
            self._model.learn(read_document(path), name, replace=True)

        made_by = f"{self._model.base.name} {self._model.documents.id} {DEFAULT_CHUNK_TOKENS} {DEFAULT_STORAGE}"
        return learn_folder(
            folder, self._model.library, learn, journals=cache_dir("journals"), made_by=made_by, remove_gone=True
        )


def _shortened(message: str, folder: Path) -> str:
    """A message in which the folder is called by its name alone."""
    return message.replace(str(folder), folder.name)


class Learning:
    """All that a server is given to learn; jobs wait until the worker is started (`jobs.start`)."""

    def __init__(self, model: Model, settings: ServerSettings):
        self._model, self._settings = model, settings
        self.library = model.library
        self._state = State(self.library)
        self.uploads = Uploads(self._state, settings.max_stored_bytes)
        self.jobs = Jobs(self._state, self._make, self.tidy, settings.max_queued_jobs)
        self.stores = VectorStores(self._state, self.uploads, self.jobs, self.library, lambda: model.reader)

    # ---- what is asked for

    def learn(self, source: BinaryIO, filename: str | None, name: str | None, **work: Any) -> Job:
        """Take in a document or an image.

        Args:
            name: of the adapter; made from the file's name if None.
            work: `tags` and `replace`; and `max_chunk_tokens` and `storage` of a document, if not the usual ones.

        Raises:
            NameTakenError, AdapterError: the name is taken, or a name or tag is not allowed.
            ApiError: there is no room for the file, or the queue is full.
        """
        upload = self.uploads.add(source, filename, INTERNAL)
        try:
            name = name or name_from(Path(upload.filename).stem)
            self._check(name, work["tags"], upload.sha256, work["replace"])
            return self.jobs.add("document", name, work, file=upload.id)
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
        found = [(self.library.find(part), weight) for part, weight in parts]
        # The versions of now, whatever the names mean once it is the job's turn.
        fixed = [(f"{entry.name}@{entry.version}", weight) for entry, weight in found]
        return self.jobs.add("combination", name, {"parts": fixed, "tags": [*tags], "replace": replace})

    def _check(self, name: str, tags: Sequence[str], source_sha256: str | None, replace: bool) -> None:
        for one in (name, *tags):
            check_name(one)
        if not replace:
            self.library.check_free(name, unless_from=source_sha256)

    def delete_upload(self, id: str) -> None:
        """Delete an upload and take it out of all vector stores, with their adapters. Raises ApiError (404)."""
        with self._state.writing() as db:
            self.uploads.find_in(db, id)
            db.execute("DELETE FROM files WHERE id = ?", (id,))  # its rows in vector stores go with it
            self.stores.tidy(db)
        self.uploads.unlink([id])
        self.stores.remove_undone()

    def tidy(self) -> None:
        """Delete what has expired and what nobody needs any more, and note which files have lost their adapters."""
        self.stores.note_lost()
        with self._state.writing() as db:
            gone = self.uploads.drop_expired(db)
            self.stores.tidy(db)
            self.jobs.drop_old(db)
        self.uploads.unlink(gone)
        self.uploads.tidy()
        self.stores.remove_undone()

    # ---- how it is done, in the worker's thread

    def _make(self, job: Job, progress: Progress) -> Adapter:
        work = job.work
        if job.kind == "document":
            made = self._learn(job, progress)
        else:
            progress(0, 1)
            if job.kind == "task":
                examples = work.get("examples", ())  # jobs of before have none
                made = self._model.task(work["description"], job.adapter, examples=examples, replace=work["replace"])
            else:
                parts = [Part(self._model.adapter(name), weight) for name, weight in work["parts"]]
                made, _ = save_combined(parts, self.library, job.adapter, replace=work["replace"])
        if work["tags"]:
            self.library.describe(made.name, tags=work["tags"])
        return made

    def _learn(self, job: Job, progress: Progress) -> Adapter:
        """Learn an upload as an image, or as a document, which is parsed in a child process with limits."""
        assert job.file is not None
        path, name = self.uploads.path(job.file), self.uploads.name_of(job.file)
        limits = Limits(max_bytes=self._settings.max_upload_bytes)
        read = read_image_file if is_image_file(path) else read_document
        options = {key: one for key, one in job.work.items() if key in ("max_chunk_tokens", "storage", "replace")}
        source = read(path, file_name=name, limits=limits)
        return self._model.learn(source, job.adapter, progress=progress, **options)
