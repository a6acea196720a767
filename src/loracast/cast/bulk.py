"""Casts many documents into PEFT folders at a URL, one a document, as vLLM's resolver and Ray Serve LLM load them.

What is new there is found, handed to this process or to Ray Data's actors, and reported.

Casts documents into PEFT folders at a URL, one a document, as vLLM's resolver and Ray Serve LLM load them.

    NAME@HASH/adapter_model.safetensors
    NAME@HASH/adapter_config.json        comes last: a folder without it is not whole

HASH is that of the file and of how it was cast, so that a name never means other weights and nothing is cast twice.

Casts all documents at a URL into PEFT folders: finds what is new, hands it to whoever casts, and keeps the report.

The report lies beside the folders and is what the next run knows: files that it lists are not read again until they
change. A run that was killed loses what it did since the report was written last; folders that are there already are
then found by their hash, before anything is parsed or cast.

Casts documents with Ray Data: actors that hold base and hypernetwork, on this machine or on a cluster.

Ray hands out the documents in small blocks and takes back a line of the report for each. An actor that dies is started
again and its block is repeated, in which what has its folder already is not cast again. Only the document that kills it
again and again fails.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from loracast.base.load import Base
from loracast.cast.document import merge_chunks, split_document
from loracast.documents import Document, Limits, read_document
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
class Found:
    """A document that was found."""

    url: str
    name: str
    """Of its adapter, without the hash."""
    stamp: str
    """Size and time or ETag, as the file system has them; "" where it has none."""


@dataclass(frozen=True)
class Line:
    """A line of the report: what became of a document."""

    url: str
    name: str
    stamp: str
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

    def __call__(self, found: Found) -> Line:
        started = time.perf_counter()
        line = Line(found.url, found.name, found.stamp, self.casting.id)
        try:
            line = self._cast(found, line)
        except LoracastError as error:
            line = replace(line, error=str(error), is_final=isinstance(error, DocumentError))
        except Exception as error:  # a bug, or too little memory: of this document, and the others go on
            line = replace(line, error=f"{type(error).__name__}: {error}")
        return replace(line, seconds=round(time.perf_counter() - started, 4))

    def _cast(self, found: Found, line: Line) -> Line:
        casting = self.casting
        data, file_name = _read(found.url)
        sha256 = hashlib.sha256(data).hexdigest()
        folder = casting.folder_for(found.name, file_name, sha256)
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
        _write(casting.out, folder, made, casting.base_name, self._about(found.name, folder, document))
        n_tokens = sum(chunk.n_tokens for chunk in chunks)
        return replace(line, rank=made.rank, lost=made.error, n_chunks=len(chunks), n_tokens=n_tokens)

    def _about(self, name: str, folder: str, document: Document) -> dict[str, str]:
        """Provenance, for the metadata of the weights."""
        return {
            "made_by": "loracast",
            "name": name,
            "version": folder,
            "title": document.title,
            "source_sha256": document.sha256,
            "hypernetwork": self.caster.id,
            "base": json.dumps(self.base.fingerprint.to_dict()),
        }


def whole_folders(out: str) -> set[str]:
    """The names of the folders at a URL or path that are whole."""
    with file_system(out) as (fs, root):
        fs.invalidate_cache()
        files = fs.find(root)
    inside = (path[len(root) + 1 :].split("/") for path in files)
    return {parts[0] for parts in inside if parts[1:] == [CONFIG]}


def _read(url: str) -> tuple[bytes, str]:
    """The bytes of a document, with the first too many of one that is too large, and its file's name."""
    with file_system(url) as (fs, path), fs.open(path, "rb") as stream:
        return stream.read(Limits().max_bytes + 1), path.rpartition("/")[2]


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
                move_unless_there(built, place)
                if not (place / CONFIG).is_file():  # half of one, copied there by somebody
                    shutil.rmtree(place)
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


LOCAL = "local"
"""In place of a cluster's address: Ray is started on this machine and ends with the command."""
PARQUET = "report.parquet"
_BLOCK = 32  # documents: a killed actor repeats as many at most, and the last actors to finish wait for as few
_DEATHS = 3
_STORE_BYTES = 100_000_000  # of Ray on this machine: nothing but URLs and lines goes through it


