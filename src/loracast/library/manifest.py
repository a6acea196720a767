"""adapter.json: what an adapter says of itself, the keys by which it is known, and the names that adapters may have."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval, MinLen

from loracast.base.fingerprint import Fingerprint
from loracast.errors import LEARN_AGAIN, AdapterError
from loracast.files import frozen, value_faults, write_atomically
from loracast.lora.merge import MOST_KEYS, Merging
from loracast.lora.quantize import Storage
from loracast.lora.target import KINDS, Target, TargetModule

if TYPE_CHECKING:
    from loracast.documents import Document
    from loracast.documents.images import ImageFile
    from loracast.documents.labels import Labels


FACTORS, STATIC_FILE, INDEX, MANIFEST = "factors.safetensors", "static.safetensors", "chunks.sqlite", "adapter.json"
FORMAT = 5
"""Of what is written; docs/adapter-format.md says how the older ones differ."""
READING = 2
"""Of how files are read and split into units: adapters of another one are no copies of what is learned now."""
VERSION_DIGITS = 12
"""Digits of a version's hash by which people and servers call it."""
AdapterKind = Literal["document", "task", "image", "labels", "combined", "imported"]
"""What an adapter was made from: a document, a task's description, an image, labels with probabilities, other adapters,
another tool's LoRA."""
MEMORY_SOURCE = "(chat)"
"""The source of a document that is what a user said in chats (cast/memory.py)."""
_STORED_AS = {"max_unscaled_chunks": "most_summed", "key_decorrelation": "merge_ridges"}
"""Fields whose key in adapter.json is older than their name; versions are hashes over these keys, so they stay."""
LONGEST_NAME = 64
"""Characters."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
VERSION = re.compile(r"[0-9a-f]{64}")
"""The hash of a version."""
Size = Annotated[int, Interval(ge=1, le=10**7)]
"""Of chunks, ranks and widths: lists as long as larger ones say would fill the memory."""
Count = Annotated[int, Interval(ge=0, lt=2**63)]
Ratio = Annotated[float, Interval(gt=0, lt=2**63)]


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of adapter.json: all that is known of an adapter without opening its factors."""

    name: str
    """The name it was made under."""
    title: str
    source: str | None = None
    """The document's file name, without its folders."""
    source_sha256: str
    """Hash of the source's bytes."""
    made_for: Fingerprint
    """The base."""
    hypernetwork: str = ""
    """Id of the hypernetwork; in older adapters a hash of its weights alone; "" where none made it."""
    modules: Annotated[tuple[tuple[str, Count, str, Size, Size], ...], MinLen(1)]
    """The target, as in the hypernetwork's config."""
    ranks: dict[str, Annotated[int, Interval(ge=0, le=10**7)]]
    """Of one chunk, by module kind; 0 of kinds that receive the static LoRA alone."""
    n_chunks: Size
    n_tokens: Count = 0
    max_chunk_tokens: Count = 0
    created: str = field(default_factory=utc_now)
    """UTC, ISO 8601."""
    learn_s: float = 0.0
    """Seconds that casting took."""
    factors_sha256: str = ""
    static_sha256: str = ""
    """Of static.safetensors; "" where there is no static LoRA, and up to format 4, whose factors hold it."""
    chunks_sha256: str = ""
    """Of chunks.sqlite; "" in adapters from before it was kept."""
    format: int = FORMAT
    warnings: tuple[str, ...] = ()
    kind: AdapterKind = "document"
    max_unscaled_chunks: dict[str, Size] = field(default_factory=dict)
    """By module kind, how many chunks are merged unscaled at most; of K more, each is scaled by this / K."""
    key_decorrelation: dict[str, Ratio] = field(default_factory=dict)
    """By module kind, the ridge with which merging decorrelates the keys of different chunks (lora/merge.py)."""
    most_keys: Ratio | None = MOST_KEYS
    """Rows of these kinds that are merged at most, in parts of a module's inputs; None (up to format 3) merges all."""
    storage: Storage = "bf16"
    """How the factors are kept; bf16 where adapter.json does not say."""
    memory_kinds: tuple[str, ...] = ()
    """Module kinds whose rows belong to a sentence each; their B rows are the same in all modules and kept once."""
    strength: float = 1.0
    """Of a task: factor on every delta, folded in already."""
    n_examples: Count = 0
    """Of a task: examples that were read beside its description."""
    is_refined: bool = False
    """Of a task: whether gradient descent on its examples went on from what was cast."""

    @property
    def is_memory(self) -> bool:
        """Whether this is a document of what a user said in chats."""
        return self.kind == "document" and self.source == MEMORY_SOURCE

    @cached_property
    def target(self) -> Target:
        return Target(tuple(TargetModule(*module) for module in self.modules))

    @property
    def hashes(self) -> dict[str, str]:
        """The files that the adapter has beside adapter.json, each with its hash ("" where none was kept)."""
        found = {INDEX: self.chunks_sha256, FACTORS: self.factors_sha256, STATIC_FILE: self.static_sha256}
        absent = ({FACTORS} if self.storage == "text" else set()) | (set() if self.static_sha256 else {STATIC_FILE})
        return {name: sha256 for name, sha256 in found.items() if name not in absent}

    @property
    def merging(self) -> Merging:
        """How the rows of several chunks become one LoRA."""
        most_keys = math.inf if self.most_keys is None else self.most_keys
        return Merging(self.max_unscaled_chunks, self.key_decorrelation, most_keys)

    @cached_property
    def version(self) -> str:
        """Hash of the content: of all but the name, and when and how fast the adapter was made."""
        left_out = {"name", "created", "learn_s", "chunks_sha256"}
        younger = {"storage": "bf16", "merge_ridges": {}, "memory_kinds": ()}  # than the first versions
        stored = self._stored().items()
        return _hash({key: value for key, value in stored if key not in left_out and younger.get(key, ...) != value})

    def cache_keys(self, former_ids: Sequence[str] = ()) -> list[str]:
        """Hashes of all that decides what is cast: the source, the hypernetwork, the base, the options.

        Args:
            former_ids: ids of the same hypernetwork in earlier releases; the keys under them follow its own.
        """
        source = (self.kind, self.title, self.source, self.source_sha256)
        options = (self.max_chunk_tokens, self.storage, self.strength)
        # An earlier id is a hash of the weights, which does not say how chunks are merged.
        # Adapters of format 1 have no sentences, and those of format 3 merged all keys; format 5 holds those of 4.
        cast_as = min(self.format, 3 if self.most_keys is None else 4)
        given = (self.key_decorrelation, self.memory_kinds, cast_as if cast_as > 2 else None, READING)
        ids = (self.hypernetwork, *former_ids)
        return [_hash([*source, one, self.made_for.to_dict(), *options, *filter(None, given)]) for one in ids]

    @property
    def rank_text(self) -> str:
        """The rank in each module kind, in words."""
        return ", ".join(f"{rank} in {kind}" for kind, rank in self.ranks.items() if rank)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in a file. Raises AdapterError where it is damaged, of another format or has unknown keys."""
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise AdapterError(f"{path.parent} is not an adapter: its adapter.json cannot be read ({error})") from error
        if not isinstance(stored, dict) or stored.get("format") not in range(1, FORMAT + 1):
            raise AdapterError(
                f"{path} is not of format 1 to {FORMAT}; this version of loracast cannot read it: update loracast"
            )
        try:
            names = {key: name for name, key in _STORED_AS.items()}
            values = {names.get(key, key): frozen(value) for key, value in stored.items()}
            if values["format"] < 4:
                values["most_keys"] = None
            values.setdefault("memory_kinds", ())
            if faults := value_faults(cls, values):
                raise ValueError("; ".join(faults))
            check_name(values["name"])
            kinds, ranks, memory = {module[2] for module in values["modules"]}, values["ranks"], values["memory_kinds"]
            if not set(KINDS) >= kinds == ranks.keys() >= set(memory):
                raise ValueError(f"its modules {sorted(kinds)}, ranks {ranks} and memory {memory} do not fit together")
            return cls(**values | {"made_for": Fingerprint(**values["made_for"])})
        except (AdapterError, KeyError, TypeError, ValueError) as error:
            raise AdapterError(f"{path} is damaged: {error}; {LEARN_AGAIN}") from error

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(self._stored(), indent=1, ensure_ascii=False).encode())

    def _stored(self) -> dict[str, Any]:
        """The manifest under the keys of adapter.json."""
        stored = {**asdict(self), "made_for": self.made_for.to_dict()}
        absent = [key for key in ("n_examples", "is_refined") if not stored[key]]  # younger than the first versions
        absent += ["static_sha256", "most_keys"] if self.format < 5 else []
        return {_STORED_AS.get(key, key): value for key, value in stored.items() if key not in absent}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_name(name: str) -> str:
    """A name that is safe as a folder's: lower-case letters, digits, `.`, `_`, `-`. Raises AdapterError."""
    if not NAME.fullmatch(name):
        raise AdapterError(
            f"{name[:80]!r} cannot name an adapter: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return name


def name_from(text: str) -> str:
    """A name made from a title or file name."""
    return _slug(text) or "document"


def name_for_task(title: str) -> str:
    """The default name of a task's adapter; one with a hash where few of the title's letters can stand in a name."""
    kept = _slug(title)
    n_letters = sum(map(str.isalnum, title[:LONGEST_NAME]))
    return kept if 2 * sum(map(str.isalnum, kept)) >= n_letters > 0 else marked_name("task", title)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST_NAME].strip("-")


def marked_name(name: str, mark: str) -> str:
    """A name with a short hash of a text behind it, for what cannot have the name itself.

    The text may be the name of a file, which need not be valid Unicode.
    """
    digest = hashlib.sha256(mark.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"


def name_for(document: Document | ImageFile | Labels) -> str:
    """The default name of an adapter, of whatever is learned: made from the file's name, or else from the title."""
    return name_from(Path(document.file_name).stem if document.file_name else document.title)
