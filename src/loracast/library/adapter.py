"""What is kept of a document: one LoRA for each chunk, the chunks' text with an index over it, a name, hashes, provenance.

An adapter is a folder of three files (docs/adapter-format.md):

    factors.safetensors   A [chunks, modules, r, in] and B [chunks, modules, r, out] for each module kind; chunk after chunk (storage.py)
    chunks.sqlite         the chunks' text and offsets, with a full-text index (FTS5) that routing asks
    adapter.json          name, hashes, base, hypernetwork, target, options; written last

Factors are streamed in as chunks are encoded and mapped when read, so neither learning nor asking holds a document in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.errors import AdapterError
from loracast.files import file_sha256
from loracast.library.manifest import VERSION_DIGITS, Manifest
from loracast.library.routing import read_chunks
from loracast.lora.quantize import SCALE, dequantise
from loracast.lora.target import Target
from loracast.lora.tensor_file import number_faults, read_header

if TYPE_CHECKING:
    from torch import Tensor

    from loracast.lora.algebra import LoRA
    from loracast.lora.merge import Merging

FACTORS = "factors.safetensors"
Recast = Callable[[Sequence[str]], "dict[str, Tensor]"]
"""Chunks as an encoder reads them -> their factors, named and shaped as in factors.safetensors, the document-independent ones among them."""


class Adapter:
    """An adapter on disk, opened for reading."""

    def __init__(self, folder: Path, name: str | None = None):
        """
        Args:
            name: by which it is known; the one it was made under if None.
        """
        self.folder = folder
        self.manifest = Manifest.read(folder / "adapter.json")
        self.name = name or self.manifest.name
        self._loras: dict[tuple[tuple[int, ...], tuple[float, ...] | None, bool], LoRA] = {}
        self._factors: Any = None
        self.recast: Recast | None = None
        """Of an adapter that keeps only its text: what makes the factors of chunks."""

    @property
    def index(self) -> Path:
        """The file with the chunks' text."""
        return self.folder / "chunks.sqlite"

    @property
    def version(self) -> str:
        """`name@hash`, with the first digits of the content hash: never means another adapter."""
        return f"{self.name}@{self.manifest.version[:VERSION_DIGITS]}"

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def problems(self) -> list[str]:
        """What differs from the hashes in the manifest, or cannot be read."""
        found = []
        hashes = {FACTORS: self.manifest.factors_sha256, "chunks.sqlite": self.manifest.chunks_sha256}
        for name, sha256 in hashes.items():
            try:
                if sha256 and file_sha256(self.folder / name) != sha256:
                    found.append(f"{name} is damaged (its hash differs)")
            except OSError as error:
                found.append(f"{name} cannot be read ({error.strerror})")
        return found

    def verify(self) -> None:
        """Compare the files with the hashes in the manifest. Raises AdapterError with all that differ."""
        if found := self.problems():
            raise AdapterError(f"the adapter {self.name!r} is damaged: {'; '.join(found)}; learn the document again")

    def lora(self, chunks: Sequence[int] | Mapping[int, float] | None = None, *, static: bool = True) -> LoRA:
        """The LoRA of some chunks, or of all (None), merged along the rank.

        The last few are kept in memory, since a conversation tends to stay where it is.

        Args:
            chunks: their numbers; or what the LoRA of each counts, by its number (1 where only numbers are given).
            static: with the LoRA that all documents of a hypernetwork share, once; False where another
                adapter of the same hypernetwork brings it along.
        """
        n_chunks = self.manifest.n_chunks
        wanted = tuple(range(n_chunks)) if chunks is None else tuple(sorted(set(chunks)))
        if not wanted or wanted[0] < 0 or wanted[-1] >= n_chunks:
            raise AdapterError(f"{self.name!r} has the chunks 0..{n_chunks - 1}, not {list(wanted)}")
        weights = tuple(chunks[i] for i in wanted) if isinstance(chunks, Mapping) else None
        key = (wanted, weights, static)
        if key in self._loras:
            return self._loras[key]
        rows = self.rows(wanted, static=static)
        if damaged := number_faults(rows.items()):
            raise AdapterError(f"the factors of {self.name!r} are damaged: {'; '.join(damaged)}")
        lora = join_chunks(self.manifest.target, rows, self.manifest.merging, weights)
        if len(self._loras) >= 8:
            self._loras.pop(next(iter(self._loras)))
        self._loras[key] = lora
        return lora

    def rows(self, wanted: Sequence[int], *, static: bool = True) -> dict[str, Tensor]:
        """The factors of some chunks and, if asked for, the document-independent ones, in bf16, by the names that they have in the file."""

        def is_wanted(name: str) -> bool:
            return static or ".shared." not in name

        if self.manifest.storage == "text":
            if self.recast is None:
                raise AdapterError(
                    f"{self.name!r} keeps only its text, and a model makes its factors when it is asked; for anything else learn the document "
                    "with --storage bf16"
                )
            rows = self.recast([chunk.prompt for chunk in read_chunks(self.index, wanted)])
            return {name: value for name, value in rows.items() if is_wanted(name)}
        reader = self._open()

        def take(name: str) -> Tensor:
            return reader.get_tensor(name) if ".shared." in name else _take(reader.get_slice(name), wanted)

        names = [n for n in reader.keys() if is_wanted(n) and not n.endswith(SCALE)]  # noqa: SIM118  (not a dict)
        if self.manifest.storage == "bf16":
            return {name: take(name) for name in names}
        return {n: take(n) if ".shared." in n else dequantise(take(n), take(n + SCALE)) for n in names}

    def _open(self) -> Any:
        """The mapped factors, after a look at the file's header."""
        if self._factors is None:
            from safetensors import safe_open

            if faults := self.header_faults():
                raise AdapterError(
                    f"the factors of {self.name!r} cannot be used: {'; '.join(faults)}; learn the document again"
                )
            self._factors = safe_open(self.folder / FACTORS, framework="pt")
        return self._factors

    def header_faults(self) -> list[str]:
        """What in the header of the factors' file is wrong, or does not fit adapter.json."""
        if (self.folder / FACTORS).is_symlink():
            return [f"{FACTORS} is a link"]
        stored, faults = read_header(self.folder / FACTORS)
        if not stored:
            return faults or [f"{FACTORS} is empty"]
        m = self.manifest
        wanted = _shapes(m, {name: info.shape for name, info in stored.items()})
        faults += [f"{name} is missing" for name in wanted if name not in stored]
        faults += [f"{name[:200]} is unknown" for name in stored if name not in wanted]
        for name in sorted(stored.keys() & wanted.keys()):
            if list(stored[name].shape) != wanted[name]:
                faults.append(f"{name} is {list(stored[name].shape)}, not {wanted[name]}")
            is_bytes = m.storage == "int8" and ".shared." not in name and not name.endswith(SCALE)
            if stored[name].dtype != (right := "I8" if is_bytes else "BF16"):
                faults.append(f"{name} is of type {stored[name].dtype}, not {right}")
        return faults

    def faults(self) -> list[str]:
        """Everything that is wrong with an adapter from elsewhere: its files, their hashes, header, shapes and numbers, and its index."""
        there = {path.name: path for path in self.folder.iterdir()}
        wanted = {"adapter.json", "chunks.sqlite"} | ({FACTORS} if self.manifest.storage != "text" else set())
        found = [f"{name} is missing" for name in sorted(wanted - there.keys())]
        found += [
            f"{name} is a link or no file" for name in sorted(wanted & there.keys()) if not _is_plain(there[name])
        ]
        found += [f"{name[:200]} does not belong there" for name in sorted(there.keys() - wanted)]
        if found:
            return found
        found = self.problems()
        try:
            if (n := len(read_chunks(self.index))) != self.manifest.n_chunks:
                found.append(f"chunks.sqlite has {n} chunks, adapter.json says {self.manifest.n_chunks}")
        except AdapterError as error:
            found.append(str(error))
        if self.manifest.storage == "text":
            return found
        header = self.header_faults()
        if not header:
            reader = self._open()
            names = [name for name, info in read_header(self.folder / FACTORS)[0].items() if info.dtype != "I8"]
            found += number_faults((name, reader.get_tensor(name)) for name in names)
        return found + header


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def loras_together(picked: Sequence[tuple[Adapter, Mapping[int, float] | None]]) -> list[LoRA]:
    """The LoRAs of adapters that are to be added up, each with its picked chunks or all (None).

    The document-independent LoRA of a hypernetwork is taken once, however many of the adapters hold it.
    """
    loras: list[LoRA] = []
    met: set[str] = set()
    for adapter, chunks in picked:
        made_by = adapter.manifest.hypernetwork
        loras.append(adapter.lora(chunks, static=made_by not in met))
        met.add(made_by)
    return loras


