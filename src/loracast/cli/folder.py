"""Learning a folder of files, with something to look at meanwhile: what `learn FOLDER`, `sync` and `watch` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from loracast.cli.options import Learning
from loracast.cli.output import print_result, progress_bar, say
from loracast.cli.session import open_model

if TYPE_CHECKING:
    from loracast.library.sync import BulkReport, FileReport, Outcome
    from loracast.model import Model


class FolderLearner:
    """Learns what is new in a folder, as often as it is asked. The models are loaded once there is something to learn.

    Args:
        again: learn everything, whether it has changed or not.
        remove_gone: delete the adapters of files that are no longer there.
    """

    def __init__(self, folder: Path, learning: Learning, *, again: bool = False, remove_gone: bool = False):
        from loracast.base.load import DEFAULT_BASE
        from loracast.cast.load import shipped_hypernetwork
        from loracast.files import file_sha256

        base = learning.base or DEFAULT_BASE
        where = Path(learning.hypernetwork) if learning.hypernetwork else shipped_hypernetwork(base)
        files = [where / name for name in ("config.json", "model.safetensors")]
        hypernet = " ".join(map(file_sha256, files)) if where.is_dir() else str(where)
        self.folder, self.learning, self.again, self.remove_gone = folder, learning, again, remove_gone
        self.made_by = f"{base} {hypernet} {learning.chunk_tokens} {learning.document_storage}"
        self._model: Model | None = None
        self._told: set[tuple[str, str | None]] = set()

    def _learn_file(self, path: Path, adapter_name: str) -> None:
        from loracast.documents import read_document

        document, how = read_document(path), self.learning
        if self._model is None:
            self._model = open_model(how, how.library)
        self._model.learn(
            document, adapter_name, max_chunk_tokens=how.chunk_tokens, storage=how.document_storage, replace=True
        )

    def run(self) -> BulkReport:
        """Go through the folder once; files that fail are reported on the way."""
        from loracast.library.sync import learn_folder
        from loracast.paths import journals_dir

        with progress_bar("files", str(self.folder)) as progress:

            def on_file(done: int, total: int, file: FileReport) -> None:
                progress(done, total)
                if file.outcome == "failed" and (file.path, file.error) not in self._told:
                    say(f"failed: {file.path}: {file.error}")
                    self._told.add((file.path, file.error))

            return learn_folder(
                self.folder, self.learning.library, self._learn_file,
                journals=journals_dir(), made_by=self.made_by,
                again=self.again, remove_gone=self.remove_gone, on_file=on_file,
            )  # fmt: skip


def learn_files(learner: FolderLearner, *, as_json: bool) -> None:
    """Learn what is new in a folder, and report. Exits with 1 if a file failed."""
    result = learner.run()
    print_result(
        as_json,
        {"folder": str(learner.folder), **result.to_dict()},
        f"{learner.folder}: {summary(result, learner.remove_gone)}; {result.ignored:,} files of other kinds",
    )
    if not result.is_complete:
        raise typer.Exit(130)
    if result.count("failed"):
        raise typer.Exit(1)


def summary(result: BulkReport, with_removed: bool) -> str:
    """How many files were learned, left alone or could not be read, in a line."""
    outcomes: list[Outcome] = ["learned", "unchanged", "failed"]
    outcomes += ["removed"] if with_removed else []
    return ", ".join(f"{result.count(outcome):,} {outcome}" for outcome in outcomes)
