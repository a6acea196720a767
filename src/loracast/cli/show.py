"""`loracast list`, `search`, `show`, `inspect`, `diff`, `route`: print what the library holds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from loracast.cli import options
from loracast.cli.terminal import plural, print_json, print_table, printable, say, size, stdout
from loracast.errors import AdapterError
from loracast.library.index import read_chunks
from loracast.reading.outline import read_outline
from loracast.reading.routing import DEFAULT_ROUTE, route_adapters

if TYPE_CHECKING:
    from loracast.library.adapter import Adapter
    from loracast.library.combine import ModuleSize
    from loracast.reading.matching import Route


def list_(
    text: Annotated[str, "Only adapters with this in their name, title or note."] = "",
    *,
    tag: Annotated[str, "Only adapters with this tag."] = "",
    owner: Annotated[str, "Only adapters of this owner."] = "",
    kind: Annotated[str, "Only adapters of a kind: document, task, image, labels, combined or imported."] = "",
    page: Annotated[options.Count, "Which page."] = 1,
    per_page: Annotated[options.Count, "Adapters on a page."] = 100,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """List the adapters of the library, by name and with their newest versions."""
    wanted = {"like": text, "tag": tag, "owner": owner, "kind": kind}
    found, n_found = library.entries(**wanted, limit=per_page, offset=(page - 1) * per_page)
    if as_json:
        print_json({"library": str(library), "n_adapters": n_found, "page": page, "adapters": found})
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
    limit: Annotated[options.Count, "Maximum number of places shown."] = 20,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Find the places where words stand, in the text of all documents and in the descriptions of tasks.

    Names and titles are found by `loracast list TEXT`.
    """
    found = library.search(" ".join(words), limit)
    if as_json:
        print_json({"words": " ".join(words), "hits": found})
    elif not found:
        say(f"nothing in {library} has all these words in one chunk")
    else:
        texts = [f"{hit.heading}: {hit.snippet}".removeprefix(": ") for hit in found]
        rows = [(hit.name, hit.chunk, " ".join(text.split())) for hit, text in zip(found, texts, strict=True)]
        print_table(("adapter", ">chunk", "text"), rows)


_MAX_CHUNKS_FOR_NORMS = 64
"""Maximum number of chunks whose norms are computed: enough for a summary of a book."""


