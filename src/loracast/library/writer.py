"""Writes an adapter's files chunk after chunk, so that a long document never lies in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace as with_changes
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loracast.errors import AdapterError
from loracast.files import file_sha256, sync_folder, tidy
from loracast.library.adapter import FACTORS, INDEX, MANIFEST, SENTENCE, Adapter, layout, static_storage_of
from loracast.library.index import write_index
from loracast.library.library import Library
from loracast.library.manifest import FORMAT, Manifest, check_name
from loracast.lora.quantize import pack, storage_of
from loracast.lora.tensor_file import BYTES

if TYPE_CHECKING:
    from io import BufferedRandom

    from torch import Tensor

    from loracast.documents import Chunk
    from loracast.lora.factors import Rows


ChunkRows = tuple["Rows", "Mapping[str, Tensor]"]
"""The rows of n chunks, and by kind of a memory the sentence of each row in its chunk [n, r], -1 for none."""
WriteIndex = Callable[[Path, "Sequence[Chunk]"], object]
"""Writes the index of some chunks to a file."""


class AdapterWriter:
    """Builds an adapter in a work folder and hands it to the library when it is whole; on any error nothing is left.

    Use as a context manager: `open_factors`, `add` the factors batch by batch, then `finish`; with storage `text`
    only `finish`.
    """

    def __init__(self, library: Library, manifest: Manifest, chunks: Sequence[Chunk], index: WriteIndex = write_index):
        """
        Args:
            manifest: all but the hashes of the files, which are filled in.
            index: writes the file of the index, given the chunks.
        """
        check_name(manifest.name)
        self.library, self.manifest, self.chunks, self._write_index = library, manifest, chunks, index
        self._n_added = 0
        self._file: BufferedRandom | None = None

    def __enter__(self) -> AdapterWriter:
        self.library.folder.mkdir(parents=True, exist_ok=True)
        tidy(self.library.folder)
        self.library.files.recover()
        with ExitStack() as stack:
            self._folder = stack.enter_context(self.library.files.work("new"))
            self._write_index(self._folder / INDEX, self.chunks)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        self._cleanup.close()

    def open_factors(self, static: Mapping[str, Tensor]) -> None:
        """Lay out factors.safetensors: the header, the static LoRA, and room for each chunk's factors."""
        tensors = layout(self.manifest, {name: tuple(value.shape) for name, value in static.items()})
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "loracast": str(FORMAT)}}
        offset = 0
        self._places: dict[str, int] = {}
        for name, info in tensors.items():
            end = offset + BYTES[info.dtype] * math.prod(info.shape)
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
            self._places[name], offset = offset, end
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._file = open(self._folder / FACTORS, "w+b")  # noqa: SIM115  (closed on exit)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._file.truncate(self._start + offset)
        for name, value in static.items():
            for suffix, part in pack(value.detach().bfloat16(), static_storage_of(self.manifest)).items():
                self._write(name + suffix, 0, part)

    def add(self, expanded: Rows, sentences: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Append the factors of the next n chunks: by kind, A [n, modules, r, in] and B [n, modules, r, out].

        Args:
            sentences: by kind of a memory, whose B is [n, 1, r, out], the sentence of each row in its chunk [n, r].
        """
        check_finite(expanded, "this document")
        n = 0
        for kind, pair in expanded.items():
            n = pair[0].shape[0]
            for side, rows in zip("ab", pair, strict=True):
                if not rows.numel():  # chunks have none of the kinds that receive the static LoRA alone
                    continue
                storage = storage_of(self.manifest.storage, kind in self.manifest.memory_kinds)
                for suffix, value in pack(rows.detach().bfloat16(), storage).items():
                    offset = self._n_added * value[0].numel() * value.element_size()
                    self._write(f"{kind}.{side}{suffix}", offset, value)
        for kind, numbers in sentences.items():
            self._write(f"{kind}{SENTENCE}", self._n_added * numbers[0].numel() * numbers.element_size(), numbers)
        self._n_added += n

    def _write(self, name: str, offset: int, value: Tensor) -> None:
        import torch

        assert self._file is not None, "open_factors comes first"
        self._file.seek(self._start + self._places[name] + offset)
        self._file.write(value.cpu().contiguous().view(torch.uint8).numpy().data)

    def finish(self, *, replace: bool, learn_s: float | None = None) -> Adapter:
        """Flush everything, write the manifest, and have the library take the folder in under its name.

        Args:
            replace: an adapter of that name gives way.
            learn_s: seconds that it took; the manifest's own if None.
        """
        whole = with_changes(self.manifest, chunks_sha256=file_sha256(self._folder / INDEX), factors_sha256="")
        if learn_s is not None:
            whole = with_changes(whole, learn_s=round(learn_s, 4))
        if self.manifest.storage != "text":
            if self._n_added != len(self.chunks):
                raise AdapterError(f"{self._n_added} of {len(self.chunks)} chunks were written")
            assert self._file is not None
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            whole = with_changes(whole, factors_sha256=file_sha256(self._folder / FACTORS))
        whole.write(self._folder / MANIFEST)
        sync_folder(self._folder)
        return self.library.add(whole.name, self._folder, whole, replace=replace)


def check_finite(rows: Rows, source: str) -> None:
    """Raise AdapterError where a hypernetwork gave numbers that are not finite."""
    if not all(side.isfinite().all() for pair in rows.values() for side in pair):
        raise AdapterError(f"the hypernetwork gave numbers that are not finite for {source}; nothing is kept")
