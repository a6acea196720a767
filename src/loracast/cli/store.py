"""`loracast store`: the library's adapters at a URL."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_result, size


def store(
    url: Annotated[
        str | None,
        typer.Argument(metavar="[URL]", help="Keep the adapters there from now on (s3://, gs://, file:// ...)."),
    ] = None,
    *,
    take_over: Annotated[bool, "Use a store that was another library's, with all that lies there."] = False,
    evict: Annotated[bool, "Delete this machine's copies; they are fetched again when needed."] = False,
    leave: Annotated[bool, "Bring everything back and keep it on this machine alone."] = False,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Keep the library's adapters at a URL, with this machine's folder as a cache; without a URL, say where they lie.

    The register of names stays on this machine. What is learned is copied to the URL before it gets its name, and what
    is deleted is deleted there too.
    """
    from loracast.library.upkeep import evict as evict_copies
    from loracast.library.upkeep import leave_store, store_url, use_store

    if sum((url is not None, evict, leave)) > 1:
        raise typer.BadParameter("give a URL, --evict or --leave, one at a time")
    if url is not None:
        text = f"{use_store(library, url, take_over=take_over):,} adapters lie at {url}"
    elif evict:
        text = f"{size(evict_copies(library))} deleted here"
    elif leave:
        leave_store(library)
        text = f"all adapters lie in {library}"
    else:
        text = f"adapters lie at {store_url(library) or library}"
    print_result(as_json, {"library": str(library), "store": store_url(library)}, text)
