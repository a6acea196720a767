"""Turn texts and questions about them into episodes of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from loracast.base.chat import ChatFormat, encode_with_offsets
from loracast.data.spans import INSIDE, FactSpan, TokenLabel, label_tokens
from loracast.documents import split_text
from loracast.documents.sentences import sentence_spans, token_sentences
from loracast.scoring.episodes import Episode, Question
from loracast.training.sentence_gates import weights_of

# System turns of training prompts; most are empty, since the template's own (None) is longer than a question.
SYSTEM_TURNS = ("", "", "", "Answer briefly.", "You answer questions.", None)
CONTINUE = ("Continue: {}", "Go on: {}", "How does the text go on? {}", "What comes after this? {}")
START_TOKENS, CONTINUED_TOKENS = 8, 24  # of a passage: those that the prompt gives, and those that the answer has
_FEWEST_CONTINUED = 4
PASSAGE_TOKENS = START_TOKENS + CONTINUED_TOKENS  # distance between passages, so that they do not overlap
UNRELATED_SHARE = 0.35  # of steps: their documents are also asked an unrelated question, if there are any

Answered = Sequence[tuple[str, str, FactSpan]]
"""Questions with their answers and the statements that give them."""


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
        """`unrelated` are (question, answer) pairs unrelated to any document; with `shows_documents`, questions
        about real documents also get the prompt of a teacher that sees the document.
        """
        self.tokenizer, self.chat = tokenizer, chat
        self.unrelated, self.shows_documents = unrelated, shows_documents

    def chunk_texts(self, text: str, max_tokens: int, title: str = "") -> list[str]:
        """A document's chunks, as the encoder reads them."""
        encode = partial(encode_with_offsets, self.tokenizer)
        return [chunk.prompt for chunk in split_text(text, encode, max_tokens=max_tokens, title=title)]

    def asks_unrelated(self, rng: random.Random) -> bool:
        """Draw whether all documents of a step get an unrelated question or none: rows are padded to its length."""
        return bool(self.unrelated) and rng.random() < UNRELATED_SHARE

    def episode(
        self,
        rng: random.Random,
        texts: Sequence[str],
        answered: Answered,
        task: str,
        *,
        asks_unrelated: bool,
        document: str | None = None,
        unasked: Sequence[FactSpan] = (),
    ) -> Episode:
        """An episode from chunk texts, with its questions under one system turn and token labels for its statements.

        `document` is the text that a teacher may see; an unrelated question comes last if `asks_unrelated`. A memory
        has to write values before it knows the questions, so values not asked for are labelled too (`unasked`).
        """
        system = rng.choice(SYSTEM_TURNS)
        asked = [text for text, *_ in answered]
        questions = []
        for text, answer, _ in answered:
            shown = reading_prompt(self.chat, document, text) if document and self.shows_documents else ()
            prompt = tuple(self.chat.prompt(text, system))
            questions.append(Question(prompt, tuple(self.chat.answer(answer)), window_prompt=tuple(shown)))
        if asks_unrelated:
            text, answer = rng.choice(self.unrelated)
            asked.append(text)
            prompt = tuple(self.chat.prompt(text, system))
            questions.append(Question(prompt, tuple(self.chat.reply(answer)), is_unrelated=True))
        encoded = [encode_with_offsets(self.tokenizer, text) for text in texts]
        labels: list[TokenLabel] = []
        for i, (text, (_, offsets)) in enumerate(zip(texts, encoded, strict=True)):
            labels += label_tokens(i, text, offsets, [fact for *_, fact in answered])
            taken = {label.token for label in labels if label.chunk == i}
            for fact in unasked:  # a value that shares a token with another one is left out
                found = label_tokens(i, text, offsets, [fact])
                if taken.isdisjoint(tokens := {label.token for label in found}):
                    labels += [label._replace(statement=-1) for label in found]
                    taken |= tokens
        episode = Episode(tuple(tuple(ids) for ids, _ in encoded), tuple(questions), task, tuple(labels))
        return _weighed(episode, texts, [offsets for _, offsets in encoded], asked)

    def passages(self, rng: random.Random, texts: Sequence[str], n: int) -> Episode:
        """A document with at most `n` passages, none overlapping, to continue word for word from their first tokens."""
        encoded = [encode_with_offsets(self.tokenizer, text) for text in texts]
        places: list[tuple[int, int]] = []  # chunk, first token
        for i, (ids, _) in enumerate(encoded):
            last = len(ids) - START_TOKENS - _FEWEST_CONTINUED
            places += [(i, first) for first in range(rng.randrange(PASSAGE_TOKENS), last + 1, PASSAGE_TOKENS)]
        questions, labels, asked = [], [], []
        for number, (chunk, first) in enumerate(rng.sample(places, min(n, len(places)))):
            ids, offsets = encoded[chunk]
            start, answer = split_passage(texts[chunk], ids, offsets, first)
            asked.append(rng.choice(CONTINUE).format(start))
            prompt = self.chat.prompt(asked[-1], rng.choice(("", None)))
            questions.append(Question(tuple(prompt), answer))
            token = first + START_TOKENS
            labels += [TokenLabel(chunk, token + i, INSIDE, -1, i, -1, number) for i in range(len(answer))]
        episode = Episode(tuple(tuple(ids) for ids, _ in encoded), tuple(questions), "reading", tuple(labels))
        return _weighed(episode, texts, [offsets for _, offsets in encoded], asked)


def _weighed(
    episode: Episode, texts: Sequence[str], offsets: Sequence[Sequence[tuple[int, int]]], asked: Sequence[str]
) -> Episode:
    """The episode with the weights that its questions give the document's sentences.

    Args:
        offsets: the (start, end) characters of each chunk's tokens.
        asked: the questions' texts.
    """
    sentences, n = [], 0
    for text, of_text in zip(texts, offsets, strict=True):
        spans = sentence_spans(text)
        sentences.append(tuple(n + i for i in token_sentences(spans, of_text)))
        n += len(spans)
    pairs = zip(episode.questions, weights_of(texts, asked), strict=True)
    questions = tuple(replace(question, sentence_weights=weights) for question, weights in pairs)
    return replace(episode, questions=questions, token_sentences=tuple(sentences))