def _shapes(m: Manifest, stored: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The shape of each tensor that factors.safetensors must have. A document-independent LoRA is there or not, of any rank."""
    shapes: dict[str, list[int]] = {}
    for kind in m.target.kinds:
        modules = m.target.of_kind(kind)
        shared = [stored[name] for side in "ab" if (name := f"{kind}.shared.{side}") in stored]
        for side, d in (("a", modules[0].d_in), ("b", modules[0].d_out)):
            rows = [m.n_chunks, len(modules), m.ranks[kind]]
            shapes[f"{kind}.{side}"] = [*rows, d]
            if m.storage == "int8":
                shapes[f"{kind}.{side}{SCALE}"] = [*rows, 1]
            if shared:
                shapes[f"{kind}.shared.{side}"] = [len(modules), *shared[0][1:2], d]
    return shapes


def join_chunks(
    target: Target, rows: Mapping[str, Tensor], merging: Merging, weights: Sequence[float] | None = None
) -> LoRA:
    """The LoRA of chunks: their factors merged, the document-independent ones, if any, once.

    Args:
        rows: named as in factors.safetensors: "down_proj.a" [chunks, layers, r, in], "down_proj.shared.a" [layers, r, in].
        weights: what each chunk counts; 1 if None.
    """
    import torch

    from loracast.lora.algebra import Factors, LoRA, concat

    joined: dict[str, Factors] = {}
    for kind in target.kinds:
        a, b = (rows[f"{kind}.{side}"].transpose(0, 1) for side in ("a", "b"))  # [layers, chunks, r, d]
        if weights is not None:
            b = b * torch.tensor(weights).to(b)[:, None, None]
        sides = list(merging.join(kind, a, b))  # [layers, chunks * r, d]
        for i, side in enumerate(("a", "b")):
            if (shared := rows.get(f"{kind}.shared.{side}")) is not None:
                sides[i] = torch.cat([sides[i], shared], dim=1)
        for layer, module in enumerate(target.of_kind(kind)):
            joined[module.name] = Factors(sides[0][layer], sides[1][layer].T)
    return concat([LoRA(joined)])


def _take(rows: Any, wanted: Sequence[int]) -> Tensor:
    """Some first-axis entries of a mapped tensor, without reading the others."""
    import torch

    if list(wanted) == list(range(rows.get_shape()[0])):
        return rows[:]
    return torch.cat([rows[i : i + 1] for i in wanted])
