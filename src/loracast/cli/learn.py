"""`loracast learn`: a document becomes an adapter in the library."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.cli import options
from loracast.cli.output import print_json, printable, say, size, stderr
from loracast.cli.session import learn_visibly, open_model

if TYPE_CHECKING:
    from loracast.adapter import Adapter
    from loracast.model import Model


def learn(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="PDF, DOCX, HTML, Markdown, CSV or text; - for standard input; or a folder of them."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name of the adapter; made from the file's by default.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let an adapter of that name give way.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Of a folder, learn also what has not changed, and what failed before.")
    ] = False,
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Longest chunk.")] = 256,
    base: options.Base = None,
    hypernetwork: options.Hypernetwork = None,
    library: options.Library = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Learn a document, or all documents of a folder.

    It is cast into an adapter in one pass, without training. Of a folder, files that have not changed since are left alone, and one that cannot be
    read holds up no other; adapters are named after the files' paths.
    """
    if Path(file).is_dir():
        if name is not None:
            raise typer.BadParameter("adapters of a folder are named after its files", param_hint="--name")
        _learn_folder(Path(file), again, chunk_tokens, base, hypernetwork, library, device, as_json)
        return
    from loracast.documents import read_document
    from loracast.library import check_free
    from loracast.manifest import check_name, name_for
    from loracast.paths import library_dir

    started = time.perf_counter()
    document = read_document(file)
    name = check_name(name or name_for(document))
    if not replace:
        check_free(library or library_dir(), name)  # before a model is loaded for nothing
    model = open_model(base, hypernetwork, library, device)
    adapter = learn_visibly(model, document, name, max_chunk_tokens=chunk_tokens, replace=replace)
    if as_json:
        print_json({**report(adapter), "total_s": round(time.perf_counter() - started, 3)})
    else:
        print_learned(adapter)


def _learn_folder(
    folder: Path,
    again: bool,
    chunk_tokens: int,
    base: str | None,
    hypernetwork: str | None,
    library: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Learn what is new in a folder; the models are loaded only if there is something to learn."""
    from loracast.base import DEFAULT_BASE
    from loracast.bulk import FileReport, learn_folder
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
            on_file=on_file,
        )
    if as_json:
        print_json({"folder": str(folder), **result.to_dict()})
    else:
        counts = ", ".join(f"{result.count(outcome):,} {outcome}" for outcome in ("learned", "unchanged", "failed"))
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


def report(adapter: Adapter) -> dict[str, Any]:
    manifest = adapter.manifest
    return {
        "name": adapter.name,
        "title": manifest.title,
        "n_tokens": manifest.n_tokens,
        "n_chunks": manifest.n_chunks,
        "ranks": manifest.ranks,
        "n_bytes": adapter.n_bytes,
        "learn_s": manifest.learn_s,
        "warnings": list(manifest.warnings),
        "folder": str(adapter.folder),
    }


def print_learned(adapter: Adapter) -> None:
    manifest = adapter.manifest
    title = f" ({printable(manifest.title)})" if manifest.title else ""
    chunks = f"{manifest.n_chunks:,} chunk{'s' * (manifest.n_chunks != 1)}"
    print(f"learned {adapter.name}{title}")
    print(
        f"{manifest.n_tokens:,} tokens in {chunks}, rank {manifest.rank_text}, {size(adapter.n_bytes)}, {manifest.learn_s:.1f} s"
    )
    print(f'ask it: loracast ask "..." -a {adapter.name}')
