"""`loracast rm`: delete adapters."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from loracast.cli import options


def rm(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="Adapters to delete, with all their versions; or NAME@HASH for one."),
    ],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    library: options.Library,
) -> None:
    """Delete adapters from the library."""
    from loracast.library.library import find, remove_adapter

    names = options.distinct(names)
    for name in names:
        find(library, name)  # an unknown name is refused before anything is deleted
    if not yes:
        if not is_terminal():
            raise typer.BadParameter("standard input is no terminal, so nobody can be asked", param_hint="--yes")
        if not typer.confirm(f"Delete {', '.join(names)}?", err=True):
            raise typer.Exit(1)
    for name in names:
        remove_adapter(library, name)
        print(f"removed {name}")


def is_terminal() -> bool:
    return sys.stdin.isatty()
