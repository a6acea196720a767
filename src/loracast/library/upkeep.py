"""Upkeep of a library: garbage, damage, adapters in a smaller storage, and moves to and from a store."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loracast.errors import AdapterError
from loracast.library import files
from loracast.library.adapter import SENTENCE, STATIC, Adapter
from loracast.library.index import read_chunks
from loracast.library.library import find, open_adapter
from loracast.library.manifest import FORMAT, VERSION_DIGITS, Manifest
from loracast.library.register import Register
from loracast.library.store import Store
from loracast.library.workfolders import tidy, work_folder
from loracast.library.writer import AdapterWriter
from loracast.lora.quantize import STORAGE, Storage


@dataclass(frozen=True)
class Collected:
    """What `collect_garbage` deleted, or would delete."""

    versions: tuple[str, ...]
    n_bytes: int


def collect_garbage(library: Path, *, keep: int | None = None, dry_run: bool = False) -> Collected:
    """Delete versions without a name, and what killed processes left.

    Args:
        keep: how many of the newest versions each name keeps; None keeps all.
        dry_run: delete nothing, only report.
    """
    if keep is not None and keep < 1:
        raise AdapterError("keep at least one version of each name; `loracast rm NAME` deletes all")
    if not files.is_ready(library):
        return Collected((), 0)
    if dry_run:
        with Register.reading(library) as register:
            named = {e.version for name in register.names() for e in register.versions_of(name)[:keep]}
            gone = sorted(_everywhere(library, register) - named)
        return Collected(tuple(gone), sum(files.size_of(files.home_of(library, version)) for version in gone))
    with Register.writing(library) as register:
        if keep is not None:
            register.drop_older(keep)
        register.drop_unnamed()
        gone = sorted(_everywhere(library, register) - set(register.all_versions()))
        for version in gone:
            register.mark_unrecovered(version)
    n_bytes = sum(files.size_of(files.home_of(library, version)) for version in gone)
    files.recover(library)
    tidy(library)
    return Collected(tuple(gone), n_bytes)


def _everywhere(library: Path, register: Register) -> set[str]:
    """The versions on this machine or in the library's store."""
    store = files.store_in(register)
    return files.folders(library).keys() | (set() if store is None else store.versions())


def use_store(library: Path, url: str, *, take_over: bool = False) -> int:
    """Copy a library's adapters to a URL and keep them there from now on, with this machine's folder as a cache.

    Args:
        take_over: make another library's store this one's, with its adapters, each under the name it was made under.

    Returns:
        how many adapters the store holds now.
    """
    library.mkdir(parents=True, exist_ok=True)
    files.is_ready(library)
    store = Store(url)
    with Register.writing(library) as register:
        owner = register.setting("id") or uuid.uuid4().hex
        store.claim(owner, take_over=take_over)
        register.set("id", owner)
    with Register.reading(library) as register:
        known = register.all_versions()
    for version in known:
        store.put(version, files.ensure_local(library, version))
    with Register.writing(library) as register:
        register.set(files.STORE, url)
    others = {version for version in store.versions() if store.has(version)} - set(known) if take_over else set()
    for version in sorted(others):
        home = files.ensure_local(library, version)
        with Register.writing(library) as register:
            files.enter(register, Manifest.read(home / "adapter.json"), home)
    return len(known) + len(others)


def store_url(library: Path) -> str | None:
    """The URL of a library's store; None where adapters lie on this machine alone."""
    with files.reading(library) as register:
        return register.setting(files.STORE)


def leave_store(library: Path) -> None:
    """Fetch all adapters to this machine and use the store no longer. Its files stay where they are."""
    if files.is_ready(library):
        with Register.reading(library) as register:
            known = register.all_versions()
        for version in known:
            files.ensure_local(library, version)
        with Register.writing(library) as register:
            register.set(files.STORE, None)


def evict(library: Path) -> int:
    """Delete this machine's copies of adapters in the store; the bytes freed. Raises AdapterError without a store."""
    url = store_url(library)
    if url is None:
        raise AdapterError(
            "this library has no store: its adapters lie on this machine alone (`loracast store URL` sets one)"
        )
    store, n_bytes = Store(url), 0
    for version, folder in files.folders(library).items():
        if store.has(version):
            n_bytes += files.size_of(folder)
            with work_folder(library, "rm") as grave:
                os.replace(folder, grave / folder.name)
    return n_bytes


def compact(library: Path, reference: str, storage: Storage) -> Adapter:
    """Keep an adapter in a smaller storage, as a new version; the one that it was made from stays until it is removed.

    Raises:
        AdapterError: there is none, or it takes no more space now; only a document can be kept as text.
    """
    adapter = open_adapter(library, reference)
    m = adapter.manifest
    if STORAGE.index(storage) <= STORAGE.index(m.storage):
        raise AdapterError(
            f"{adapter.name!r} is kept as {m.storage} and cannot become {storage}: learn the document again"
        )
    if storage == "text" and m.kind != "document":
        raise AdapterError(
            f"{adapter.name!r} was not made from a document: only a document's factors can be made again from its text"
        )
    smaller = replace(m, name=adapter.name, storage=storage, format=FORMAT)
    with AdapterWriter(library, smaller, read_chunks(adapter.index)) as writer:
        if storage != "text":
            for i in range(m.n_chunks):
                rows = adapter.rows([i])
                if i == 0:
                    writer.open_factors({name: value for name, value in rows.items() if STATIC in name})
                factors = {kind: (rows[f"{kind}.a"], rows[f"{kind}.b"]) for kind in m.target.kinds}
                writer.add(factors, {kind: rows[f"{kind}{SENTENCE}"] for kind in m.memory_kinds})
        return writer.finish(replace=True)


def verify(library: Path, names: Sequence[str] = ()) -> list[str]:
    """Every fault of a library in a line: files missing, changed or half-written, a damaged register.

    Args:
        names: only these adapters (`name` or `name@hash`); all of them, and the register, if empty.
    """
    if names:
        return [problem for name in names for problem in _verify_one(library, find(library, name).version)]
    if not files.is_ready(library):
        return []
    with Register.reading(library) as register:
        problems = register.problems()
        known = set(register.all_versions())
        unrecovered = set(register.unrecovered())
        store = files.store_in(register)
    stored = set() if store is None else {version for version in store.versions() if store.has(version)}
    for version in sorted(known):
        if store is None or files.home_of(library, version).exists():
            problems += _verify_one(library, version)
        if store is not None and version not in stored:
            problems.append(f"the version {version[:VERSION_DIGITS]} is not at {store.url}")
    for version in sorted((files.folders(library).keys() | stored) - known - unrecovered):
        problems.append(f"the version {version[:VERSION_DIGITS]} belongs to no name: `loracast gc` deletes it")
    problems += [f"{folder} cannot be taken into the register: {why}" for folder, why in files.orphans(library)[1]]
    return problems


def _verify_one(library: Path, version: str) -> list[str]:
    home = files.home_of(library, version)
    try:
        adapter = Adapter(home)
    except AdapterError as error:
        return [str(error)]
    found = adapter.problems()
    if adapter.manifest.version != version:
        found.append("adapter.json is not the one it was stored with")
    return [f"{home}: {problem}" for problem in found]
