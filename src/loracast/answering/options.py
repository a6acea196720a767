"""What the methods of the public `Model` take and give: documents, questions, adapters, options by name, answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from loracast.base.chat import Message
from loracast.base.generate import Sampling
from loracast.documents import Document, read_document
from loracast.documents.images import MAGIC_BYTES, ImageFile, image_format, is_image_file, read_image_file
from loracast.documents.labels import Labels
from loracast.errors import DocumentError
from loracast.library.adapter import Adapter
from loracast.lora.algebra import LoRA

Readable = str | Path | BinaryIO | Document | ImageFile | Labels
"""A path, "-" for standard input, an open binary stream, or a Document, ImageFile or Labels. A string is always a path:
pass text as `Document.from_text(text)`."""
Question = str | Sequence[Message]
"""A question, or the messages of a chat, the last one the user's."""
Chosen = Adapter | LoRA | str | Sequence[Adapter | str]
"""What a question is answered with: an adapter or its name, several, none (the plain base), or one LoRA. "*" is the
whole library and a pattern such as "manuals-*" all documents with such names, of which those that match are opened."""
_LONGEST_NAME = 255
"""Characters of a file's name at most, on all common systems."""


class Asking(TypedDict, total=False):
    """Options of `Model.ask`, `answer` and `stream`."""

    tag: str
    """Choose among the documents with this tag."""
    always: bool
    """Answer with the documents' adapters even where the question is not about them at all."""
    strict: bool | None
    """Whether a question that no chosen document answers is answered with `NOT_SAID`, before the model says anything
    (True), or by the plain base (False). None, the default: so where documents alone are named, and small talk goes to
    the base. Without a reader beside the hypernetwork the default is False, and a strict answer is refused only where
    the question shares no word with the documents."""
    route: int | None
    """Number of chunks that are merged for the question, of each document that is named and of all that a pattern or a
    tag stands for; None merges all of those that are named. 2 by default."""
    system: str | None
    """The system turn, "" for an empty one (the default), None for the template's own. A chat may have one."""
    sampling: Sampling
    """How tokens are chosen; greedily by default."""


def read_source(source: Readable) -> Document | ImageFile | Labels:
    """A document or an image, read unless it has been read already; or labels as they are."""
    if isinstance(source, (Document, ImageFile, Labels)):
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
