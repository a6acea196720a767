"""Casts a document into an adapter: text, chunks, features, rows, disk. Memory stays flat in the document's length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TypedDict

import torch
from cachetools import LRUCache
from torch import Tensor

from loracast.base.chat import encode_with_offsets
from loracast.base.forward import token_batches
from loracast.base.load import Base
from loracast.documents import Chunk, Document, split_text
from loracast.documents.units import sentence_spans, token_sentences
from loracast.errors import ConfigError, DocumentError, HypernetworkError
from loracast.hypernets.protocol import Caster
from loracast.library.adapter import SENTENCE, STATIC, Adapter, join_chunks
from loracast.library.library import Library
from loracast.library.manifest import Manifest
from loracast.library.save import ChunkBatch, Progress, save_rows, tensors_of
from loracast.lora.algebra import LoRA
from loracast.lora.quantize import DEFAULT_STORAGE, Storage, as_stored, storage_of
from loracast.reading.outline import write_document_index
from loracast.reading.questions import ReadChunk, kept_chunks, write_vectors

Spans = Sequence[tuple[int, int]]
"""The (start, end) characters of a chunk's sentences in its prompt."""
Place = tuple[str, tuple[tuple[int, int], ...]]
"""A chunk's prompt, and the places of its sentences."""


class Keeping(TypedDict, total=False):
    """Options of `Model.learn`."""

    max_chunk_tokens: int | None
    """Longest chunk, the hypernetwork's own by default: 192 for the shipped one, trained with up to 256."""
    storage: Storage
    """How factors are kept (lora/quantize.py), "int4" by default."""
    replace: bool
    """Whether an adapter of that name is replaced."""
    progress: Progress
    """Called with the chunks done and the chunks in all."""


def split_document(base: Base, document: Document, max_chunk_tokens: int) -> list[Chunk]:
    """Split a document into chunks of at most so many tokens of this base.

    Raises:
        ConfigError: no chunk can be so short. DocumentError: the document holds no text.
    """
    try:
        chunks = split_text(
            document.text,
            lambda text: encode_with_offsets(base.tokenizer, text),
            max_tokens=max_chunk_tokens,
            title=document.title,
            rows=document.rows,
        )
    except ValueError as error:
        raise ConfigError(f"max_chunk_tokens={max_chunk_tokens}: {error}; give a larger one") from error
    if not chunks:
        raise DocumentError(f"{document.file_name or 'the document'} holds no text")
    return chunks


def cast_chunks(
    caster: Caster,
    base: Base,
    prompts: Sequence[str],
    sentences: Sequence[Spans],
    read: Callable[[Sequence[ReadChunk]], object] = lambda chunks: None,
) -> Iterator[ChunkBatch]:
    """The rows of chunks, in order, a batch at a time, and the sentences of those that belong to tokens.

    Args:
        sentences: of each chunk.
        read: receives what the hypernetwork's reader keeps of the chunks of each batch, if it has one.
    """
    places = zip(prompts, sentences, strict=True)
    for batch in token_batches(base, prompts):
        features = caster.encode(batch)
        cast = caster.cast(features)
        owners = [
            token_sentences(spans, encode_with_offsets(base.tokenizer, prompt)[1])
            for prompt, spans in islice(places, len(batch))
        ]
        reader = caster.hypernetwork.reader
        if reader is not None and features.read is not None:
            read(kept_chunks(reader, features.read, owners))
        of_each = cast.tokens or {}
        ranks = {kind: cast.rows[kind][0].shape[2] for kind in of_each}
        of_rows = {f"{k}{SENTENCE}": _row_sentences(of_each[k].cpu(), owners, ranks[k]) for k in ranks}
        yield tensors_of(cast.rows) | of_rows


def _row_sentences(tokens: Tensor, owners: Sequence[Sequence[int]], rank: int) -> Tensor:
    """The sentence of each row of a memory [n, rank], -1 for rows that are filled up, from their tokens [n, r].

    Args:
        owners: for each token of a chunk the number of its sentence in the chunk.
    """
    sentences = torch.full((len(owners), rank), -1, dtype=torch.int16)
    for i, (row, owner) in enumerate(zip(tokens.tolist(), owners, strict=True)):
        for j, token in enumerate(row):
            if token < len(owner):  # others are of the batch's padding
                sentences[i, j] = owner[token]
    return sentences


