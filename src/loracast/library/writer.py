"""Writing an adapter's files, chunk after chunk, so that a long document never lies in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace as with_changes
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.errors import AdapterError
from loracast.files import file_sha256, sync_folder
from loracast.library.adapter import Adapter
from loracast.library.files import recover
from loracast.library.library import add_adapter
from loracast.library.manifest import FORMAT, Manifest, check_name
from loracast.library.workfolders import tidy, work_folder
from loracast.lora.quantize import SCALE, Storage, quantise
from loracast.lora.target import Target

if TYPE_CHECKING:
    from io import BufferedRandom

    from torch import Tensor

    from loracast.documents import Chunk


class AdapterWriter:
    """Builds an adapter in a work folder and hands it to the library when it is whole; on any error nothing is left.

    Use as a context manager: `open_factors`, `add` the factors batch by batch, then `finish`; with the storage `text` only `finish`.
    """

    def __init__(
        self,
        library: Path,
        name: str,
        target: Target,
        ranks: Mapping[str, int],
        chunks: Sequence[Chunk],
        storage: Storage = "bf16",
    ):
        self.library, self.name, self.storage = library, check_name(name), storage
        self.target, self.ranks, self.chunks = target, ranks, chunks
        self._n_added = 0
        self._file: BufferedRandom | None = None

    def __enter__(self) -> AdapterWriter:
        from loracast.library.routing import write_index

        self.library.mkdir(parents=True, exist_ok=True)
        tidy(self.library)
        recover(self.library)
        with ExitStack() as stack:
            self._folder = stack.enter_context(work_folder(self.library, "new"))
            write_index(self._folder / "chunks.sqlite", self.chunks)
            self._cleanup = stack.pop_all()
        shapes: dict[str, tuple[int, ...]] = {}
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
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "loracast": str(FORMAT)}}
        offset = 0
        self._places: dict[str, int] = {}
        is_int8 = self.storage == "int8"
        sizes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, shape in self._shapes.items():
            sizes[name] = ("I8" if is_int8 else "BF16", shape)
            if is_int8:
                sizes[name + SCALE] = ("BF16", (*shape[:-1], 1))
        sizes |= {name: ("BF16", tuple(value.shape)) for name, value in shared.items()}
        for name, (dtype, shape) in sizes.items():
            n_bytes = (1 if dtype == "I8" else 2) * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
            self._places[name] = offset
            offset += n_bytes
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._file = open(self._folder / "factors.safetensors", "w+b")  # noqa: SIM115  (closed on exit)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._file.truncate(self._start + offset)
        for name, value in shared.items():
            self._write(name, 0, value.detach().bfloat16())

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
                if rows.numel():  # of kinds that all documents share, chunks have nothing
                    self._put(f"{kind}.{side}", rows)
        self._n_added += n

    def _put(self, name: str, rows: Tensor) -> None:
        """The rows [n, modules, r, d] of the next n chunks, as they are kept."""
        kept = {name: rows.detach().bfloat16()}
        if self.storage == "int8":
            kept = dict(zip((name, name + SCALE), quantise(kept[name]), strict=True))
        for part, value in kept.items():
            self._write(part, self._n_added * value[0].numel() * value.element_size(), value)

    def _write(self, name: str, offset: int, value: Tensor) -> None:
        import torch

        assert self._file is not None, "open_factors comes first"
        self._file.seek(self._start + self._places[name] + offset)
        self._file.write(value.cpu().contiguous().view(torch.uint8).numpy().data)

    def finish(self, manifest: Manifest, *, replace: bool) -> Adapter:
        """Flush everything, write the manifest, and have the library take the folder in under its name."""
        whole = with_changes(manifest, chunks_sha256=file_sha256(self._folder / "chunks.sqlite"))
        if self.storage != "text":
            if self._n_added != len(self.chunks):
                raise AdapterError(f"{self._n_added} of {len(self.chunks)} chunks were written")
            assert self._file is not None
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            whole = with_changes(whole, factors_sha256=file_sha256(self._folder / "factors.safetensors"))
        whole.write(self._folder / "adapter.json")
        sync_folder(self._folder)
        return add_adapter(self.library, self.name, self._folder, whole, replace=replace)
