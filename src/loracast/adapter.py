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
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.errors import AdapterError
from loracast.files import sync_folder, write_atomically
from loracast.fingerprint import Fingerprint
from loracast.target import Target, TargetModule

if TYPE_CHECKING:
    from io import BufferedRandom

    from torch import Tensor

    from loracast.documents import Chunk, Document
    from loracast.lora import LoRA

FORMAT = 1
_HIDDEN = ".loracast-"  # begins the names of folders that are being written or deleted
_GRACE_S = 10.0
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
            manifest = cls(**stored)
            if not _NAME.fullmatch(manifest.name):
                raise ValueError(f"{manifest.name[:80]!r} is no adapter's name")
            sizes = [manifest.rank, manifest.n_chunks, *(d for m in manifest.modules for d in m[3:])]
            if not manifest.modules or min(sizes) < 1:
                raise ValueError("it targets nothing, or a size in it is not positive")
            if unknown := set(manifest.target.kinds) ^ {module.kind for module in manifest.target.modules}:
                raise ValueError(f"unknown module kinds {sorted(unknown)}")
            return manifest
        except (KeyError, TypeError, ValueError) as error:
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


def check_free(library: Path, name: str) -> None:
    """Refuse a name that is taken. Raises AdapterError."""
    if (library / check_name(name)).exists():
        raise AdapterError(f"there is an adapter called {name!r} already; choose another --name or give --replace")


def name_from(text: str) -> str:
    """A name made from a title or file name."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:64].strip("-")
    return slug or "document"


def name_for(document: Document) -> str:
    """The name of a document's adapter where the user gives none: made from the file's name, or else the title."""
    return name_from(Path(document.file_name).stem if document.file_name else document.title)


class Adapter:
    """An adapter on disk, opened for reading."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = Manifest.read(folder / "adapter.json")
        self._loras: dict[tuple[tuple[int, ...], bool], LoRA] = {}
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

    def lora(self, chunks: Sequence[int] | None = None, *, document_independent: bool = True) -> LoRA:
        """The LoRA of some chunks, or of all (None), merged along the rank.

        The last few are kept in memory, since a conversation tends to stay where it is.

        Args:
            document_independent: with the LoRA that all documents of a hypernetwork share, once; False where another
                adapter of the same hypernetwork brings it along.
        """
        n_chunks = self.manifest.n_chunks
        wanted = tuple(range(n_chunks)) if chunks is None else tuple(sorted(set(chunks)))
        if not wanted or wanted[0] < 0 or wanted[-1] >= n_chunks:
            raise AdapterError(f"{self.name!r} has the chunks 0..{n_chunks - 1}, not {list(wanted)}")
        key = (wanted, document_independent)
        if key in self._loras:
            return self._loras[key]
        reader = self._open()
        rows = {
            name: reader.get_tensor(name) if ".shared." in name else _take(reader.get_slice(name), wanted)
            for name in reader.keys()  # noqa: SIM118  (not a dict)
            if document_independent or ".shared." not in name
        }
        if damaged := [name for name, value in rows.items() if not value.isfinite().all()]:
            raise AdapterError(
                f"the factors of {self.name!r} are damaged: numbers that are not finite in {', '.join(damaged)}"
            )
        lora = join_chunks(self.manifest.target, rows)
        if len(self._loras) >= 8:
            self._loras.pop(next(iter(self._loras)))
        self._loras[key] = lora
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
        stored = {name: reader.get_slice(name).get_shape() for name in reader.keys()}  # noqa: SIM118  (no mapping)
        wanted = _shapes(m, stored)
        problems = [f"{name} is missing" for name in wanted if name not in stored]
        problems += [f"{name} is unknown" for name in stored if name not in wanted]
        for name in sorted(stored.keys() & wanted.keys()):
            if stored[name] != wanted[name]:
                problems.append(f"{name} is {stored[name]}, not {wanted[name]}")
            if (dtype := reader.get_slice(name).get_dtype()) != "BF16":
                problems.append(f"{name} is of type {dtype}, not BF16")
        if problems:
            raise AdapterError(f"the factors of {self.name!r} do not fit its adapter.json: {'; '.join(problems)}")
        self._factors = reader
        return reader


