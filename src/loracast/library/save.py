"""A LoRA from anywhere, kept in the library: of a task, combined from others, or read from another tool's folder."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn import functional

from loracast.base.fingerprint import Fingerprint
from loracast.documents import Chunk
from loracast.errors import AdapterError
from loracast.library.adapter import Adapter
from loracast.library.library import check_free
from loracast.library.manifest import AdapterKind, Manifest
from loracast.library.writer import AdapterWriter
from loracast.lora.algebra import LoRA, compress
from loracast.lora.target import KINDS, Target, TargetModule

_MODULE = re.compile(rf".*\blayers\.(\d+)\..*?\b({'|'.join(KINDS)})")


def save_lora(
    lora: LoRA,
    library: Path,
    name: str,
    *,
    kind: AdapterKind,
    title: str,
    made_for: Fingerprint,
    source: str | None = None,
    source_sha256: str | None = None,
    hypernetwork: str = "",
    seconds: float = 0.0,
    strength: float = 1.0,
    warnings: tuple[str, ...] = (),
    replace: bool = False,
) -> Adapter:
    """Keep a LoRA as an adapter of one piece, in bf16.

    Modules of one kind have one rank in an adapter: smaller ones are filled up with zeros, and a dense delta becomes the factors that its
    SVD gives.

    Args:
        kind: what it was made from.
        title: for people: a task's description, or what was combined.
        source: the file or folder it came from, without what lies above.
        source_sha256: hash of what it was made from; of the title if None.
        hypernetwork: hash of what made it; "" where nothing did.

    Raises:
        AdapterError: a module that no base of ours has, numbers that are not finite, or a name that is taken or not allowed.
    """
    made_of = source_sha256 or source_of(title)
    if not replace:
        check_free(library, name, unless_from=made_of)
    if lora.dense:
        lora, _ = compress(lora, lora.rank)
    target = target_of(lora)
    ranks = {k: max(lora.factors[m.name].rank for m in target.of_kind(k)) for k in target.kinds}
    only = Chunk(text=title, start=0, end=len(title), heading="", n_tokens=0)
    with AdapterWriter(library, name, target, ranks, [only]) as writer:
        writer.open_factors({})
        pairs = {}
        for k in target.kinds:
            factors = [lora.factors[module.name] for module in target.of_kind(k)]
            a = torch.stack([functional.pad(f.a, (0, 0, 0, ranks[k] - f.rank)) for f in factors])
            b = torch.stack([functional.pad(f.b.T, (0, 0, 0, ranks[k] - f.rank)) for f in factors])
            pairs[k] = (a[None], b[None])
        writer.add(pairs)
        manifest = Manifest(
            name=name,
            kind=kind,
            title=title,
            source=source,
            source_sha256=made_of,
            made_for=made_for,
            hypernetwork=hypernetwork,
            modules=target.rows,
            ranks=ranks,
            n_chunks=1,
            n_tokens=0,
            max_chunk_tokens=0,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            learn_s=round(seconds, 4),
            strength=strength,
            warnings=warnings,
        )
        return writer.finish(manifest, replace=replace)


def source_of(title: str) -> str:
    """The hash of a source that is a text for people: the description of a task."""
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
            f"this LoRA is on modules that cannot be kept ({', '.join(problems) or 'none'}); those of an adapter are {', '.join(KINDS)} of "
            "a decoder's layers"
        )
    return Target(tuple(modules))
