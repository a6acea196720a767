"""Keeps LoRAs as adapters of the library: the rows that a hypernetwork cast, or a LoRA from anywhere else.

An adapter's files are written chunk after chunk, so that a long document never lies in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace as with_changes
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from loracast.base.load import Base
from loracast.documents import Chunk
from loracast.errors import AdapterError
from loracast.files import file_sha256, sync_folder, tidy, write_atomically
from loracast.library.adapter import SENTENCE, STATIC, Adapter, layout, tensor_storage
from loracast.library.index import write_index
from loracast.library.library import Library
from loracast.library.manifest import FACTORS, FORMAT, INDEX, MANIFEST, STATIC_FILE, Manifest, check_name
from loracast.lora.algebra import LoRA, compress, rows_of
from loracast.lora.factors import Rows
from loracast.lora.inject import linear_shapes
from loracast.lora.peft_format import read_peft
from loracast.lora.quantize import SCALE, pack
from loracast.lora.target import KINDS, Target, TargetModule
from loracast.lora.tensor_file import TensorInfo

ChunkBatch = Mapping[str, Tensor]
"""The tensors [n, ...] of n chunks under their names in the file: factors, which may be packed already, and of a memory
"down_proj.sentence" [n, r], the sentence of each row in its chunk, -1 for none."""
WriteIndex = Callable[[Path, Sequence[Chunk]], object]
"""Writes the index of some chunks to a file."""
Progress = Callable[[int, int], None]
"""Receives how many chunks are done, and how many there are."""
_MODULE = re.compile(rf".*\blayers\.(\d+)\..*?\b({'|'.join(KINDS)})")


def save_rows(
    library: Library,
    manifest: Manifest,
    chunks: Sequence[Chunk],
    batches: Iterable[ChunkBatch],
    static: Mapping[str, Tensor],
    optional: Mapping[str, TensorInfo] = MappingProxyType({}),
    *,
    seconds: Callable[[], float] | None = None,
    index: WriteIndex = write_index,
    replace: bool = False,
    progress: Progress = lambda done, total: None,
    check: Callable[[], object] = lambda: None,
) -> Adapter:
    """Keep the rows of an adapter's chunks under the manifest's name, batch by batch; on any error nothing is left.

    Args:
        manifest: all but the hashes of the files, which are filled in.
        batches: the tensors of all chunks, in order; with the storage `text` none are taken.
        static: what the adapter shares with others of its hypernetwork (`tensors_of`), which may be packed already.
        optional: type and shape of tensors that come in the batches and are kept for later versions (`is_optional`).
        seconds: called at the end: how long casting has taken; the manifest says it if None.
        index: writes the file of the index, given the chunks.
        replace: an adapter of that name gives way.
        progress: called with the chunks done and the chunks in all.
        check: called once everything is written, before the adapter gets its name; it may raise an error.

    Raises:
        AdapterError: the name is taken or not allowed, or numbers are not finite; nothing is kept then.
    """
    check_name(manifest.name)
    library.folder.mkdir(parents=True, exist_ok=True)
    tidy(library.folder)
    library.recover()
    with library.work("new") as folder:
        index(folder / INDEX, chunks)
        if manifest.storage == "text":
            progress(len(chunks), len(chunks))
        else:
            _write_factors(folder / FACTORS, manifest, {**layout(manifest), **optional}, batches, progress)
            if static:
                # Equal numbers are equal bytes, whatever adapter they belong to.
                write_atomically(folder / STATIC_FILE, save(_packed(manifest, static)))
        files = {"chunks_sha256": INDEX, "factors_sha256": FACTORS, "static_sha256": STATIC_FILE}
        paths = {key: folder / name for key, name in files.items()}
        hashes: dict[str, Any] = {key: file_sha256(path) if path.is_file() else "" for key, path in paths.items()}
        learn_s = round(manifest.learn_s if seconds is None else seconds(), 4)
        check()
        whole = with_changes(manifest, learn_s=learn_s, **hashes)
        whole.write(folder / MANIFEST)
        sync_folder(folder)
        return library.add(whole.name, folder, whole, replace=replace)


def _write_factors(
    path: Path, m: Manifest, tensors: Mapping[str, TensorInfo], batches: Iterable[ChunkBatch], progress: Progress
) -> None:
    """Write factors.safetensors: the header, and the factors of each chunk as they come."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "loracast": str(FORMAT)}}
    end = 0
    for name, info in tensors.items():
        start, end = end, end + info.n_bytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:

        def write(name: str, value: Tensor, row: int) -> None:
            """Write the rows of a tensor from this one on."""
            place = 8 + len(encoded) + header[name]["data_offsets"][0]
            file.seek(place + row * value[0].numel() * value.element_size())
            file.write(value.view(torch.uint8).numpy().data)

        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
        n_done = 0
        progress(0, m.n_chunks)
        for batch in batches:
            check_finite(batch, "this document")
            for name, value in _packed(m, batch).items():
                if value.numel():  # chunks have none of the kinds that receive the static LoRA alone
                    write(name, value, n_done)
            n_done += len(next(iter(batch.values())))
            progress(n_done, m.n_chunks)
        if n_done != m.n_chunks:
            raise AdapterError(f"{n_done} of {m.n_chunks} chunks were written")
        file.flush()
        os.fsync(file.fileno())


