"""What a question of a chat is looked up with: by itself, or together with the questions before it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loracast.library.bm25 import phrases

_LONG = 7
"""A question of so many words stands alone."""
_LEADS = frozenset({"and", "but", "or", "so", "then", "also"})
_WORD = re.compile(r"\w+")
_REFERRING = frozenset(
    _WORD.findall("it its he him his she her they them their this that these those there one ones same other")
)
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")  # kana and Chinese characters, two of which count as a word
_BEFORE = 2  # questions that go along


def queries(question: str, before: Sequence[str]) -> list[str]:
    """What routing looks for, in turn, until a document has something.

    A question that stands alone is looked up alone, so that the questions before it make it neither more nor less
    about a document. Any other one ("And in winter?", "How heavy is it?") goes with those before it, and alone if that
    finds nothing. Each of those before it is a line of its own.
    """
    if not before or stands_alone(question):
        return [question]
    return ["\n".join([*(" ".join(one.split()) for one in before[-_BEFORE:]), question]), question]


def stands_alone(question: str) -> bool:
    """Whether a question says by itself what it is about: it is long, or names two things and refers to nothing."""
    words = [word.lower() for word in _WORD.findall(question)]
    n_unspaced = len(_UNSPACED.findall(question)) // 2
    if max(len(question.split()), n_unspaced) >= _LONG:
        return True
    if not words or words[0] in _LEADS or words[:2] in (["what", "about"], ["how", "about"]):
        return False
    n_telling = sum(" " not in phrase for phrase, _ in phrases(question))
    return _REFERRING.isdisjoint(words) and max(n_telling, n_unspaced) >= 2
