"""Upkeep of a library: garbage, damage, and moves to and from a store."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from loracast.errors import AdapterError
from loracast.library import folders as files
from loracast.library.adapter import Adapter
from loracast.library.folders import tidy, work_folder
from loracast.library.library import find
from loracast.library.manifest import VERSION_DIGITS, Manifest
from loracast.library.register import Register
from loracast.library.shared import changing, reading, shared_store, take_in, unshare
from loracast.library.store import SharedStore, Store


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
    shared = shared_store(library)
    if dry_run:
        with reading(library) as register:
            named = {e.version for name in register.names() for e in register.versions_of(name)[:keep]}
            gone = _everywhere(library, register) - named
        gone |= set() if shared is None else set(shared.garbage(named))
        return Collected(tuple(sorted(gone)), sum(files.size_of(files.home_of(library, version)) for version in gone))

    def sweep(register: Register) -> tuple[set[str], set[str]]:
        if keep is not None:
            register.drop_older(keep)
        register.drop_unnamed()
        named = set(register.all_versions())
        gone = _everywhere(library, register) - named
        for version in gone:
            register.mark_unrecovered(version)
        return gone, named

    gone, named = changing(library, None, sweep)
    n_bytes = sum(files.size_of(files.home_of(library, version)) for version in gone)
    tidy(library)  # first: the folder of a killed process says that it is still at work
    files.recover(library)
    if shared is not None:
        for version in shared.garbage(named):
            if shared.delete_unless_used(version):
                gone.add(version)
        shared.tidy()
    return Collected(tuple(sorted(gone)), n_bytes)


def _everywhere(library: Path, register: Register) -> set[str]:
    """The versions on this machine, or in a store that is this library's own."""
    store = files.store_in(library, register)
    return files.folders(library).keys() | (set() if store is None or store.is_shared else store.versions())


def use_store(library: Path, url: str, *, take_over: bool = False) -> int:
    """Copy a library's adapters to a URL and keep them there from now on, with this machine's folder as a cache.

    Args:
        take_over: make another library's store this one's, with its adapters, each under the name it was made under.

    Returns:
        how many adapters the store holds now.
    """
    library.mkdir(parents=True, exist_ok=True)
    files.is_ready(library)
    if shared := files.shared_url(library):
        raise AdapterError(f"the library is shared at {shared}: `loracast store --leave` first")
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
    homes = [files.ensure_local(library, version) for version in others]
    found = [(Manifest.read(home / "adapter.json"), home) for home in homes]
    for manifest, home in sorted(found, key=lambda f: (f[0].created, f[0].version)):  # the newest of a name comes last
        with Register.writing(library) as register:
            files.enter(register, manifest, home)
    return len(known) + len(others)


def store_url(library: Path) -> str | None:
    """The URL of a library's store; None where adapters lie on this machine alone."""
    with reading(library) as register:
        return files.shared_url(library) or register.setting(files.STORE)


def leave_store(library: Path) -> None:
    """Fetch all adapters to this machine and use the store no longer. Its files stay where they are."""
    if files.is_ready(library):
        with reading(library) as register:
            known = register.all_versions()
        for version in known:
            files.ensure_local(library, version)
        unshare(library)


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


def verify(library: Path, names: Sequence[str] = ()) -> list[str]:
    """Every fault of a library in a line: files missing, changed or half-written, a damaged register.

    Args:
        names: only these adapters (`name` or `name@hash`); all of them, and the register, if empty.
    """
    if names:
        found = [find(library, name).version for name in names]
        with Register.reading(library) as register:
            store = files.store_in(library, register)
        there = set() if store is None else {version for version in found if store.has(version)}
        return [problem for version in found for problem in _verify_one(library, version, store, there)]
    if not files.is_ready(library):
        return []
    shared = shared_store(library)
    if shared is not None:
        take_in(library, shared)
    with Register.reading(library) as register:
        problems = register.problems() + ([] if shared is None else _verify_names(register, shared))
        known = set(register.all_versions())
        unrecovered = set(register.unrecovered())
        store = files.store_in(library, register)
    stored = set() if store is None else {version for version in store.versions() if store.has(version)}
    for version in sorted(known):
        problems += _verify_one(library, version, store, stored)
    ours = stored if shared is None else set()  # without a name, in a shared store, another machine may be adding it
    for version in sorted((files.folders(library).keys() | ours) - known - unrecovered):
        problems.append(f"the version {version[:VERSION_DIGITS]} belongs to no name: `loracast gc` deletes it")
    good, bad = files.orphans(library)
    problems += [f"{folder} cannot be taken into the register: {why}" for folder, why in bad]
    problems += [f"{folder} is in no register: `loracast pull-adapter {folder}` takes it in" for folder, _ in good]
    return problems


def _verify_names(register: Register, store: SharedStore) -> list[str]:
    """Names that are not in the register what they are at a shared store, one a line."""
    numbers, newest = register.numbers(), store.newest()
    wrong = [name for name in register.names() if name not in newest]
    for name, number in newest.items():
        if numbers.get(name) == number and store.read(name, number) != register.state(name):
            wrong.append(name)
    return [f"{name} is not here what it is at {store.url}" for name in sorted(wrong)]


def _verify_one(library: Path, version: str, store: Store | None, stored: Collection[str]) -> list[str]:
    """The faults of a version: of its files, if they are here, and that its library's store lacks it."""
    problems = []
    if store is not None and version not in stored:
        problems.append(f"the version {version[:VERSION_DIGITS]} is not at {store.url}")
    home = files.home_of(library, version)
    if store is not None and not home.exists():
        return problems
    try:
        adapter = Adapter(home)
    except AdapterError as error:
        return [str(error), *problems]
    found = adapter.problems()
    if adapter.manifest.version != version:
        found.append("adapter.json is not the one it was stored with")
    return [f"{home}: {problem}" for problem in found] + problems
