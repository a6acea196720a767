"""The adapter on disk, opened for reading: the LoRAs of its chunks, checked and merged (docs/adapter-format.md).

An adapter is a folder of files that never change:

    factors.safetensors   A [chunks, modules, r, in] and B [chunks, modules, r, out] by module kind, chunk after chunk
    static.safetensors    the static LoRA, if there is one; in a library one file on the disk for all that share it
    chunks.sqlite         the chunks' text and offsets with a full-text index, which routing asks (index.py)
    adapter.json          name, hashes, base, hypernetwork, target, options; written last (manifest.py)

Factors are read chunk by chunk, so that asking never holds a whole document in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from cachetools import LRUCache, cached

from loracast.errors import LEARN_AGAIN, AdapterError
from loracast.files import file_sha256
from loracast.library.index import OpenIndex, index_faults, read_chunks, read_sentences
from loracast.library.manifest import FACTORS, INDEX, MANIFEST, STATIC_FILE, VERSION_DIGITS, Manifest
from loracast.lora.merge import Merging, row_lengths, row_weights
from loracast.lora.quantize import SCALE, Storage, packed, storage_of, unpack
from loracast.lora.target import Target
from loracast.lora.tensor_file import OpenTensors, TensorInfo, number_faults, read_header

if TYPE_CHECKING:
    from torch import Tensor

    from loracast.lora.algebra import LoRA
    from loracast.lora.factors import Factors


SENTENCE = ".sentence"
"""Suffix of the tensor that holds the sentence of each row of a memory."""
STATIC = ".shared."
"""Part of the names of the tensors that hold the static LoRA, which all documents of a hypernetwork have in common."""
YES = f"{STATIC}yes."
"""The same of a row that older versions stored to answer Yes or No by a rule; it is ignored."""


def tensor_storage(m: Manifest, name: str) -> Storage:
    """How an adapter keeps a tensor of factors; the static LoRA as it came up to format 3, then in a byte a number."""
    if STATIC in name and m.format < 4:
        return "bf16"
    return storage_of(m.storage, STATIC in name or name.partition(".")[0] in m.memory_kinds)


def layout(m: Manifest) -> dict[str, TensorInfo]:
    """Type and shape of each tensor of the chunks' factors, in the order of the file."""
    found = {}
    for kind in m.target.kinds:
        modules = m.target.of_kind(kind)
        in_memory = kind in m.memory_kinds
        sides = ("a", len(modules), modules[0].d_in), ("b", 1 if in_memory else len(modules), modules[0].d_out)
        for side, n, d in sides:
            for suffix, (dtype, size) in packed(d, tensor_storage(m, kind)).items():
                found[f"{kind}.{side}{suffix}"] = TensorInfo(dtype, (m.n_chunks, n, m.ranks[kind], size))
        if in_memory:
            found[f"{kind}{SENTENCE}"] = TensorInfo("I16", (m.n_chunks, m.ranks[kind]))
    return found


