"""Folders that a server watches: it learns their documents, and deletes the adapters of files that are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from loracast.documents import read_document
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import LoracastError
from loracast.library.sync import BulkReport, learn_folder
from loracast.lora.quantize import DEFAULT_STORAGE
from loracast.paths import journals_dir
from loracast.serving.errors import log_failure

if TYPE_CHECKING:
    from loracast.model import Model

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
        self._states = {folder: WatchedFolder(folder.name) for folder in self._folders}
        self._fault: str | None = None
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="watcher", daemon=True)

    @property
    def states(self) -> list[WatchedFolder]:
        """The state of each folder, in the order in which they were given."""
        return [self._states[folder] for folder in self._folders]

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
        for folder in self._folders:
            self._states[folder] = replace(self._states[folder], is_learning=True)
            try:
                report = self._learn(folder)
                faults = {file.path: file.error or "" for file in report.files if file.outcome == "failed"}
                failed = tuple((path, _shortened(error, folder)) for path, error in faults.items())
                n_documents = report.count("learned") + report.count("unchanged")
                state = replace(self._states[folder], n_documents=n_documents, failed=failed, error=self._fault)
            except LoracastError as error:
                state = replace(self._states[folder], error=_shortened(str(error), folder))
            except Exception as error:
                log_failure(error)
                state = replace(self._states[folder], error="the folder could not be read; the server's log says why")
            self._states[folder] = replace(state, is_learning=False)

    def _learn(self, folder: Path) -> BulkReport:
        def learn(path: Path, name: str) -> None:
            if self._stopping.is_set():
                raise KeyboardInterrupt  # so `learn_folder` ends early and keeps its journal
            self._model.learn(read_document(path), name, replace=True)

        made_by = f"{self._model.base.name} {self._model.documents.id} {DEFAULT_CHUNK_TOKENS} {DEFAULT_STORAGE}"
        return learn_folder(
            folder, self._model.library, learn, journals=journals_dir(), made_by=made_by, remove_gone=True
        )


def _shortened(message: str, folder: Path) -> str:
    """A message in which the folder is called by its name alone."""
    return message.replace(str(folder), folder.name)
