"""Keeps LoRAs as adapters of the library: the rows that a hypernetwork cast, or a LoRA from anywhere else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loracast.base.fingerprint import Fingerprint
from loracast.base.load import Base
from loracast.documents import Chunk
from loracast.errors import AdapterError
from loracast.library.adapter import STATIC, Adapter
from loracast.library.index import write_index
from loracast.library.library import Library
from loracast.library.manifest import AdapterKind, Manifest, utc_now
from loracast.library.writer import AdapterWriter, ChunkRows, WriteIndex
from loracast.lora.algebra import LoRA, compress
from loracast.lora.factors import Rows
from loracast.lora.inject import linear_shapes
from loracast.lora.peft_format import read_peft
from loracast.lora.quantize import Storage
from loracast.lora.target import KINDS, Target, TargetModule

_MODULE = re.compile(rf".*\blayers\.(\d+)\..*?\b({'|'.join(KINDS)})")


def save_rows(
    library: Library,
    manifest: Manifest,
    chunks: Sequence[Chunk],
    batches: Iterable[ChunkRows],
    static: Mapping[str, Tensor],
    seconds: Callable[[], float],
    *,
    index: WriteIndex = write_index,
    replace: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Adapter:
    """Keep the rows of an adapter's chunks under the manifest's name, batch by batch.

    Args:
        batches: the rows of all chunks, in order; with the storage `text` none are taken.
        static: what the adapter shares with others of its hypernetwork, as `static_tensors` names it.
        seconds: called at the end: how long casting has taken.
        index: writes the file of the index, given the chunks.
        progress: called with the chunks done and the chunks in all.

    Raises:
        AdapterError: the name is taken or not allowed, or numbers are not finite; nothing is kept then.
    """
    with AdapterWriter(library, manifest, chunks, index) as writer:
        done = len(chunks) if manifest.storage == "text" else 0
        progress(done, len(chunks))
        if manifest.storage != "text":
            writer.open_factors(static)
            for rows, sentences in batches:
                writer.add(rows, sentences)
                done += next(iter(rows.values()))[0].shape[0]
                progress(done, len(chunks))
        return writer.finish(replace=replace, learn_s=seconds())


def static_tensors(static: Rows) -> dict[str, Tensor]:
    """Rows of a static LoRA as tensors named as in an adapter's file."""
    return {
        f"{kind}{STATIC}{side}": rows for kind, pair in static.items() for side, rows in zip("ab", pair, strict=True)
    }


def save_single(
    rows: Rows,
    target: Target,
    library: Library,
    name: str,
    *,
    kind: AdapterKind,
    title: str,
    made_for: Fingerprint,
    static: Rows | None = None,
    source: str | None = None,
    source_sha256: str | None = None,
    hypernetwork: str = "",
    seconds: float = 0.0,
    strength: float = 1.0,
    n_examples: int = 0,
    is_refined: bool = False,
    warnings: tuple[str, ...] = (),
    storage: Storage = "bf16",
    replace: bool = False,
) -> Adapter:
    """Keep the rows of one LoRA (n = 1) as an adapter of one chunk.

    Args:
        kind: what it was made from.
        title: for people: a task's description, or what was combined.
        source: the file or folder it came from, without its folders.
        source_sha256: hash of what it was made from; of the title if None.
        hypernetwork: id of the hypernetwork that cast it; "" where none did.

    Raises:
        AdapterError: the name is taken or not allowed, or numbers are not finite.
    """
    manifest = Manifest(
        name=name,
        kind=kind,
        title=title,
        source=source,
        source_sha256=source_sha256 or source_of(title),
        made_for=made_for,
        hypernetwork=hypernetwork,
        modules=target.rows,
        ranks={kind: rows[kind][0].shape[2] for kind in target.kinds},
        n_chunks=1,
        n_tokens=0,
        max_chunk_tokens=0,
        created=utc_now(),
        learn_s=0.0,
        strength=strength,
        n_examples=n_examples,
        is_refined=is_refined,
        warnings=warnings,
        storage=storage,
    )
    only = Chunk(text=title, start=0, end=len(title), heading="", n_tokens=0)
    return save_rows(
        library, manifest, [only], [(rows, {})], static_tensors(static or {}), lambda: seconds, replace=replace
    )


