"""Reads a file, a stream or standard input into a Document: all text enters loracast here.

PDF, DOCX, HTML and e-mail are parsed in a child process (worker.py), so that a bomb or a crash in a parser cannot take
the caller down.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from loracast.documents.clean import bare_name, decode, normalise, readable_stem, sensible_title
from loracast.documents.conversation import parse_conversation
from loracast.documents.file_types import MEDIA_TYPES, Limits, Parsed, sniff
from loracast.documents.tables import name_rows, parse_csv, take_marks
from loracast.documents.units import markdown_title
from loracast.errors import DocumentError

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
# What an interpreter may need to start; everything else (tokens, keys, proxies) stays with the parent.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP", "LANG")
_SIGXCPU = getattr(signal, "SIGXCPU", None)


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
    photos: tuple[bytes, ...] = ()  # the pictures inside a PDF or Word file, if they were asked for

    @classmethod
    def from_text(cls, text: str, title: str = "") -> Document:
        """Make a document from a string of markdown, whose first heading is the title if none is given.

        Raises DocumentError if the text is empty.
        """
        data = text.encode()
        text, rows = take_marks(name_rows(normalise(text)))
        if not text.strip():
            raise DocumentError("the text holds only white space: there is nothing to learn from it")
        sha256 = hashlib.sha256(data).hexdigest()
        return cls(title or markdown_title(text), text, None, "text/markdown", sha256, len(data), rows=rows)


def parse_in_child(kind: str, data: bytes, label: str, limits: Limits) -> Parsed:
    """The parsed text of `data`. Raises DocumentError for any failure.

    Args:
        kind: "pdf", "docx", "html", "message" or "photos", the module that parses it.
    """
    # -P: without it the current folder comes first on the path, and a stray pypdf.py there would be run.
    command = [sys.executable, "-P", "-m", "loracast.documents.worker", kind, json.dumps(asdict(limits)), label]
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    search_path = [_PACKAGE_PARENT, *(folder for folder in sys.path if folder)]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(search_path))
    stopped = "to parse and was stopped: it is damaged, malicious or needs to be split"
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as complaints:
        try:
            done = subprocess.run(
                command, check=False, input=data, stdout=answer, stderr=complaints,
                timeout=limits.timeout_s, env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DocumentError(f"{label} took more than {limits.timeout_s:g} s {stopped}") from None
        size = answer.seek(0, os.SEEK_END)
        if done.returncode == 0 and size <= 2 * limits.max_text_bytes + 65_536:  # where there are no rlimits
            answer.seek(0)
            reply = json.loads(answer.read())
            if "error" in reply:
                raise DocumentError(reply["error"])
            return Parsed(**{**reply, "warnings": tuple(reply["warnings"])})
        complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 500))
        last_words = complaints.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
    if _SIGXCPU is not None and done.returncode == -_SIGXCPU:
        raise DocumentError(f"{label} took more than {limits.max_cpu_s} s of processor time {stopped}")
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    raise DocumentError(
        f"{label} made its parser fail ({how}; {last_words or 'no message'}): the file is damaged; export it again"
    )


def read_document(
    source: str | Path | BinaryIO,
    *,
    file_name: str | None = None,
    limits: Limits | None = None,
    photos: bool = False,
) -> Document:
    """Reads `source`, a path, an open binary stream, or "-" for standard input; with `photos` its pictures, too.

    `file_name` stands in for the name of a stream, or of a path that is a temporary file: its extension decides where
    the content does not (md, csv, html without a doctype), and its stem is the title where the document has none.
    """
    limits = limits or Limits()
    data, file_name, label = read_bytes(source, file_name, limits)
    kind = sniff(data, file_name, label)
    if kind in ("pdf", "docx", "html", "message"):
        parsed = parse_in_child(kind, data, label, limits)
    else:
        text = decode(data, label)
        if kind == "csv" and text.strip():  # before it is normalised, which makes new lines and delimiters
            is_tsv = (file_name or "").lower().endswith(".tsv")
            text = parse_csv(text, label, "\t" if is_tsv else None).text
        text = normalise(text)
        if not text.strip():
            raise DocumentError(f"{label} holds only white space: there is nothing to learn from it")
        talk = parse_conversation(text, label, file_name) if kind == "text" else None
        parsed = talk or (Parsed(text) if kind == "csv" else Parsed(name_rows(text), markdown_title(text)))
    if len(parsed.text) > limits.max_text_bytes or len(parsed.text.encode()) > limits.max_text_bytes:
        raise DocumentError(f"{label} holds more than {_mega(limits.max_text_bytes)} of text: split it into parts")
    text, rows = take_marks(parsed.text)
    title, sha256 = sensible_title(parsed.title) or readable_stem(file_name), hashlib.sha256(data).hexdigest()
    found = parse_in_child("photos", data, label, limits).text.split() if photos and kind in ("pdf", "docx") else ()
    facts = (MEDIA_TYPES[kind], sha256, len(data), parsed.n_pages, parsed.warnings, rows)
    return Document(title, text, file_name, *facts, tuple(map(base64.b64decode, found)))


def read_bytes(source: str | Path | BinaryIO, file_name: str | None, limits: Limits) -> tuple[bytes, str | None, str]:
    """The bytes of a source as `read_document` takes it, its name without folders, and what to call it in errors."""
    is_path = isinstance(source, str | Path) and source != "-"
    label = file_name or (str(source) if is_path else "standard input" if source == "-" else "the stream")
    # A name may come from an upload and end up in a log or a terminal.
    label = "".join(c if c.isprintable() else "?" for c in label[:300])
    if isinstance(source, str | Path):
        data = _read_path(Path(source), label, limits) if is_path else _read_stream(sys.stdin.buffer, label, limits)
    else:
        data = _read_stream(source, label, limits)
    return data, bare_name(file_name or (Path(str(source)).name if is_path else None)), label


def _read_path(path: Path, label: str, limits: Limits) -> bytes:
    try:
        if path.is_dir():
            raise DocumentError(f"{label} is a directory: name a file in it, or each of them")
        if path.exists() and not path.is_file():  # opening a pipe would wait until somebody writes to it
            raise DocumentError(
                f"{label} is a pipe or a device and no regular file: give - and redirect it to standard input"
            )
        with path.open("rb") as stream:
            return _read_stream(stream, label, limits)
    except FileNotFoundError:
        what = "a URL is read with --out alone: download the file" if "://" in label else "check the path"
        raise DocumentError(f"{label} does not exist: {what} (relative paths start at {Path.cwd()})") from None
    except PermissionError:
        raise DocumentError(f"{label} may not be read by this user: change its permissions") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DocumentError(f"{label} cannot be read ({error}): check the path and the disk") from None


def _read_stream(stream: BinaryIO, label: str, limits: Limits) -> bytes:
    # No trust in the reported size: a pipe has none, and a device such as /dev/zero never ends.
    data = stream.read(limits.max_bytes + 1)
    if len(data) > limits.max_bytes:
        raise DocumentError(f"{label} is larger than {_mega(limits.max_bytes)}: split it, or raise Limits.max_bytes")
    return data


def _mega(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes >= 1e6 else f"{n_bytes:,} bytes"
