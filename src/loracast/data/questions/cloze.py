"""Make questions about any text by rule, without a model: remove a name, number or date from a sentence and ask for it.

After Lewis et al., "Unsupervised question answering by cloze translation", arXiv 1906.04980. Such a question shares its
words with the text, so it teaches to find a sentence by its words; people's questions use other words.
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
    ("date", re.compile(rf"\b(?:{_MONTH})(?: \d{{1,2}})?,? \d{{4}}\b|\b\d{{1,2}} (?:{_MONTH})(?: \d{{4}})?\b"
                        rf"|\b(?:{_MONTH}) \d{{1,2}}\b")),
    ("year", re.compile(r"\b(?:1[0-9]|20)\d\d\b")),
    ("amount", re.compile(r"[$€£]\s?\d[\d,.]*(?: (?:million|billion|thousand))?"
                          r"|\b\d[\d,.]*\s?(?:%|percent|per cent)(?!\w)")),
    ("number", re.compile(r"\b\d[\d,]*(?:\.\d+)?(?: (?:million|billion|thousand|hundred))?\b(?!\w)")),
    ("name", re.compile(rf"{_CAPITAL}(?:(?: of the | of | the | and | de | )?{_CAPITAL})*")),
    ("thing", re.compile(r"(?<=\bthe )[a-z]+(?: [a-z]+)?(?= (?:of|in|was|is|were|are|and|to|that|which)\b)"
                         r"|(?<=\ba )[a-z]+ [a-z]+(?=[,.;])")),
)  # fmt: skip
_ASKS: dict[str, tuple[str, ...]] = {
    "date": ("When", "On what date", "When was it that"),
    "year": ("When", "In what year", "In which year"),
    "amount": ("How much", "What amount", "What percentage"),
    "number": ("How many", "What number", "What is the number:"),
    "name": ("Who", "What", "Which", "What is the name:", "Where", "Whose"),
    "thing": ("What", "Which", "What kind of thing"),
}
_WORDS = """
a an the of in on at to for and or but with by from as is was are were be been it its this that he she they his her
their which who when where had has have not also into than then there
"""
STOP_WORDS = frozenset(_WORDS.split())  # frequent words that say little about a sentence
_BLANK = ("Fill the gap: {}", "Complete: {}", "What is missing? {}", "{}", "What belongs in the gap? {}")
_TURNS = 5
_FEWEST_WORDS = 5
_MOST_WORDS = 22


@dataclass(frozen=True)
class Cloze:
    """A question, its answer, and the sentence that gives it."""

    question: str
    answer: str
    fact: FactSpan


def make_clozes(rng: random.Random, text: str, n: int) -> list[Cloze]:
    """Make at most `n` questions about a text, about different sentences if there are enough, in the text's order."""
    spans = [span for span in sentence_spans(text) if len(text[slice(*span)].split()) >= _FEWEST_WORDS]
    rng.shuffle(spans)
    made: list[tuple[int, Cloze]] = []
    asked: set[tuple[int, str]] = set()
    for start, end in spans * _TURNS:  # several about one sentence if there are few
        if len(made) == n:
            break
        sentence = text[start:end]
        cloze = _cloze(rng, sentence)
        if cloze is not None and (start, cloze.answer) not in asked:
            asked.add((start, cloze.answer))
            made.append((start, cloze))
    return [cloze for _, cloze in sorted(made, key=lambda pair: pair[0])]


def _cloze(rng: random.Random, sentence: str) -> Cloze | None:
    """A question about one sentence; None if nothing in it can be asked for."""
    found = [(kind, match) for kind, pattern in _KINDS for match in pattern.finditer(sentence) if _may_ask(kind, match)]
    if not found:
        return None
    kind = rng.choice(sorted({kind for kind, _ in found}))
    match = rng.choice([match for of_kind, match in found if of_kind == kind])
    answer = match.group()
    before, after = sentence[: match.start()], sentence[match.end() :]
    if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", before + " " + after):
        return None  # the question would contain the answer
    question = _with_gap(rng, before, after) if rng.random() < 0.3 else _with_word(rng, kind, before, after)
    return Cloze(question, answer, FactSpan(sentence, "", answer, match.start())) if question else None


def _may_ask(kind: str, match: re.Match[str]) -> bool:
    """Whether to ask for a match: the first word of a sentence or quotation is capitalised even if it is no name."""
    if kind != "name":
        return True
    before = match.string[: match.start()].rstrip()
    is_first = not before or before[-1] in "\"“'‘.!?;:|([—"
    return match.group().split()[0].lower() not in STOP_WORDS and (not is_first or " " in match.group())


def _with_gap(rng: random.Random, before: str, after: str) -> str:
    """The sentence with a gap, cut to a few words on both sides."""
    left, right = before.split(), after.split()
    room = rng.randint(_FEWEST_WORDS + 1, _MOST_WORDS)
    n_left = min(len(left), max(room // 2, room - len(right)))
    kept = [*left[len(left) - n_left :], "___", *right[: room - n_left]]
    return rng.choice(_BLANK).format(" ".join(kept))


def _with_word(rng: random.Random, kind: str, before: str, after: str) -> str | None:
    """A question word and the rest of the sentence, with some words dropped and its two parts perhaps swapped."""
    left, right = (_thinned(rng, part.split()) for part in (before, after))
    words = [*right, *left] if rng.random() < 0.5 else [*left, *right]
    telling = [word for word in words if word.strip(",.;:()\"'").lower() not in STOP_WORDS]
    if len(telling) < 2:
        return None
    first = rng.randrange(max(1, len(words) - _MOST_WORDS + 1))
    body = " ".join(words[first : first + _MOST_WORDS]).strip(" ,.;:\"'()")
    if rng.random() < 0.2:
        body = body.lower()
    return f"{rng.choice(_ASKS[kind])} {body}?"


def _thinned(rng: random.Random, words: Sequence[str]) -> list[str]:
    """Drop some of the words, stop words twice as often."""
    drop = rng.choice((0.0, 0.1, 0.3))
    return [
        word
        for word in words
        if rng.random() >= (min(1.0, drop * 2) if word.strip(",.;").lower() in STOP_WORDS else drop)
    ]
