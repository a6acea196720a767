"""Read documents and questions once with a base, for a training that then needs no base: states in a file.

A document's chunks are read as in learning, with the hypernetwork's encoder LoRA; a question by the plain base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loracast.base.chat import encode_text, encode_with_offsets
from loracast.base.forward import pad_right, token_batches
from loracast.base.load import Base
from loracast.cast.document import split_document
from loracast.documents import Chunk
from loracast.documents.units import token_sentences
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.reader import ReaderConfig
from loracast.lab.data.asked import AskedDocument, AskedQuestion
from loracast.reading.questions import reading_encoder

NOWHERE, FOREIGN = -1, -2
"""In place of a unit: the answer stands nowhere in the document; the question is meant for none."""


@dataclass(frozen=True)
class ReadText:
    """A text whose states lie in the file."""

    ids: tuple[int, ...]
    row: int
    """Of its first token's state."""


@dataclass(frozen=True)
class ReadChunk(ReadText):
    """A chunk of a document."""

    chunk: Chunk
    units: tuple[int, ...]
    """The unit of each token, from 0 on."""
    n_units: int


@dataclass(frozen=True)
class ReadQuestion(ReadText):
    """A question, and where its answer is."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """The characters of each token."""
    chunk: int = NOWHERE
    """Of its document; `NOWHERE`, or `FOREIGN`."""
    unit: int = NOWHERE
    """Of the chunk."""
    token: int = -1
    """Of the chunk, with which the answer begins; -1 where it is not copied."""
    answer: str = ""


@dataclass(frozen=True)
class ReadDocument:
    """A document with questions."""

    source: str
    group: str
    chunks: tuple[ReadChunk, ...]
    questions: tuple[ReadQuestion, ...]


class ReadFile:
    """The documents and questions of a training, and their states [tokens, d] in fp16, which memory maps."""

    def __init__(
        self,
        path: Path,
        base: Base,
        hypernetwork: DocToLoRA,
        config: ReaderConfig,
        asked: Sequence[AskedDocument],
        foreign: Sequence[str] = (),
        progress: Callable[[int, int], object] = lambda done, total: None,
    ):
        """
        Args:
            path: the file of states; if it is there, it is that of the same documents.
            foreign: questions that are meant for no document.
            progress: called with the tokens that are read, and all.
        """
        tokenizer = base.tokenizer
        split = [split_document(base, one.document, hypernetwork.chunk_tokens) for one in asked]
        chunks = [chunk for of_one in split for chunk in of_one]
        questions = [question.text for one in asked for question in one.questions]
        texts = [*(chunk.prompt for chunk in chunks), *questions, *foreign]
        ids = [tuple(encode_text(tokenizer, text)) for text in texts]
        rows = np.cumsum([0, *map(len, ids)]).tolist()
        shape = rows[-1], config.d_state
        if not path.is_file():
            part = path.with_suffix(".part")
            states = np.memmap(part, np.float16, "w+", shape=shape)
            as_text, as_question = reading_encoder(base, config, hypernetwork), reading_encoder(base, config)
            n, n_read = len(chunks), 0
            for encoder, numbers in ((as_text, range(n)), (as_question, range(n, len(ids)))):
                by_length = sorted(numbers, key=lambda i: len(ids[i]))
                places = iter(by_length)
                for batch in token_batches(base, [texts[i] for i in by_length]):
                    with torch.inference_mode():
                        found = encoder(pad_right(batch, base.pad_id)[0].to(base.device)).states.half().cpu().numpy()
                    for i, of_one in zip(islice(places, len(batch)), found, strict=True):
                        states[rows[i] : rows[i + 1]] = of_one[: len(ids[i])]
                        n_read += len(ids[i])
                    progress(n_read, rows[-1])
            states.flush()
            part.rename(path)
        self._states = np.memmap(path, np.float16, "r", shape=shape)
        self._embeddings = base.model.get_input_embeddings().weight.detach()
        made = iter(zip(ids, rows, strict=False))
        read = [[_read_chunk(base, chunk, *next(made)) for chunk in of_one] for of_one in split]
        self.documents: list[ReadDocument] = []
        for one, of_one in zip(asked, read, strict=True):
            found_questions = [_read_question(base, question, of_one, *next(made)) for question in one.questions]
            known = tuple(question for question in found_questions if question is not None)
            self.documents.append(ReadDocument(one.source, one.group, tuple(of_one), known))
        self.foreign = [ReadQuestion(*next(made), text, _spans(base, text), FOREIGN, FOREIGN) for text in foreign]

    def tokens(self, texts: Iterable[ReadText]) -> Tensor:
        """States and input embeddings of texts, one after the other [t, 2 * d]."""
        texts = list(texts)
        states = np.concatenate([self._states[text.row : text.row + len(text.ids)] for text in texts])
        ids = torch.tensor([i for text in texts for i in text.ids])
        embedded = self._embeddings[ids.to(self._embeddings.device)].cpu().float()
        return torch.cat([torch.from_numpy(states).float(), embedded], -1)


def _read_chunk(base: Base, chunk: Chunk, ids: tuple[int, ...], row: int) -> ReadChunk:
    spans = chunk.units
    units = token_sentences(spans, encode_with_offsets(base.tokenizer, chunk.prompt)[1])
    return ReadChunk(ids, row, chunk, tuple(units), len(spans))


def _spans(base: Base, text: str) -> tuple[tuple[int, int], ...]:
    """The characters of each token of a question."""
    return tuple(encode_with_offsets(base.tokenizer, text)[1])


def _read_question(
    base: Base, question: AskedQuestion, chunks: Sequence[ReadChunk], ids: tuple[int, ...], row: int
) -> ReadQuestion | None:
    """A question with the place of its answer; None where no chunk holds all of it."""
    spans = _spans(base, question.text)
    if question.place is None:
        return ReadQuestion(ids, row, question.text, spans)
    start, end = question.place
    for number, read in enumerate(chunks):
        chunk = read.chunk
        if chunk.start <= start and end <= chunk.end:
            at = start - chunk.start + len(chunk.prompt) - len(chunk.text)
            offsets: Any = encode_with_offsets(base.tokenizer, chunk.prompt)[1]
            token = next((i for i, (_, stop) in enumerate(offsets) if stop > at), None)
            if token is not None:
                answer = chunk.text[start - chunk.start : end - chunk.start]
                begin = token if question.is_copied else -1
                return ReadQuestion(ids, row, question.text, spans, number, read.units[token], begin, answer)
    return None
