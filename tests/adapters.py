"""Adapters with random factors, for tests of the library and of what is in it."""

from __future__ import annotations

import builtins
import io
import os
import shutil
import sqlite3
from dataclasses import replace as with_changes
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracast.base.fingerprint import Fingerprint
from loracast.documents import Chunk
from loracast.files import file_sha256
from loracast.library.adapter import STATIC, Adapter
from loracast.library.index import write_index
from loracast.library.library import Library
from loracast.library.manifest import FACTORS, FORMAT, MANIFEST, STATIC_FILE, Manifest
from loracast.library.save import save_rows, tensors_of
from loracast.lora.merge import MOST_KEYS
from loracast.lora.target import target_from_config
from loracast.reading.outline import write_document_index
from tiny import make_model

TARGET = target_from_config(make_model().config, ("q_proj", "down_proj"), layers=[1, 3])
RANKS = dict.fromkeys(TARGET.kinds, 2)
MADE_FOR = Fingerprint("tiny", "c" * 16, "n" * 16, "m" * 16)
STATIC_ROWS = {
    f"q_proj.shared.{side}": torch.randn(2, 3, d, generator=torch.Generator().manual_seed(7))
    for side, d in (("a", 48), ("b", 64))
}
"""The static LoRA of a hypernetwork."""
Expanded = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Killed(BaseException):
    """Stands in for the end of the process."""


def random_factors(n: int, seed: int = 0, rank: int = 2) -> Expanded:
    """Factors of n chunks, as a hypernetwork casts them."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for kind in TARGET.kinds:
        m = TARGET.of_kind(kind)[0]
        found[kind] = tuple(torch.randn(n, 2, rank, d, generator=g) for d in (m.d_in, m.d_out))
    return found


def deltas(factors: Expanded, chunks: list[int]) -> dict[str, torch.Tensor]:
    """The delta of each module in fp32, by hand."""
    found = {}
    for kind, (a, b) in factors.items():
        a, b = a.bfloat16().float(), b.bfloat16().float()
        for layer, module in enumerate(TARGET.of_kind(kind)):
            found[module.name] = sum(b[i, layer].T @ a[i, layer] for i in chunks)
    return found


def some_chunks(n: int) -> list[Chunk]:
    return [Chunk(f"word{i} in chunk {i}", 10 * i, 10 * i + 9, f"Manual / Part {i}", 5) for i in range(n)]


def some_manifest(n: int, **changes) -> Manifest:
    values = {
        "name": "doc", "title": "A manual", "source": "manual.pdf", "source_sha256": "s" * 64, "made_for": MADE_FOR,
        "hypernetwork": "h" * 16, "modules": tuple((m.name, m.layer, m.kind, m.d_in, m.d_out) for m in TARGET.modules),
        "ranks": RANKS, "n_chunks": n, "n_tokens": 5 * n, "max_chunk_tokens": 256,
        "created": "2026-01-01T00:00:00+00:00",
        "learn_s": 0.5, "warnings": ("page 3 has no text",),
    }  # fmt: skip
    return Manifest(**{**values, **changes})


def write(
    library: Library | Path,
    n: int = 3,
    *,
    seed: int = 0,
    name: str = "doc",
    shared: dict | None = None,
    replace: bool = False,
    chunks: list[Chunk] | None = None,
    **changes,
) -> Adapter:
    """An adapter with random factors, added in two batches; `changes` of its manifest."""
    if (older := changes.pop("format", FORMAT)) != FORMAT:
        given = {"seed": seed, "name": name, "shared": shared, "chunks": chunks, **changes}
        return as_older(Library.of(library), write(Library.of(library).folder / "new", n, **given), older)
    factors = random_factors(n, seed)
    manifest = some_manifest(n, **{"name": name, **changes})
    index = partial(write_document_index, title=manifest.title) if manifest.kind == "document" else write_index
    parts = [part for part in (slice(0, 1), slice(1, n)) if n > part.start]
    batches = [{name: value[part] for name, value in tensors_of(factors).items()} for part in parts]
    chunks = chunks or some_chunks(n)
    return save_rows(Library.of(library), manifest, chunks, batches, shared or {}, index=index, replace=replace)


def as_older(library: Library, made: Adapter, format: int) -> Adapter:
    """The same adapter as a version of that format wrote it: the static LoRA among the factors, in bf16 up to 3."""
    static = made.rows([0]) if format < 4 else made.stored_static()
    with library.work("new") as folder:
        shutil.copytree(made.folder, folder, dirs_exist_ok=True)
        tensors = load_file(folder / FACTORS) | {name: rows for name, rows in static.items() if STATIC in name}
        save_file(tensors, folder / FACTORS)
        (folder / STATIC_FILE).unlink(missing_ok=True)
        changes = {"most_keys": MOST_KEYS if format > 3 else None, "factors_sha256": file_sha256(folder / FACTORS)}
        manifest = with_changes(made.manifest, format=format, static_sha256="", **changes)
        manifest.write(folder / MANIFEST)
        shutil.rmtree(library.folder / "new", ignore_errors=True)
        return library.add(manifest.name, folder, manifest, replace=True)


def refuse_writes(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    """Make a library one that this process cannot write, also where it is root's, which may write anything."""

    def is_there(path) -> bool:
        return isinstance(path, (str, os.PathLike)) and Path(path).absolute().is_relative_to(library)

    def guard(owner, name: str, writes) -> None:
        real = getattr(owner, name)

        def guarded(path, *given, **options):
            if is_there(path) and writes(*given, **options):
                raise PermissionError(f"{path} cannot be written")
            return real(path, *given, **options)

        monkeypatch.setattr(owner, name, guarded)

    def connect(address: str | Path, **options) -> sqlite3.Connection:
        path, _, how = str(address).removeprefix("file://").partition("?")
        if is_there(path) and not how.startswith("mode=ro"):
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return real_connect(address, **options)

    real_access, real_connect = os.access, sqlite3.connect
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode, **how: not (mode & os.W_OK and is_there(path)) and real_access(path, mode, **how),
    )
    monkeypatch.setattr(sqlite3, "connect", connect)
    for owner in (builtins, io):
        guard(owner, "open", lambda mode="r", *_, **__: any(letter in mode for letter in "wax+"))
    guard(os, "open", lambda flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "utime", "symlink", "link"):
        guard(os, name, lambda *_, **__: True)
