"""Exports an adapter of the library as one LoRA, or a document's chunk by chunk with the index to pick among them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from loracast.base.fingerprint import check, config_fingerprint
from loracast.base.load import EMBEDDED, Base, base_folder, pull
from loracast.errors import AdapterError, BaseModelError
from loracast.export.gguf import write_gguf
from loracast.export.merged import write_merged
from loracast.export.mlx import write_mlx
from loracast.export.ollama import write_ollama
from loracast.export.peft import write_peft
from loracast.export.uniform import Uniform, uniform
from loracast.export.vllm import RANKS, write_vllm
from loracast.files import write_atomically
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks
from loracast.library.manifest import VERSION_DIGITS
from loracast.lora.algebra import LoRA

Format = Literal["peft", "vllm", "gguf", "mlx", "ollama", "merged"]
FORMATS: tuple[Format, ...] = get_args(Format)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """Where one LoRA was written, and what that lost."""

    path: Path
    rank: int | None
    """The rank in all modules; None where the LoRA went into the base's weights."""
    error: float
    """What compressing to the rank lost, |delta - kept| / |delta|."""


def export_adapter(
    adapter: Adapter,
    to: Format,
    out: Path,
    *,
    max_rank: int | None = None,
    each_chunk: bool = False,
    base: str | None = None,
    load: Callable[[str], Base] | None = None,
    say: Say = lambda text: None,
) -> list[Exported]:
    """Write an adapter for another runtime.

    Args:
        out: a folder, made if need be; of the format `gguf` the file NAME.gguf in it.
        max_rank: a higher rank is compressed to it; None compresses only as far as the runtime demands.
        each_chunk: write a document's chunks one by one, with chunks.json and the index that `loracast route` reads.
        base: the base's name, folder or hub id, if not the one that the adapter was made for.
        load: loads a base: needed for `merged`.
        say: receives messages where the embedded base has to be fetched first.

    Raises:
        AdapterError: the format is unknown, the folder is not empty, or the adapter cannot be exported so.
        BaseModelError: the base is another one, or cannot be read.
    """
    if to not in FORMATS:
        raise AdapterError(f"unknown format {to!r}; one of {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} is there already and not an empty folder; give another --out")
    adapter.verify()
    name = base or adapter.manifest.made_for.base
    writer = _Writer(adapter, to, name, max_rank, load, say)
    if not each_chunk:
        return [writer.write(adapter.lora(), out, adapter.name)]
    if to == "merged" or adapter.manifest.n_chunks < 2:
        raise AdapterError("chunk by chunk goes a document of several chunks, and not into the base's weights")
    made, chunks = [], []
    for i, chunk in enumerate(read_chunks(adapter.index)):
        made.append(writer.write(adapter.lora([i]), out / f"chunk-{i:05d}", f"{adapter.name}-{i}"))
        chunks.append({"chunk": i, "path": str(made[-1].path.relative_to(out)), **asdict(chunk)})
    listing = {"adapter": adapter.version, "factors_sha256": adapter.manifest.factors_sha256, "chunks": chunks}
    write_atomically(out / "chunks.json", json.dumps(listing, indent=1, ensure_ascii=False).encode())
    shutil.copyfile(adapter.index, out / adapter.index.name)
    return made


class _Writer:
    """Writes the LoRAs of one adapter in one format."""

    def __init__(
        self,
        adapter: Adapter,
        to: Format,
        base: str,
        max_rank: int | None,
        load: Callable[[str], Base] | None,
        say: Say,
    ):
        self.adapter, self.to, self.base, self.max_rank, self.load = adapter, to, base, max_rank, load
        self.config = base_config(base, adapter, say) if to in ("gguf", "mlx", "ollama") else None
        m = adapter.manifest
        self.about = {
            "made_by": "loracast",
            "name": adapter.name,
            "version": m.version,
            "title": m.title,
            "factors_sha256": m.factors_sha256,
            "source_sha256": m.source_sha256,
            "hypernetwork": m.hypernetwork,
            "base": json.dumps(m.made_for.to_dict()),
        }

    def write(self, lora: LoRA, out: Path, name: str) -> Exported:
        if self.to == "merged":
            assert self.load is not None, "merging needs the base"
            loaded = self.load(self.base)
            check(self.adapter.manifest.made_for, loaded.fingerprint, f"the adapter {self.adapter.name!r}")
            write_merged(lora, out, loaded)
            return Exported(out, None, 0.0)
        made = uniform(lora, self.max_rank, RANKS if self.to == "vllm" else None)
        path = self._write(made, out, name)
        return Exported(path, made.rank, made.error)

    def _write(self, made: Uniform, out: Path, name: str) -> Path:
        if self.to == "peft":
            write_peft(made, out, self.base, self.about)
        elif self.to == "vllm":
            write_vllm(made, out, f"{name}@{self.adapter.manifest.version[:VERSION_DIGITS]}", self.base, self.about)
        elif self.to == "mlx":
            write_mlx(made, out, self.config)
        elif self.to == "ollama":
            write_ollama(made, out, self.config, name, self.base, base_gguf(self.base))
        else:
            write_gguf(made, out / f"{name}.gguf", self.config, name)
            return out / f"{name}.gguf"
        return out


def base_config(name: str, adapter: Adapter, say: Say = lambda text: None) -> Any:
    """The config of the base that an adapter was made for, without weights. Raises BaseModelError for another base."""
    from transformers import AutoConfig

    where = str(pull(name, say=say)) if name in EMBEDDED else name
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"cannot read the config of the base {name!r}: give its folder or hub id with --base"
        ) from error
    if config_fingerprint(config) != adapter.manifest.made_for.config:
        raise BaseModelError(
            f"{adapter.name!r} was made for a base of other shapes than {name!r}; give the right one with --base"
        )
    return config


def base_gguf(name: str) -> Path | None:
    """The GGUF file of an embedded base, if it has been fetched; None for other bases."""
    files = sorted(base_folder(name).glob("*.gguf")) if name in EMBEDDED else []
    return files[0] if files else None
