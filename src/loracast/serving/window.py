"""The text that adapters were made from, put before the question in the prompt: what they replace, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loracast.base.chat import Message, encode_text
from loracast.base.cut import without_middle
from loracast.base.load import Base
from loracast.errors import AdapterError, BaseModelError
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks

_JOINTS = 8
"""Tokens that a text may have more inside a prompt than by itself, where it touches what stands around it."""


@dataclass(frozen=True)
class Windowed:
    """The messages of a chat with the texts before the last question, and how much of the texts is shown."""

    messages: list[Message]
    n_tokens: int
    """Of the texts."""
    n_shown: int
    """Fewer where the window is full: the middle of the texts gives way then."""


def in_window(
    base: Base, adapters: Sequence[Adapter], messages: Sequence[Message], max_new_tokens: int, most: int | None = None
) -> Windowed:
    """Put the documents' texts, and the tasks' descriptions, before the last question of a chat.

    The wording is the one with which bases answered best from a document on the dev split (docs/notebook).

    Args:
        most: longest prompt in tokens, where it is shorter than the base's window with the answer.

    Raises:
        AdapterError: an adapter was made from no text (an image, a combination).
        BaseModelError: the window has no room for any text beside the messages and the answer.
    """
    text = "\n\n".join(map(_text, adapters))
    has_document = any(adapter.manifest.kind == "document" for adapter in adapters)
    n_around = len(base.chat.conversation(_asked(messages, "", has_document)))
    longest = base.window - max_new_tokens if most is None else min(base.window - max_new_tokens, most)
    room = longest - n_around - _JOINTS
    if room < 1:
        raise BaseModelError(
            f"beside {n_around} tokens of prompt and {max_new_tokens} of the answer, there is no room left for a text: "
            f"the base's window holds {base.window}" + (f", and a prompt {most} at most" if most is not None else "")
        )
    shown = without_middle(base.tokenizer, text, room)
    counts = [len(encode_text(base.tokenizer, one)) for one in (text, shown)]
    return Windowed(_asked(messages, shown, has_document), *counts)


def _text(adapter: Adapter) -> str:
    if adapter.manifest.kind == "document":
        return "\n".join(chunk.text for chunk in read_chunks(adapter.index))
    if adapter.manifest.kind == "task":
        return adapter.manifest.title
    raise AdapterError(f"{adapter.name!r} was made from no text that a prompt could hold")


def _asked(messages: Sequence[Message], text: str, has_document: bool) -> list[Message]:
    *before, last = messages
    content = f"{text}\n\n{last['content']}"
    if has_document:
        order = "Answer the question with words from the text, as short as possible."
        content = f"Text: {text}\n\n{order}\nQuestion: {last['content']}\nAnswer:"
    return [*before, {**last, "content": content}]
