"""`loracast edit`: another name, tags, a note, an owner."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options


def edit(
    name: options.Adapter,
    *,
    rename: Annotated[str | None, typer.Option("--rename", metavar="NEW", help="Another name.")] = None,
    tag: Annotated[list[str] | None, "Add a tag. Repeatable."] = None,
    untag: Annotated[list[str] | None, "Take a tag away. Repeatable."] = None,
    note: Annotated[str | None, 'A note for people; "" for none.'] = None,
    owner: Annotated[str | None, 'Whose it is; "" for nobody.'] = None,
    library: options.Library,
) -> None:
    """Change an adapter's name, or what is noted about it. What it holds never changes."""
    from loracast.library.library import describe_adapter, rename_adapter

    if rename is None and not tag and not untag and note is None and owner is None:
        raise typer.BadParameter("say what to change: --rename, --tag, --untag, --note or --owner")
    describe_adapter(library, name, owner=owner, note=note, tags=tag or (), untag=untag or ())
    if rename is not None:
        rename_adapter(library, name, rename)
        print(f"{name} is now called {rename}")
