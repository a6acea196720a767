"""What the methods of the public `Model` take and give: documents, questions, adapters, options by name, answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypedDict

from loracast.base.chat import Message
from loracast.base.generate import Answer, Sampling
from loracast.cast.document import Progress
from loracast.documents import Document, read_document
from loracast.documents.images import MAGIC_BYTES, ImageFile, image_format, is_image_file, read_image_file
from loracast.errors import DocumentError
from loracast.library.adapter import Adapter
from loracast.lora.algebra import LoRA
from loracast.lora.quantize import Storage
from loracast.reading.matching import Likely
from loracast.reading.routing import Route
from loracast.reading.wide_route import Source

Readable = str | Path | BinaryIO | Document | ImageFile
"""A path, "-" for standard input, an open binary stream, or a Document or ImageFile. A string is always a path: pass
text as `Document.from_text(text)`."""
Question = str | Sequence[Message]
"""A question, or the messages of a chat, the last one the user's."""
Chosen = Adapter | LoRA | str | Sequence[Adapter | str]
"""What a question is answered with: an adapter or its name, several, none (the plain base), or one LoRA. "*" is the
whole library and a pattern such as "manuals-*" all documents with such names, of which those that match are opened."""
NOT_SAID = "The document does not say."
"""The answer of a refusal, and in training to a question that the document does not answer."""
LEAST_CONFIDENCE = 0.5
"""Of a strict answer (`Answer.confidence`), however likely the documents hold it. Chosen on dev, as are the next ones
(docs/notebook/2026-12-01.md)."""
_LOGIT, _SLOPE = 4.8, 0.75  # the least confidence's logit is this, less the slope times that of `Route.about`,
_SLOPE_NOWHERE = 0.75  # and more by this slope times that of `Route.nowhere`
_LEAST_NOWHERE, _ANY_NOWHERE = 0.001, 0.03  # the second one where nobody looked
_LONGEST_NAME = 255
"""Characters of a file's name at most, on all common systems."""


AnsweredBy = Literal["adapter", "base", "outline", "refusal"]
"""What gave an answer: the model with an adapter, the plain base (no adapter was used), the outline that a document
keeps, or the refusal `NOT_SAID`. The last two ask no model, or leave aside what it said."""


@dataclass(frozen=True)
class SourcedAnswer(Answer):
    """An answer, what it cost, what gave it, and where in which documents it comes from."""

    answered_by: AnsweredBy = "base"
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """One question, ready to be generated: its prompt, and what of which adapters it is answered with."""

    prompt: list[int]
    routed: list[tuple[Adapter, Route]]
    sources: tuple[Source, ...]
    answer: SourcedAnswer | None = None
    """The answer where no model is needed: from the outlines of the documents (`Model.overview`), or `NOT_SAID`."""
    likely: tuple[Likely, ...] = ()
    """What the answer may begin with, by the words of the documents."""
    least_confidence: float = 0.0
    """An answer of a lower confidence becomes `NOT_SAID`; where it is above 0, no text must be shown before the end."""
    has_lora: bool = False
    """Whether a LoRA answers that is no adapter of a library, so that `routed` does not name it."""

    @property
    def answered_by(self) -> AnsweredBy:
        """What answers, unless it turns out too unsure."""
        if self.answer is not None:
            return self.answer.answered_by
        return "adapter" if self.has_lora or any(not route.is_empty for _, route in self.routed) else "base"

    def sourced(self, given: Answer) -> SourcedAnswer:
        """What the base answered, with its sources; or, where it is too unsure, `NOT_SAID`."""
        if given.confidence < self.least_confidence:
            return SourcedAnswer(**{**vars(given), "text": NOT_SAID, "finished": True}, answered_by="refusal")
        return SourcedAnswer(**vars(given), answered_by=self.answered_by, sources=self.sources)


def least_confidence(routes: Sequence[Route]) -> float:
    """How sure the model must be of a strict answer, 0 to 1: the surer, the less likely the documents give it.

    Args:
        routes: what the question gets of each document.
    """
    about = max((route.about for route in routes if route.about is not None), default=None)
    nowhere = min((route.nowhere for route in routes if route.nowhere is not None), default=_ANY_NOWHERE)
    if about is None:
        return LEAST_CONFIDENCE
    logit = _LOGIT - _SLOPE * _logit(about) + _SLOPE_NOWHERE * _logit(max(nowhere, _LEAST_NOWHERE))
    return max(LEAST_CONFIDENCE, 1 / (1 + math.exp(-logit)))


def _logit(probability: float) -> float:
    return math.log(max(probability, 1e-6) / max(1 - probability, 1e-6))


class Asking(TypedDict, total=False):
    """Options of `Model.ask`, `answer` and `stream`."""

    tag: str
    """Choose among the documents with this tag."""
    always: bool
    """Answer with the documents' adapters even where the question is not about them at all; otherwise the plain base
    answers then (reading/relevance.py)."""
    strict: bool
    """Answer from the documents alone: where the question is about none of them, or the model is less sure of its
    answer than `least_confidence`, the answer is `NOT_SAID`. It comes as a whole, also from `stream`."""
    route: int | None
    """Number of chunks that are merged for the question, of each document that is named and of all that a pattern or a
    tag stands for; None merges all of those that are named. 2 by default."""
    system: str | None
    """The system turn, "" for an empty one (the default), None for the template's own. A chat may have one."""
    sampling: Sampling
    """How tokens are chosen; greedily by default."""


class Keeping(TypedDict, total=False):
    """Options of `Model.learn`."""

    max_chunk_tokens: int | None
    """Longest chunk, the hypernetwork's own by default: 192 for the shipped one, trained with up to 256."""
    storage: Storage
    """How a document's factors are kept (lora/quantize.py), "int4" by default; an image's are in bf16."""
    replace: bool
    """Whether an adapter of that name is replaced."""
    progress: Progress
    """Called with the chunks done and the chunks in all."""


def read_source(source: Readable) -> Document | ImageFile:
    """A document or an image, read unless it has been read already."""
    if isinstance(source, (Document, ImageFile)):
        return source
    if isinstance(source, str) and ("\n" in source or max(map(len, Path(source).parts), default=0) > _LONGEST_NAME):
        raise DocumentError("this is text, not a path: pass Document.from_text(text)")
    return read_image_file(source) if _is_image(source) else read_document(source)


def _is_image(source: str | Path | BinaryIO) -> bool:
    """Whether a source begins as an image does; of a stream nothing is taken."""
    if source != "-" and isinstance(source, (str, Path)):
        return is_image_file(source)
    stream: Any = sys.stdin.buffer if source == "-" else source
    if hasattr(stream, "peek"):
        return image_format(stream.peek(MAGIC_BYTES)) is not None
    if not stream.seekable():
        return False
    place = stream.tell()
    begins = stream.read(MAGIC_BYTES)
    stream.seek(place)
    return image_format(begins) is not None


def is_batch(question: str | Sequence[Any]) -> bool:
    """Whether this is a list of questions, not a question or the messages of a chat."""
    return not isinstance(question, str) and not (question and isinstance(question[0], dict))


def listed(adapter: Chosen) -> Sequence[Adapter | str]:
    """The adapters that were chosen, as a list also where it is one; none of them is a single LoRA."""
    if isinstance(adapter, LoRA):
        return []
    return [adapter] if isinstance(adapter, (Adapter, str)) else adapter
