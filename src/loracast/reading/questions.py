"""Asks a document with the learned reader (hypernets/reader.py): which units answer a question, or that none does.

What the reader keeps of a document's tokens lies in the document's index, so that a question costs a pass of the base's
lower blocks over the question alone. Documents that were learned without it, and those of which only the text is kept,
are read when they are first asked; their vectors stay in memory.
"""

from __future__ import annotations

import sqlite3
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, islice
from threading import Lock
from typing import Any, NamedTuple, cast
from unicodedata import normalize

import torch
from cachetools import LRUCache
from torch import Tensor

from loracast.base.chat import encode_with_offsets
from loracast.base.forward import pad_right, token_batches
from loracast.base.load import Base
from loracast.documents import Chunk
from loracast.documents.units import token_sentences
from loracast.errors import LEARN_AGAIN, AdapterError
from loracast.hypernets.encoders import HiddenStatesEncoder
from loracast.hypernets.protocol import Hypernetwork
from loracast.hypernets.reader import Found, Reader, ReaderConfig
from loracast.library.index import Index, changing_index, open_index, read_chunks, read_sentences
from loracast.reading.matching import CANDIDATES_KEPT, MIN_PROBABILITY, Candidate, Route, shortened
from loracast.reading.search import sentence_scores, words_held

Spans = Sequence[tuple[int, int]]
_CHUNKS_IN_MEMORY = 2048  # that are read when they are asked: about 50 MB
_POWER = 0.5  # of a unit's probability beside the best one's, as its weight


def match_tokens(index: Index, question: str, spans: Spans, chunk_of: Tensor) -> tuple[Tensor, Tensor]:
    """What the words of a question have in common with a document, for the reader: BM25 and matches of words.

    Args:
        spans: the characters of each of the question's tokens.
        chunk_of: the chunk of each unit of the document [n_units].

    Returns:
        BM25 of each unit, 1 for the best [n_units]; and for each token, 1 where a unit holds its word, a half where its
        chunk does, and then 1 where the document does [m, n_units + 1].
    """
    with open_index(index) as database:
        scores, words = sentence_scores(database, question), words_held(database, question)
    bm25 = torch.zeros(len(chunk_of)) if scores is None else torch.tensor(scores) / max(scores)
    held = torch.zeros(max(1, len(spans)), len(chunk_of) + 1)
    for (start, end), units, chunks in words:
        row = torch.zeros(len(chunk_of) + 1)
        row[:-1][torch.isin(chunk_of, torch.tensor(chunks))] = 0.5
        row[units], row[-1] = 1.0, float(bool(chunks))
        held[[i for i, (low, high) in enumerate(spans) if low < end and start < high]] = row
    return bm25, held


class ReadChunk(NamedTuple):
    """What the reader keeps of a chunk."""

    vectors: Tensor
    """Of its tokens, in bytes [t, width]."""
    units: tuple[int, ...]
    """The unit of each token, from 0 on."""


def reading_encoder(base: Base, config: ReaderConfig, hypernetwork: Hypernetwork | None = None) -> HiddenStatesEncoder:
    """Reads questions for a reader, or documents, if their hypernetwork is given: its encoder LoRA reads them."""
    lora = {} if hypernetwork is None else {"lora": cast(Any, hypernetwork).encoder_lora_batch}
    return HiddenStatesEncoder(base.model, [config.layer], prefix=config.prefix, reader_layer=config.layer, **lora)


def kept_chunks(reader: Reader, read: Tensor, owners: Sequence[Sequence[int]]) -> list[ReadChunk]:
    """What a reader keeps of chunks, from their states and input embeddings [chunks, t, 2 * d_state].

    Args:
        owners: of each chunk, the unit of each token.
    """
    vectors = reader.kept(reader.vectors(reader.standard(read))).cpu()
    return [ReadChunk(its[: len(units)].clone(), tuple(units)) for its, units in zip(vectors, owners, strict=True)]


