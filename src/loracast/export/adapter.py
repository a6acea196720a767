"""Exports an adapter of the library as one LoRA, or a document's chunk by chunk with the index to pick among them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

from loracast.base.fingerprint import check
from loracast.base.load import load_base
from loracast.errors import AdapterError
from loracast.export import FORMATS, MERGED
from loracast.export.base import base_config, write_merged
from loracast.export.formats import VLLM_RANKS, Request, write_mlx, write_peft, write_vllm
from loracast.export.gguf import write_gguf, write_ollama
from loracast.files import write_atomically
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks
from loracast.library.manifest import VERSION_DIGITS
from loracast.lora.algebra import LoRA, uniform
from loracast.reading.matching import Route
from loracast.reading.questions import QuestionReader
from loracast.reading.routing import route_set
from loracast.reading.search import search

WRITERS: dict[str, Callable[[Request], Path]] = {
    "peft": write_peft, "vllm": write_vllm, "gguf": write_gguf, "mlx": write_mlx, "ollama": write_ollama,
}  # fmt: skip
"""Writes each format of `FORMATS` but `MERGED`, and returns the folder or file that the runtime loads."""
ALLOWED_RANKS = {"vllm": VLLM_RANKS}
"""Formats whose runtime takes certain ranks only, and these ranks."""
HOLDING_BASE = (MERGED, "ollama")
"""The formats that hold the base beside each LoRA."""


@dataclass(frozen=True)
class Exported:
    """Where one LoRA was written, and what that lost."""

    path: Path
    rank: int | None
    """The rank in all modules; None where the LoRA went into the base's weights."""
    error: float
    """What compressing to the rank lost, |delta - kept| / |delta|."""


def export_adapter(
    adapter: Adapter,
    to: str,
    out: Path,
    *,
    max_rank: int | None = None,
    each_chunk: bool = False,
    questions: Sequence[str] = (),
    reader: QuestionReader | None = None,
    base: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Exported]:
    """Write an adapter for another runtime.

    Args:
        to: the format's name, one of `FORMATS`.
        out: a folder, made if need be; of the format `gguf` the file NAME.gguf in it.
        max_rank: a higher rank is compressed to it; None compresses only as far as the runtime demands.
        each_chunk: write a document's chunks one by one, with chunks.json and the index that `loracast route` reads.
        questions: write the LoRA that these questions need, each at its best; all of a document if empty.
        reader: finds the units that answer the questions; without one, BM25 does.
        base: the base's name, folder or hub id, if not the one that the adapter was made for.
        say: receives messages where the embedded base has to be fetched first.

    Raises:
        AdapterError: the format is unknown, the folder is not empty, or the adapter cannot be exported so.
        BaseModelError: the base is another one, or cannot be read.
    """
    if to not in FORMATS:
        raise AdapterError(f"unknown format {to!r}; one of {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} is there already and not an empty folder; give another --out")
    if each_chunk and to in HOLDING_BASE:
        raise AdapterError(f"{to} cannot be written chunk by chunk: leave out --each-chunk")
    if to == MERGED and max_rank is not None:
        raise AdapterError(f"{MERGED} adds the whole LoRA to the base's weights: leave out --rank")
    m = adapter.manifest
    if each_chunk and m.n_chunks == 1:
        raise AdapterError(f"{adapter.name!r} has one chunk: leave out --each-chunk")
    if questions and (each_chunk or m.kind != "document"):
        raise AdapterError("questions choose among the sentences of a document as a whole: leave out --questions")
    adapter.verify()
    if unmatched := [one for one in questions if not search(adapter.index, one, 1)]:
        raise AdapterError(
            f"no word of {len(unmatched)} of the questions stands in {adapter.name!r}, such as {unmatched[0][:80]!r}: "
            "each would take all of it; leave them out"
        )
    route = route_set(adapter.index, m.n_chunks, questions, reader=reader) if questions else Route()

    def lora() -> LoRA:
        return adapter.lora(route.chunk_weights, route.sentence_weights, dense=False)

    base = base or m.made_for.base
    if to == MERGED:
        loaded = load_base(base, dtype="bfloat16", say=say)
        check(m.made_for, loaded.fingerprint, f"the adapter {adapter.name!r}")
        write_merged(lora(), out, loaded)
        return [Exported(out, None, 0.0)]
    read_config = cache(partial(base_config, base, adapter, say))
    kept = ("version", "title", "factors_sha256", "source_sha256", "hypernetwork")
    about = {"made_by": "loracast", "name": adapter.name, **{key: getattr(m, key) for key in kept}}
    about["base"] = json.dumps(m.made_for.to_dict())

    def write(lora: LoRA, folder: Path, name: str) -> Exported:
        made = uniform(lora, max_rank, ALLOWED_RANKS.get(to))
        version = f"{name}@{m.version[:VERSION_DIGITS]}"
        path = WRITERS[to](Request(made, folder, name, version, base, about, read_config))
        return Exported(path, made.rank, made.error)

    if not each_chunk:
        return [write(lora(), out, adapter.name)]
    made, chunks = [], []
    for i, chunk in enumerate(read_chunks(adapter.index)):
        made.append(write(adapter.lora([i], dense=False), out / f"chunk-{i:05d}", f"{adapter.name}-{i}"))
        chunks.append({"chunk": i, "path": str(made[-1].path.relative_to(out)), **asdict(chunk)})
    listing: dict[str, object] = {"adapter": adapter.version, "factors_sha256": m.factors_sha256, "chunks": chunks}
    if adapter.static_lora.names:  # each chunk holds it, so that one works alone: of several it comes in once
        static = write(adapter.static_lora, out / "static", f"{adapter.name}-static")
        listing["static"] = str(static.path.relative_to(out))
    write_atomically(out / "chunks.json", json.dumps(listing, indent=1, ensure_ascii=False).encode())
    shutil.copyfile(adapter.index, out / adapter.index.name)
    return made
