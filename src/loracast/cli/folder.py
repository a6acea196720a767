"""Learning a folder of files, with something to look at meanwhile: what `learn FOLDER`, `sync` and `watch` have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from loracast.cli.output import print_json, printable, say, stderr
from loracast.cli.session import open_model

if TYPE_CHECKING:
    from loracast.library.sync import BulkReport, Outcome
    from loracast.lora.quantize import Storage
    from loracast.model import Model


class FolderLearner:
    """Learns what is new in a folder, as often as it is asked; the models are loaded when there is something to learn, and kept.

    Args:
        again: everything, whether it has changed or not.
        remove_gone: delete the adapters of files that are no longer there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        chunk_tokens: int,
        storage: Storage,
        base: str | None,
        hypernetwork: str | None,
        library: Path | None,
        device: str | None,
        again: bool = False,
        remove_gone: bool = False,
    ):
        from loracast.base.load import DEFAULT_BASE
        from loracast.files import file_sha256
        from loracast.model import shipped_hypernetwork
        from loracast.paths import library_dir

        where = Path(hypernetwork) if hypernetwork else shipped_hypernetwork(base or DEFAULT_BASE)
        files = [where / name for name in ("config.json", "model.safetensors")]
        hypernet = " ".join(map(file_sha256, files)) if where.is_dir() else str(where)
        self.folder, self.library = folder, library or library_dir()
        self.again, self.remove_gone = again, remove_gone
        self.made_by = f"{base or DEFAULT_BASE} {hypernet} {chunk_tokens} {storage}"
        self._open = lambda: open_model(base, hypernetwork, library, device)
        self._chunk_tokens, self._storage = chunk_tokens, storage
        self._model: Model | None = None
        self._told: set[tuple[str, str | None]] = set()

    def _learn_file(self, path: Path, adapter_name: str) -> None:
        from loracast.documents import read_document

        document = read_document(path)
        if self._model is None:
            self._model = self._open()
        self._model.learn(
            document, adapter_name, max_chunk_tokens=self._chunk_tokens, storage=self._storage, replace=True
        )

    def run(self) -> BulkReport:
        """Once through the folder; files that fail are told on the way."""
        from loracast.library.sync import FileReport, learn_folder
        from loracast.paths import journals_dir

        with _folder_progress() as (advance, tell):

            def on_file(done: int, total: int, file: FileReport) -> None:
                advance(done, total, file.path)
                if file.outcome == "failed" and (file.path, file.error) not in self._told:
                    tell(f"failed: {file.path}: {file.error}")
                    self._told.add((file.path, file.error))

            return learn_folder(
                self.folder,
                self.library,
                self._learn_file,
                journals=journals_dir(),
                made_by=self.made_by,
                again=self.again,
                remove_gone=self.remove_gone,
                on_file=on_file,
            )


def learn_files(learner: FolderLearner, *, as_json: bool) -> None:
    """Learn what is new in a folder, and report. Exits with 1 if a file failed."""
    result = learner.run()
    if as_json:
        print_json({"folder": str(learner.folder), **result.to_dict()})
    else:
        print(f"{learner.folder}: {summary(result, learner.remove_gone)}; {result.ignored:,} files of other kinds")
    if not result.is_complete:
        raise typer.Exit(130)
    if result.count("failed"):
        raise typer.Exit(1)


def summary(result: BulkReport, with_removed: bool) -> str:
    """What came of the files, in a line."""
    outcomes: list[Outcome] = ["learned", "unchanged", "failed"]
    outcomes += ["removed"] if with_removed else []
    return ", ".join(f"{result.count(outcome):,} {outcome}" for outcome in outcomes)


@contextmanager
def _folder_progress() -> Iterator[tuple[Callable[[int, int, str], None], Callable[[str], None]]]:
    """A bar with an estimate on a terminal, and a way to say something above it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("files"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield (
            lambda done, total, path: bar.update(task, completed=done, total=total, description=printable(path)),
            lambda text: bar.console.print(printable(text), markup=False) if sys.stderr.isatty() else say(text),
        )
