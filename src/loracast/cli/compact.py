"""`loracast compact`: adapters in less space."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import size
from loracast.lora.quantize import Storage


def compact(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Adapters.")],
    *,
    storage: Annotated[
        Storage,
        typer.Option(
            "-s",
            "--storage",
            help="int8 takes half the space; text keeps no factors: they are cast again when asked for.",
        ),
    ] = "int8",
    library: options.Library,
) -> None:
    """Keep adapters in less space, as new versions; `loracast gc --keep 1` deletes the larger ones."""
    from loracast.library.compact import compact as make_compact
    from loracast.library.library import open_adapter

    for name in options.distinct(names):
        before = open_adapter(library, name).n_bytes
        adapter = make_compact(library, name, storage)
        print(f"{adapter.version}: {size(adapter.n_bytes)} as {storage}, {size(before)} before")