def static_layout(m: Manifest, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Type and shape of each tensor of a stored static LoRA: of each kind it is there or not, of any rank."""
    found = {}
    for kind in m.target.kinds:
        modules = m.target.of_kind(kind)
        names = {f"{kind}{STATIC}a": modules[0].d_in, f"{kind}{STATIC}b": modules[0].d_out}
        if there := [stored[name].shape for name in names if name in stored]:
            for name, d in names.items():
                for suffix, (dtype, size) in packed(d, tensor_storage(m, name)).items():
                    found[f"{name}{suffix}"] = TensorInfo(dtype, (len(modules), *there[0][1:2], size))
    return found


def is_optional(m: Manifest, name: str, info: TensorInfo) -> bool:
    """Whether the factors' file may hold a tensor that this version keeps and does not use (docs/adapter-format.md)."""
    kind, _, part = name.rpartition(".")
    of_rows = part in ("module", "code") and info == TensorInfo("I16", (m.n_chunks, m.ranks.get(kind, 0)))
    of_reader = name.startswith("reader.") and info.shape[:1] == (m.n_chunks,) and info.dtype in ("I8", "U8", "BF16")
    return m.format > 4 and (of_reader or (of_rows and kind in m.ranks))


SentenceWeights = Mapping[int, Sequence[float]]
"""By chunk, the weight of each of its sentences."""
ChunkRows = Mapping[str, "Tensor | Sequence[Tensor]"]
"""Factors of chunks, named as in the file: "down_proj.a" for each chunk [layers, r, in], "o_proj.sentence" [r]."""


def join_chunks(
    target: Target,
    rows: ChunkRows,
    common: Mapping[str, Tensor],
    merging: Merging,
    weights: Sequence[float] | None = None,
    sentences: Sequence[Sequence[float]] | None = None,
    dense: bool = True,
    ready: Mapping[str, Factors] = MappingProxyType({}),
) -> LoRA:
    """The LoRA of chunks: their factors merged, and the static ones once, if there are any.

    Args:
        common: what chunks have in common, named as in the file: "down_proj.shared.a" [layers, r, in].
        weights: what the LoRA of each chunk is multiplied with; 1 if None.
        sentences, dense: as in `Adapter.lora`; the sentences chunk by chunk.
        ready: the static factors by module, as they were made before, for the modules that chunks have none in.
    """
    import torch

    from loracast.lora.algebra import LoRA
    from loracast.lora.factors import Factors, is_past_break_even

    joined: dict[str, Factors] = {}
    products: dict[str, Tensor] = {}
    alone: set[str] = set()
    for kind in target.kinds:
        static = [common[name] for side in "ab" if (name := f"{kind}{STATIC}{side}") in common]  # each [layers, r, d]
        a, b = ([*rows[f"{kind}.{side}"]] for side in "ab")  # of each chunk [layers or 1, r, d]
        if ready and not a[0].shape[1]:
            found = [module.name for module in target.of_kind(kind) if module.name in ready]
            joined |= {name: ready[name] for name in found}
            alone.update(found)
            continue
        of_rows = None
        if sentences is not None and (owners := rows.get(f"{kind}{SENTENCE}")) is not None:
            of_rows = row_weights([*owners], [row_lengths(side) for side in b], sentences)
        elif weights is not None:
            b = [side * weight for side, weight in zip(b, weights, strict=True)]
        sides: Sequence[Tensor] = merging.join(kind, a, b, of_rows)  # each [layers or 1, m, d]
        if static and not sides[0].shape[1]:
            sides = static
            alone |= {module.name for module in target.of_kind(kind)}
        elif static:
            of_all = zip(sides, static, strict=True)
            sides = [torch.cat([side.expand(len(more), -1, -1), more], dim=1) for side, more in of_all]
        modules, (_, rank, d_in), d_out = target.of_kind(kind), sides[0].shape, sides[1].shape[-1]
        if dense and is_past_break_even(rank, d_in, d_out):
            deltas = sides[1].mT @ sides[0]  # [layers, out, in]
            products |= {module.name: delta for module, delta in zip(modules, deltas, strict=True)}
        else:
            of_modules = (side.expand(len(modules), -1, -1) for side in sides)
            joined |= {m.name: Factors(x, y.T) for m, x, y in zip(modules, *of_modules, strict=True)}
    return LoRA(joined, products, frozenset(alone & joined.keys()))


STATIC_FOLDER = "static"
"""The folder of a library with the static LoRAs of its adapters, each under its hash."""
_MAX_BYTES = 64 * 2**20  # of factors in memory: a conversation tends to stay with the same chunks
_ROUNDED = 0.02  # of a static LoRA's length: twice what storing it in int8 changes
_CHUNKS_KEPT_APART = 8  # up to so many, the factors of each chunk are kept on their own
_STATIC: WeakValueDictionary[Hashable, LoRA] = WeakValueDictionary()
"""The static LoRAs in memory, by the hash of their file, or of their numbers up to format 4, and their modules."""
Kept = Callable[[Hashable, Callable[[], Any]], Any]
"""A key, and what reads its factors -> the factors."""
Recast = Callable[[Sequence[str], "Sequence[Sequence[tuple[int, int]]] | None"], "dict[str, Tensor]"]
"""The prompts of chunks and the places of their sentences, None to find them -> their factors and the static ones,
named and shaped as in the files."""


class Adapter:
    """An adapter on disk, opened for reading."""

    def __init__(self, folder: Path, name: str | None = None):
        """
        Args:
            name: its name in the library; the one it was made under if None.
        """
        self.folder, self.index = folder, folder / INDEX
        """The adapter's files, and the one with the chunks' text."""
        self.manifest = Manifest.read(folder / MANIFEST)
        self.name = name or self.manifest.name
        self.recast: Recast | None = None
        """Casts the factors of chunks anew: set by whoever opens an adapter that keeps only its text."""
        self.kept = factors_in_memory()
        """The factors of a key, from memory or read; whoever opens many adapters gives all of them the same memory."""

    @cached_property
    def open_index(self) -> OpenIndex:
        """The index, open while the adapter is used."""
        return OpenIndex(self.index)

    @property
    def version(self) -> str:
        """`name@hash`, with the first digits of the content hash: it never means another adapter."""
        return f"{self.name}@{self.manifest.version[:VERSION_DIGITS]}"

    @property
    def n_bytes(self) -> int:
        """Size of the adapter's files but for the static LoRA, which the library keeps once."""
        return size_of(self.folder)

    def lora(
        self,
        chunks: Sequence[int] | Mapping[int, float] | None = None,
        sentences: SentenceWeights | None = None,
        *,
        static: bool = True,
        dense: bool = True,
    ) -> LoRA:
        """The LoRA of some chunks, or of all (None), merged along the rank.

        Args:
            chunks: their numbers; or the weight of each chunk's LoRA, by its number.
            sentences: by chunk, the weights of its sentences, which a memory's rows get in place of the chunk's; rows
                of weight 0 are left out.
            static: with the static LoRA, whose weight is always 1; False where another adapter of the same hypernetwork
                brings it along (`loras_together`).
            dense: keep the product B A, in bf16, of a module whose factors would be larger than it; False keeps all
                factors, for computations in fp32.

        Raises:
            AdapterError: no such chunk, damaged factors, or an adapter of text alone without `recast`.
        """
        n_chunks = self.manifest.n_chunks
        wanted = tuple(range(n_chunks)) if chunks is None else tuple(sorted(set(chunks)))
        if not wanted or wanted[0] < 0 or wanted[-1] >= n_chunks:
            raise AdapterError(f"{self.name!r} has the chunks 0..{n_chunks - 1}, not {list(wanted)}")
        weights = [chunks[i] for i in wanted] if isinstance(chunks, Mapping) else None
        of_chunks = None if sentences is None else [sentences[i] for i in wanted]
        which = (self.manifest.version, wanted, static)

        def join(rows: ChunkRows, common: Mapping[str, Tensor]) -> LoRA:
            target, merging = self.manifest.target, self.manifest.merging
            ready = self.static_lora.factors if static and self.manifest.storage != "text" else {}
            return join_chunks(target, rows, common, merging, weights, of_chunks, dense, ready)

        # Weights differ with every question: what they multiply is kept, and the LoRA itself only where there are none.
        if weights is None and sentences is None and dense:
            return self.kept(("LoRA", *which), lambda: join(together := self.rows(wanted, static=static), together))
        if len(wanted) > _CHUNKS_KEPT_APART or self.manifest.storage == "text":
            together = self.kept(which, lambda: self.rows(wanted, static=static))
            return join(together, together)
        # Each chunk's own are kept: the next question picks another pair.
        of_each = [self.kept((self.manifest.version, i), partial(self.rows, [i], static=False)) for i in wanted]
        rows = {name: [of_one[name][0] for of_one in of_each] for name in of_each[0]}
        return join(rows, self.static_rows if static else {})

    @property
    def static_lora(self) -> LoRA:
        """The static LoRA in the modules where it adds anything; empty where the adapter has none."""
        from safetensors.torch import save

        from loracast.lora.algebra import LoRA
        from loracast.lora.factors import Factors

        def make() -> LoRA:
            static, target = self.static_rows, self.manifest.target
            factors = {
                module.name: Factors(static[f"{kind}{STATIC}a"][i], static[f"{kind}{STATIC}b"][i].T)
                for kind in target.kinds
                if f"{kind}{STATIC}a" in static
                for i, module in enumerate(target.of_kind(kind))
            }
            made = LoRA({name: pair for name, pair in factors.items() if pair.b.any()})
            # Of one hypernetwork all have the very same, which needs no comparison of numbers (lora/inject.py).
            sha256 = m.static_sha256 or hashlib.sha256(save(static)).hexdigest()
            return _STATIC.setdefault((sha256, m.modules), made)

        m = self.manifest
        return self.kept((m.static_sha256 or m.version, m.modules, "static LoRA"), make)

    @property
    def static_rows(self) -> dict[str, Tensor]:
        """The factors of the static LoRA, named and shaped as in the file."""

        def read() -> dict[str, Tensor]:
            if self.manifest.storage == "text":
                return {name: value for name, value in self.rows([0]).items() if STATIC in name}
            return self._checked(_unpacked(self.manifest, self.stored_static()))

        return self.kept((self.manifest.static_sha256 or self.manifest.version, STATIC), read)

    def rows(self, wanted: Sequence[int], *, static: bool = True) -> dict[str, Tensor]:
        """The factors of some chunks and, if wanted, of the static LoRA, in bf16, under their names in the file.

        Raises AdapterError where they are damaged, or where only the text is kept and nothing casts it anew.
        """
        if self.manifest.storage == "text":
            if self.recast is None:
                raise AdapterError(
                    f"{self.name!r} keeps only its text; its factors are cast only to answer a question: for anything "
                    "else, learn the document with --storage bf16"
                )
            spans: dict[int, list[tuple[int, int]]] = {i: [] for i in wanted}
            for place in (places := read_sentences(self.index, wanted)):
                spans[place.chunk].append((place.start, place.end))
            prompts = [chunk.prompt for chunk in read_chunks(self.index, wanted)]
            rows = self.recast(prompts, [spans[i] for i in wanted] if places else None)
            return self._checked({name: value for name, value in rows.items() if static or STATIC not in name})
        rows = _unpacked(self.manifest, self.stored_rows(wanted, layout(self.manifest)))
        return self._checked(rows) | (self.static_rows if static else {})

    def stored_rows(self, wanted: Sequence[int], names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of some chunks as the file has them, under their names there."""
        return {name: self._file.items(name, wanted) for name in names}

    def stored_static(self) -> dict[str, Tensor]:
        """The tensors of the static LoRA as the file has them."""
        is_apart = self.manifest.format > 4
        if is_apart and not self.manifest.static_sha256:
            return {}
        file = self._opened(STATIC_FILE) if is_apart else self._file
        return {name: file.tensor(name) for name in file.header if STATIC in name and YES not in name}

    @property
    def optional(self) -> dict[str, TensorInfo]:
        """The tensors of the chunks that this version keeps and does not use."""
        header = {} if self.manifest.storage == "text" else self._file.header
        return {name: info for name, info in header.items() if is_optional(self.manifest, name, info)}

    def _checked(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same rows. Raises AdapterError where their numbers are none of a factor."""
        if damaged := number_faults(rows.items()):
            raise AdapterError(f"the factors of {self.name!r} are damaged: {'; '.join(damaged)}")
        return rows

    @cached_property
    def _file(self) -> OpenTensors:
        """The file of the chunks' factors; it stays open while the adapter is used."""
        return self._opened(FACTORS)

    def _opened(self, name: str) -> OpenTensors:
        """A file of tensors, opened after a look at its header."""
        if faults := self.header_faults(name):
            raise AdapterError(f"the factors of {self.name!r} cannot be used: {'; '.join(faults)}; {LEARN_AGAIN}")
        try:
            return OpenTensors(self.folder / name)
        except FileNotFoundError:
            raise AdapterError(f"the adapter {self.name!r} was deleted a moment ago") from None

    # ---- checking

    def verify(self) -> None:
        """Compare the files with the hashes in the manifest. Raises AdapterError with all that differ."""
        if found := self.problems():
            raise AdapterError(f"the adapter {self.name!r} is damaged: {'; '.join(found)}; {LEARN_AGAIN}")

    def problems(self) -> list[str]:
        """Which files differ from the hashes in the manifest, or cannot be read."""
        hashes = self.manifest.hashes.items()
        return [fault for name, sha256 in hashes if (fault := self._file_fault(name, sha256))]

    def _file_fault(self, name: str, sha256: str = "") -> str | None:
        """Why a file cannot be used, whatever it holds; or that its hash is another one, if one is given."""
        path = self.folder / name
        if not os.path.lexists(path):
            kept_as = f" (its library keeps it as {STATIC_FOLDER}/{self.manifest.static_sha256})"
            return f"{name} is missing{kept_as if name == STATIC_FILE else ''}"
        if path.is_symlink() or not path.is_file():
            return f"{name} is a link or no file"
        try:
            is_changed = sha256 and file_sha256(path) != sha256
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return f"{name} is damaged (its hash differs)" if is_changed else None

    def header_faults(self, name: str) -> list[str]:
        """What is wrong in the header of a file of tensors, or does not fit adapter.json."""
        if fault := self._file_fault(name):
            return [fault]
        stored, faults = read_header(self.folder / name)
        if not stored:
            return faults or [f"{name} is empty"]
        m, wanted = self.manifest, {}
        if name == FACTORS:
            wanted = layout(m) | {key: info for key, info in stored.items() if is_optional(m, key, info)}
        if name == STATIC_FILE or m.format < 5:
            wanted |= static_layout(m, stored)
            stored = {key: info for key, info in stored.items() if m.format > 4 or YES not in key}
        faults += [f"{name} is missing" for name in wanted if name not in stored]
        faults += [f"{name[:200]} is unknown" for name in stored if name not in wanted]
        others = [key for key in sorted(stored.keys() & wanted.keys()) if stored[key] != wanted[key]]
        return faults + [f"{key} is {stored[key]}, not {wanted[key]}" for key in others]

    def faults(self) -> list[str]:
        """Everything wrong with an adapter from elsewhere: files, hashes, header, shapes, numbers and index."""
        wanted = {MANIFEST, *self.manifest.hashes}
        found = [fault for name in sorted(wanted) if (fault := self._file_fault(name))]
        there = {path.name for path in self.folder.iterdir()}
        found += [f"{name[:200]} does not belong there" for name in sorted(there - wanted)]
        if found:
            return found
        found = self.problems() + index_faults(self.index, self.manifest.n_chunks)
        for name in self.manifest.hashes.keys() - {INDEX}:
            if header := self.header_faults(name):
                found += header
                continue
            file = OpenTensors(self.folder / name)
            numbers = [key for key, info in file.header.items() if info.dtype not in ("I8", "U8", "I16")]
            found += number_faults((key, file.tensor(key)) for key in numbers)
        return found


def _unpacked(m: Manifest, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file without their scales; those that have some are unpacked as it fits their storage."""
    found = {name: value for name, value in stored.items() if not name.endswith(SCALE)}
    for name in found.keys() & {name.removesuffix(SCALE) for name in stored if name.endswith(SCALE)}:
        found[name] = unpack({"": found[name], SCALE: stored[name + SCALE]}, tensor_storage(m, name))
    return found


def size_of(folder: Path) -> int:
    """Bytes of an adapter's files but for the static LoRA, which others share; 0 where there is no such folder."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sum(path.stat().st_size for path in files if path.name != STATIC_FILE)


def first_with_static(adapters: Sequence[Adapter]) -> list[bool]:
    """For each adapter, whether it is the first in the list that holds its static LoRA, so that it is added only once.

    Static LoRAs are compared by their numbers: a combination (combine.py) holds that of its parts, and the id of a
    hypernetwork may have changed since an adapter was made. Up to what rounding to int8 makes of them they are equal.
    """

    def is_equal(side: Tensor, other: Tensor) -> bool:
        return side.shape == other.shape and bool((side - other).norm() <= _ROUNDED * other.norm())

    def are_equal(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> bool:
        return one.keys() == other.keys() and all(
            is_equal(one[name].a, other[name].a) and is_equal(one[name].b, other[name].b) for name in one
        )

    statics = [adapter.static_lora.factors for adapter in adapters]
    return [not any(are_equal(one, other) for other in statics[:i]) for i, one in enumerate(statics)]


def factors_in_memory(max_bytes: int = _MAX_BYTES) -> Kept:
    """A new `Adapter.kept`: it keeps LoRAs and sets of factors, and those that were used least recently go first.

    Args:
        max_bytes: of all together; what is larger alone is not kept.
    """

    def n_bytes(held: LoRA | Mapping[str, Tensor]) -> int:
        from loracast.lora.algebra import LoRA

        sides = held.values() if not isinstance(held, LoRA) else (*chain(*held.factors.values()), *held.dense.values())
        return sum({(s := side.untyped_storage()).data_ptr(): s.nbytes() for side in sides}.values())

    @cached(LRUCache(max_bytes, n_bytes), key=lambda key, read: key, lock=Lock())
    def kept(key: Hashable, read: Callable[[], Any]) -> Any:
        return read()

    return kept
