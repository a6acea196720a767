"""What is kept of a document: one LoRA for each chunk, the chunks' text with an index over it, a name, hashes, provenance.

An adapter is a folder of three files (docs/adapter-format.md):

    factors.safetensors   A [chunks, layers, r, in] and B [chunks, layers, r, out] for each module kind, bf16; chunk after chunk
    chunks.sqlite         the chunks' text and offsets, with a full-text index (FTS5) that routing asks
    adapter.json          name, hashes, base, hypernetwork, target, options; written last

Factors are streamed in as chunks are encoded and mapped when read, so neither learning nor asking holds a document in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.errors import AdapterError
from loracast.files import sync_folder, write_atomically
from loracast.fingerprint import Fingerprint
from loracast.target import Target, TargetModule

if TYPE_CHECKING:
    from torch import Tensor

    from loracast.documents import Chunk
    from loracast.lora import LoRA

FORMAT = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Manifest:
    """adapter.json: all that is known of an adapter without opening its factors."""

    name: str
    title: str
    source: str | None
    """The document's file name, without its folders."""
    source_sha256: str
    made_for: Fingerprint
    hypernetwork: str
    """Hash of the hypernetwork's weights."""
    modules: tuple[tuple[str, int, str, int, int], ...]
    """The target, as in the hypernetwork's config."""
    rank: int
    """Of one chunk."""
    n_chunks: int
    n_tokens: int
    max_chunk_tokens: int
    created: str
    """UTC, ISO 8601."""
    learn_s: float
    """Seconds it took."""
    factors_sha256: str = ""
    format: int = FORMAT
    warnings: tuple[str, ...] = field(default=())

    @property
    def target(self) -> Target:
        return Target(tuple(TargetModule(*module) for module in self.modules))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AdapterError(f"{path.parent} is not an adapter: its adapter.json cannot be read ({error})") from error
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise AdapterError(
                f"{path} is not of format {FORMAT}; this version of loracast cannot read it: update loracast"
            )
        try:
            stored["made_for"] = Fingerprint(**stored["made_for"])
            stored["modules"] = tuple(tuple(module) for module in stored["modules"])
            stored["warnings"] = tuple(stored["warnings"])
            return cls(**stored)
        except (KeyError, TypeError) as error:
            raise AdapterError(f"{path} is damaged: {error}; learn the document again") from error

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=1, ensure_ascii=False).encode())


def check_name(name: str) -> str:
    """A name that is safe as a folder's: lower-case letters, digits, `.`, `_`, `-`. Raises AdapterError."""
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"{name[:80]!r} cannot name an adapter: use 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
        )
    return name


def name_from(text: str) -> str:
    """A name made from a title or file name."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:64].strip("-")
    return slug or "document"


class Adapter:
    """An adapter on disk, opened for reading."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = Manifest.read(folder / "adapter.json")
        self._loras: dict[tuple[int, ...], LoRA] = {}
        self._factors: Any = None

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def verify(self) -> None:
        """Compare the factors with the hash in the manifest. Raises AdapterError if they differ."""
        if _file_sha256(self.folder / "factors.safetensors") != self.manifest.factors_sha256:
            raise AdapterError(
                f"the factors of {self.name!r} are damaged (their hash differs); learn the document again"
            )

    def lora(self, chunks: Sequence[int] | None = None) -> LoRA:
        """The LoRA of some chunks, or of all (None), merged along the rank; the document-independent one, if any, once.

        The last few are kept in memory, since a conversation tends to stay where it is.
        """
        import torch

        from loracast.lora import Factors, LoRA, concat

        wanted = tuple(range(self.manifest.n_chunks)) if chunks is None else tuple(sorted(set(chunks)))
        if wanted in self._loras:
            return self._loras[wanted]
        target, reader = self.manifest.target, self._open()
        joined: dict[str, Factors] = {}
        keys = set(reader.keys())
        for kind in target.kinds:
            sides = []
            for side in ("a", "b"):
                rows = (
                    _take(reader.get_slice(f"{kind}.{side}"), wanted).transpose(0, 1).flatten(1, 2)
                )  # [layers, K*r, d]
                if f"{kind}.shared.{side}" in keys:
                    rows = torch.cat([rows, reader.get_tensor(f"{kind}.shared.{side}")], dim=1)
                sides.append(rows)
            for layer, module in enumerate(target.of_kind(kind)):
                joined[module.name] = Factors(sides[0][layer], sides[1][layer].T)
        lora = concat([LoRA(joined)])
        if len(self._loras) >= 8:
            self._loras.pop(next(iter(self._loras)))
        self._loras[wanted] = lora
        return lora

    def _open(self) -> Any:
        """The mapped factors, after a look at their names and shapes."""
        from safetensors import SafetensorError, safe_open

        if self._factors is not None:
            return self._factors
        try:
            reader = safe_open(self.folder / "factors.safetensors", framework="pt")
        except (OSError, SafetensorError) as error:
            raise AdapterError(
                f"the factors of {self.name!r} cannot be read ({error}); learn the document again"
            ) from error
        m = self.manifest
        problems = []
        for kind in m.target.kinds:
            modules = m.target.of_kind(kind)
            for side, d in (("a", modules[0].d_in), ("b", modules[0].d_out)):
                shape = [m.n_chunks, len(modules), m.rank, d]
                if f"{kind}.{side}" not in reader.keys():
                    problems.append(f"{kind}.{side} is missing")
                elif (found := reader.get_slice(f"{kind}.{side}").get_shape()) != shape:
                    problems.append(f"{kind}.{side} is {found}, not {shape}")
        if problems:
            raise AdapterError(f"the factors of {self.name!r} do not fit its adapter.json: {'; '.join(problems)}")
        self._factors = reader
        return reader


