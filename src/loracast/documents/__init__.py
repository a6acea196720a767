"""Files to text (`read_document`), text to chunks (`split_text`). Knows no model: the tokenizer is handed in."""

from loracast.documents.chunks import Chunk, split_text
from loracast.documents.file_types import Limits
from loracast.documents.read import Document, read_document

__all__ = ["Chunk", "Document", "Limits", "read_document", "split_text"]
