"""Keeping an adapter in a smaller storage, as a new version of its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loracast.errors import AdapterError
from loracast.library.adapter import STATIC, Adapter
from loracast.library.index import read_chunks
from loracast.library.library import open_adapter
from loracast.library.writer import AdapterWriter
from loracast.lora.quantize import STORAGE, Storage


def compact(library: Path, reference: str, storage: Storage) -> Adapter:
    """Keep an adapter in less space. The version that it was made from stays until it is removed.

    Raises:
        AdapterError: there is none, or it takes no more space now; only a document can be kept as text.
    """
    adapter = open_adapter(library, reference)
    m = adapter.manifest
    if STORAGE.index(storage) <= STORAGE.index(m.storage):
        raise AdapterError(
            f"{adapter.name!r} is kept as {m.storage} and cannot become {storage}: learn the document again"
        )
    if storage == "text" and m.kind != "document":
        raise AdapterError(
            f"{adapter.name!r} was not made from a document: only a document's factors can be made again from its text"
        )
    smaller = replace(m, name=adapter.name, storage=storage)
    with AdapterWriter(library, smaller, read_chunks(adapter.index)) as writer:
        if storage != "text":
            for i in range(m.n_chunks):
                rows = adapter.rows([i])
                if i == 0:
                    writer.open_factors({name: value for name, value in rows.items() if STATIC in name})
                writer.add({kind: (rows[f"{kind}.a"], rows[f"{kind}.b"]) for kind in m.target.kinds})
        return writer.finish(replace=True)