def _take(rows: Any, wanted: Sequence[int]) -> Tensor:
    """Some first-axis entries of a mapped tensor, without reading the others."""
    import torch

    if list(wanted) == list(range(rows.get_shape()[0])):
        return rows[:]
    return torch.cat([rows[i : i + 1] for i in wanted])


class AdapterWriter:
    """Builds an adapter in a hidden folder and moves it into place when it is whole; on any error nothing is left.

    Use as a context manager: `add` the factors batch by batch, then `finish`.
    """

    def __init__(self, library: Path, name: str, target: Target, rank: int, chunks: Sequence[Chunk]):
        self.library, self.name = library, check_name(name)
        self.target, self.rank, self.chunks = target, rank, chunks
        library.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(dir=library, prefix=f".{name}."))
        self._n_added = 0

    def __enter__(self) -> AdapterWriter:
        from loracast.routing import write_index

        write_index(self._folder / "chunks.sqlite", self.chunks)
        shapes = {}
        for kind in self.target.kinds:
            modules = self.target.of_kind(kind)
            shapes[f"{kind}.a"] = (len(self.chunks), len(modules), self.rank, modules[0].d_in)
            shapes[f"{kind}.b"] = (len(self.chunks), len(modules), self.rank, modules[0].d_out)
        self._shapes = shapes
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def open_factors(self, shared: dict[str, Tensor]) -> None:
        """Lay out factors.safetensors: the header, the shared LoRA, and room for each chunk's factors."""
        import torch

        header: dict[str, Any] = {"__metadata__": {"format": "pt", "loracast": str(FORMAT)}}
        offset = 0
        self._places: dict[str, int] = {}
        sizes = {name: tuple(shape) for name, shape in self._shapes.items()}
        sizes |= {name: tuple(value.shape) for name, value in shared.items()}
        for name, shape in sizes.items():
            n_bytes = 2 * int(torch.tensor(shape).prod())
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
            self._places[name] = offset
            offset += n_bytes
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._file = open(self._folder / "factors.safetensors", "w+b")  # noqa: SIM115  (closed by finish)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._file.truncate(self._start + offset)
        for name, value in shared.items():
            self._write(name, 0, value)

    def add(self, expanded: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Append the factors of the next chunks, as the hypernetwork's `expand` gives them."""
        n = 0
        for kind, (a, b) in expanded.items():
            n = a.shape[0]
            for side, rows in (("a", a), ("b", b)):
                self._write(f"{kind}.{side}", self._n_added * rows[0].numel() * 2, rows)
        self._n_added += n

    def _write(self, name: str, offset: int, value: Tensor) -> None:
        import torch

        self._file.seek(self._start + self._places[name] + offset)
        self._file.write(value.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().data)

    def finish(self, manifest: Manifest, *, replace: bool) -> Adapter:
        """Flush everything, write the manifest, move the folder into the library under its name."""
        from dataclasses import replace as with_changes

        if self._n_added != len(self.chunks):
            raise AdapterError(f"{self._n_added} of {len(self.chunks)} chunks were written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self._folder / "factors.safetensors"
        with_changes(manifest, factors_sha256=_file_sha256(path)).write(self._folder / "adapter.json")
        sync_folder(self._folder)
        final = self.library / self.name
        if final.exists():
            if not replace:
                raise AdapterError(
                    f"there is an adapter called {self.name!r} already; choose another --name or give --replace"
                )
            old = Path(tempfile.mkdtemp(dir=self.library, prefix=f".{self.name}.old."))
            os.replace(final, old / self.name)
            os.replace(self._folder, final)
            shutil.rmtree(old)
        else:
            os.replace(self._folder, final)
        sync_folder(self.library)
        return Adapter(final)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapters(library: Path) -> Iterator[Adapter]:
    """All adapters of a library, by name. What a killed writer left behind is hidden, and not listed."""
    if library.is_dir():
        for folder in sorted(library.iterdir()):
            if not folder.name.startswith(".") and (folder / "adapter.json").is_file():
                yield Adapter(folder)


def open_adapter(library: Path, name: str) -> Adapter:
    """The adapter of that name. Raises AdapterError, listing those there are."""
    if not (library / check_name(name) / "adapter.json").is_file():
        known = ", ".join(adapter.name for adapter in adapters(library)) or "none yet: `loracast learn FILE` makes one"
        raise AdapterError(f"no adapter is called {name!r}; there are: {known}")
    return Adapter(library / name)


def remove_adapter(library: Path, name: str) -> None:
    """Delete an adapter: it is gone from the list at once, then from the disk."""
    adapter = open_adapter(library, name)
    grave = Path(tempfile.mkdtemp(dir=library, prefix=f".{name}.rm."))
    os.replace(adapter.folder, grave / name)
    sync_folder(library)
    shutil.rmtree(grave)
