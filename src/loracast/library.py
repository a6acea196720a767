"""The adapters kept on this machine: a folder each, in one folder. Added, found and removed so that a kill at any moment loses nothing.

What is being written, replaced or deleted lies in hidden folders, each locked by the process at work; `tidy` clears up after those that died.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace as with_changes
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.adapter import Adapter
from loracast.errors import AdapterError
from loracast.files import file_sha256, sync_folder
from loracast.manifest import FORMAT, Manifest, check_name
from loracast.target import Target

if TYPE_CHECKING:
    from io import BufferedRandom

    from torch import Tensor

    from loracast.documents import Chunk

_HIDDEN = ".loracast-"  # begins the names of folders that are being written or deleted
_GRACE_S = 10.0


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


def check_free(library: Path, name: str) -> None:
    """Refuse a name that is taken. Raises AdapterError."""
    if (library / check_name(name)).exists():
        raise AdapterError(f"there is an adapter called {name!r} already; choose another --name or give --replace")


class AdapterWriter:
    """Builds an adapter in a hidden folder and moves it into place when it is whole; on any error nothing is left.

    Use as a context manager: `add` the factors batch by batch, then `finish`.
    """

    def __init__(self, library: Path, name: str, target: Target, ranks: Mapping[str, int], chunks: Sequence[Chunk]):
        self.library, self.name = library, check_name(name)
        self.target, self.ranks, self.chunks = target, ranks, chunks
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
            shapes[f"{kind}.a"] = (len(self.chunks), len(modules), self.ranks[kind], modules[0].d_in)
            shapes[f"{kind}.b"] = (len(self.chunks), len(modules), self.ranks[kind], modules[0].d_out)
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
        """Append the factors of the next chunks, as the hypernetwork casts them."""
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
        if self._n_added != len(self.chunks):
            raise AdapterError(f"{self._n_added} of {len(self.chunks)} chunks were written")
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self._folder / "factors.safetensors"
        with_changes(manifest, factors_sha256=file_sha256(path)).write(self._folder / "adapter.json")
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