def save_lora(
    lora: LoRA,
    library: Library,
    name: str,
    *,
    kind: AdapterKind,
    title: str,
    made_for: Fingerprint,
    source: str | None = None,
    static: LoRA = LoRA(),
    replace: bool = False,
) -> Adapter:
    """Keep a LoRA as an adapter of one chunk, in bf16.

    Modules of one kind have one rank in an adapter: smaller ones are padded with zeros, and a dense delta becomes the
    factors that its SVD gives.

    Args:
        static: a static LoRA that other adapters have too; it is kept apart from `lora`, which is without it.
        kind, title, made_for, source, replace: as in `save_single`.

    Raises:
        AdapterError: a module that no base of ours has, and as in `save_single`.
    """
    if lora.dense:
        lora, _ = compress(lora, lora.rank)
    target = target_of(LoRA({**static.factors, **lora.factors}))
    rows = {kind: (a[None], b[None]) for kind, (a, b) in _stacked(lora, target).items()}
    kept_apart = {kind: pair for kind, pair in _stacked(static, target).items() if pair[0].shape[1]}
    return save_single(
        rows, target, library, name, kind=kind, title=title, made_for=made_for, source=source, static=kept_apart,
        replace=replace,
    )  # fmt: skip


def import_lora(base: Base, folder: Path, library: Library, name: str, *, replace: bool = False) -> Adapter:
    """Keep a LoRA that another tool trained for a base, from a folder in PEFT's format.

    Raises AdapterError where it is damaged or does not fit the base, or the name is taken or not allowed.
    """
    source = folder.resolve().name
    return save_lora(
        LoRA(read_peft(folder, linear_shapes(base.model))), library, name, kind="imported",
        title=f"LoRA from {source}", made_for=base.fingerprint, source=source, replace=replace,
    )  # fmt: skip


def _stacked(lora: LoRA, target: Target) -> Rows:
    """By kind, A [modules, r, in] and B rows [modules, r, out], padded to the largest rank r of the kind."""
    rows = {}
    for kind in target.kinds:
        modules = target.of_kind(kind)
        pairs = [lora.factors.get(module.name) for module in modules]
        rank = max(pair.rank if pair else 0 for pair in pairs)
        a, b = (torch.zeros(len(modules), rank, d) for d in (modules[0].d_in, modules[0].d_out))
        for i, pair in enumerate(pairs):
            if pair:
                a[i, : pair.rank], b[i, : pair.rank] = pair.a, pair.b.T
        rows[kind] = (a, b)
    return rows


def source_of(title: str) -> str:
    """The source hash of an adapter that was made from its title alone, such as a task's description."""
    return hashlib.sha256(title.encode()).hexdigest()


def target_of(lora: LoRA) -> Target:
    """The modules of a LoRA as a target. Raises AdapterError for modules that are none of a decoder's linear ones."""
    modules, problems = [], []
    for name, (d_out, d_in) in lora.shapes.items():
        found = _MODULE.fullmatch(name)
        if found is None:
            problems.append(name)
        else:
            modules.append(TargetModule(name, int(found[1]), found[2], d_in, d_out))
    modules.sort(key=lambda m: (m.layer, KINDS.index(m.kind)))
    by_kind: dict[str, set[tuple[int, int]]] = {}
    for m in modules:
        by_kind.setdefault(m.kind, set()).add((m.d_in, m.d_out))
    problems += [f"{kind} of several shapes" for kind, shapes in by_kind.items() if len(shapes) > 1]
    if problems or not modules:
        raise AdapterError(
            f"this LoRA is on modules that cannot be kept ({', '.join(problems) or 'none'}); those of an adapter are "
            f"{', '.join(KINDS)} of a decoder's layers"
        )
    return Target(tuple(modules))
