"""Casts many documents into PEFT folders at a URL, one a document, as vLLM's resolver and Ray Serve LLM load them.

    NAME@HASH/adapter_model.safetensors
    NAME@HASH/adapter_config.json        comes last: a folder without it is not whole

HASH is that of the file and of how it was cast, so that a name never means other weights and nothing is cast twice.

A report lies beside the folders and is what the next run knows: files that it lists are not read again until they
change. A run that was killed loses what it did since the report was written last; folders that are there already are
then found by their hash, before anything is parsed or cast.

With Ray, processes that hold base and hypernetwork cast, on this machine or on a cluster. One that dies is started
again and casts its document once more; only the document that kills it again and again fails.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from loracast.base.load import Base
from loracast.cast.document import merge_chunks, split_document
from loracast.documents import Limits, read_document
from loracast.errors import AdapterError, ConfigError, DocumentError, LoracastError, PackageError
from loracast.export.formats import VLLM_RANKS
from loracast.files import move_unless_there, tidy, work_folder
from loracast.hypernets.protocol import Caster
from loracast.library.manifest import VERSION_DIGITS
from loracast.library.store import file_system, is_local, write
from loracast.library.sync import is_readable, names_for
from loracast.lora.algebra import Uniform, uniform
from loracast.lora.peft_format import PEFT_FILES, write_peft_folder

CONFIG = PEFT_FILES[0]
MOST_CHUNKS = 256
"""Chunks of a document at most. All of them are in memory at once: so many take 4.5 GB with the shipped models."""


@dataclass(frozen=True)
class Casting:
    """How documents are cast into PEFT folders, and where those lie."""

    out: str
    """URL or path under which each document gets its folder."""
    made_by: str
    """Base, hypernetwork and chunk length, in words: other ones give other adapters."""
    base_name: str
    """The base in adapter_config.json. vLLM's resolver compares it with the model that it serves."""
    chunk_tokens: int | None = None
    """Most tokens of a chunk; the hypernetwork's own if None."""
    max_rank: int | None = None
    """A higher rank is compressed to it; None compresses only as far as vLLM demands."""

    @property
    def id(self) -> str:
        """Hash of all that the weights depend on, besides the document."""
        return _short_hash([self.made_by, self.base_name, self.max_rank])

    def folder_for(self, name: str, file_name: str, sha256: str) -> str:
        """Name of the folder of a document: the file's name is part of it, since it may become the title."""
        return f"{name}@{_short_hash([self.id, file_name, sha256])}"


@dataclass(frozen=True)
class Line:
    """A line of the report: a document, and what became of it."""

    url: str
    name: str
    """Of its adapter, without the hash."""
    stamp: str
    """Size and time or ETag, as the file system has them; "" where it has none."""
    cast_by: str
    """`Casting.id`."""
    sha256: str = ""
    folder: str = ""
    """The adapter's folder; "" where the document failed."""
    rank: int | None = None
    lost: float | None = None
    """What compressing to the rank lost, |delta - kept| / |delta|; None, as the next two, for a folder found there."""
    n_chunks: int | None = None
    n_tokens: int | None = None
    seconds: float = 0.0
    error: str | None = None
    is_final: bool = False
    """Whether the fault is the file's own: it is not tried again until it changes."""


class FolderCaster:
    """Casts one document after the other; whatever is wrong with one becomes its line in the report."""

    def __init__(self, casting: Casting, caster: Caster, base: Base):
        self.casting, self.caster, self.base = casting, caster, base

    def __call__(self, line: Line) -> Line:
        started = time.perf_counter()
        try:
            line = self._cast(line)
        except LoracastError as error:
            line = replace(line, error=str(error), is_final=isinstance(error, DocumentError))
        except Exception as error:  # a bug, or too little memory: of this document, and the others go on
            line = replace(line, error=f"{type(error).__name__}: {error}")
        return replace(line, seconds=round(time.perf_counter() - started, 4))

    def _cast(self, line: Line) -> Line:
        casting = self.casting
        with file_system(line.url) as (fs, path), fs.open(path, "rb") as stream:
            data = stream.read(Limits().max_bytes + 1)  # one too many of a file that is too large
        file_name = path.rpartition("/")[2]
        sha256 = hashlib.sha256(data).hexdigest()
        folder = casting.folder_for(line.name, file_name, sha256)
        line = replace(line, sha256=sha256, folder=folder)
        if (rank := _rank_of(casting.out, folder)) is not None:
            return replace(line, rank=rank)
        document = read_document(io.BytesIO(data), file_name=file_name)
        chunks = split_document(self.base, document, casting.chunk_tokens or self.caster.hypernetwork.chunk_tokens)
        if len(chunks) > MOST_CHUNKS:
            raise DocumentError(
                f"it has {len(chunks):,} chunks, and at most {MOST_CHUNKS} are merged into one LoRA: split it, or "
                "learn it into a library, where each question is routed to the chunks that it is about"
            )
        made = uniform(merge_chunks(self.caster, self.base, chunks, dense=False), casting.max_rank, VLLM_RANKS)
        about = {
            "made_by": "loracast", "name": line.name, "version": folder, "title": document.title,
            "source_sha256": document.sha256, "hypernetwork": self.caster.id,
            "base": json.dumps(self.base.fingerprint.to_dict()),
        }  # fmt: skip
        _write(casting.out, folder, made, casting.base_name, about)
        n_tokens = sum(chunk.n_tokens for chunk in chunks)
        return replace(line, rank=made.rank, lost=made.error, n_chunks=len(chunks), n_tokens=n_tokens)


