"""`loracast search`: words, in everything that has been learned."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_json, print_table, say


def search(
    words: Annotated[list[str], typer.Argument(metavar="WORD...", help="All of them must stand in one chunk.")],
    *,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most places shown.")] = 20,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Find the places where words stand, in the text of all documents and in the descriptions of tasks.

    Names and titles are found by `loracast list TEXT`.
    """
    from loracast.library.library import search as search_library

    wanted = " ".join(words)
    found = search_library(library, wanted, limit)
    if as_json:
        print_json({"words": wanted, "hits": [asdict(hit) for hit in found]})
    elif not found:
        say(f"nothing in {library} has all these words in one chunk")
    else:
        places = (f"{hit.heading}: {hit.snippet}" if hit.heading else hit.snippet for hit in found)
        rows = [(hit.name, hit.chunk, " ".join(place.split())) for hit, place in zip(found, places, strict=True)]
        print_table(("adapter", ">chunk", "text"), rows)
