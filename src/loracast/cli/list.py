"""`loracast list` and `search`: the adapters of the library, and the places where words stand in them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_json, print_table, say, size
from loracast.library.library import entries
from loracast.library.library import search as search_library


def list_(
    text: Annotated[str, "Only adapters with this in their name, title or note."] = "",
    *,
    tag: Annotated[str, "Only adapters with this tag."] = "",
    owner: Annotated[str, "Only adapters of this owner."] = "",
    kind: Annotated[str, "Only adapters of a kind: document, task, image, combined or imported."] = "",
    page: Annotated[int, typer.Option(min=1, help="Which page.")] = 1,
    per_page: Annotated[int, typer.Option(min=1, help="Adapters on a page.")] = 100,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """List the adapters of the library, by name and with their newest versions."""
    wanted = {"like": text, "tag": tag, "owner": owner, "kind": kind}
    found, n_found = entries(library, **wanted, limit=per_page, offset=(page - 1) * per_page)
    if as_json:
        listed = [{**asdict(entry), "tags": list(entry.tags)} for entry in found]
        print_json({"library": str(library), "n_adapters": n_found, "page": page, "adapters": listed})
        return
    if not n_found:
        none = f"no adapters in {library}; `loracast learn FILE` makes one"
        say(f"no such adapter in {library}" if any(wanted.values()) else none)
        return
    rows = []
    for one in found:
        version = one.version[:8] + (f" of {one.n_versions}" if one.n_versions > 1 else "")
        counts = (f"{one.n_tokens:,}", f"{one.n_chunks:,}") if one.kind == "document" else ("", "")
        learned = one.created[:16].replace("T", " ")
        rows.append((one.name, version, one.kind, one.title, *counts, size(one.n_bytes), learned, ", ".join(one.tags)))
    columns = ("name", "version", "from", "title", ">tokens", ">chunks", ">size", "learned", "tags")
    print_table(columns, rows, wrapped=("name", "title", "tags"))
    n_pages = -(-n_found // per_page)
    if n_pages > 1:
        say(f"page {page} of {n_pages}, {n_found:,} adapters; --page shows another")


def search(
    words: Annotated[list[str], "All of them must stand in one chunk."],
    *,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of places shown.")] = 20,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Find the places where words stand, in the text of all documents and in the descriptions of tasks.

    Names and titles are found by `loracast list TEXT`.
    """
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
