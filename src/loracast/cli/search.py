"""`loracast search`: words, in everything that has been learned."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_json, printable, say, stdout


def search(
    words: Annotated[list[str], typer.Argument(metavar="WORDS", help="All of them are to stand in one chunk.")],
    limit: Annotated[int, typer.Option(min=1, help="Most places shown.")] = 20,
    library: options.Library = None,
    as_json: options.Json = False,
) -> None:
    """Find the places where words stand, in the text of all documents and in the descriptions of tasks.

    Names and titles are found by `loracast list TEXT`.
    """
    from loracast.library.library import search as search_library
    from loracast.paths import library_dir

    folder, wanted = library or library_dir(), " ".join(words)
    found = search_library(folder, wanted, limit)
    if as_json:
        print_json({"words": wanted, "hits": [asdict(hit) for hit in found]})
        return
    if not found:
        say(f"nothing in {folder} has all these words in one chunk")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("adapter", no_wrap=True)
    table.add_column("chunk", justify="right", no_wrap=True)
    table.add_column("text")
    for hit in found:
        shown = " ".join(f"{hit.heading}: {hit.snippet}".split()) if hit.heading else " ".join(hit.snippet.split())
        table.add_row(hit.name, str(hit.chunk), Text(printable(shown)))
    stdout().print(table)
