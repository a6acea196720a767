"""A memory: the document adapter whose chunks are what a user said in chats, and questions that follow others.

A memory is a document to every other part of the library. Its text is one message after the other, with a blank line
between them and none inside, so that its chunks say where a message begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loracast.documents.chunks import Chunk
from loracast.documents.clean import normalise
from loracast.documents.units import sentence_spans
from loracast.reading.search import phrases

MESSAGE_GAP = "\n\n"
_FEWEST_WORDS = 3
_GREETING = re.compile(
    r"^(?:hi|hello|hey|thanks|ok|okay|(?:good )?(?:morning|evening|afternoon|day))(?: there| again)?\s*[,!.:]\s*", re.I
)
_REQUEST = re.compile(
    r"(?:please|write|tell|give|show|explain|describe|list|summari[sz]e|translate|make|help|let's|let us|thanks?|"
    r"(?:what|who|whose|which|why|how)(?:'s|'re)?|is|are|am|do|does|did|can|could|would|should|"
    r"(?:when|where) (?:is|are|am|was|were|do|does|did|can|could|will|would|should)|"
    r"will (?:you|i|we|it|he|she|they|there|the|my))\b",
    re.I,
)
"""How a sentence begins that states nothing, also where its question mark is missing."""


def statements_in(message: str) -> str:
    """The sentences of a message that state something, on one line; "" where it only asks, requests or greets.

    A question that was remembered would be found in place of its answer.
    """
    message = normalise(message)
    sentences = [_GREETING.sub("", message[start:end], count=1) for start, end in sentence_spans(message)]
    stated = [one for one in sentences if not one.rstrip("\"'”’)").endswith("?") and not _REQUEST.match(one)]
    return " ".join(" ".join(one.split()) for one in stated if len(one.split()) >= _FEWEST_WORDS)


def messages_in(chunks: Sequence[Chunk]) -> list[str]:
    """The messages of a memory, the oldest first; a long one has several chunks."""
    messages: list[str] = []
    end = -len(MESSAGE_GAP)
    for chunk in chunks:
        if chunk.start - end >= len(MESSAGE_GAP):
            messages.append(chunk.text)
        else:
            messages[-1] += " " * (chunk.start - end) + chunk.text
        end = chunk.end
    return messages


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
