"""`loracast sync` and `watch`, and what they share with `learn`: learning a folder with a progress bar and a report."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracast.base.embedded import DEFAULT_BASE
from loracast.cli.client import Learner
from loracast.cli.options import Again, Json, Learning, Local, Naming
from loracast.cli.terminal import EXIT_CODE, print_result, printable, progress_bar, say
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.files import cache_dir, file_sha256

if TYPE_CHECKING:
    from loracast.cast.bulk import BulkCast
    from loracast.library.sync import BulkReport, FileReport, Outcome

_RESCAN_MS = 10_000
_MAX_FILES_NAMED = 5  # files of other kinds
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of documents.", exists=True, file_okay=False)]


class FolderLearner:
    """Learns what is new in a folder, as often as it is asked. The models are loaded once there is something to learn.

    Args:
        again: learn everything, whether it has changed or not.
        remove_gone: delete the adapters of files that are no longer there.
        local: use no server.
    """

    def __init__(
        self, folder: Path, learning: Learning, *, again: bool = False, remove_gone: bool = False, local: bool = False
    ):
        self.folder, self.learning, self.again, self.remove_gone = folder, learning, again, remove_gone
        self.made_by = f"{made_by(learning)} {learning.document_storage}"
        self._learner = Learner(learning, local=local)
        self._reported: set[tuple[str, str | None]] = set()

    def run(self) -> BulkReport:
        """Go through the folder once; files that fail are reported on the way."""
        from loracast.library.sync import learn_folder

        def learn_file(path: Path, adapter_name: str) -> None:
            self._learner.learn(path, Naming(name=adapter_name, replace=True))

        with progress_bar("files", str(self.folder)) as progress:

            def on_file(done: int, total: int, file: FileReport) -> None:
                progress(done, total)
                if file.outcome == "failed" and (file.path, file.error) not in self._reported:
                    say(f"failed: {file.path}: {file.error}")
                    self._reported.add((file.path, file.error))

            return learn_folder(
                self.folder, self.learning.library, learn_file,
                journals=cache_dir("journals"), made_by=self.made_by,
                again=self.again, remove_gone=self.remove_gone, on_file=on_file,
            )  # fmt: skip


def made_by(learning: Learning) -> str:
    """A text that identifies how documents are cast: base, hypernetwork (hashes of its files) and chunk length."""
    from loracast.cast.load import DOC_FILE, OWN_FILES, shipped_hypernetwork

    base = learning.base or DEFAULT_BASE
    where = Path(learning.hypernetwork) if learning.hypernetwork else shipped_hypernetwork(base)
    files = [path for name in (*OWN_FILES, DOC_FILE) if (path := where / name).is_file()]
    hypernet = " ".join(map(file_sha256, files)) if where.is_dir() else str(where)
    return f"{base} {hypernet} {learning.chunk_tokens or DEFAULT_CHUNK_TOKENS}"


def learn_files(learner: FolderLearner, *, as_json: bool) -> None:
    """Learn what is new in a folder, and report. Exits with 1 if a file failed."""
    result = learner.run()
    ignored = result.ignored
    text = f"{learner.folder}: {summary(result, learner.remove_gone)}; {len(ignored):,} files of other kinds"
    if ignored:
        text += f" ({', '.join(ignored[:_MAX_FILES_NAMED])}{', ...' * (len(ignored) > _MAX_FILES_NAMED)})"
    print_result(as_json, {"folder": str(learner.folder), **result.to_dict()}, text)
    exit_unless_all_done(result)


def exit_unless_all_done(result: BulkReport | BulkCast) -> None:
    """Exit with 130 where Ctrl-C has ended the work, and with 1 where a document failed."""
    if not result.is_complete:
        raise typer.Exit(EXIT_CODE)
    if result.count("failed"):
        raise typer.Exit(1)


def summary(result: BulkReport, with_removed: bool) -> str:
    """The number of files by outcome, in one line."""
    outcomes: list[Outcome] = ["learned", "unchanged", "failed"]
    outcomes += ["removed"] if with_removed else []
    return ", ".join(f"{result.count(outcome):,} {outcome}" for outcome in outcomes)


def sync(
    folder: Folder, *, again: Again = False, learning: Learning, local: Local = False, as_json: Json = False
) -> None:
    """Learn what is new or has changed in a folder, and delete the adapters of files that are gone.

    Only versions that were learned from this folder are deleted, and none of a name that means something else by now.
    """
    learn_files(FolderLearner(folder, learning, again=again, remove_gone=True, local=local), as_json=as_json)


def watch(folder: Folder, *, learning: Learning, local: Local = False) -> None:
    """Do what `sync` does, and again whenever files change, until Ctrl-C."""
    import watchfiles

    learner = FolderLearner(folder, learning, remove_gone=True, local=local)
    say(f"watching {folder}; Ctrl-C ends it")
    # It also looks now and then: for what changed before the watch began, and for file systems that report no changes.
    looks = watchfiles.watch(
        folder, raise_interrupt=False, yield_on_timeout=True, rust_timeout=_RESCAN_MS, ignore_permission_denied=True
    )
    with suppress(KeyboardInterrupt):  # the way to end it, wherever it comes
        for _ in itertools.chain([()], looks):
            result = learner.run()
            changed = [file for file in result.files if file.outcome in ("learned", "removed")]
            for file in changed:
                print(f"{file.outcome} {file.name} ({printable(file.path)})", flush=True)
            if changed:
                say(summary(result, with_removed=True))
            if not result.is_complete:
                break
