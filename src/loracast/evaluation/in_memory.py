"""Documents learned in memory, without a disk, the chunks of many documents cast in one batch.

Chunks, index and factors are made by the code of `loracast learn`, in the same precision; a test compares them.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from loracast.cast.document import cast_chunks, split_document, static_of
from loracast.documents import Document
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.library.bm25 import best_passages
from loracast.library.index import IndexInMemory, write_index
from loracast.library.join import join_chunks
from loracast.library.layout import SENTENCE
from loracast.library.relevance import THRESHOLD
from loracast.library.routing import Route, SentenceWeights, route_question
from loracast.lora.algebra import LoRA
from loracast.lora.quantize import DEFAULT_STORAGE, Storage, as_stored, static_storage, storage_of
from loracast.model import Model


class InMemoryAdapter:
    """A document's chunks with their index; the factors of a chunk come with `cast`."""

    def __init__(
        self,
        model: Model,
        document: Document | str,
        title: str = "",
        max_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        storage: Storage = DEFAULT_STORAGE,
    ):
        self.document = Document.from_text(document, title) if isinstance(document, str) else document
        self.chunks = split_document(model.base, self.document, max_chunk_tokens)
        self._index = sqlite3.connect(":memory:", factory=IndexInMemory)
        write_index(self._index, self.chunks)
        hypernetwork = model.documents.hypernetwork
        self._target, self._merging = hypernetwork.config.target, hypernetwork.merging
        of_static = static_storage(storage)
        self._shared = {name: as_stored(value, of_static) for name, value in static_of(hypernetwork).items()}
        self._factors: dict[str, Tensor] = {}  # "down_proj.a" [chunks, layers, r, in], rows filled by `put`
        self._storage = storage
        self._is_cast = [False] * len(self.chunks)

    @property
    def full_text(self) -> str:
        """The document as a reader gets it."""
        title, text = self.document.title, self.document.text
        return f"{title}\n\n{text}" if title else text

    @property
    def n_tokens(self) -> int:
        return sum(chunk.n_tokens for chunk in self.chunks)

    def chunk_of(self, statement: str, value_at: int) -> int | None:
        """The number of the chunk that holds a character of a statement; None where it is not there word for word."""
        at = self.document.text.find(statement)
        return None if at < 0 else max(0, bisect_right(self.chunks, at + value_at, key=lambda chunk: chunk.start) - 1)

    def route(self, question: str, k: int | None, threshold: float = THRESHOLD, name: str = "") -> Route:
        """What a question gets of the document, as `Adapter.route` says it."""
        return route_question(self._index, len(self.chunks), question, k, threshold, name)

    def best_passages(self, question: str, k: int) -> list[int]:
        """The k chunks that BM25 finds best, in order; all where none matches."""
        return best_passages(self._index, question, len(self.chunks), k)

    def needs(self, chunk: int) -> bool:
        """Whether a chunk's factors have yet to be cast."""
        return not self._is_cast[chunk]

    def put(self, chunk: int, factors: dict[str, tuple[Tensor, Tensor]], sentences: Mapping[str, Tensor]) -> None:
        """Keep one chunk's factors, by kind A [layers, r, in] and B [layers, r, out], and its rows' sentences [r]."""
        for kind, numbers in sentences.items():
            name = f"{kind}{SENTENCE}"
            if name not in self._factors:
                self._factors[name] = torch.full((len(self.chunks), *numbers.shape), -1, dtype=numbers.dtype)
            self._factors[name][chunk] = numbers
        for kind, pair in factors.items():
            for side, rows in zip(("a", "b"), pair, strict=True):
                name = f"{kind}.{side}"
                if name not in self._factors:
                    shape = (len(self.chunks), *rows.shape)
                    self._factors[name] = torch.empty(shape, dtype=torch.bfloat16, device=rows.device)
                storage = storage_of(self._storage, kind in sentences)
                self._factors[name][chunk].copy_(as_stored(rows, storage))
        self._is_cast[chunk] = True

    def lora(
        self,
        chunks: Sequence[int] | Mapping[int, float] | None = None,
        sentences: SentenceWeights | None = None,
        *,
        static: bool = True,
    ) -> LoRA:
        """The LoRA of some chunks, or of all (None), as `Adapter.lora` has it."""
        common = self._shared if static else {}
        wanted = sorted(set(range(len(self.chunks)) if chunks is None else chunks))
        weights = [chunks[i] for i in wanted] if isinstance(chunks, Mapping) else None
        of_chunks = None if sentences is None else [sentences[i] for i in wanted]
        if len(wanted) == len(self.chunks):
            return join_chunks(self._target, self._factors, common, self._merging, weights, of_chunks)
        picked = torch.tensor(wanted)
        rows = {name: value.index_select(0, picked.to(value.device)) for name, value in self._factors.items()}
        return join_chunks(self._target, rows, common, self._merging, weights, of_chunks)

    def close(self) -> None:
        """Free the index and the factors; chunks and text stay."""
        self._index.close()
        self._factors.clear()
        self._shared.clear()


def cast(model: Model, wanted: Iterable[tuple[InMemoryAdapter, Sequence[int]]]) -> None:
    """Cast chunks of several documents, full batches across documents; those that were cast before are left alone."""
    todo = [(document, i) for document, chunks in wanted for i in chunks if document.needs(i)]
    todo = list(dict.fromkeys(todo))
    places = iter(todo)
    chunks = [document.chunks[i] for document, i in todo]
    units = [chunk.units for chunk in chunks]
    for expanded, sentences in cast_chunks(model.documents, model.base, [chunk.prompt for chunk in chunks], units):
        n = next(iter(expanded.values()))[0].shape[0]
        for row, (document, i) in enumerate(islice(places, n)):
            factors = {kind: (a[row], b[row]) for kind, (a, b) in expanded.items()}
            document.put(i, factors, {kind: numbers[row] for kind, numbers in sentences.items()})
