"""Turn texts and questions about them into episodes of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from loracast.base.chat import ChatFormat, encode_with_offsets
from loracast.data.spans import INSIDE, FactSpan, TokenLabel, label_tokens
from loracast.documents import split_text
from loracast.scoring.episodes import Episode, Question

SYSTEM_TURNS = ("", "", "", "Answer briefly.", "You answer questions.", None)
"""System turns of training prompts; most are empty, since the template's own (None) is longer than a question."""
CONTINUE = ("Continue: {}", "Go on: {}", "How does the text go on? {}", "What comes after this? {}")
"""Prompts that ask to continue a passage from its first tokens."""
START_TOKENS = 8
"""Tokens of a passage that the prompt gives."""
CONTINUED_TOKENS = 24
"""Tokens of a passage that the answer has."""
_FEWEST_CONTINUED = 4
PASSAGE_TOKENS = START_TOKENS + CONTINUED_TOKENS
"""Distance between passages, so that they do not overlap."""
UNRELATED_SHARE = 0.35
"""Share of steps whose documents are also asked an unrelated question, if there are any."""


def reading_prompt(chat: ChatFormat, document: str, question: str) -> list[int]:
    """The prompt of a reader that sees the document: the text, then the question, under an empty system turn."""
    content = f"{document}\n\nQuestion: {question}"
    return chat.conversation([{"role": "system", "content": ""}, {"role": "user", "content": content}])


def split_passage(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], first: int
) -> tuple[str, tuple[int, ...]]:
    """Split the passage that begins at token `first` into the text that is given and the tokens to continue with."""
    begins = first + START_TOKENS
    start = text[offsets[first][0] : offsets[begins - 1][1]].strip()
    return start, tuple(ids[begins : begins + CONTINUED_TOKENS])


class EpisodeMaker:
    """Makes episodes for one base: its tokenizer and its chat format."""

    def __init__(
        self,
        tokenizer: Any,
        chat: ChatFormat,
        unrelated: Sequence[tuple[str, str]] = (),
        shows_documents: bool = False,
    ):
        """
        Args:
            unrelated: (question, answer) pairs that are unrelated to any document.
            shows_documents: whether questions about real documents also get the prompt of a teacher that sees the
                document.
        """
        self.tokenizer, self.chat = tokenizer, chat
        self.unrelated, self.shows_documents = unrelated, shows_documents

    def chunk_texts(self, text: str, max_tokens: int, title: str = "") -> list[str]:
        """A document's chunks, as the encoder reads them."""
        chunks = split_text(
            text, lambda part: encode_with_offsets(self.tokenizer, part), max_tokens=max_tokens, title=title
        )
        return [chunk.prompt for chunk in chunks]

    def episode(
        self, texts: Sequence[str], questions: tuple[Question, ...], task: str, facts: Sequence[FactSpan]
    ) -> Episode:
        """An episode from chunk texts, with token labels for the facts; the i-th fact answers the i-th question."""
        chunks: list[tuple[int, ...]] = []
        labels: list[TokenLabel] = []
        for i, text in enumerate(texts):
            ids, offsets = encode_with_offsets(self.tokenizer, text)
            chunks.append(tuple(ids))
            labels += label_tokens(i, text, offsets, facts)
        return Episode(tuple(chunks), questions, task, tuple(labels))

    def asks_unrelated(self, rng: random.Random) -> bool:
        """Draw whether all documents of a step get an unrelated question or none: rows are padded to its length."""
        return bool(self.unrelated) and rng.random() < UNRELATED_SHARE

    def questions(
        self,
        rng: random.Random,
        pairs: Sequence[tuple[str, str]],
        document: str | None = None,
        *,
        asks_unrelated: bool = False,
    ) -> tuple[Question, ...]:
        """Encode (question, answer) pairs under one system turn.

        Args:
            document: its text, if a teacher may see it.
            asks_unrelated: whether an unrelated question follows.
        """
        system = rng.choice(SYSTEM_TURNS)
        questions = []
        for text, answer in pairs:
            shown = reading_prompt(self.chat, document, text) if document and self.shows_documents else ()
            prompt = tuple(self.chat.prompt(text, system))
            questions.append(Question(prompt, tuple(self.chat.answer(answer)), window_prompt=tuple(shown)))
        if asks_unrelated:
            text, answer = rng.choice(self.unrelated)
            prompt = tuple(self.chat.prompt(text, system))
            questions.append(Question(prompt, tuple(self.chat.reply(answer)), is_unrelated=True))
        return tuple(questions)

    def passages(self, rng: random.Random, texts: Sequence[str], n: int) -> Episode:
        """A document with at most `n` passages, none overlapping, to continue word for word from their first tokens."""
        encoded = [encode_with_offsets(self.tokenizer, text) for text in texts]
        places: list[tuple[int, int]] = []  # chunk, first token
        for i, (ids, _) in enumerate(encoded):
            last = len(ids) - START_TOKENS - _FEWEST_CONTINUED
            places += [(i, first) for first in range(rng.randrange(PASSAGE_TOKENS), last + 1, PASSAGE_TOKENS)]
        questions, labels = [], []
        for number, (chunk, first) in enumerate(rng.sample(places, min(n, len(places)))):
            ids, offsets = encoded[chunk]
            start, answer = split_passage(texts[chunk], ids, offsets, first)
            prompt = self.chat.prompt(rng.choice(CONTINUE).format(start), rng.choice(("", None)))
            questions.append(Question(tuple(prompt), answer))
            token = first + START_TOKENS
            labels += [TokenLabel(chunk, token + i, INSIDE, -1, i, -1, number) for i in range(len(answer))]
        return Episode(tuple(tuple(ids) for ids, _ in encoded), tuple(questions), "reading", tuple(labels))
