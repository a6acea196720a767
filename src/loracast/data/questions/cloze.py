"""Rule-made questions about any text, which need no model: a name, number or date is taken out of a sentence, and what is left asks
for it (after Lewis et al., "Unsupervised question answering by cloze translation", arXiv 1906.04980).

The words of such a question stand in the text, so it teaches to find a sentence by its words, where people's questions say the
same in others. Knows texts only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from loracast.data.questions.answers import sentence_spans
from loracast.data.spans import FactSpan

_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_CAPITAL = r"[A-Z][\w'’-]+"
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("date", re.compile(rf"\b(?:{_MONTH})(?: \d{{1,2}})?,? \d{{4}}\b|\b\d{{1,2}} (?:{_MONTH})(?: \d{{4}})?\b|\b(?:{_MONTH}) \d{{1,2}}\b")),
    ("year", re.compile(r"\b(?:1[0-9]|20)\d\d\b")),
    ("amount", re.compile(r"[$€£]\s?\d[\d,.]*(?: (?:million|billion|thousand))?|\b\d[\d,.]*\s?(?:%|percent|per cent)(?!\w)")),
    ("number", re.compile(r"\b\d[\d,]*(?:\.\d+)?(?: (?:million|billion|thousand|hundred))?\b(?!\w)")),
    ("name", re.compile(rf"{_CAPITAL}(?:(?: of the | of | the | and | de | )?{_CAPITAL})*")),
    ("thing", re.compile(r"(?<=\bthe )[a-z]+(?: [a-z]+)?(?= (?:of|in|was|is|were|are|and|to|that|which)\b)|(?<=\ba )[a-z]+ [a-z]+(?=[,.;])")),
)  # fmt: skip
_ASKS: dict[str, tuple[str, ...]] = {
    "date": ("When", "On what date", "When was it that"),
    "year": ("When", "In what year", "In which year"),
    "amount": ("How much", "What amount", "What percentage"),
    "number": ("How many", "What number", "What is the number:"),
    "name": ("Who", "What", "Which", "What is the name:", "Where", "Whose"),
    "thing": ("What", "Which", "What kind of thing"),
}
_BLANK = ("Fill the gap: {}", "Complete: {}", "What is missing? {}", "{}", "What belongs in the gap? {}")
_STOPS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "to",
        "for",
        "and",
        "or",
        "but",
        "with",
        "by",
        "from",
        "as",
        "is",
        "was",
        "are",
        "were",
        "be",
        "been",
        "it",
        "its",
        "this",
        "that",
        "he",
        "she",
        "they",
        "his",
        "her",
        "their",
        "which",
        "who",
        "when",
        "where",
        "had",
        "has",
        "have",
        "not",
        "also",
        "into",
        "than",
        "then",
        "there",
    ]
)
_WORD = re.compile(r"\S+")
_TURNS = 5
_FEWEST_WORDS = 5
_MOST_WORDS = 22


@dataclass(frozen=True)
class Cloze:
    """A question, its answer, and where the text says it."""

    question: str
    answer: str
    stated: FactSpan


def make_clozes(rng: random.Random, text: str, n: int) -> list[Cloze]:
    """At most `n` questions about a text, of different sentences where there are enough, in the order of the text."""
    spans = [span for span in sentence_spans(text) if len(_WORD.findall(text[slice(*span)])) >= _FEWEST_WORDS]
    rng.shuffle(spans)
    made: list[tuple[int, Cloze]] = []
    asked: set[tuple[int, str]] = set()
    for start, end in spans * _TURNS:  # several of a sentence where there are few
        if len(made) == n:
            break
        sentence = text[start:end]
        cloze = _cloze(rng, sentence)
        if cloze is not None and (start, cloze.answer) not in asked:
            asked.add((start, cloze.answer))
            made.append((start, cloze))
    return [cloze for _, cloze in sorted(made, key=lambda pair: pair[0])]


def _cloze(rng: random.Random, sentence: str) -> Cloze | None:
    """A question about one sentence; None where nothing in it can be asked for."""
    found = [(kind, match) for kind, pattern in _KINDS for match in pattern.finditer(sentence) if _may_ask(kind, match)]
    if not found:
        return None
    kinds = sorted({kind for kind, _ in found})
    kind = rng.choice(kinds)
    match = rng.choice([match for of_kind, match in found if of_kind == kind])
    answer = match.group()
    before, after = sentence[: match.start()], sentence[match.end() :]
    if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", before + " " + after):
        return None  # the question would say it
    question = _with_gap(rng, before, after) if rng.random() < 0.3 else _with_word(rng, kind, before, after)
    return Cloze(question, answer, FactSpan(sentence, "", answer, match.start())) if question else None


def _may_ask(kind: str, match: re.Match[str]) -> bool:
    """Whether a match is worth asking for: the first word of a sentence or of what is quoted has a capital whatever it is."""
    if kind != "name":
        return True
    before = match.string[: match.start()].rstrip()
    is_first = not before or before[-1] in "\"“'‘.!?;:|([—"
    return match.group().split()[0].lower() not in _STOPS and (not is_first or " " in match.group())


def _with_gap(rng: random.Random, before: str, after: str) -> str:
    """The sentence around a gap, cut to a few words on both sides."""
    left, right = before.split(), after.split()
    room = rng.randint(_FEWEST_WORDS + 1, _MOST_WORDS)
    n_left = min(len(left), max(room // 2, room - len(right)))
    kept = [*left[len(left) - n_left :], "___", *right[: room - n_left]]
    return rng.choice(_BLANK).format(" ".join(kept))


def _with_word(rng: random.Random, kind: str, before: str, after: str) -> str | None:
    """A question word and what is left of the sentence: some words dropped, its parts perhaps the other way round."""
    left, right = (_thinned(rng, part.split()) for part in (before, after))
    words = [*right, *left] if rng.random() < 0.5 else [*left, *right]
    telling = [word for word in words if word.strip(",.;:()\"'").lower() not in _STOPS]
    if len(telling) < 2:
        return None
    first = rng.randrange(max(1, len(words) - _MOST_WORDS + 1))
    body = " ".join(words[first : first + _MOST_WORDS]).strip(" ,.;:\"'()")
    if rng.random() < 0.2:
        body = body.lower()
    return f"{rng.choice(_ASKS[kind])} {body}?"


def _thinned(rng: random.Random, words: Sequence[str]) -> list[str]:
    """Words without some of those that say little, and a few that do."""
    drop = rng.choice((0.0, 0.1, 0.3))
    return [
        word for word in words if rng.random() >= (min(1.0, drop * 2) if word.strip(",.;").lower() in _STOPS else drop)
    ]
