"""`loracast push-adapter` and `pull-adapter`: adapters to and from elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import printable, size

Where = Annotated[
    str, typer.Argument(metavar="WHERE", help="A URL (s3://, gs://, file:// ...), a path, or OWNER/NAME on the hub.")
]


def push_adapter(
    name: options.Adapter,
    where: Where,
    *,
    public: Annotated[bool, "Let everybody see a repository that is made on the hub."] = False,
    library: options.Library,
) -> None:
    """Put an adapter, with the text it was made from and a model card, to where others can pull it."""
    from loracast.library.library import open_adapter
    from loracast.library.remote import push_adapter as push

    adapter = open_adapter(library, name)
    push(adapter, where, private=not public)
    print(f"{adapter.version} ({size(adapter.n_bytes)}) is at {where}")


def pull_adapter(
    where: Where, *, name: options.Name = None, replace: options.Replace = False, library: options.Library
) -> None:
    """Take an adapter from elsewhere into the library, after checking it."""
    from loracast.library.remote import pull_adapter as pull

    adapter = pull(library, where, name, replace=replace)
    print(f"pulled {adapter.version} ({printable(adapter.manifest.title)}), {size(adapter.n_bytes)}")
