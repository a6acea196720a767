"""Texts and what is asked about them -> episodes of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from loracast.chat import ChatFormat, encode_with_offsets
from loracast.documents import split_text
from loracast.training.episodes import Episode, Question
from loracast.training.marks import Mark, Stated, find_marks

SYSTEM_TURNS = ("", "", "", "Answer briefly.", "You answer questions.", None)
"""System turns met in training: mostly empty, since the template's own costs more tokens than a question; None is the template's."""


class EpisodeMaker:
    """Knows how a base sees texts, questions and answers."""

    def __init__(self, tokenizer: Any, chat: ChatFormat):
        self.tokenizer, self.chat = tokenizer, chat

    def chunk_texts(self, text: str, max_tokens: int, title: str = "") -> list[str]:
        """A document's chunks as the encoder reads them."""
        chunks = split_text(
            text, lambda part: encode_with_offsets(self.tokenizer, part), max_tokens=max_tokens, title=title
        )
        return [chunk.prompt for chunk in chunks]

    def episode(
        self, texts: Sequence[str], questions: tuple[Question, ...], task: str, stated: Sequence[Stated]
    ) -> Episode:
        """A document from its chunks' texts, with marks for what is stated in them: by each question one statement."""
        chunks: list[tuple[int, ...]] = []
        marks: list[Mark] = []
        for i, text in enumerate(texts):
            ids, offsets = encode_with_offsets(self.tokenizer, text)
            chunks.append(tuple(ids))
            marks += find_marks(i, text, offsets, stated)
        return Episode(tuple(chunks), questions, task, tuple(marks))

    def questions(self, rng: random.Random, pairs: Sequence[tuple[str, str]]) -> tuple[Question, ...]:
        """(question, answer) pairs under one system turn."""
        system = rng.choice(SYSTEM_TURNS)
        return tuple(Question(tuple(self.chat.prompt(q, system)), tuple(self.chat.answer(a))) for q, a in pairs)