class CachedRecast:
    """Casts the factors of chunks, and keeps the last ones in memory: about 2 MB each for the shipped hypernetwork."""

    def __init__(self, caster: Caster, base: Base, most: int = 32, storage: Storage = "bf16"):
        """
        Args:
            most: chunks whose factors are kept.
            storage: factors are rounded as they come back from an adapter of this storage.
        """
        self.caster, self.base, self.storage = caster, base, storage
        static, of_static = tensors_of(caster.hypernetwork.static_rows(), STATIC), storage_of(storage, True)
        self._static = {name: as_stored(value, of_static).cpu() for name, value in static.items()}
        self._rows: LRUCache[Place, dict[str, Tensor]] = LRUCache(most)
        self._changing = Lock()

    def attach(self, adapter: Adapter) -> None:
        """Have the factors of an adapter of storage `text` cast here.

        Raises:
            HypernetworkError: another hypernetwork made it.
        """
        if adapter.manifest.hypernetwork not in (self.caster.id, *self.caster.hypernetwork.former_ids):
            raise HypernetworkError(
                f"{adapter.name!r} keeps only its text, and this is not the hypernetwork that it was learned with "
                f"({adapter.manifest.hypernetwork}): give that one with --hypernetwork, or learn the document again"
            )
        adapter.recast = self

    def cast(self, places: Sequence[Place]) -> dict[Place, dict[str, Tensor]]:
        """The rows of each chunk; those of chunks that are not in memory are cast in one go."""
        with self._changing:
            found = {place: self._rows[place] for place in places if place in self._rows}
        new = [place for place in dict.fromkeys(places) if place not in found]
        ahead, prompts, spans = iter(new), [prompt for prompt, _ in new], [some for _, some in new]
        for batch in cast_chunks(self.caster, self.base, prompts, spans):
            stored = dict(batch)
            for name in (name for name in batch if not name.endswith(SENTENCE)):
                storage = storage_of(self.storage, name.partition(".")[0] + SENTENCE in batch)
                stored[name] = as_stored(batch[name], storage).cpu()
            for i in range(len(next(iter(stored.values())))):
                found[next(ahead)] = {name: value[i : i + 1].clone() for name, value in stored.items()}
        with self._changing:
            self._rows.update(found)
        return found

    def forget(self, places: Sequence[Place]) -> None:
        """Free the rows of these chunks."""
        for place in places:
            self._rows.pop(place, None)

    def __call__(self, prompts: Sequence[str], sentences: Sequence[Spans] | None = None) -> dict[str, Tensor]:
        """The tensors that an adapter of these chunks would hold, the static LoRA's included.

        Args:
            sentences: as in `cast_chunks`; those of an adapter's index, which another version may have split otherwise.
        """
        spans = map(sentence_spans, prompts) if sentences is None else sentences
        places: list[Place] = [(prompt, tuple(some)) for prompt, some in zip(prompts, spans, strict=True)]
        found = self.cast(places)
        each = [found[place] for place in places]
        return {name: torch.cat([rows[name] for rows in each]) for name in each[0]} | self._static


def cast_document(caster: Caster, base: Base, document: Document, max_chunk_tokens: int | None) -> LoRA:
    """Cast a document into a LoRA, all of its chunks merged, and keep nothing."""
    chunks = split_document(base, document, max_chunk_tokens or caster.hypernetwork.chunk_tokens)
    return merge_chunks(caster, base, chunks)


def merge_chunks(caster: Caster, base: Base, chunks: Sequence[Chunk], *, dense: bool = True) -> LoRA:
    """The LoRA of a document's chunks, all of them merged; `dense` as in `Adapter.lora`."""
    hypernetwork = caster.hypernetwork
    rows = CachedRecast(caster, base)([chunk.prompt for chunk in chunks])
    return join_chunks(hypernetwork.config.target, rows, rows, hypernetwork.merging, dense=dense)


def learn_document(
    caster: Caster,
    base: Base,
    document: Document,
    library: Library,
    name: str,
    *,
    chunks: Sequence[Chunk] | None = None,
    max_chunk_tokens: int | None = None,
    storage: Storage = DEFAULT_STORAGE,
    replace: bool = False,
    progress: Progress = lambda done, total: None,
) -> Adapter:
    """Cast a document into an adapter and keep it under `name`.

    If the library has an adapter of the same document, cast in the same way, that one gets the name. The adapter
    appears in the library once it is complete: casting that fails or is killed leaves nothing behind.

    Args:
        chunks: of a document that has been split already.
        max_chunk_tokens: longest chunk; as long as the hypernetwork was made for if None.
    """
    started = time.perf_counter()
    hypernetwork = caster.hypernetwork
    config = hypernetwork.config
    longest = max_chunk_tokens or hypernetwork.chunk_tokens
    if chunks is None:
        chunks = split_document(base, document, longest)
    manifest = Manifest(
        name=name,
        title=document.title,
        source=document.file_name,
        source_sha256=document.sha256,
        made_for=base.fingerprint,
        hypernetwork=caster.id,
        modules=config.target.rows,
        ranks=config.ranks,
        max_unscaled_chunks=dict(hypernetwork.merging.max_unscaled_chunks),
        key_decorrelation=dict(hypernetwork.merging.ridges),
        memory_kinds=hypernetwork.memory_kinds,
        n_chunks=len(chunks),
        n_tokens=sum(chunk.n_tokens for chunk in chunks),
        max_chunk_tokens=longest,
        warnings=document.warnings,
        storage=storage,
    )
    version = library.find_cached(manifest.cache_keys(hypernetwork.former_ids))
    if version is not None:
        library.check_whole(version)
        return library.give_name(name, version, replace=replace)
    if not replace:
        library.check_free(name)  # now, not after the work
    index = _IndexWriter(document.title, "" if hypernetwork.reader is None else hypernetwork.reader.id)
    prompts, units = [chunk.prompt for chunk in chunks], [chunk.units for chunk in chunks]
    batches = cast_chunks(caster, base, prompts, units, index.add)
    return save_rows(
        library,
        manifest,
        chunks,
        batches,
        tensors_of(hypernetwork.static_rows(), STATIC),
        seconds=lambda: time.perf_counter() - started,
        index=index,
        replace=replace,
        progress=progress,
    )


class _IndexWriter:
    """Writes the index of a document, and then, batch by batch, what a reader keeps of its chunks."""

    def __init__(self, title: str, reader_id: str):
        self.title, self.reader_id, self.n_read = title, reader_id, 0
        self.path = Path()

    def __call__(self, path: Path, chunks: Sequence[Chunk]) -> None:
        write_document_index(path, chunks, self.title)
        self.path = path

    def add(self, read: Sequence[ReadChunk]) -> None:
        write_vectors(self.path, self.reader_id, list(enumerate(read, self.n_read)))
        self.n_read += len(read)
