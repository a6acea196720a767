"""`loracast route`: which chunks a question would be answered with, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.cli import options
from loracast.cli.output import print_json, printable, say, stdout
from loracast.routing import DEFAULT_ROUTE

if TYPE_CHECKING:
    from loracast.adapter import Adapter

_SHOWN = 90  # characters of a chunk's text
_BEST = 3  # chunks of each document of the library


def route(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What would be asked.")],
    adapter: options.Adapters = None,
    k: options.Route = DEFAULT_ROUTE,
    library: options.Library = None,
    as_json: options.Json = False,
) -> None:
    """Show which chunks a question would be answered with, and what each counts.

    Without -a, all documents of the library are looked through, those that match best first. Scores of different documents are only roughly
    comparable: a word's weight depends on how rare it is in its document.
    """
    from loracast.library import adapters, open_adapter
    from loracast.paths import library_dir

    folder = library or library_dir()
    if adapter:
        found = [_picked(open_adapter(folder, name), question, k) for name in adapter]
    else:
        found = [_matching(one, question) for one in adapters(folder) if one.manifest.kind == "document"]
        found = sorted((one for one in found if one["chunks"]), key=lambda one: -one["chunks"][0]["score"])
    if as_json:
        print_json({"question": question, "adapters": found})
        return
    if not found:
        say(f"no document in {folder} has a word of the question")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("adapter", no_wrap=True)
    for column in ("chunk", "score", "counts"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("text")
    for one in found:
        if not one["chunks"]:
            table.add_row(one["adapter"], "all", "", "", Text(printable(one["reason"])))
        for chunk in one["chunks"]:
            text = " ".join(f"{chunk['heading']} {chunk['text']}".split())
            shown = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
            weight = "" if chunk["weight"] is None else f"{chunk['weight']:.2f}"
            row = (one["adapter"], str(chunk["chunk"]), f"{chunk['score']:.2f}", weight)
            table.add_row(*row, Text(printable(shown)))
    stdout().print(table)


def _picked(adapter: Adapter, question: str, k: int | None) -> dict[str, Any]:
    """The chunks of one adapter that a question would be answered with."""
    from loracast.routing import route as route_question

    if adapter.manifest.kind != "document":
        return {"adapter": adapter.name, "reason": f"{adapter.manifest.kind}: always whole", "chunks": []}
    picked = route_question(adapter, question, k)
    chunks = _described(adapter, picked.chunks or (), picked.scores, picked.weights)
    return {"adapter": adapter.name, "reason": picked.reason, "chunks": chunks}


def _matching(adapter: Adapter, question: str) -> dict[str, Any]:
    """The chunks of one document that match a question best."""
    from loracast.routing import search

    found = search(adapter.index, question, _BEST)
    chunks = _described(adapter, [i for i, _ in found], [score for _, score in found], [None] * len(found))
    return {"adapter": adapter.name, "reason": "", "chunks": chunks}


def _described(
    adapter: Adapter, chunks: Sequence[int], scores: Sequence[float], weights: Sequence[float | None]
) -> list[dict[str, Any]]:
    """Chunks with what is known of them."""
    from loracast.routing import read_chunks

    return [
        {
            "chunk": i,
            "score": round(score, 3),
            "weight": None if weight is None else round(weight, 3),
            "heading": chunk.heading,
            "start": chunk.start,
            "end": chunk.end,
            "text": chunk.text,
        }
        for i, score, weight, chunk in zip(chunks, scores, weights, read_chunks(adapter.index, chunks), strict=True)
    ]