def show(
    name: options.Adapter,
    *,
    chunks: Annotated[bool, "List the chunks with their headings and places."] = False,
    layers: Annotated[bool, "List norm and effective rank of every module, all chunks merged."] = False,
    plot: Annotated[Path | None, "Draw what --layers lists into this PNG file."] = None,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Show all that is known of an adapter.

    Where it comes from, its size, chunks and norms; its factors are verified against their hash.
    """
    from loracast.library.combine import draw, sizes

    adapter, entry = library.open(name), library.find(name)
    adapter.verify()
    manifest = adapter.manifest
    places = read_chunks(adapter.index) if chunks else []
    outline = read_outline(adapter.index) if manifest.kind == "document" else None
    norms = {} if manifest.storage == "text" else chunk_norms(adapter)
    modules = sizes(adapter.lora()) if layers or plot else []
    if plot is not None:
        draw(modules, ("norm", "effective_rank"), plot, adapter.name, ("norm of the delta", "effective rank"))
    if as_json:
        report = {
            "manifest": manifest, "name": adapter.name, "version": entry.version,
            "versions": [other.version for other in library.versions(adapter.name)],
            "owner": entry.owner, "note": entry.note, "tags": entry.tags,
            "folder": str(adapter.folder), "n_bytes": adapter.n_bytes, "norms": norms, "outline": outline,
        }  # fmt: skip
        if chunks:
            report["chunks"] = [{k: v for k, v in asdict(place).items() if k != "text"} for place in places]
        print_json(report | ({"modules": modules} if modules else {}))
        return
    layer_numbers = [module.layer for module in manifest.target.modules]
    first, last = min(layer_numbers), max(layer_numbers)
    version = adapter.version + (f", one of {entry.n_versions}" if entry.n_versions > 1 else "")
    facts = {"name": adapter.name, "title": manifest.title or "-", "version": version}
    facts |= {"tags": ", ".join(entry.tags), "note": entry.note, "owner": entry.owner}
    if manifest.kind == "task":
        facts["cast"] = f"{manifest.created}, in {1000 * manifest.learn_s:.0f} ms, strength {manifest.strength:g}"
        if manifest.n_examples:
            facts["examples"] = f"{manifest.n_examples}{', refined on them' if manifest.is_refined else ''}"
    elif manifest.kind != "document":
        facts[manifest.kind] = f"{manifest.created}{f', from {manifest.source}' if manifest.source else ''}"
        said = " ".join(chunk.text.replace("\n", " ") for chunk in read_chunks(adapter.index))
        facts |= {"labels": said} if said != manifest.title else {}
    else:
        in_chunks = f"{plural(manifest.n_chunks, 'chunk')} of at most {manifest.max_chunk_tokens}"
        facts |= {
            "source": f"{manifest.source or 'standard input'}, sha256 {manifest.source_sha256[:16]}",
            "learned": f"{manifest.created}, in {manifest.learn_s:.1f} s",
            "document": f"{manifest.n_tokens:,} tokens in {in_chunks}",
            "routing": "by chunk and sentence" if manifest.memory_kinds else "by chunk",
        }
        if manifest.format == 1:
            facts["routing"] = "by chunk: an older version made the adapter; learn it again to route it by sentence"
        if outline is None:
            facts["outline"] = "none: an older version made the adapter; remove it and learn the document again for one"
        else:
            facts["sections"] = "; ".join(outline.top_headings())
            facts["summary"] = " ".join(text for _, text in outline.summary)
    each = " for each chunk" * (manifest.kind == "document")
    facts |= {
        "factors": f"rank {manifest.rank_text}{each}, layers {first} to {last}; kept as {manifest.storage}",
        "base": f"{manifest.made_for.base}, weights {manifest.made_for.norms}",
        "hypernetwork": manifest.hypernetwork or "-",
        "size": f"{size(adapter.n_bytes)} in {adapter.folder}",
    }
    for kind, of in norms.items():
        facts[f"norm {kind}"] = f"{of['mean']:.3g} on average, {of['min']:.3g} to {of['max']:.3g} in a layer{each}"
    facts |= {f"warning {i}": warning for i, warning in enumerate(manifest.warnings, 1)}

    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
        if value:
            table.add_row(Text(key, style="bold"), Text(printable(value)))
    stdout().print(table)
    if chunks:
        print()
        rows = [(f"{i:,}", f"{c.start:,}", f"{c.end:,}", f"{c.n_tokens:,}", c.heading) for i, c in enumerate(places)]
        print_table((">chunk", ">start", ">end", ">tokens", "heading"), rows, wrapped=("heading",))
    if layers:
        print()
        _print_modules(modules)


def _print_modules(modules: Sequence[ModuleSize]) -> None:
    print_table(
        (">layer", "module", ">norm", ">rank", ">effective rank"),
        [(m.layer, m.kind, f"{m.norm:.3g}", m.rank, f"{m.effective_rank:.1f}") for m in modules],
    )


def inspect(
    name: options.Adapter, *, choice: options.BaseChoice, library: options.Library, as_json: options.Json = False
) -> None:
    """Show what an adapter does before you trust it.

    The norm of every module; how it changes the answers to a fixed set of prompts that have nothing to do with it; and
    all of the text that it was made from, but for a task's examples, which are not kept. All chunks of a document are
    merged, as if every question was about it.
    """
    from loracast.base.fingerprint import check
    from loracast.library.combine import sizes
    from loracast.reading.probes import probe

    adapter = library.open(name)
    if faults := adapter.faults():
        raise AdapterError(f"the adapter {name!r} is damaged: {'; '.join(faults)}")
    lora = adapter.lora()
    loaded = options.open_base(replace(choice, base=choice.base or options.base_of([adapter])))
    check(adapter.manifest.made_for, loaded.fingerprint, f"the adapter {name!r}")
    modules, probes, chunks = sizes(lora), probe(loaded, lora), read_chunks(adapter.index)
    if as_json:
        report = {"name": adapter.name, "version": adapter.manifest.version, "kind": adapter.manifest.kind}
        texts = [{"heading": chunk.heading, "text": chunk.text} for chunk in chunks]
        print_json({**report, "modules": modules, "probes": probes, "text": texts})
        return
    _print_modules(modules)
    print()
    rows = [(one.prompt, f"{one.kl:.2f}", one.plain, one.adapted) for one in probes]
    print_table(("prompt", ">KL", "plain base", "with it"), rows, wrapped=("prompt", "plain base", "with it"))
    print(f"KL: nats between the first tokens, on average {sum(one.kl for one in probes) / len(probes):.2f}")
    for chunk in chunks:
        print(f"\n{printable(f'--- {chunk.heading}'.strip())}\n\n{printable(chunk.text)}")


def chunk_norms(adapter: Adapter) -> dict[str, dict[str, float]]:
    """For each module kind the smallest, mean and largest Frobenius norm of one chunk's delta in one layer."""
    n_chunks = adapter.manifest.n_chunks
    kind_of = {module.name: module.kind for module in adapter.manifest.target.modules}
    found: dict[str, list[float]] = {}
    for chunk in range(0, n_chunks, -(-n_chunks // _MAX_CHUNKS_FOR_NORMS)):
        for module, norm in adapter.lora([chunk]).norms().items():
            found.setdefault(kind_of[module], []).append(norm)
    return {kind: {"min": min(of), "mean": sum(of) / len(of), "max": max(of)} for kind, of in found.items()}


def diff(
    name: options.Adapter,
    other: Annotated[str, "The adapter to compare it with."],
    *,
    plot: Annotated[Path | None, "Draw the differences into this PNG file."] = None,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Show how two adapters differ, layer by layer, all chunks of a document merged."""
    from loracast.base.fingerprint import check
    from loracast.library.combine import differences, draw

    first, second = library.open(name), library.open(other)
    check(first.manifest.made_for, second.manifest.made_for, f"the adapter {name!r}")
    found = differences(first.lora(), second.lora())
    a, b, d = (math.hypot(*(getattr(m, field) for m in found)) for field in ("norm", "other_norm", "distance"))
    cosine = (a * a + b * b - d * d) / (2 * a * b) if a and b else 0.0
    if plot is not None:
        draw(found, ("cosine", "distance"), plot, f"{name} and {other}", ("cosine", "norm of the difference"))
    if as_json:
        print_json({"cosine": cosine, "norm": a, "other_norm": b, "distance": d, "modules": found})
        return
    columns = (">layer", "module", f">norm of {name}", f">norm of {other}", ">cosine", ">difference")
    rows = []
    for m in found:
        figures = (f"{m.norm:.3g}", f"{m.other_norm:.3g}", f"{m.cosine:.3f}", f"{m.distance:.3g}")
        rows.append((m.layer, m.kind, *figures))
    print_table(columns, rows)
    print(f"in all: cosine {cosine:.3f}, norms {a:.3g} and {b:.3g}, difference {d:.3g}")


_MAX_CANDIDATES = 3
_MAX_TEXT_CHARACTERS = 90


def route(
    question: options.Question,
    *,
    adapters: options.Adapters = None,
    k: options.Route = DEFAULT_ROUTE,
    exported: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False),
        "A folder that `export --each-chunk` wrote: show which of its adapters to load, by BM25, without the base.",
    ] = None,
    models: options.Models,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Show which chunks a question would be answered with, and the weight of each.

    Without -a, these are the chunks that `ask --all` would take.
    """
    if exported is not None:
        if adapters:
            raise typer.BadParameter("give adapters of the library or an exported folder", param_hint="--exported")
        found = [_exported(exported, question, k)]
    else:
        reader = options.open_model(models, library, eager=False).reader
        routed = route_adapters(library, question, adapters or ["*"], k, "", library.open, reader)
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
            rows.append((one["adapter"], "none" if one["is_empty"] else "all", "", one["reason"]))
        for chunk in one["chunks"]:
            text = " ".join(f"{chunk['heading']} {chunk['text']}".split())
            shown = text if len(text) <= _MAX_TEXT_CHARACTERS else text[: _MAX_TEXT_CHARACTERS - 1] + "…"
            rows.append((chunk.get("path", one["adapter"]), chunk["chunk"], f"{chunk['weight']:.2f}", shown))
        if one["likely"]:
            begins = [f"{place['text']!r} ({place['probability']:.2f})" for place in one["likely"][:_MAX_CANDIDATES]]
            rows.append((one["adapter"], "", "", f"the answer probably begins {', '.join(begins)}"))
        if static := one.get("static"):
            rows.append((static["path"], "", f"{static['weight']:.2f}", "the part that all chunks share, once"))
    print_table(("adapter", ">chunk", ">weight", "text"), rows)


def _exported(folder: Path, question: str, k: int | None) -> dict[str, Any]:
    """The adapters of an exported document that a question would be answered with, and their weights."""
    from loracast.reading.routing import route_document

    index = folder / "chunks.sqlite"
    try:
        listing = json.loads((folder / "chunks.json").read_text(encoding="utf-8"))
        name, chunks, static = listing["adapter"], listing["chunks"], listing.get("static")
        paths = [str(folder / chunk["path"]) for chunk in chunks]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{folder} is no document exported chunk by chunk: its chunks.json cannot be read"
        raise AdapterError(f"{what} ({error})") from error
    picked = route_document(index, question, k, always=True)
    wanted = range(len(chunks)) if picked.chunks is None else picked.chunks
    found = _described(name, index, picked, wanted) | {"likely": []}
    for chunk in found["chunks"]:
        chunk["path"] = paths[chunk["chunk"]]
    if static is not None and (surplus := sum(chunk["weight"] for chunk in found["chunks"]) - 1):
        found["static"] = {"path": str(folder / static), "weight": round(-surplus, 3)}
    return found


def _picked(adapter: Adapter, picked: Route) -> dict[str, Any]:
    """The chunks of an adapter that a question is answered with; none where it is taken as a whole, or not at all."""
    return _described(adapter.name, adapter.index, picked, picked.chunks or ())


def _described(name: str, index: Path, route: Route, chunks: Sequence[int]) -> dict[str, Any]:
    """The chunks of an adapter that answer a question, each with its weight, place and text."""
    weights = route.weights or [1.0] * len(chunks)
    described = [
        {"chunk": i, "weight": round(weight, 3)}
        | {field: getattr(chunk, field) for field in ("heading", "start", "end", "text")}
        for i, weight, chunk in zip(chunks, weights, read_chunks(index, chunks), strict=True)
    ]
    found = {"adapter": name, "reason": route.reason, "is_empty": route.is_empty}
    return {**found, "likely": [one._asdict() for one in route.candidates], "chunks": described}