def _shapes(m: Manifest, stored: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The shape of each tensor that factors.safetensors must have. A document-independent LoRA is there or not, of any rank."""
    shapes: dict[str, list[int]] = {}
    for kind in m.target.kinds:
        modules = m.target.of_kind(kind)
        shared = [stored[name] for side in "ab" if (name := f"{kind}.shared.{side}") in stored]
        for side, d in (("a", modules[0].d_in), ("b", modules[0].d_out)):
            shapes[f"{kind}.{side}"] = [m.n_chunks, len(modules), m.rank, d]
            if shared:
                shapes[f"{kind}.shared.{side}"] = [len(modules), *shared[0][1:2], d]
    return shapes


def join_chunks(target: Target, rows: Mapping[str, Tensor]) -> LoRA:
    """The LoRA of chunks: their factors merged along the rank, the document-independent ones, if any, once.

    `rows` are named as in factors.safetensors: "down_proj.a" [chunks, layers, r, in], "down_proj.shared.a" [layers, r, in].
    """
    import torch

    from loracast.lora import Factors, LoRA, concat

    joined: dict[str, Factors] = {}
    for kind in target.kinds:
        sides = []
        for side in ("a", "b"):
            merged = rows[f"{kind}.{side}"].transpose(0, 1).flatten(1, 2)  # [layers, chunks * r, d]
            shared = rows.get(f"{kind}.shared.{side}")
            sides.append(merged if shared is None else torch.cat([merged, shared], dim=1))
        for layer, module in enumerate(target.of_kind(kind)):
            joined[module.name] = Factors(sides[0][layer], sides[1][layer].T)
    return concat([LoRA(joined)])


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
        self._n_added = 0
        self._file: BufferedRandom | None = None

    def __enter__(self) -> AdapterWriter:
        from loracast.routing import write_index

        self.library.mkdir(parents=True, exist_ok=True)
        tidy(self.library)
        with ExitStack() as stack:
            self._folder = stack.enter_context(_hidden_folder(self.library, "new"))
            write_index(self._folder / "chunks.sqlite", self.chunks)
            self._cleanup = stack.pop_all()
        shapes = {}
        for kind in self.target.kinds:
            modules = self.target.of_kind(kind)
            shapes[f"{kind}.a"] = (len(self.chunks), len(modules), self.rank, modules[0].d_in)
            shapes[f"{kind}.b"] = (len(self.chunks), len(modules), self.rank, modules[0].d_out)
        self._shapes = shapes
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        self._cleanup.close()

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
        self._file = open(self._folder / "factors.safetensors", "w+b")  # noqa: SIM115  (closed on exit)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._file.truncate(self._start + offset)
        for name, value in shared.items():
            self._write(name, 0, value)

    def add(self, expanded: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Append the factors of the next chunks, as the hypernetwork's `expand` gives them."""
        n = 0
        for kind, (a, b) in expanded.items():
            if not (a.isfinite().all() and b.isfinite().all()):
                raise AdapterError(
                    "the hypernetwork gave numbers that are not finite for this document; nothing is kept"
                )
            n = a.shape[0]
            for side, rows in (("a", a), ("b", b)):
                self._write(f"{kind}.{side}", self._n_added * rows[0].numel() * 2, rows)
        self._n_added += n

    def _write(self, name: str, offset: int, value: Tensor) -> None:
        import torch

        assert self._file is not None, "open_factors comes first"
        self._file.seek(self._start + self._places[name] + offset)
        self._file.write(value.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().data)

    def finish(self, manifest: Manifest, *, replace: bool) -> Adapter:
        """Flush everything, write the manifest, move the folder into the library under its name."""
        from dataclasses import replace as with_changes

        if self._n_added != len(self.chunks):
            raise AdapterError(f"{self._n_added} of {len(self.chunks)} chunks were written")
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self._folder / "factors.safetensors"
        with_changes(manifest, factors_sha256=_file_sha256(path)).write(self._folder / "adapter.json")
        sync_folder(self._folder)
        final = self.library / self.name
        if not replace:
            check_free(self.library, self.name)
        with _hidden_folder(self.library, "old") as old:
            is_replaced = final.exists()
            if is_replaced:
                os.replace(final, old / self.name)
            try:
                os.replace(self._folder, final)
            except OSError:
                if is_replaced:
                    os.replace(old / self.name, final)
                else:
                    check_free(self.library, self.name)  # another process was faster
                raise
            sync_folder(self.library)
        return Adapter(final)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_names(library: Path) -> list[str]:
    """The names in a library, damaged adapters' included. What a killed writer left behind is hidden, and not listed."""
    if not library.is_dir():
        return []
    return sorted(path.parent.name for path in library.glob("*/adapter.json") if not path.parent.name.startswith("."))


def adapters(library: Path) -> Iterator[Adapter]:
    """All adapters of a library, by name."""
    for name in adapter_names(library):
        yield Adapter(library / name)


def open_adapter(library: Path, name: str) -> Adapter:
    """The adapter of that name. Raises AdapterError, listing those there are."""
    return Adapter(_folder_of(library, name))


def _folder_of(library: Path, name: str) -> Path:
    folder = library / check_name(name)
    if not (folder / "adapter.json").is_file():
        known = ", ".join(adapter_names(library)) or "none yet: `loracast learn FILE` makes one"
        raise AdapterError(f"no adapter is called {name!r}; there are: {known}")
    return folder


def remove_adapter(library: Path, name: str) -> None:
    """Delete an adapter, a damaged one too: it is gone from the list at once, then from the disk."""
    folder = _folder_of(library, name)
    with _hidden_folder(library, "rm") as grave:
        os.replace(folder, grave / name)
        sync_folder(library)


@contextmanager
def _hidden_folder(library: Path, purpose: str) -> Iterator[Path]:
    """A folder of this process's own that no list shows, gone afterwards; if the process is killed, `tidy` finds it."""
    folder = Path(tempfile.mkdtemp(dir=library, prefix=f"{_HIDDEN}{purpose}-"))
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Hold a folder until the descriptor is closed or this process dies; None where another process holds it."""
    if os.name != "posix":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def tidy(library: Path) -> None:
    """Clear up after killed processes: what was half-written or half-deleted goes, what was half-replaced comes back."""
    for folder in library.glob(f"{_HIDDEN}*-*"):
        with suppress(OSError):  # another process may be tidying too
            is_new = time.time() - folder.stat().st_mtime < _GRACE_S  # perhaps made, but not yet locked
            lock = None if is_new else _lock(folder)
            if lock is None:
                continue
            try:
                for kept in folder.glob("*/adapter.json") if folder.name.startswith(f"{_HIDDEN}old-") else ():
                    if not (library / kept.parent.name).exists():
                        os.replace(kept.parent, library / kept.parent.name)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
