"""Which format a file is in, the limits on a file, and what a parser hands back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from loracast.errors import DocumentError


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


MEDIA_TYPES = {
    "text": "text/plain",
    "markdown": "text/markdown",
    "html": "text/html",
    "csv": "text/csv",
    "pdf": "application/pdf",
    "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "message": "message/rfc822",
}
READABLE = "loracast reads txt, md, html, pdf, docx, csv, eml and conversations (jsonl, json, WhatsApp's txt)"

EXTENSIONS = {
    ".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html", ".xhtml": "html",
    ".csv": "csv", ".tsv": "csv", ".pdf": "pdf", ".docx": "docx", ".eml": "message", ".jsonl": "text",
}  # fmt: skip
# The start of common files that are no text. The remedy is the best known way to one that loracast reads.
MAGIC = (
    (b"\x89PNG", "a PNG image", "recognise its text first, e.g. with `ocrmypdf --image-dpi 300 in.png out.pdf`"),
    (b"\xff\xd8\xff", "a JPEG image", "recognise its text first, e.g. with `ocrmypdf --image-dpi 300 in.jpg out.pdf`"),
    (b"GIF8", "a GIF image", "convert it to a PDF with a text layer"),
    ((b"II*\x00", b"MM\x00*"), "a TIFF image", "recognise its text first, e.g. with `img2pdf` and `ocrmypdf`"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first with `gunzip`"),
    (b"BZh", "a bzip2 archive", "unpack it first with `bunzip2`"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it first with `unxz`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    (b"Rar!", "a RAR archive", "unpack it first"),
    ((b"\x7fELF", b"MZ\x90"), "a program", READABLE),
    (b"SQLite format 3\x00", "an SQLite database", "export the table as CSV"),
    (b"%!PS", "a PostScript file", "convert it with `ps2pdf`"),
    (rb"{\rtf", "an RTF file", "convert it with `soffice --headless --convert-to docx`"),
)
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # the container of Office before 2007, and of encrypted files after it
_HTML = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.{0,1000}?-->\s*)*<(!doctype\s+html|html)\b", re.I | re.S)


def sniff(data: bytes, file_name: str | None, label: str) -> str:
    """A key of MEDIA_TYPES for `data`; `label` names the file in errors. Empty or unknown files raise DocumentError."""
    suffix = PurePath(file_name or "").suffix.lower()
    named = EXTENSIONS.get(suffix, "text")
    if not data:
        what = "an empty PDF (0 bytes)" if named == "pdf" else "empty (0 bytes)"
        raise DocumentError(f"{label} is {what}: download or export it again")
    head = data[:4096]
    # The specification allows junk before the header, and a text may speak of it.
    if head.startswith(b"%PDF-") or (b"%PDF-" in head[:1024] and (named == "pdf" or not _is_text(head))):
        return "pdf"
    if head.startswith(b"PK\x03\x04"):
        return "docx"
    if head.startswith(OLE):
        raise DocumentError(_say_ole(data, label))
    for magic, what, remedy in MAGIC:
        if head.startswith(magic):
            raise DocumentError(f"{label} is {what}: {remedy}")
    start = head.decode("utf-16", "ignore").encode() if head.startswith((b"\xff\xfe", b"\xfe\xff")) else head
    found = "html" if _HTML.match(start.removeprefix(b"\xef\xbb\xbf")) else None
    if named in ("pdf", "docx"):
        what = "HTML (often the error page of a failed download)" if found else "something else"
        raise DocumentError(
            f"{label} is named {suffix} but its content is {what}: get the file again, or rename it to what it is"
        )
    return named if named == "message" else found or named


def _is_text(head: bytes) -> bool:
    try:
        head[:-3].decode()  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return b"\x00" not in head


def _say_ole(data: bytes, label: str) -> str:
    if "EncryptedPackage".encode("utf-16-le") in data:
        return f"{label} is an Office file locked with a password: open it, remove the password and save it again"
    if "WordDocument".encode("utf-16-le") in data or label.lower().endswith(".doc"):
        return f"{label} is a Word file of the old .doc format: convert it with `soffice --headless --convert-to docx`"
    return f"{label} is an Office file of the time before 2007: convert it with `soffice --headless --convert-to pdf`"
