"""The types that parsers and readers exchange: a document as read, the limits on a file, what a parser returns."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from loracast.errors import DocumentError


@dataclass(frozen=True)
class Document:
    """The normalised text of one file, with its title, name, hash and warnings."""

    title: str  # the document's own, else its file name made readable; empty when it has neither
    text: str  # NFC, unix newlines, headings as markdown lines; never empty
    file_name: str | None  # without its folders; None for standard input and nameless streams
    media_type: str  # of the content, whatever the file name says
    sha256: str  # hash of the file's bytes, in hexadecimal: the document's identity
    n_bytes: int
    n_pages: int | None = None  # PDF only
    warnings: tuple[str, ...] = ()  # what may be missing from the text (an unread page, say), one sentence each
    rows: tuple[int, ...] = ()  # the characters of the text at which lines begin that are rows of tables

    @classmethod
    def from_text(cls, text: str, title: str = "") -> Document:
        """Make a document from a string of markdown, whose first heading is the title if none is given.

        Raises DocumentError if the text is empty.
        """
        from loracast.documents.clean import normalise
        from loracast.documents.headings import markdown_title
        from loracast.documents.tables import name_markdown_rows, take_marks

        data = text.encode()
        text, rows = take_marks(name_markdown_rows(normalise(text)))
        if not text.strip():
            raise DocumentError("the text holds only white space: there is nothing to learn from it")
        sha256 = hashlib.sha256(data).hexdigest()
        return cls(title or markdown_title(text), text, None, "text/markdown", sha256, len(data), rows=rows)


@dataclass(frozen=True)
class Limits:
    """Bounds on one file. The last three hold the child process that parses PDF, DOCX and HTML."""

    max_bytes: int = 100_000_000  # of the file itself
    max_pages: int = 2_000  # of a PDF
    max_unpacked_bytes: int = 500_000_000  # of all parts of a DOCX together
    max_ratio: int = 200  # unpacked over packed size of a part of a DOCX; only parts over 1 MB are judged
    max_text_bytes: int = 100_000_000  # of the resulting text in UTF-8
    max_memory_bytes: int = 2 << 30  # address space of the child
    max_cpu_s: int = 120  # processor time of the child
    timeout_s: float = 180.0  # wall time of the child


@dataclass(frozen=True)
class Parsed:
    """What a parser of one format hands back; `title` is empty when the format holds none of its own."""

    text: str  # with marks before the rows of tables (tables.py)
    title: str = ""
    n_pages: int | None = None
    warnings: tuple[str, ...] = ()
