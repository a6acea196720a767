"""The needle task: sentences with a random value, hidden in natural prose, and questions for the values.

It widens the task of Doc-to-LoRA's first experiment (arXiv 2602.15902): many kinds of values, many names for them, and
one to eight needles that only their keys distinguish. Wordings are in `content/needles.toml`, disjoint for train and
test.

Documents for the needle task: a given number of tokens of natural prose, with sentences hidden at given depths.

The prose is cut from texts that no training has seen. It knows a tokenizer, which is handed in, and no model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, cycle

import numpy as np

from loracast.documents.chunks import Encode
from loracast.errors import ConfigError
from loracast.lab.data.facts import Split, expand, fill, wordings_of
from loracast.lab.data.rows import read_content

N_DEV = 2
"""Wordings of each list that are the dev split's."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'“(])")


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, its question and the answer."""

    statement: str
    question: str
    answer: str
    key: str


def make_needles(rng: random.Random, n_needles: int, *, split: Split, kind: str | None = None) -> list[Needle]:
    """Draw the needles of one document: a single one may lack a key, several have different keys.

    All values are of `kind`, one of `[kinds]` of the content; with None each draws one, 4-digit numbers most often.
    """
    content = read_content("needles")
    frames = content["plain"] if n_needles == 1 and rng.random() < 0.3 else content["keyed"]
    needles: list[Needle] = []
    while len(needles) < n_needles:
        name = kind or rng.choice([*sorted(content["kinds"]), "number4", "number4", "number4"])
        table = content["kinds"][name]
        label, value = rng.choice(wordings_of(table, "", split, N_DEV)), expand(rng, rng.choice(table["values"]))
        key = expand(rng, rng.choice(content["keys"]["things"]))
        state = fill(rng.choice(wordings_of(frames, "state_", split, N_DEV)), label=label, key=key, v=value)
        question = fill(rng.choice(wordings_of(frames, "ask_", split, N_DEV)), label=label, key=key, v=value)
        taken = any(key == other.key or value == other.answer for other in needles)
        if not taken and value.lower() not in question.lower():
            needles.append(Needle(state, question, value, key))
    return needles


def sentences(text: str) -> list[str]:
    """Split a text roughly into sentences, between which a needle can be put."""
    return [piece for piece in _SENTENCE_END.split(" ".join(text.split())) if piece]


def hide(statements: Sequence[str], prose: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Put each statement between two sentences of the prose, at its depth (0 is the beginning, 1 the end)."""
    slots = sorted(zip(depths, range(len(statements)), strict=True), reverse=True)
    mixed = list(prose)
    for depth, index in slots:  # from the back, so that earlier places do not move
        mixed.insert(round(depth * len(prose)), statements[index])
    return mixed


_MARGIN = 4  # tokens that a document stays below the length asked for, so that a chunk of that length holds it


class Haystack:
    """Prose by the token: runs of successive sentences from texts in random order."""

    def __init__(self, texts: Sequence[str], encode: Encode):
        """`encode` gives a string's token ids, without special tokens, and the (start, end) characters of each."""
        self._texts = [pieces for text in texts if len(pieces := sentences(text)) >= 3]
        if not self._texts:
            raise ConfigError("the given texts hold no prose (no text of three sentences); give others with --texts")
        self._encode = encode
        self._count = cache(lambda sentence: len(encode(f" {sentence}")[0]))  # as it is in the middle of a text

    def sample(self, rng: random.Random, n_tokens: int, needles: Sequence[Needle], depths: Sequence[float]) -> str:
        """A document of `n_tokens` tokens or a few less, each needle at the sentence's end next to its depth.

        A depth of 0 is the beginning, 1 the end.
        """
        room = n_tokens - _MARGIN - sum(self._count(needle.statement) for needle in needles)
        if room < 0:
            raise ConfigError(f"{len(needles)} needle(s) do not fit into {n_tokens} tokens; ask for longer documents")
        prose, lengths = self._span(rng, room)
        seams = np.array([0, *accumulate(lengths)])  # tokens before each place where a needle may go
        slots = [int(np.abs(seams - depth * seams[-1]).argmin()) for depth in depths]
        for slot, number in sorted(zip(slots, range(len(needles)), strict=True), reverse=True):
            prose.insert(slot, needles[number].statement)  # from the back: earlier places stay where they are
        return " ".join(prose)

    def _span(self, rng: random.Random, n_tokens: int) -> tuple[list[str], list[int]]:
        """Sentences of `n_tokens` tokens, the last one cut at a word's end, and their token counts."""
        pieces: list[str] = []
        lengths: list[int] = []
        room = n_tokens
        order = rng.sample(range(len(self._texts)), len(self._texts))
        start = rng.randrange(len(self._texts[order[0]]))
        for i in cycle(order):
            for sentence in self._texts[i][start:]:
                length = self._count(sentence)
                if length > room:
                    if head := self._head(sentence, room):
                        pieces.append(head)
                        lengths.append(self._count(head))
                    return pieces, lengths
                pieces.append(sentence)
                lengths.append(length)
                room -= length
            start = 0
        raise AssertionError("a cycle does not end")

    def _head(self, sentence: str, n_tokens: int) -> str:
        """The beginning of a sentence, at most `n_tokens` tokens, ending with a word."""
        offsets = self._encode(sentence)[1]
        if n_tokens < 1 or len(offsets) <= n_tokens:
            return ""
        end = offsets[n_tokens - 1][0]
        is_between_words = end > 0 and (sentence[end].isspace() or sentence[end - 1].isspace())
        head = sentence[:end]
        return (head if is_between_words else head.rpartition(" ")[0]).strip()
