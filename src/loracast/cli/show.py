"""`loracast show`, `inspect` and `diff`: what is known of an adapter, what it does, and how two differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from loracast.cli import options
from loracast.cli.output import plural, print_json, print_table, printable, size, stdout
from loracast.errors import AdapterError
from loracast.library.index import read_chunks
from loracast.library.library import find, open_adapter, versions
from loracast.library.summary import read_outline

if TYPE_CHECKING:
    from loracast.library.adapter import Adapter
    from loracast.library.inspect import ModuleDifference, ModuleSize
    from loracast.library.summary import Outline

_MOST_CHUNKS = 64
"""Chunks whose norms are looked at: enough for a summary of a book."""


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
    adapter, entry = open_adapter(library, name), find(library, name)
    adapter.verify()
    manifest = adapter.manifest
    places = read_chunks(adapter.index) if chunks else []
    outline = read_outline(adapter.index) if manifest.kind == "document" else None
    norms = {} if manifest.storage == "text" else chunk_norms(adapter)
    modules: list[ModuleSize] = []
    if layers or plot:
        from loracast.library.inspect import sizes

        modules = sizes(adapter.lora())
    if plot is not None:
        _draw(modules, ("norm", "effective_rank"), plot, adapter.name, ("norm of the delta", "effective rank"))
    if as_json:
        report: dict[str, Any] = {"manifest": asdict(manifest), "name": adapter.name, "version": entry.version}
        report["versions"] = [other.version for other in versions(library, adapter.name)]
        report |= {"owner": entry.owner, "note": entry.note, "tags": list(entry.tags)}
        report |= {"folder": str(adapter.folder), "n_bytes": adapter.n_bytes, "norms": norms}
        report["outline"] = outline and asdict(outline)
        if chunks:
            report["chunks"] = [{k: v for k, v in asdict(place).items() if k != "text"} for place in places]
        if modules:
            report["modules"] = [asdict(module) for module in modules]
        print_json(report)
        return
    targeted = sorted({module.layer for module in manifest.target.modules})
    version = adapter.version + (f", one of {entry.n_versions}" if entry.n_versions > 1 else "")
    facts = {"name": adapter.name, "title": manifest.title or "-", "version": version}
    noted = {"tags": ", ".join(entry.tags), "note": entry.note, "owner": entry.owner}
    facts |= {key: text for key, text in noted.items() if text}
    if manifest.kind == "task":
        facts["cast"] = f"{manifest.created}, in {1000 * manifest.learn_s:.0f} ms, strength {manifest.strength:g}"
        if manifest.n_examples:
            facts["examples"] = f"{manifest.n_examples}{', refined on them' if manifest.is_refined else ''}"
    elif manifest.kind != "document":
        facts[manifest.kind] = f"{manifest.created}{f', from {manifest.source}' if manifest.source else ''}"
    else:
        facts["source"] = f"{manifest.source or 'standard input'}, sha256 {manifest.source_sha256[:16]}"
        facts["learned"] = f"{manifest.created}, in {manifest.learn_s:.1f} s"
        in_chunks = f"{plural(manifest.n_chunks, 'chunk')} of at most {manifest.max_chunk_tokens}"
        facts["document"] = f"{manifest.n_tokens:,} tokens in {in_chunks}"
        facts["routing"] = _routing(adapter)
        facts |= _outline_facts(outline)
    each = " for each chunk" * (manifest.kind == "document")
    facts |= {
        "factors": f"rank {manifest.rank_text}{each}, layers {targeted[0]} to {targeted[-1]}; "
        f"kept as {manifest.storage}",
        "base": f"{manifest.made_for.base}, weights {manifest.made_for.norms}",
        "hypernetwork": manifest.hypernetwork or "-",
        "size": f"{size(adapter.n_bytes)} in {adapter.folder}",
    }
    for kind, norm in norms.items():
        facts[f"norm {kind}"] = (
            f"{norm['mean']:.3g} on average, {norm['min']:.3g} to {norm['max']:.3g} in a layer{each}"
        )
    for i, warning in enumerate(manifest.warnings, 1):
        facts[f"warning {i}"] = warning

    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
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
    name: options.Adapter,
    *,
    choice: options.BaseChoice,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Show what an adapter does before you trust it.

    The norm of every module; how it changes the answers to a fixed set of prompts that have nothing to do with it; and
    all of the text that it was made from, but for a task's examples, which are not kept. All chunks of a document are
    merged, as if every question was about it.
    """
    from loracast.base.fingerprint import check
    from loracast.cli.session import base_of, open_base
    from loracast.library.inspect import sizes
    from loracast.library.probes import probe

    adapter = open_adapter(library, name)
    if faults := adapter.faults():
        raise AdapterError(f"the adapter {name!r} is damaged: {'; '.join(faults)}")
    lora = adapter.lora()
    loaded = open_base(replace(choice, base=choice.base or base_of([adapter])))
    check(adapter.manifest.made_for, loaded.fingerprint, f"the adapter {name!r}")
    modules, probes = sizes(lora), probe(loaded, lora)
    texts = [(chunk.heading, chunk.text) for chunk in read_chunks(adapter.index)]
    if as_json:
        report: dict[str, Any] = {
            "name": adapter.name,
            "version": adapter.manifest.version,
            "kind": adapter.manifest.kind,
        }
        report |= {"modules": [asdict(m) for m in modules], "probes": [asdict(one) for one in probes]}
        print_json(report | {"text": [{"heading": heading, "text": text} for heading, text in texts]})
        return
    _print_modules(modules)
    print()
    rows = [(one.prompt, f"{one.kl:.2f}", one.plain, one.adapted) for one in probes]
    wrapped = ("prompt", "plain base", "with it")
    print_table(("prompt", ">KL", "plain base", "with it"), rows, wrapped=wrapped)
    print(f"KL: nats between the first tokens, on average {sum(one.kl for one in probes) / len(probes):.2f}")
    for heading, text in texts:
        print(f"\n--- {printable(heading)}\n" if heading else "\n---\n")
        print(printable(text))


