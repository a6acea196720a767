"""`loracast push-adapter` and `pull-adapter`: adapters to and from elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import printable, size

Where = Annotated[
    str, typer.Argument(metavar="WHERE", help="A URL (s3://, gs://, file:// ...), a path, or OWNER/NAME on the hub.")
]


def push(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter; NAME@HASH for an older version.")],
    where: Where,
    public: Annotated[
        bool, typer.Option("--public", help="Of a repository on the hub that is made: for everybody to see.")
    ] = False,
    library: options.Library = None,
) -> None:
    """Put an adapter, with the text it was made from and a model card, to where others can pull it."""
    from loracast.library.library import open_adapter
    from loracast.library.remote import push_adapter
    from loracast.paths import library_dir

    adapter = open_adapter(library or library_dir(), name)
    push_adapter(adapter, where, private=not public)
    print(f"{adapter.version} ({size(adapter.n_bytes)}) is at {where}")


def pull(
    where: Where,
    name: Annotated[str | None, typer.Option(help="Name of the adapter; its own by default.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let an adapter of that name give way.")] = False,
    library: options.Library = None,
) -> None:
    """Take an adapter from elsewhere into the library, after looking it over."""
    from loracast.library.remote import pull_adapter
    from loracast.paths import library_dir

    adapter = pull_adapter(library or library_dir(), where, name, replace=replace)
    print(f"pulled {adapter.version} ({printable(adapter.manifest.title)}), {size(adapter.n_bytes)}")
