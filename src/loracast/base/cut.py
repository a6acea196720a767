"""Cut a text to fit a window: its middle gives way."""

from __future__ import annotations

from typing import Any

from loracast.base.chat import encode_text, encode_with_offsets


def without_middle(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The text; only its beginning and end where it has more than `max_tokens` tokens."""
    if len(encode_text(tokenizer, text)) <= max_tokens:
        return text
    offsets = encode_with_offsets(tokenizer, text)[1]
    head, tail = offsets[max_tokens // 2][0], offsets[-(max_tokens - max_tokens // 2)][0]
    return f"{text[:head].rstrip()}\n{text[tail:].lstrip()}"
