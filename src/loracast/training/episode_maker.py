"""Texts and what is asked about them -> episodes of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from loracast.base.chat import ChatFormat, encode_with_offsets
from loracast.data.spans import SAY, FactSpan, TokenLabel, label_tokens
from loracast.documents import split_text
from loracast.scoring.episodes import Episode, Question

SYSTEM_TURNS = ("", "", "", "Answer briefly.", "You answer questions.", None)
"""System turns met in training: mostly empty, since the template's own costs more tokens than a question; None is the template's."""


CONTINUE = ("Continue: {}", "Go on: {}", "How does the text go on? {}", "What comes after this? {}")
"""How the beginning of a passage is put to the base."""
START_TOKENS = 8
"""Tokens of a passage that are given."""
CONTINUED_TOKENS = 24
"""Tokens that are to follow."""
_FEWEST_CONTINUED = 4
PASSAGE_TOKENS = START_TOKENS + CONTINUED_TOKENS
"""From one passage to the next, so that no token is asked for twice."""
UNRELATED_SHARE = 0.35
"""Share of steps whose documents are also asked something that has nothing to do with them, where there are such questions."""


def reading_prompt(chat: ChatFormat, document: str, question: str) -> list[int]:
    """The prompt of one who sees the document: the text, then the question, under an empty system turn."""
    content = f"{document}\n\nQuestion: {question}"
    return chat.conversation([{"role": "system", "content": ""}, {"role": "user", "content": content}])


def split_passage(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], first: int
) -> tuple[str, tuple[int, ...]]:
    """The passage of an encoded text that begins at a token: the text that is given of it, and the tokens that are to follow."""
    begins = first + START_TOKENS
    start = text[offsets[first][0] : offsets[begins - 1][1]].strip()
    return start, tuple(ids[begins : begins + CONTINUED_TOKENS])


class EpisodeMaker:
    """Knows how a base sees texts, questions and answers."""

    def __init__(
        self,
        tokenizer: Any,
        chat: ChatFormat,
        unrelated: Sequence[tuple[str, str]] = (),
        shows_documents: bool = False,
    ):
        """
        Args:
            unrelated: (question, answer) pairs that have nothing to do with any document.
            shows_documents: questions about real documents also get the prompt of a teacher that sees the document.
        """
        self.tokenizer, self.chat = tokenizer, chat
        self.unrelated, self.shows_documents = unrelated, shows_documents

    def chunk_texts(self, text: str, max_tokens: int, title: str = "") -> list[str]:
        """A document's chunks as the encoder reads them."""
        chunks = split_text(
            text, lambda part: encode_with_offsets(self.tokenizer, part), max_tokens=max_tokens, title=title
        )
        return [chunk.prompt for chunk in chunks]

    def episode(
        self, texts: Sequence[str], questions: tuple[Question, ...], task: str, stated: Sequence[FactSpan]
    ) -> Episode:
        """A document from its chunks' texts, with marks for what is stated in them: by each question one statement."""
        chunks: list[tuple[int, ...]] = []
        marks: list[TokenLabel] = []
        for i, text in enumerate(texts):
            ids, offsets = encode_with_offsets(self.tokenizer, text)
            chunks.append(tuple(ids))
            marks += label_tokens(i, text, offsets, stated)
        return Episode(tuple(chunks), questions, task, tuple(marks))

    def asks_unrelated(self, rng: random.Random) -> bool:
        """Draw whether the documents of a step are also asked what has nothing to do with them: all or none, since such questions are long
        and rows without one are padded to their length."""
        return bool(self.unrelated) and rng.random() < UNRELATED_SHARE

    def questions(
        self,
        rng: random.Random,
        pairs: Sequence[tuple[str, str]],
        document: str | None = None,
        *,
        asks_unrelated: bool = False,
    ) -> tuple[Question, ...]:
        """(question, answer) pairs under one system turn.

        Args:
            document: its text, where a teacher may see it.
            asks_unrelated: after them comes one that has nothing to do with the document.
        """
        system = rng.choice(SYSTEM_TURNS)
        questions = []
        for asked, answer in pairs:
            shown = reading_prompt(self.chat, document, asked) if document and self.shows_documents else ()
            prompt = tuple(self.chat.prompt(asked, system))
            questions.append(Question(prompt, tuple(self.chat.answer(answer)), window_prompt=tuple(shown)))
        if asks_unrelated:
            asked, answer = rng.choice(self.unrelated)
            prompt = tuple(self.chat.prompt(asked, system))
            questions.append(Question(prompt, tuple(self.chat.reply(answer)), is_unrelated=True))
        return tuple(questions)

    def passages(self, rng: random.Random, texts: Sequence[str], n: int) -> Episode:
        """A document whose passages are to be continued from their first few tokens, word for word: at most `n`, none in another's place."""
        chunks: list[tuple[int, ...]] = []
        places: list[tuple[int, int]] = []  # chunk, first token
        encoded = [encode_with_offsets(self.tokenizer, text) for text in texts]
        for i, (ids, _) in enumerate(encoded):
            chunks.append(tuple(ids))
            last = len(ids) - START_TOKENS - _FEWEST_CONTINUED
            places += [(i, first) for first in range(rng.randrange(PASSAGE_TOKENS), last + 1, PASSAGE_TOKENS)]
        questions, marks = [], []
        for number, (chunk, first) in enumerate(rng.sample(places, min(n, len(places)))):
            ids, offsets = encoded[chunk]
            start, answer = split_passage(texts[chunk], ids, offsets, first)
            prompt = self.chat.prompt(rng.choice(CONTINUE).format(start), rng.choice(("", None)))
            questions.append(Question(tuple(prompt), answer))
            marks += [
                TokenLabel(chunk, first + START_TOKENS + place, SAY, -1, place, -1, number)
                for place in range(len(answer))
            ]
        return Episode(tuple(chunks), tuple(questions), "reading", tuple(marks))
