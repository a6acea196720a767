"""adapter.json: what an adapter says of itself, and the names that adapters may have."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from loracast.base.fingerprint import Fingerprint
from loracast.errors import AdapterError
from loracast.files import write_atomically
from loracast.lora.merge import Merging
from loracast.lora.quantize import STORAGE, Storage
from loracast.lora.target import Target, TargetModule

if TYPE_CHECKING:
    from loracast.documents import Document
    from loracast.documents.images import ImageFile

FORMAT = 1
VERSION_DIGITS = 12
"""Digits of a version's hash by which people and servers call it."""
AdapterKind = Literal["document", "task", "image", "combined", "imported"]
"""What an adapter was made from: a document, the description of a task (its title), an image, other adapters, or another tool's LoRA."""
_STORED_AS = {"max_unscaled_chunks": "most_summed", "key_decorrelation": "merge_ridges"}
"""Fields whose key in adapter.json is older than their name; versions are hashes over these keys, so they stay."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Manifest:
    """adapter.json: all that is known of an adapter without opening its factors."""

    name: str
    title: str
    source: str | None
    """The document's file name, without its folders."""
    source_sha256: str
    made_for: Fingerprint
    hypernetwork: str
    """Hash of the hypernetwork's weights."""
    modules: tuple[tuple[str, int, str, int, int], ...]
    """The target, as in the hypernetwork's config."""
    ranks: dict[str, int]
    """Of one chunk, by module kind."""
    n_chunks: int
    n_tokens: int
    max_chunk_tokens: int
    created: str
    """UTC, ISO 8601."""
    learn_s: float
    """Seconds it took."""
    factors_sha256: str = ""
    chunks_sha256: str = ""
    """Of chunks.sqlite; "" in adapters from before it was kept."""
    format: int = FORMAT
    warnings: tuple[str, ...] = field(default=())
    kind: AdapterKind = "document"
    """What it was made from."""
    max_unscaled_chunks: dict[str, int] = field(default_factory=dict)
    """By module kind, chunks up to which factors add up when merged; those of K more count this / K each."""
    key_decorrelation: dict[str, float] = field(default_factory=dict)
    """By module kind, the ridge with which chunks are told apart when merged (merging.py)."""
    storage: Storage = "bf16"
    """How the factors are kept."""
    strength: float = 1.0
    """Factor on every delta, folded in already; of a task."""

    @property
    def target(self) -> Target:
        return Target(tuple(TargetModule(*module) for module in self.modules))

    @property
    def merging(self) -> Merging:
        """How its chunks become one LoRA."""
        return Merging(self.max_unscaled_chunks, self.key_decorrelation)

    @property
    def version(self) -> str:
        """Hash of what the adapter is and what it was made from; not of its name, nor of when and how fast it was made."""
        named_apart = ("name", "created", "learn_s", "chunks_sha256")
        kept = {key: value for key, value in self._stored().items() if key not in named_apart}
        if self.storage == "bf16":  # as it was before there were others
            del kept["storage"]
        if not self.key_decorrelation:
            del kept[_STORED_AS["key_decorrelation"]]
        return _hash(kept)

    def _stored(self) -> dict[str, Any]:
        """The manifest under the keys of adapter.json."""
        return {_STORED_AS.get(key, key): value for key, value in asdict(self).items()}

    @property
    def made_from(self) -> str:
        """Hash of all that decides what a hypernetwork makes: the source, the hypernetwork, the base, the options."""
        source = (self.kind, self.title, self.source, self.source_sha256)
        options = (self.max_chunk_tokens, self.storage, self.strength)
        # The hash of a hypernetwork is that of its weights, which do not say how chunks are merged.
        merging = (self.key_decorrelation,) if self.key_decorrelation else ()
        return _hash([*source, self.hypernetwork, asdict(self.made_for), *options, *merging])

    @property
    def rank_text(self) -> str:
        """The ranks in words."""
        return ", ".join(f"{rank} in {kind}" for kind, rank in self.ranks.items() if rank)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AdapterError(f"{path.parent} is not an adapter: its adapter.json cannot be read ({error})") from error
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise AdapterError(
                f"{path} is not of format {FORMAT}; this version of loracast cannot read it: update loracast"
            )
        try:
            names = {_STORED_AS.get(f.name, f.name): f.name for f in fields(cls)}
            if unknown := stored.keys() - names.keys():
                raise ValueError(f"unknown keys {sorted(unknown)}")
            stored["made_for"] = Fingerprint(**stored["made_for"])
            stored["modules"] = tuple(tuple(module) for module in stored["modules"])
            stored["warnings"] = tuple(stored["warnings"])
            manifest = cls(**{names[key]: value for key, value in stored.items()})
            if not _NAME.fullmatch(manifest.name):
                raise ValueError(f"{manifest.name[:80]!r} is no adapter's name")
            sizes = [
                *dict(manifest.max_unscaled_chunks).values(),
                *(rank or 1 for rank in dict(manifest.ranks).values()),  # 0 of kinds that all documents share
                manifest.n_chunks,
                *(d for m in manifest.modules for d in m[3:]),
            ]
            if not manifest.modules or min(sizes) < 1:
                raise ValueError("it targets nothing, or a size in it is not positive")
            if not all(0 < ridge < math.inf for ridge in dict(manifest.key_decorrelation).values()):
                raise ValueError("a ridge in it is not a positive number")
            if unknown := set(manifest.target.kinds) ^ {module.kind for module in manifest.target.modules}:
                raise ValueError(f"unknown module kinds {sorted(unknown)}")
            if manifest.kind not in get_args(AdapterKind):
                raise ValueError(f"unknown kind {manifest.kind!r}")
            if manifest.storage not in STORAGE:
                raise ValueError(f"unknown storage {manifest.storage!r}")
            if manifest.ranks.keys() != set(manifest.target.kinds):
                raise ValueError("its ranks are not those of its module kinds")
            return manifest
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(f"{path} is damaged: {error}; learn the document again") from error

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(self._stored(), indent=1, ensure_ascii=False).encode())


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_name(name: str) -> str:
    """A name that is safe as a folder's: lower-case letters, digits, `.`, `_`, `-`. Raises AdapterError."""
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"{name[:80]!r} cannot name an adapter: use 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
        )
    return name


def name_from(text: str) -> str:
    """A name made from a title or file name."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:64].strip("-")
    return slug or "document"


def name_for(document: Document | ImageFile) -> str:
    """The name of a document's (or picture's) adapter where the user gives none: made from the file's name, or else the title."""
    return name_from(Path(document.file_name).stem if document.file_name else document.title)
