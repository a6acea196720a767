"""Learning a folder of files, with something to look at meanwhile: what `learn FOLDER` and `sync` have in common."""

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
    from loracast.model import Model


def learn_files(
    folder: Path,
    *,
    again: bool,
    chunk_tokens: int,
    base: str | None,
    hypernetwork: str | None,
    library: Path | None,
    device: str | None,
    as_json: bool,
    remove_gone: bool = False,
) -> None:
    """Learn what is new in a folder, and report; the models are loaded only if there is something to learn."""
    from loracast.base import DEFAULT_BASE
    from loracast.bulk import FileReport, Outcome, learn_folder
    from loracast.documents import read_document
    from loracast.files import file_sha256
    from loracast.model import shipped_hypernetwork
    from loracast.paths import journals_dir, library_dir

    where = Path(hypernetwork) if hypernetwork else shipped_hypernetwork(base or DEFAULT_BASE)
    weights = file_sha256(where / "model.safetensors") if where.is_dir() else str(where)
    loaded: list[Model] = []

    def learn_file(path: Path, adapter_name: str) -> None:
        document = read_document(path)
        if not loaded:
            loaded.append(open_model(base, hypernetwork, library, device))
        loaded[0].learn(document, adapter_name, max_chunk_tokens=chunk_tokens, replace=True)

    with _folder_progress() as (advance, tell):

        def on_file(done: int, total: int, file: FileReport) -> None:
            advance(done, total, file.path)
            if file.outcome == "failed":
                tell(f"failed: {file.path}: {file.error}")

        result = learn_folder(
            folder,
            library or library_dir(),
            learn_file,
            journals=journals_dir(),
            made_by=f"{base or DEFAULT_BASE} {weights} {chunk_tokens}",
            again=again,
            remove_gone=remove_gone,
            on_file=on_file,
        )
    if as_json:
        print_json({"folder": str(folder), **result.to_dict()})
    else:
        outcomes: list[Outcome] = ["learned", "unchanged", "failed"]
        outcomes += ["removed"] if remove_gone else []
        counts = ", ".join(f"{result.count(outcome):,} {outcome}" for outcome in outcomes)
        print(f"{folder}: {counts}; {result.ignored:,} files of other kinds")
    if not result.is_complete:
        raise typer.Exit(130)
    if result.count("failed"):
        raise typer.Exit(1)


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
