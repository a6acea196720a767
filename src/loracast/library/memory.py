"""A memory: the document adapter whose chunks are what a user said in chats, and how a question finds them.

A memory is a document to every other part of the library. Its text is one message after the other, with a blank line
between them and none inside, so that its chunks say where a message begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loracast.documents.chunks import Chunk
from loracast.documents.clean import normalise
from loracast.documents.sentences import sentence_spans
from loracast.library.bm25 import search
from loracast.library.index import Index
from loracast.library.routing import Route, route_question

MESSAGE_GAP = "\n\n"
_IMPERSONAL_THRESHOLD = 0.8
"""Least probability that a question is about a memory if no word in it stands for its speaker (chosen on dev chats).
"What time is it?" shares its words with much that people say of themselves."""
_FEWEST_WORDS = 3
_GREETING = re.compile(
    r"^(?:hi|hello|hey|thanks|ok|okay|(?:good )?(?:morning|evening|afternoon|day))(?: there| again)?\s*[,!.:]\s*", re.I
)
_SPEAKER = re.compile(r"\b(?:i|i'm|i've|i'd|me|my|mine|myself|we|we're|we've|us|our|ours)\b", re.I)
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


def route_memory(index: Index, n_chunks: int, question: str, k: int | None, threshold: float) -> Route:
    """What a question gets of a memory: as of any document, but nothing where no word of it was ever said.

    A document that is short is given whole then; a memory holds something else in every sentence.

    Args:
        threshold: as in `route_question`; higher for questions without a word for their speaker.
    """
    if threshold > 0 and not search(index, question, 1):
        return Route((), reason="no word of the question was ever said")
    is_personal = threshold <= 0 or _SPEAKER.search(question)
    return route_question(index, n_chunks, question, k, threshold if is_personal else _IMPERSONAL_THRESHOLD)
