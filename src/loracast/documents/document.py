"""What a document is once it has been read, and how much of a file loracast is willing to look at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """The text of one file, normalised, with what is needed to say later where a fact came from."""

    title: str
    """The document's own title, else its file name made readable; empty when it has neither."""
    text: str
    """NFC, unix newlines, headings as markdown lines; never empty."""
    file_name: str | None
    """The name without its folders; None for standard input and nameless streams."""
    media_type: str
    """What the content was read as, whatever the name said."""
    sha256: str
    """Hash of the file's bytes, in hexadecimal: the document's identity."""
    n_bytes: int
    n_pages: int | None = None
    """PDF only."""
    warnings: tuple[str, ...] = ()
    """What may be missing from the text, one sentence each (a page without a text layer, a damaged object)."""


@dataclass(frozen=True)
class Limits:
    """Bounds on one file. The last three hold the child process that parses PDF, DOCX and HTML."""

    max_bytes: int = 100_000_000
    """Size of the file itself."""
    max_pages: int = 2_000
    """Pages of a PDF."""
    max_unpacked_bytes: int = 500_000_000
    """Sum of the parts of a DOCX when unpacked."""
    max_ratio: int = 200
    """Unpacked over packed size of a part of a DOCX; only parts over 1 MB are judged."""
    max_text_bytes: int = 100_000_000
    """Size of the resulting text in UTF-8."""
    max_memory_bytes: int = 2 << 30
    """Address space of the child."""
    max_cpu_s: int = 120
    """Processor time of the child."""
    timeout_s: float = 180.0
    """Wall time of the child."""


@dataclass(frozen=True)
class Parsed:
    """What a parser of one format hands back; `title` is empty when the format holds none of its own."""

    text: str
    title: str = ""
    n_pages: int | None = None
    warnings: tuple[str, ...] = ()