def _outline_facts(outline: Outline | None) -> dict[str, str]:
    """What a document is about."""
    if outline is None:
        return {"outline": "none: an older version made the adapter; remove it and learn the document again for one"}
    facts = {"sections": "; ".join(outline.top_headings()), "summary": " ".join(text for _, text in outline.summary)}
    return {key: text for key, text in facts.items() if text}


def _routing(adapter: Adapter) -> str:
    """How a question chooses among the rows of a document."""
    if adapter.manifest.format == 1:
        return "by chunk: an older version made the adapter; learn the document again to route it by sentence"
    return "by chunk and sentence" if adapter.manifest.memory_kinds else "by chunk"


def chunk_norms(adapter: Adapter) -> dict[str, dict[str, float]]:
    """For each module kind the smallest, mean and largest Frobenius norm of one chunk's delta in one layer."""
    n_chunks = adapter.manifest.n_chunks
    kind_of = {module.name: module.kind for module in adapter.manifest.target.modules}
    found: dict[str, list[float]] = {}
    for chunk in range(0, n_chunks, -(-n_chunks // _MOST_CHUNKS)):
        for module, norm in adapter.lora([chunk]).norms().items():
            found.setdefault(kind_of[module], []).append(norm)
    return {
        kind: {"min": min(norms), "mean": sum(norms) / len(norms), "max": max(norms)} for kind, norms in found.items()
    }


Other = Annotated[str, "The adapter to compare it with."]
Plot = Annotated[Path | None, "Draw the differences into this PNG file."]


def diff(
    name: options.Adapter, other: Other, *, plot: Plot = None, library: options.Library, as_json: options.Json = False
) -> None:
    """Show how two adapters differ, layer by layer, all chunks of a document merged."""
    from loracast.base.fingerprint import check
    from loracast.library.inspect import differences, total

    first, second = open_adapter(library, name), open_adapter(library, other)
    check(first.manifest.made_for, second.manifest.made_for, f"the adapter {name!r}")
    found = differences(first.lora(), second.lora())
    a, b, d = (total([getattr(m, field) for m in found]) for field in ("norm", "other_norm", "distance"))
    cosine = (a * a + b * b - d * d) / (2 * a * b) if a and b else 0.0
    if plot is not None:
        _draw(found, ("cosine", "distance"), plot, f"{name} and {other}", ("cosine", "norm of the difference"))
    if as_json:
        print_json({"cosine": cosine, "norm": a, "other_norm": b, "distance": d, "modules": [asdict(m) for m in found]})
        return
    print_table(
        (">layer", "module", f">norm of {name}", f">norm of {other}", ">cosine", ">difference"),
        (
            (m.layer, m.kind, f"{m.norm:.3g}", f"{m.other_norm:.3g}", f"{m.cosine:.3f}", f"{m.distance:.3g}")
            for m in found
        ),
    )
    print(f"in all: cosine {cosine:.3f}, norms {a:.3g} and {b:.3g}, difference {d:.3g}")


def _draw(
    modules: Sequence[ModuleSize | ModuleDifference],
    fields: tuple[str, str],
    file: Path,
    title: str,
    labels: tuple[str, str],
) -> None:
    """Draw two figures of every module into a PNG file, over the layers and with a line for each module kind."""
    from loracast.library.inspect import plot

    lines: dict[str, dict[int, tuple[float, float]]] = {}
    for module in modules:
        first, second = (getattr(module, field) for field in fields)
        lines.setdefault(module.kind, {})[module.layer] = first, second
    plot(lines, file, title, labels)
