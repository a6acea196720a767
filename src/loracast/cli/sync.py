"""`loracast sync` and `loracast watch`: a folder and its adapters are kept equal, once or as files change."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.folder import FolderLearner, learn_files, summary
from loracast.cli.output import printable, say
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.lora.quantize import DEFAULT_STORAGE

_LOOK_EVERY_MS = 10_000
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of documents.", exists=True, file_okay=False)]


def sync(
    folder: Folder,
    again: Annotated[
        bool, typer.Option("--again", help="Learn also what has not changed, and what failed before.")
    ] = False,
    chunk_tokens: options.ChunkTokens = DEFAULT_CHUNK_TOKENS,
    storage: options.StorageOption = DEFAULT_STORAGE,
    base: options.Base = None,
    hypernetwork: options.Hypernetwork = None,
    library: options.Library = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Learn what is new or has changed in a folder, and delete the adapters of files that are gone.

    Only adapters that were learned from this folder in this way, and are still the same, are deleted.
    """
    learner = FolderLearner(
        folder, again=again, chunk_tokens=chunk_tokens, storage=storage, remove_gone=True,
        base=base, hypernetwork=hypernetwork, library=library, device=device,
    )  # fmt: skip
    learn_files(learner, as_json=as_json)


def watch(
    folder: Folder,
    chunk_tokens: options.ChunkTokens = DEFAULT_CHUNK_TOKENS,
    storage: options.StorageOption = DEFAULT_STORAGE,
    base: options.Base = None,
    hypernetwork: options.Hypernetwork = None,
    library: options.Library = None,
    device: options.Device = None,
) -> None:
    """Do what `sync` does, and again whenever files change, until Ctrl-C."""
    import watchfiles

    learner = FolderLearner(
        folder, chunk_tokens=chunk_tokens, storage=storage, remove_gone=True,
        base=base, hypernetwork=hypernetwork, library=library, device=device,
    )  # fmt: skip
    say(f"watching {folder}; Ctrl-C ends it")
    # A look now and then as well: for what changed before the watch began, and for file systems that tell of no changes.
    looks = watchfiles.watch(folder, raise_interrupt=False, yield_on_timeout=True, rust_timeout=_LOOK_EVERY_MS)
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
