"""Keeps adapters of the library in a smaller storage."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

from loracast.errors import AdapterError
from loracast.library.adapter import SENTENCE, STATIC, Adapter
from loracast.library.index import read_chunks, read_sentences, write_index
from loracast.library.library import Library
from loracast.library.manifest import FORMAT
from loracast.library.writer import AdapterWriter
from loracast.lora.quantize import STORAGE, Storage
from loracast.reading.outline import write_document_index


def compact(library: Library, reference: str, storage: Storage) -> Adapter:
    """Keep an adapter in a smaller storage, as a new version; the one that it was made from stays until it is removed.

    Raises:
        AdapterError: there is none, it takes no more space now, or it is not the newest version of its name, which the
        new version would then follow; only a document can be kept as text.
    """
    adapter = library.open(reference)
    m = adapter.manifest
    _check_newest(library, adapter)
    if storage == m.storage:
        smallest = "; --storage text keeps only its text, and factors are cast again" if m.kind == "document" else ""
        raise AdapterError(f"{adapter.name!r} is kept as {storage} already" + smallest)
    if STORAGE.index(storage) < STORAGE.index(m.storage):
        raise AdapterError(
            f"{adapter.name!r} is kept as {m.storage} and cannot become {storage}: learn the document again"
        )
    if storage == "text" and m.kind != "document":
        raise AdapterError(
            f"{adapter.name!r} was not made from a document: only a document's factors can be made again from its text"
        )
    # Which rows are merged goes by the format in which they were made; from text they are made anew.
    smaller = replace(m, name=adapter.name, storage=storage, format=FORMAT if storage == "text" else m.format)
    # Rows belong to sentences as the index has them; one from before sentences were kept is made anew.
    has_sentences = bool(read_sentences(adapter.index, [0]))
    of_document = partial(write_document_index, title=m.title) if m.kind == "document" else write_index
    index = (lambda path, _: shutil.copyfile(adapter.index, path)) if has_sentences else of_document
    with AdapterWriter(library, smaller, read_chunks(adapter.index), index) as writer:
        if storage != "text":
            for i in range(m.n_chunks):
                rows = adapter.rows([i])
                if i == 0:
                    writer.open_factors({name: value for name, value in rows.items() if STATIC in name})
                factors = {kind: (rows[f"{kind}.a"], rows[f"{kind}.b"]) for kind in m.target.kinds}
                writer.add(factors, {kind: rows[f"{kind}{SENTENCE}"] for kind in m.memory_kinds})
        _check_newest(library, adapter)  # another process may have learned the document anew meanwhile
        return writer.finish(replace=True)


def _check_newest(library: Library, adapter: Adapter) -> None:
    newest = library.find(adapter.name).version
    if newest != adapter.manifest.version:
        raise AdapterError(
            f"{adapter.version} is not the newest version of {adapter.name!r}, and a smaller one would become it: "
            f"compact {adapter.name!r}"
        )