def cast_with_ray(
    address: str, load: Callable[[], FolderCaster], *, actors: int | None = None
) -> Callable[[Sequence[Found]], Iterator[Line]]:
    """What casts documents with Ray, as `cast_all` takes it.

    Args:
        address: of a cluster, as `ray.init` takes it; or `LOCAL`.
        load: loads the models in each actor; it has to be picklable.
        actors: how many; one for each GPU if the cluster has some, else for each CPU, if None.

    Raises:
        PackageError: Ray is not installed. ConfigError: no cluster answers at the address.
    """
    ray = _import_ray()

    def cast(todo: Sequence[Found]) -> Iterator[Line]:
        with redirect_stdout(sys.stderr):  # Ray says there what has died
            try:
                _start(ray, address, actors)
                yield from _lines(ray, todo, load, actors)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                reason = cause if isinstance(cause, LoracastError) else str(error).strip().rsplit("\n", 1)[-1]
                raise LoracastError(f"Ray gave up: {reason}") from error
            finally:
                ray.shutdown()

    return cast


def write_parquet(out: str) -> None:
    """Write the report once more, as a table in Parquet."""
    from io import BytesIO

    import pyarrow
    import pyarrow.parquet

    kinds = {"rank": pyarrow.int32(), "n_chunks": pyarrow.int64(), "n_tokens": pyarrow.int64()}
    kinds |= dict.fromkeys(("lost", "seconds"), pyarrow.float64()) | {"is_final": pyarrow.bool_()}
    schema = pyarrow.schema([(field.name, kinds.get(field.name, pyarrow.string())) for field in fields(Line)])
    table = pyarrow.Table.from_pylist([asdict(line) for line in read_report(out).values()], schema)
    content = BytesIO()
    pyarrow.parquet.write_table(table, content)
    with file_system(out) as (fs, root):
        write(fs, f"{root}/{PARQUET}", content.getvalue())


def _import_ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would send statistics to its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes as an exception
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise PackageError("--ray needs Ray Data: pip install 'loracast[ray]'") from error
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)
    return ray


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


class _Attempts:
    """Counts how often something was begun and not ended; it outlives the actors that begin it."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        self._counts[what] += 1
        return self._counts[what]

    def end(self, what: str) -> None:
        del self._counts[what]


class _Actor:
    """Holds the models, and casts blocks of documents."""

    def __init__(self, load: Callable[[], FolderCaster], attempts: Any):
        """
        Args:
            attempts: handle of `_Attempts`.
        """
        self._cast, self._attempts = load(), attempts

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        found = [Found(**json.loads(text)) for text in block["document"]]
        cast = self._cast if self._begin(f"block {found[0].url}") == 1 else self._announced
        return {"line": [json.dumps(asdict(cast(one))) for one in found]}

    def _announced(self, found: Found) -> Line:
        """Cast a document of a block in which an actor has died: the document that kills is begun and never ends."""
        if self._begin(found.url) >= _DEATHS:  # it died once more, unannounced
            error = f"the process that cast it died {_DEATHS} times, of too little memory or of the document"
            return Line(found.url, found.name, found.stamp, self._cast.casting.id, error=error)
        line = self._cast(found)
        self._attempts.end.remote(found.url)
        return line

    def _begin(self, what: str) -> int:
        import ray

        return ray.get(self._attempts.begin.remote(what))


def _lines(ray: Any, todo: Sequence[Found], load: Callable[[], FolderCaster], actors: int | None) -> Iterator[Line]:
    """The lines of documents, in any order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    has = ray.cluster_resources()
    each = {"num_cpus": 1, "num_gpus": 1} if has.get("GPU") else {"num_cpus": 1}
    size = actors or max(1, int(has.get("GPU") or has.get("CPU", 1)))
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
    documents = [{"document": json.dumps(asdict(one))} for one in todo]
    lines = ray.data.from_items(documents, override_num_blocks=-(-len(todo) // _BLOCK)).map_batches(
        _Actor,
        fn_constructor_args=[load, attempts],
        batch_size=None,  # a whole block
        compute=ray.data.ActorPoolStrategy(size=size),
        **each,
    )
    for batch in lines.iter_batches(batch_size=None):
        for text in batch["line"]:
            yield Line(**json.loads(text))