def _packed(m: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as an adapter's files hold them; what is packed already, or no factor, stays as it is."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        is_factor = name.partition(".")[0] in m.ranks and value.is_floating_point() and not name.endswith(SCALE)
        parts = pack(value.detach().bfloat16(), tensor_storage(m, name)) if is_factor else {"": value}
        found |= {name + suffix: part.cpu().contiguous() for suffix, part in parts.items()}
    return found


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise AdapterError where a hypernetwork gave numbers that are not finite."""
    if not all(value.isfinite().all() for value in tensors.values()):
        raise AdapterError(f"the hypernetwork gave numbers that are not finite for {source}; nothing is kept")


def tensors_of(rows: Rows, part: str = ".") -> dict[str, Tensor]:
    """Rows as tensors named as in an adapter's files; `part` is STATIC for those of a static LoRA."""
    return {f"{kind}{part}{side}": value for kind, pair in rows.items() for side, value in zip("ab", pair, strict=True)}


def save_single(
    rows: Rows,
    target: Target,
    library: Library,
    name: str,
    *,
    title: str,
    text: str | None = None,
    static: Rows | None = None,
    replace: bool = False,
    **about: Any,
) -> Adapter:
    """Keep the rows of one LoRA (n = 1) as an adapter of one chunk.

    Args:
        title: for people: a task's description, or what was combined.
        text: of the chunk; the title if None.
        about: other fields of the manifest. `kind` and `made_for` have to be given; by default the source is the title
            and no hypernetwork made it.

    Raises:
        AdapterError: the name is taken or not allowed, or numbers are not finite.
    """
    ranks = {kind: rows[kind][0].shape[2] for kind in target.kinds}
    about = {"source_sha256": source_of(title)} | about
    manifest = Manifest(name=name, title=title, modules=target.rows, ranks=ranks, n_chunks=1, **about)
    text = title if text is None else text
    only = Chunk(text=text, start=0, end=len(text), heading="", n_tokens=0)
    tensors, shared = tensors_of(rows), tensors_of(static or {}, STATIC)
    tensors |= {f"{kind}{SENTENCE}": torch.zeros(1, ranks[kind], dtype=torch.int16) for kind in manifest.memory_kinds}
    return save_rows(library, manifest, [only], [tensors], shared, replace=replace)


def save_lora(lora: LoRA, library: Library, name: str, *, static: LoRA = LoRA(), **about: Any) -> Adapter:
    """Keep a LoRA as an adapter of one chunk, in bf16.

    Modules of one kind have one rank in an adapter: smaller ones are padded with zeros, and a dense delta becomes the
    factors that its SVD gives.

    Args:
        static: a static LoRA that other adapters have too; it is kept apart from `lora`, which is without it.
        about: as in `save_single`.

    Raises:
        AdapterError: a module that no base of ours has, and as in `save_single`.
    """
    if lora.dense:
        lora, _ = compress(lora, lora.rank)
    target = target_of(LoRA({**static.factors, **lora.factors}))
    rows, of_static = (rows_of(one.to(dtype=torch.float32), target) for one in (lora, static))
    kept_apart = {kind: (a[0], b[0]) for kind, (a, b) in of_static.items() if a.shape[2]}
    return save_single(rows, target, library, name, static=kept_apart, **about)


def import_lora(base: Base, folder: Path, library: Library, name: str, *, replace: bool = False) -> Adapter:
    """Keep a LoRA that another tool trained for a base, from a folder in PEFT's format.

    Raises AdapterError where it is damaged or does not fit the base, or the name is taken or not allowed.
    """
    source, lora = folder.resolve().name, LoRA(read_peft(folder, linear_shapes(base.model)))
    about: dict[str, Any] = {"title": f"LoRA from {source}", "source": source, "made_for": base.fingerprint}
    return save_lora(lora, library, name, kind="imported", replace=replace, **about)


def source_of(title: str) -> str:
    """The source hash of an adapter that was made from its title alone, such as a task's description."""
    return hashlib.sha256(title.encode()).hexdigest()


def target_of(lora: LoRA) -> Target:
    """The modules of a LoRA as a target. Raises AdapterError for modules that are none of a decoder's linear ones."""
    found = [(name, _MODULE.fullmatch(name), shape) for name, shape in lora.shapes.items()]
    modules = [TargetModule(name, int(at[1]), at[2], d_in, d_out) for name, at, (d_out, d_in) in found if at]
    modules.sort(key=lambda m: (m.layer, KINDS.index(m.kind)))
    n_shapes = Counter(kind for kind, *_ in {(m.kind, m.d_in, m.d_out) for m in modules})
    problems = [name for name, at, _ in found if at is None]
    problems += [f"{kind} of several shapes" for kind in KINDS if n_shapes[kind] > 1]
    if problems or not modules:
        raise AdapterError(
            f"this LoRA is on modules that cannot be kept ({', '.join(problems) or 'none'}); those of an adapter are "
            f"{', '.join(KINDS)} of a decoder's layers"
        )
    return Target(tuple(modules))
