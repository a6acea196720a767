"""Casts documents into PEFT folders at a URL, one a document, as vLLM's resolver and Ray Serve LLM load them.

    NAME@HASH/adapter_model.safetensors
    NAME@HASH/adapter_config.json        comes last: a folder without it is not whole

HASH is that of the file and of how it was cast, so that a name never means other weights and nothing is cast twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loracast.base.load import Base
from loracast.cast.document import merge_chunks, split_document
from loracast.documents import Document, Limits, read_document
from loracast.errors import AdapterError, DocumentError, LoracastError
from loracast.export.vllm import RANKS
from loracast.files import move_unless_there
from loracast.hypernets.protocol import Caster
from loracast.library.manifest import VERSION_DIGITS
from loracast.library.store import file_system, is_local
from loracast.library.workfolders import work_folder
from loracast.lora.peft_format import PEFT_FILES, write_peft_folder
from loracast.lora.uniform import Uniform, uniform

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
        made = uniform(merge_chunks(self.caster, self.base, chunks, dense=False), casting.max_rank, RANKS)
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
                built, place = write_peft_folder(made, work / "adapter", base, about), Path(root) / folder
                move_unless_there(built, place)
                if not (place / CONFIG).is_file():  # half of one, copied there by somebody
                    shutil.rmtree(place)
                    move_unless_there(built, place)
            return
        with tempfile.TemporaryDirectory() as work_name:
            local = write_peft_folder(made, Path(work_name), base, about)
            for name in reversed(PEFT_FILES):
                fs.put_file(str(local / name), f"{root}/{folder}/{name}")


def _short_hash(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:VERSION_DIGITS]
