"""The pictures inside a PDF or Word file, for whoever can say what they show; read where parsers run (worker.py)."""

from __future__ import annotations

import base64
import io
import zipfile

import pypdf

from loracast.documents.file_types import Limits, Parsed


def parse(data: bytes, label: str, limits: Limits) -> Parsed:
    """The pictures as files in base64, one a line, in their order in a PDF and by their names in a Word file."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = [archive.read(name) for name in sorted(archive.namelist()) if name.startswith("word/media/")]
    else:
        found = [image.data for page in pypdf.PdfReader(io.BytesIO(data)).pages for image in page.images]
    return Parsed("\n".join(base64.b64encode(one).decode() for one in found))
