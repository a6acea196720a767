"""Files to text (`read_document`), text to chunks (`split_text`). Knows no model: the tokenizer is handed in.

The names below load on first use: a question to a library needs one rule of this package and no parser.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loracast.documents.chunks import Chunk, split_text
    from loracast.documents.file_types import Limits
    from loracast.documents.read import Document, read_document

__all__ = ["Chunk", "Document", "Limits", "read_document", "split_text"]

_HOMES = {
    "Chunk": "chunks",
    "Document": "read",
    "Limits": "file_types",
    "read_document": "read",
    "split_text": "chunks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loracast.documents' has no attribute {name!r}")
    return getattr(import_module(f"loracast.documents.{_HOMES[name]}"), name)
