"""Find where a text answers a question: where the answer's sentence shares most words with the question."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loracast.data.spans import FactSpan

# A wrapped line is no end, but a table's row is.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n\s*\n|\n(?=[^\n]*\|)")
_WORD = re.compile(r"\w+")
_STEM = 5  # words that begin with as many equal characters count as the same: "settled" and "settling"


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Split a text roughly into sentences: (start, end) characters, without the blanks between them."""
    cuts = [0]
    for match in _SENTENCE_END.finditer(text):
        cuts += [match.start(), match.end()]
    cuts.append(len(text))
    return [(start, end) for start, end in zip(cuts[::2], cuts[1::2], strict=True) if text[start:end].strip()]


def find_answer(text: str, question: str, answers: Sequence[str]) -> FactSpan | None:
    """The sentence that answers a question, with the answer in its words; None if the text has no answer.

    Among equals the preferred answer wins, then the first place.
    """
    spans = sentence_spans(text)
    asked = _stems(question)
    best: tuple[float, int, int, int, str] | None = None
    for rank, answer in enumerate(answers):
        for start, end in _places(text, answer):
            home = next(((low, high) for low, high in spans if low <= start and end <= high), None)
            if home is None:
                continue
            shared = len(asked & (_stems(text[home[0] : home[1]]) - _stems(answer)))
            if best is None or shared - rank / len(answers) > best[0]:
                best = (shared - rank / len(answers), *home, start, text[start:end])
    if best is None:
        return None
    _, low, high, start, value = best
    return FactSpan(text[low:high], "", value, start - low)


def _places(text: str, answer: str) -> list[tuple[int, int]]:
    """Where an answer stands in a text as whole words, ignoring case."""
    pattern = rf"(?<!\w){re.escape(answer.strip())}(?!\w)"
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)] if answer.strip() else []


def _stems(text: str) -> set[str]:
    return {word[:_STEM] for word in _WORD.findall(text.lower()) if len(word) > 2}
