"""Keeps adapters of the library in a smaller storage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from loracast.errors import AdapterError
from loracast.library.adapter import SENTENCE, Adapter, layout
from loracast.library.index import read_chunks, read_sentences, write_index
from loracast.library.library import Library
from loracast.library.manifest import FORMAT
from loracast.library.save import ChunkBatch, save_rows
from loracast.lora.merge import MOST_KEYS
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
    if storage == m.storage and m.format == FORMAT:
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
    most_keys = MOST_KEYS if storage == "text" else m.most_keys  # from text, factors are cast as they are today
    smaller = replace(m, name=adapter.name, storage=storage, format=FORMAT, most_keys=most_keys)
    # Rows belong to sentences as the index has them; one from before sentences were kept is made anew.
    has_sentences = bool(read_sentences(adapter.index, [0]))
    of_document = partial(write_document_index, title=m.title) if m.kind == "document" else write_index
    index = (lambda path, _: shutil.copyfile(adapter.index, path)) if has_sentences else of_document
    is_same = storage == m.storage  # what is kept as it was is copied: rounding it again could change a scale
    static = {}
    if storage != "text":
        static = adapter.stored_static() if is_same and m.format > 3 else adapter.static_rows
    copied = [*adapter.optional, *(name for name in layout(m) if is_same or name.endswith(SENTENCE))]

    def batches() -> Iterator[ChunkBatch]:
        for i in range(m.n_chunks):
            rows = {} if is_same else adapter.rows([i], static=False)
            yield {**rows, **adapter.stored_rows([i], copied)}

    chunks = read_chunks(adapter.index)
    # Another process may learn the document anew meanwhile.
    check = partial(_check_newest, library, adapter)
    more = adapter.optional
    return save_rows(library, smaller, chunks, batches(), static, more, index=index, replace=True, check=check)


def _check_newest(library: Library, adapter: Adapter) -> None:
    newest = library.find(adapter.name).version
    if newest != adapter.manifest.version:
        raise AdapterError(
            f"{adapter.version} is not the newest version of {adapter.name!r}, and a smaller one would become it: "
            f"compact {adapter.name!r}"
        )
