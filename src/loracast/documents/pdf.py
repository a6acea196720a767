"""Parses PDF into markdown-like text with pypdf: pages to lines here, lines to paragraphs in paragraphs.py."""

from __future__ import annotations

import io
import logging
from collections import Counter
from math import hypot
from typing import Any

import pypdf
from pypdf.errors import DependencyError, LimitReachedError
from pypdf.generic import ArrayObject, DictionaryObject

from loracast.documents.clean import brief, normalise, sensible_title
from loracast.documents.document import Limits, Parsed
from loracast.documents.paragraphs import Line, join_lines
from loracast.errors import DocumentError

_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})
_TAIL = 2048  # bytes at the end in which the end mark must stand; a truncated file may have one further up


def parse(data: bytes, label: str, limits: Limits) -> Parsed:
    """The text of a PDF, its metadata's title or else its largest heading on the first page, and its page count."""
    if b"%%EOF" not in data.rstrip(b"\0\r\n\t ")[-_TAIL:]:
        raise DocumentError(f"{label} is a truncated PDF (its end is missing): copy or download it again")
    remedy = "remove its password with `qpdf --password=... --decrypt in.pdf out.pdf` and read out.pdf"
    encrypted = f"{label} is encrypted: {remedy}"
    complaints = _Complaints()
    logger = logging.getLogger("pypdf")
    logger.addHandler(complaints)
    logger.propagate = False
    page_number = 0
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError(encrypted)
        n_pages = len(reader.pages)
        if n_pages > limits.max_pages:
            raise DocumentError(
                f"{label} has {n_pages:,} pages, more than {limits.max_pages:,}: split it with "
                "`qpdf --split-pages=100 in.pdf out.pdf`, or raise Limits.max_pages"
            )
        metadata = reader.metadata
        title = sensible_title(metadata.get("/Title") if metadata else None)
        pages: list[list[Line]] = []
        scans: list[int] = []
        for page_number in range(1, n_pages + 1):
            page = reader.pages[page_number - 1]
            pages.append(_page_lines(page, page_number) + _filled_in(page, page_number))
            if not pages[-1] and _has_image(page):
                scans.append(page_number)
    except DependencyError:  # AES needs a library that loracast does not ask for
        raise DocumentError(encrypted) from None
    except (MemoryError, RecursionError, DocumentError):
        raise
    except LimitReachedError as error:
        raise DocumentError(
            f"{label} goes beyond a safety limit of the PDF parser ({brief(error)}): if you trust it, "
            "print it to a new PDF, e.g. with `gs -o out.pdf -sDEVICE=pdfwrite in.pdf`"
        ) from None
    except Exception as error:  # damage makes pypdf raise nearly anything
        where = f" on page {page_number}" if page_number else ""
        raise DocumentError(
            f"{label} is a damaged PDF ({brief(error)}{where}): repair it with `qpdf in.pdf out.pdf`"
        ) from None

    if not any(pages):
        damage = f"; {complaints.sentences()[0]}" if complaints.messages else ""
        raise DocumentError(
            f"{label} has no text layer (a scan?{damage}): recognise its text with `ocrmypdf in.pdf out.pdf` and "
            "read out.pdf"
        )
    text = join_lines([line for lines in pages for line in lines])
    if any("\ud800" <= c <= "\udfff" for c in text):  # join surrogate pairs; lone halves cannot be written
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = normalise(text)
    n_unknown = text.count("\ufffd") + sum("\ue000" <= c <= "\uf8ff" for c in text)
    if n_unknown > len(text) // 5:
        raise DocumentError(
            f"{label} has fonts that do not map to characters: use `ocrmypdf --force-ocr in.pdf out.pdf`"
        )
    warnings = complaints.sentences()
    if scans:
        shown = ", ".join(map(str, scans[:10])) + (" ..." if len(scans) > 10 else "")
        warnings.append(
            f"only pictures on {len(scans)} of {n_pages} pages ({shown}): `ocrmypdf --skip-text` reads scans"
        )
    if not title:  # the largest letters, if they stand on the first page with text
        title = next((block[2:] for block in text.split("\n\n")[:3] if block.startswith("# ")), "")
    return Parsed(text, title, n_pages, tuple(warnings))


def _page_lines(page: Any, number: int) -> list[Line]:
    """The lines of a page in pypdf's order, each with its size in points and its height on the page."""
    lines: list[Line] = []
    text: list[str] = []
    sizes: Counter[float] = Counter()
    bold = 0
    height: float | None = None

    def end_line() -> None:
        nonlocal bold, height
        joined = " ".join("".join(text).translate(_LIGATURES).split())
        if joined:
            size = sizes.most_common(1)[0][0] if sizes else 0.0
            lines.append(Line(joined, size, height, number, 2 * bold > len(joined)))
        text.clear()
        sizes.clear()
        bold, height = 0, None

    def visit(run: str, cm: list[float], tm: list[float], font: Any, font_size: float) -> None:
        nonlocal bold, height
        for i, piece in enumerate(run.split("\n")):
            if i:
                end_line()
            if not piece.strip():
                text.append(piece)
                continue
            text.append(piece)
            size = abs(font_size) * hypot(tm[2], tm[3]) * hypot(cm[2], cm[3])
            sizes[round(2 * size) / 2] += len(piece)
            name = str(font.get("/BaseFont", "")) if font else ""
            bold += len(piece) if any(word in name for word in ("Bold", "Black", "Heavy")) else 0
            if height is None:
                height = tm[4] * cm[1] + tm[5] * cm[3] + cm[5]

    page.extract_text(visitor_text=visit)
    end_line()
    return lines


def _filled_in(page: Any, number: int) -> list[Line]:
    """What was filled into the fields of a form, and written on the page as notes: a line each."""
    lines: list[Line] = []
    annotations = _entry(page, "/Annots")
    for annotation in annotations if isinstance(annotations, ArrayObject) else ():
        field = annotation.get_object()
        group = _entry(field, "/Parent")
        kind, name, value, what = (_entry(field, key) or _entry(group, key) for key in ("/FT", "/TU", "/V", "/Subtype"))
        name = name or _entry(field, "/T") or _entry(group, "/T")
        said: Any = _entry(field, "/Contents") if what == "/FreeText" else None
        if what == "/Widget" and name and kind == "/Btn":
            said = None if value in (None, "/Off") else f"{name}: yes"
        elif what == "/Widget" and name and isinstance(value, str) and value.strip():
            said = f"{name}: {value}"
        if isinstance(said, str) and said.strip():
            lines.append(Line(f"- {' '.join(said.split())}", 0.0, None, number))
    return lines


def _entry(holder: Any, key: str) -> Any:
    """The entry of a dictionary, None where there is none; [] follows references, which `get` does not."""
    return holder[key] if isinstance(holder, DictionaryObject) and key in holder else None


def _has_image(page: Any) -> bool:
    try:
        objects = page["/Resources"]["/XObject"]
    except KeyError:
        return False
    return any(objects[name].get("/Subtype") == "/Image" for name in objects)  # by name: [] follows references


class _Complaints(logging.Handler):
    """pypdf repairs what it can and only logs it; what it logs may be missing text, which the caller must hear of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.messages) < 1000:
            self.messages[" ".join(record.getMessage().split())[:120]] += 1

    def sentences(self) -> list[str]:
        return [f"damaged in places: {message}" for message, _ in self.messages.most_common(5)]