class _Asked(NamedTuple):
    """A question as the base reads it."""

    read: Tensor
    """Its standardised tokens [m, 2 * d_state]."""
    ids: Tensor
    """Of these [m]."""
    spans: Spans
    """Their characters."""


def write_vectors(index: Index, reader_id: str, read: Sequence[tuple[int, ReadChunk]]) -> None:
    """Keep in a document's index what a reader keeps of some chunks, each with its number."""
    with changing_index(index) as database:
        database.execute("CREATE TABLE IF NOT EXISTS vectors (reader TEXT, chunk INTEGER, vectors BLOB, units BLOB)")
        rows = [
            (reader_id, number, one.vectors.cpu().numpy().tobytes(), array("H", one.units).tobytes())
            for number, one in read
        ]
        database.executemany("INSERT INTO vectors VALUES (?, ?, ?, ?)", rows)


class QuestionReader:
    """A reader bound to a base: it asks documents questions. Threads may share one."""

    def __init__(self, reader: Reader, base: Base, hypernetwork: Callable[[], Hypernetwork]):
        """
        Args:
            hypernetwork: gives the one of documents, whose encoder LoRA the base carries while it reads a document.
        """
        self.reader, self.base = reader, base
        self._hypernetwork = hypernetwork
        self._read: LRUCache[str, ReadChunk] = LRUCache(_CHUNKS_IN_MEMORY)
        self._asked: LRUCache[str, _Asked] = LRUCache(64)
        self._changing = Lock()

    @cached_property
    def _as_question(self) -> HiddenStatesEncoder:
        return reading_encoder(self.base, self.reader.config)

    @cached_property
    def _as_text(self) -> HiddenStatesEncoder:
        return reading_encoder(self.base, self.reader.config, self._hypernetwork())

    def match(self, index: Index, question: str) -> Route | None:
        """What a document has for a question; None for an index from before sentences were kept."""
        asked = self._asked_as(question)
        with open_index(index) as database:
            places = read_sentences(database)
            if not places:
                return None
            chunks, kept = read_chunks(database), self._kept(database)
            words = match_tokens(database, question, asked.spans, torch.tensor([place.chunk for place in places]))
        of_chunks: list[list[tuple[int, int]]] = [[] for _ in chunks]
        for place in places:
            of_chunks[place.chunk].append((place.start, place.end))
        read = self._document(kept, chunks, of_chunks)
        first = [0, *accumulate(map(len, of_chunks))]
        units = torch.tensor([first[i] + unit for i, one in enumerate(read) for unit in one.units])
        text = self.reader.unpacked(torch.cat([one.vectors for one in read]))
        return self._route(self.reader.find(asked.read, asked.ids, text, units, *words), chunks, of_chunks, read)

    def _route(self, found: Found, chunks: Sequence[Chunk], spans: Sequence[Spans], read: Sequence[ReadChunk]) -> Route:
        best, weights = max(found.of_units), [0.0] * sum(map(len, spans))
        for unit, probability in zip(found.units, found.of_units, strict=True):
            weights[unit] = (probability / best) ** _POWER
        rest = iter(weights)
        sentences = [tuple(islice(rest, len(of_one))) for of_one in spans]
        ranked = sorted((-max(some, default=0.0), chunk) for chunk, some in enumerate(sentences) if any(some))
        margin = found.margin - self.reader.refusing.item()
        return Route(
            tuple(chunk for _, chunk in ranked),
            tuple(-score for score, _ in ranked),
            tuple(sentences[chunk] for _, chunk in ranked),
            about=torch.sigmoid(torch.tensor(-margin)).item(),
            candidates=tuple(self._candidates(found, chunks, spans, read)),
            nowhere=found.nowhere,
            is_foreign=found.is_foreign,
        )

    def _candidates(
        self, found: Found, chunks: Sequence[Chunk], spans: Sequence[Spans], read: Sequence[ReadChunk]
    ) -> Iterator[Candidate]:
        """With what the answer may begin: texts from a token on to the end of its unit."""
        starts, offsets = [0, *accumulate(len(one.units) for one in read)], dict[int, Spans]()
        for token, probability in found.begins[:CANDIDATES_KEPT]:
            if probability < MIN_PROBABILITY:
                return
            chunk = bisect_right(starts, token) - 1
            at = token - starts[chunk]
            prompt = chunks[chunk].prompt
            if chunk not in offsets:
                offsets[chunk] = encode_with_offsets(self.base.tokenizer, prompt)[1]
            text = normalize("NFC", prompt[offsets[chunk][at][0] : spans[chunk][read[chunk].units[at]][1]])
            if beginning := shortened(text.strip()).rstrip():
                yield Candidate(beginning, probability, chunk)

    # ---- what the reader sees

    def _asked_as(self, question: str) -> _Asked:
        with self._changing:
            known = self._asked.get(question)
        if known is None:
            found, spans = encode_with_offsets(self.base.tokenizer, question)
            ids = torch.tensor(found or [self.base.pad_id])
            known = _Asked(self.reader.standard(self._states(self._as_question, ids[None])[0]), ids, spans)
            with self._changing:
                self._asked[question] = known
        return known

    @torch.inference_mode()
    def _states(self, encoder: HiddenStatesEncoder, ids: Tensor) -> Tensor:
        with self.base.lock:
            return cast(Tensor, encoder(ids.to(self.base.device)).read).cpu()

    def _kept(self, database: sqlite3.Connection) -> dict[int, ReadChunk]:
        """What an index keeps of chunks for this reader."""
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'vectors'").fetchone():
            return {}
        found = database.execute("SELECT chunk, vectors, units FROM vectors WHERE reader = ?", (self.reader.id,))
        return {number: self._from_bytes(vectors, units) for number, vectors, units in found}

    def _document(self, kept: dict[int, ReadChunk], chunks: Sequence[Chunk], spans: Sequence[Spans]) -> list[ReadChunk]:
        """What the reader keeps of each chunk: from the index, from memory, or read now."""
        with self._changing:
            for i, chunk in enumerate(chunks):
                if i not in kept and chunk.prompt in self._read:
                    kept[i] = self._read[chunk.prompt]
        if missing := [i for i in range(len(chunks)) if i not in kept]:
            made = self.read([chunks[i].prompt for i in missing], [spans[i] for i in missing])
            kept |= dict(zip(missing, made, strict=True))
            with self._changing:
                self._read.update({chunks[i].prompt: kept[i] for i in missing[:_CHUNKS_IN_MEMORY]})
        read = [kept[i] for i in range(len(chunks))]
        if any(max(one.units, default=0) >= len(of_one) for one, of_one in zip(read, spans, strict=True)):
            raise AdapterError(f"the index holds vectors of another text than its own; {LEARN_AGAIN}")
        return read

    def read(self, prompts: Sequence[str], spans: Sequence[Spans]) -> list[ReadChunk]:
        """Read chunks with the base's lower blocks.

        Args:
            spans: of each, the characters of its units.
        """
        offsets = (encode_with_offsets(self.base.tokenizer, prompt)[1] for prompt in prompts)
        owners = map(token_sentences, spans, offsets)
        read = list[ReadChunk]()
        for batch in token_batches(self.base, prompts):
            states = self._states(self._as_text, pad_right(batch, self.base.pad_id)[0])
            read += kept_chunks(self.reader, states, list(islice(owners, len(batch))))
        return read

    def _from_bytes(self, vectors: bytes, units: bytes) -> ReadChunk:
        """What an index holds of a chunk; a stranger's may hold anything."""
        width = self.reader.config.width
        if not (isinstance(vectors, bytes) and isinstance(units, bytes) and len(vectors) * 2 == len(units) * width > 0):
            raise AdapterError(f"the index holds vectors that are none; {LEARN_AGAIN}")
        numbers = torch.frombuffer(bytearray(vectors), dtype=torch.int8).view(-1, width)
        return ReadChunk(numbers, tuple(array("H", units)))
