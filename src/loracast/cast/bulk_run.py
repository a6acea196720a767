"""Casts all documents at a URL into PEFT folders: finds what is new, hands it to whoever casts, and keeps the report.

The report lies beside the folders and is what the next run knows: files that it lists are not read again until they
change. A run that was killed loses what it did since the report was written last; folders that are there already are
then found by their hash, before anything is parsed or cast.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from loracast.cast.bulk import Casting, Found, Line, whole_folders
from loracast.errors import DocumentError
from loracast.library.store import file_system, is_local, write
from loracast.library.sync import is_readable, names_for
from loracast.library.workfolders import tidy

REPORT = "report.jsonl"
_REPORT_EVERY_S = 30.0
_REPORT_SHARE = 0.05  # of the time, at most, goes into reports on the way

Outcome = Literal["learned", "unchanged", "failed"]


@dataclass
class BulkCast:
    """What became of the documents at a URL."""

    lines: dict[str, Line] = field(default_factory=dict)
    """By the documents' URLs."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """In this run, by the documents' URLs."""
    ignored: int = 0
    """How many files are of other kinds."""
    is_complete: bool = True
    has_written: bool = False
    """Whether the report is a new one: where nothing has changed, nothing is written."""

    def count(self, outcome: Outcome) -> int:
        return sum(one == outcome for one in self.outcomes.values())

    def failed(self) -> list[Line]:
        """The lines of the documents that failed, in order."""
        return [line for url, line in self.lines.items() if self.outcomes.get(url) == "failed"]


def cast_all(
    source: str,
    casting: Casting,
    cast: Callable[[Sequence[Found]], Iterable[Line]],
    *,
    again: bool = False,
    on_line: Callable[[int, int, Line], None] = lambda done, total, line: None,
) -> BulkCast:
    """Cast the new and changed documents at a URL or path, a file or all files below it.

    Args:
        cast: casts documents, and gives their lines in any order; it is not called if there are none.
        again: read files too that have not changed, and try again those that failed. What has its folder already is
            not cast again.
        on_line: called with each line that `cast` gives.

    Raises:
        DocumentError: there is nothing at the URL. LoracastError: the URLs cannot be used.
    """
    known = read_report(casting.out)
    _make_room(casting.out)
    there = whole_folders(casting.out)
    found, ignored = find_documents(source, casting.out, known)
    run = BulkCast(ignored=ignored)
    todo = []
    for one in found:
        line = known.get(one.url)
        if again or line is None or not _is_current(line, one, casting, there):
            todo.append(one)
        else:
            run.lines[one.url] = line
            run.outcomes[one.url] = "failed" if line.error else "unchanged"
    below = _place(source).rstrip("/")
    kept = {url: line for url, line in known.items() if url != below and not url.startswith(below + "/")}
    if not todo and len(kept) + len(found) == len(known):
        return run
    # A run that is stopped leaves what is known of those that it has not come to.
    report = _Report(casting.out, kept | {one.url: known[one.url] for one in todo if one.url in known})
    try:
        for number, line in enumerate(cast(todo) if todo else (), 1):
            run.lines[line.url] = line
            run.outcomes[line.url] = "failed" if line.error else "unchanged" if line.folder in there else "learned"
            on_line(number, len(todo), line)
            report.write_now_and_then(run.lines)
    except KeyboardInterrupt:
        run.is_complete = False
    finally:
        run.lines = {one.url: run.lines[one.url] for one in found if one.url in run.lines}
        report.write(run.lines)
        run.has_written = True
    return run


def find_documents(source: str, out: str, known: Mapping[str, Line]) -> tuple[list[Found], int]:
    """The documents at a URL or path, without hidden files and links, and how many files of other kinds there are.

    Args:
        out: where the adapters lie, which may be below the documents.
        known: lines of an earlier run: documents keep their names.
    """
    with file_system(source) as (fs, root):
        fs.invalidate_cache()
        files = {path: info for path, info in fs.find(root, detail=True).items() if info["type"] == "file"}
        urls = {path: fs.unstrip_protocol(path) for path in files}
    ours = _place(out) + "/"
    relative = {
        path: path[len(root) + 1 :] or path.rpartition("/")[2]
        for path in sorted(files)
        if not urls[path].startswith(ours)
    }
    shown = {path: short for path, short in relative.items() if not any(p.startswith(".") for p in short.split("/"))}
    wanted = {path: short for path, short in shown.items() if is_readable(short)}
    if not shown:
        raise DocumentError(f"there is no document at {source}")
    names = names_for(list(wanted.values()), {s: known[urls[p]].name for p, s in wanted.items() if urls[p] in known})
    found = [Found(urls[path], names[short], _stamp(files[path])) for path, short in wanted.items()]
    return found, len(shown) - len(wanted)


def _is_current(line: Line, found: Found, casting: Casting, there: set[str]) -> bool:
    """Whether a line of an earlier run still says all about a document."""
    is_same = bool(found.stamp) and line.stamp == found.stamp and line.cast_by == casting.id
    return is_same and (line.is_final if line.error else line.folder in there)


def _stamp(info: Mapping[str, Any]) -> str:
    """What changes with a file, as its file system tells it."""
    marks = (info.get(key) for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created"))
    mark = next((one for one in marks if one), None)
    return "" if mark is None else f"{info['size']} {mark}"


def _place(where: str) -> str:
    """A URL in full, also of a path."""
    with file_system(where) as (fs, root):
        return str(fs.unstrip_protocol(root))


def _make_room(out: str) -> None:
    with file_system(out) as (fs, root):
        fs.makedirs(root, exist_ok=True)
        if is_local(fs):
            tidy(Path(root))


# ---- the report


def read_report(out: str) -> dict[str, Line]:
    """The lines of the report, by the documents' URLs; none where there is no report, or a damaged one."""
    with file_system(out) as (fs, root):
        try:
            content = fs.cat_file(f"{root}/{REPORT}")
        except FileNotFoundError:
            return {}
    try:
        lines = (Line(**json.loads(line)) for line in content.splitlines())
        return {line.url: line for line in lines}
    except (ValueError, TypeError):
        return {}  # folders are found by their hash


class _Report:
    """The report while documents are cast."""

    def __init__(self, out: str, kept: Mapping[str, Line]):
        """
        Args:
            kept: lines of documents from elsewhere, and of those that are not cast yet.
        """
        self._out, self._kept = out, kept
        self._written_s, self._took_s = time.monotonic(), 0.0

    def write_now_and_then(self, lines: Mapping[str, Line]) -> None:
        if time.monotonic() - self._written_s > max(_REPORT_EVERY_S, self._took_s / _REPORT_SHARE):
            self.write(lines)

    def write(self, lines: Mapping[str, Line]) -> None:
        started = time.monotonic()
        content = "".join(
            json.dumps(asdict(one)) + "\n"  # in ASCII: names of files may be no text
            for one in {**self._kept, **lines}.values()
        )
        with file_system(self._out) as (fs, root):
            write(fs, f"{root}/{REPORT}", content.encode())
        self._written_s = time.monotonic()
        self._took_s = self._written_s - started
