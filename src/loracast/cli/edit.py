"""`loracast edit`: another name, tags, a note, an owner."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options


def edit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")],
    rename: Annotated[str | None, typer.Option(metavar="NEW", help="Another name.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Add a tag; may be repeated.")] = None,
    untag: Annotated[list[str] | None, typer.Option(help="Take a tag away; may be repeated.")] = None,
    note: Annotated[str | None, typer.Option(help='A note for people; "" for none.')] = None,
    owner: Annotated[str | None, typer.Option(help='Whose it is; "" for nobody.')] = None,
    library: options.Library = None,
) -> None:
    """Change an adapter's name, or what is noted about it. What it holds never changes."""
    from loracast.library.library import describe_adapter, rename_adapter
    from loracast.paths import library_dir

    if rename is None and not tag and not untag and note is None and owner is None:
        raise typer.BadParameter("say what to change: --rename, --tag, --untag, --note or --owner")
    folder = library or library_dir()
    describe_adapter(folder, name, owner=owner, note=note, tags=tag or (), untag=untag or ())
    if rename is not None:
        rename_adapter(folder, name, rename)
        print(f"{name} is now called {rename}")
