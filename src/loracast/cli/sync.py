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

_LOOK_EVERY_MS = 10_000
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of documents.", exists=True, file_okay=False)]


def sync(
    folder: Folder, *, again: options.Again = False, learning: options.Learning, as_json: options.Json = False
) -> None:
    """Learn what is new or has changed in a folder, and delete the adapters of files that are gone.

    Only adapters that were learned from this folder in this way, and are still the same, are deleted.
    """
    learn_files(FolderLearner(folder, learning, again=again, remove_gone=True), as_json=as_json)


def watch(folder: Folder, learning: options.Learning) -> None:
    """Do what `sync` does, and again whenever files change, until Ctrl-C."""
    import watchfiles

    learner = FolderLearner(folder, learning, remove_gone=True)
    say(f"watching {folder}; Ctrl-C ends it")
    # It also looks now and then: for what changed before the watch began, and for file systems that report no changes.
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