def whole_folders(out: str) -> set[str]:
    """The names of the folders at a URL or path that are whole."""
    with file_system(out) as (fs, root):
        fs.invalidate_cache()
        files = fs.find(root)
    inside = (path[len(root) + 1 :].split("/") for path in files)
    return {parts[0] for parts in inside if parts[1:] == [CONFIG]}


def _rank_of(out: str, folder: str) -> int | None:
    """The rank of the adapter in a folder; None where the folder is not there, or not whole."""
    with file_system(out) as (fs, root):
        try:
            return int(json.loads(fs.cat_file(f"{root}/{folder}/{CONFIG}"))["r"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"{out}/{folder}/{CONFIG} is damaged: delete the folder, and it is cast anew") from error


def _write(out: str, folder: str, made: Uniform, base: str, about: Mapping[str, str]) -> None:
    """Write an adapter's folder so that nobody sees half of it."""
    with file_system(out) as (fs, root):
        if is_local(fs):
            with work_folder(Path(root), "new") as work:
                built, place = write_peft_folder(made.lora.factors, work / "adapter", base, about), Path(root) / folder
                if not (place / CONFIG).is_file():
                    shutil.rmtree(place, ignore_errors=True)  # half of one, copied there by somebody
                move_unless_there(built, place)
            return
        with tempfile.TemporaryDirectory() as work_name:
            local = write_peft_folder(made.lora.factors, Path(work_name), base, about)
            for name in reversed(PEFT_FILES):
                fs.put_file(str(local / name), f"{root}/{folder}/{name}")


def _short_hash(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:VERSION_DIGITS]


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
    cast: Callable[[Sequence[Line]], Iterable[Line]],
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
    found, ignored = find_documents(source, casting, known)
    run = BulkCast(ignored=ignored)
    todo = []
    for one in found:
        line = known.get(one.url)
        if again or line is None or not _is_current(line, one, there):
            todo.append(one)
        else:
            run.lines[one.url] = line
            run.outcomes[one.url] = "failed" if line.error else "unchanged"
    below = _place(source).rstrip("/")
    kept = {url: line for url, line in known.items() if url != below and not url.startswith(below + "/")}
    if not todo and len(kept) + len(found) == len(known):
        return run
    # A run that is stopped leaves what is known of those that it has not come to.
    kept |= {one.url: known[one.url] for one in todo if one.url in known}
    due = time.monotonic() + _REPORT_EVERY_S
    try:
        for number, line in enumerate(cast(todo) if todo else (), 1):
            run.lines[line.url] = line
            run.outcomes[line.url] = "failed" if line.error else "unchanged" if line.folder in there else "learned"
            on_line(number, len(todo), line)
            if (started := time.monotonic()) > due:
                _write_report(casting.out, kept | run.lines)
                took_s = time.monotonic() - started
                due = started + took_s + max(_REPORT_EVERY_S, took_s / _REPORT_SHARE)
    except KeyboardInterrupt:
        run.is_complete = False
    finally:
        run.lines = {one.url: run.lines[one.url] for one in found if one.url in run.lines}
        _write_report(casting.out, kept | run.lines)
        run.has_written = True
    return run


def find_documents(source: str, casting: Casting, known: Mapping[str, Line]) -> tuple[list[Line], int]:
    """The documents at a URL or path, without hidden files and links, and how many files of other kinds there are.

    Args:
        casting: its folders, which may be below the documents, are left out.
        known: lines of an earlier run: documents keep their names.
    """
    with file_system(source) as (fs, root):
        fs.invalidate_cache()
        files = {path: info for path, info in sorted(fs.find(root, detail=True).items()) if info["type"] == "file"}
        urls = {path: fs.unstrip_protocol(path) for path in files}
    ours = _place(casting.out) + "/"
    relative = {path: path[len(root) + 1 :] or path.rpartition("/")[2] for path in files}
    shown = [path for path, short in relative.items() if not (urls[path].startswith(ours) or "/." in f"/{short}")]
    if not shown:
        raise DocumentError(f"there is no document at {source}")
    wanted = {relative[path]: path for path in shown if is_readable(relative[path])}
    names = names_for([*wanted], {short: known[urls[p]].name for short, p in wanted.items() if urls[p] in known})
    found = [Line(urls[path], names[short], _stamp(files[path]), casting.id) for short, path in wanted.items()]
    return found, len(shown) - len(wanted)


def _is_current(line: Line, found: Line, there: set[str]) -> bool:
    """Whether a line of an earlier run still says all about a document."""
    is_same = bool(found.stamp) and (line.stamp, line.cast_by) == (found.stamp, found.cast_by)
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


def _write_report(out: str, lines: Mapping[str, Line]) -> None:
    content = "".join(json.dumps(asdict(line)) + "\n" for line in lines.values())  # ASCII: names may be no text
    with file_system(out) as (fs, root):
        write(fs, f"{root}/{REPORT}", content.encode())


LOCAL = "local"
"""In place of a cluster's address: Ray is started on this machine and ends with the command."""
PARQUET = "report.parquet"
_DEATHS = 3
_STORE_BYTES = 100_000_000  # of Ray on this machine: nothing but URLs and lines goes through it


class _Worker:
    """A process of Ray that loads the models once, and casts one document after the other."""

    def __init__(self, load: Callable[[], FolderCaster]):
        self._load = cache(load)

    def cast(self, line: Line) -> Line:
        return self._load()(line)


def cast_with_ray(
    address: str, load: Callable[[], FolderCaster], *, actors: int | None = None
) -> Callable[[Sequence[Line]], Iterator[Line]]:
    """What casts documents with Ray, as `cast_all` takes it.

    Args:
        address: of a cluster, as `ray.init` takes it; or `LOCAL`.
        load: loads the models in each process; it has to be picklable.
        actors: how many processes; one for each GPU if the cluster has some, else for each CPU, if None.

    Raises:
        PackageError: Ray is not installed. ConfigError: no cluster answers at the address.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would send statistics to its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes as an exception
    try:
        import ray
    except ImportError as error:
        raise PackageError("--ray needs Ray: pip install 'loracast[ray]'") from error

    def lines_of(todo: Sequence[Line]) -> Iterator[Line]:
        """The lines in any order; each process has one document at a time."""
        n_gpus, n_cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        made = ray.remote(num_cpus=1, num_gpus=min(1, n_gpus), max_restarts=-1, max_task_retries=_DEATHS - 1)(_Worker)
        free: list[Any] = [made.remote(load) for _ in range(min(len(todo), actors or n_gpus or max(1, n_cpus)))]
        waiting, running = iter(todo), dict[Any, tuple[Any, Line]]()
        while True:
            for worker, line in zip(free, waiting, strict=False):
                running[worker.cast.remote(line)] = worker, line
            if not running:
                return
            (done,), _ = ray.wait([*running])
            worker, line = running.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayActorError:
                error = f"the process that cast it died {_DEATHS} times, of too little memory or of the document"
                yield replace(line, error=error)
            free = [worker]

    def cast(todo: Sequence[Line]) -> Iterator[Line]:
        with redirect_stdout(sys.stderr):  # Ray says there what has died
            try:
                _start(ray, address, actors)
                yield from lines_of(todo)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                reason = cause if isinstance(cause, LoracastError) else str(error).strip().rsplit("\n", 1)[-1]
                raise LoracastError(f"Ray gave up: {reason}") from error
            finally:
                ray.shutdown()

    return cast


def _start(ray: Any, address: str, actors: int | None) -> None:
    quietly = {"logging_level": "error", "log_to_driver": False}
    if address == LOCAL:
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ray.init("local", num_cpus=actors or own, include_dashboard=False, object_store_memory=_STORE_BYTES, **quietly)
        return
    try:
        ray.init(address, **quietly)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no Ray cluster answers at {address!r} ({error}): give its address, or {LOCAL}") from error


def write_parquet(out: str) -> None:
    """Write the report once more, as a table in Parquet."""
    import pyarrow
    import pyarrow.parquet

    kinds = {"rank": pyarrow.int32(), "n_chunks": pyarrow.int64(), "n_tokens": pyarrow.int64()}
    kinds |= dict.fromkeys(("lost", "seconds"), pyarrow.float64()) | {"is_final": pyarrow.bool_()}
    schema = pyarrow.schema([(field.name, kinds.get(field.name, pyarrow.string())) for field in fields(Line)])
    content = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([asdict(line) for line in read_report(out).values()], schema), content
    )
    with file_system(out) as (fs, root):
        write(fs, f"{root}/{PARQUET}", content.getvalue())
