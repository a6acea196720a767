"""`loracast route`: which chunks a question would be answered with, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.cli import options
from loracast.cli.output import print_json, print_table, say
from loracast.library.index import read_chunks
from loracast.library.library import open_adapter
from loracast.library.routing import DEFAULT_ROUTE
from loracast.library.wide_route import route_adapters

if TYPE_CHECKING:
    from loracast.library.adapter import Adapter
    from loracast.library.routing import Route

_MOST_LIKELY = 3
_SHOWN = 90  # characters of a chunk's text


def route(
    question: options.Question,
    *,
    adapters: options.Adapters = None,
    k: options.Route = DEFAULT_ROUTE,
    exported: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False,
            help="A folder that `export --each-chunk` wrote: show which of its adapters to load.",
        ),
    ] = None,
    library: options.Library,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Show which chunks a question would be answered with, and the weight of each.

    Without -a, these are the chunks that `ask --all` would take.
    """
    options.check_question(question)
    if exported is not None:
        if adapters:
            raise typer.BadParameter("give adapters of the library or an exported folder", param_hint="--exported")
        found = [_exported(exported, question, k)]
    else:
        chosen = adapters or ["*"]
        routed = route_adapters(library, question, chosen, k, "", partial(open_adapter, library))
        found = [_picked(*one) for one in routed]
    if as_json:
        print_json({"question": question, "adapters": found})
        return
    if not found:
        say(f"no document in {library} is about the question")
        return
    rows: list[tuple[object, ...]] = []
    for one in found:
        if not one["chunks"]:
            rows.append((one["adapter"], "none" if one["is_empty"] else "all", "", "", one["reason"]))
        for chunk in one["chunks"]:
            text = " ".join(f"{chunk['heading']} {chunk['text']}".split())
            shown = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
            score = "" if chunk["score"] is None else f"{chunk['score']:.2f}"
            weight = f"{chunk['weight']:.2f}"
            rows.append((chunk.get("path", one["adapter"]), chunk["chunk"], score, weight, shown))
        if one["likely"]:
            begins = ", ".join(
                f"{place['text']!r} ({place['probability']:.2f})" for place in one["likely"][:_MOST_LIKELY]
            )
            rows.append((one["adapter"], "", "", "", f"the answer probably begins {begins}"))
        if static := one.get("static"):
            rows.append((static["path"], "", "", f"{static['weight']:.2f}", "the part that all chunks share, once"))
    print_table(("adapter", ">chunk", ">score", ">weight", "text"), rows)


def _exported(folder: Path, question: str, k: int | None) -> dict[str, Any]:
    """The adapters of an exported document that a question would be answered with, and their weights."""
    from loracast.errors import AdapterError
    from loracast.library.routing import pick

    try:
        listing = json.loads((folder / "chunks.json").read_text(encoding="utf-8"))
        name, chunks, static = listing["adapter"], listing["chunks"], listing.get("static")
        paths = [str(folder / chunk["path"]) for chunk in chunks]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder} is no document exported chunk by chunk: its chunks.json cannot be read ({error})"
        ) from error
    index = folder / "chunks.sqlite"
    picked = pick(index, len(chunks), question, k)
    wanted = range(len(chunks)) if picked.chunks is None else picked.chunks
    n = len(wanted)
    described = _described(index, wanted, picked.scores or [0.0] * n, picked.weights or [1.0] * n)
    placed = [{**chunk, "path": paths[chunk["chunk"]]} for chunk in described]
    found = {"adapter": name, "reason": picked.reason, "is_empty": False, "likely": [], "chunks": placed}
    if static is not None and (surplus := sum(chunk["weight"] for chunk in placed) - 1):
        found["static"] = {"path": str(folder / static), "weight": round(-surplus, 3)}
    return found


def _picked(adapter: Adapter, picked: Route) -> dict[str, Any]:
    """The chunks of an adapter that a question is answered with; none where it is taken as a whole, or not at all."""
    is_one_chunk = adapter.manifest.kind == "document" and adapter.manifest.n_chunks == 1
    chunks = (0,) * is_one_chunk if picked.chunks is None else picked.chunks
    described = _described(
        adapter.index, chunks, picked.scores or [None] * len(chunks), picked.weights or [1.0] * len(chunks)
    )
    found = {"adapter": adapter.name, "reason": picked.reason, "is_empty": picked.is_empty}
    likely = [one._asdict() for one in picked.likely]
    return {**found, "likely": likely, "chunks": described}


def _described(
    index: Path, chunks: Sequence[int], scores: Sequence[float | None], weights: Sequence[float]
) -> list[dict[str, Any]]:
    """The number, score, weight, place and text of each chunk."""
    return [
        {"chunk": i, "score": None if score is None else round(score, 3), "weight": round(weight, 3)}
        | {field: getattr(chunk, field) for field in ("heading", "start", "end", "text")}
        for i, score, weight, chunk in zip(chunks, scores, weights, read_chunks(index, chunks), strict=True)
    ]
