"""`loracast sync`: a folder and its adapters are kept equal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.folder import learn_files


def sync(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of documents.", exists=True, file_okay=False)
    ],
    again: Annotated[
        bool, typer.Option("--again", help="Learn also what has not changed, and what failed before.")
    ] = False,
    chunk_tokens: options.ChunkTokens = 256,
    base: options.Base = None,
    hypernetwork: options.Hypernetwork = None,
    library: options.Library = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Learn what is new or has changed in a folder, and delete the adapters of files that are gone.

    Only adapters that were learned from this folder in this way, and are still the same, are deleted.
    """
    learn_files(
        folder, again=again, chunk_tokens=chunk_tokens, remove_gone=True,
        base=base, hypernetwork=hypernetwork, library=library, device=device, as_json=as_json,
    )  # fmt: skip
