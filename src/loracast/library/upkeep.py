"""Upkeep of a library: garbage, damage, and moves to and from a store."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from loracast.errors import AdapterError
from loracast.files import tidy
from loracast.library.adapter import MANIFEST, Adapter
from loracast.library.files import STORE, size_of
from loracast.library.library import Library
from loracast.library.manifest import VERSION_DIGITS, Manifest
from loracast.library.register import Register
from loracast.library.store import SharedStore, Store


@dataclass(frozen=True)
class Collected:
    """What `collect_garbage` deleted, or would delete."""

    versions: tuple[str, ...]
    n_bytes: int


def collect_garbage(library: Library, *, keep: int | None = None, dry_run: bool = False) -> Collected:
    """Delete versions without a name, and what killed processes left.

    Args:
        keep: how many of the newest versions each name keeps; None keeps all.
        dry_run: delete nothing, only report.
    """
    if keep is not None and keep < 1:
        raise AdapterError("keep at least one version of each name; `loracast rm NAME` deletes all")
    if not library.files.make_ready():
        return Collected((), 0)
    shared = library.register.store
    if dry_run:
        with library.register.reading() as register:
            named = {e.version for name in register.names() for e in register.versions_of(name)[:keep]}
            gone = _everywhere(library, register) - named
        gone |= set() if shared is None else set(shared.garbage(named))
        return Collected(tuple(sorted(gone)), sum(map(library.files.size, gone)))

    def sweep(register: Register) -> tuple[set[str], set[str]]:
        if keep is not None:
            register.drop_older(keep)
        register.drop_unnamed()
        named = set(register.all_versions())
        gone = _everywhere(library, register) - named
        for version in gone:
            register.mark_unrecovered(version)
        return gone, named

    gone, named = library.register.changing(None, sweep)
    n_bytes = sum(map(library.files.size, gone))
    tidy(library.folder)  # first: the folder of a killed process says that it is still at work
    library.files.recover()
    if shared is not None:
        for version in shared.garbage(named):
            if shared.delete_unless_used(version):
                gone.add(version)
        shared.tidy()
    return Collected(tuple(sorted(gone)), n_bytes)


def _everywhere(library: Library, register: Register) -> set[str]:
    """The versions on this machine, or in a store that is this library's own."""
    store = library.files.store(register)
    return library.files.homes().keys() | (set() if store is None or store.is_shared else store.versions())


def use_store(library: Library, url: str, *, take_over: bool = False) -> int:
    """Copy a library's adapters to a URL and keep them there from now on, with this machine's folder as a cache.

    Args:
        take_over: make another library's store this one's, with its adapters, each under the name it was made under.

    Returns:
        how many adapters the store holds now.
    """
    library.folder.mkdir(parents=True, exist_ok=True)
    library.files.make_ready()
    if shared := library.files.shared_url:
        raise AdapterError(f"the library is shared at {shared}: `loracast store --leave` first")
    store = Store(url)
    with Register.writing(library.files.register) as register:
        owner = register.setting("id") or uuid.uuid4().hex
        store.claim(owner, take_over=take_over)
        register.set("id", owner)
    with Register.reading(library.files.register) as register:
        versions = register.all_versions()
    for version in versions:
        store.put(version, library.files.local(version))
    with Register.writing(library.files.register) as register:
        register.set(STORE, url)
    others = {version for version in store.versions() if store.has(version)} - set(versions) if take_over else set()
    manifests = [Manifest.read(library.files.local(version) / MANIFEST) for version in others]
    for manifest in sorted(manifests, key=lambda m: (m.created, m.version)):  # the newest of a name comes last
        with Register.writing(library.files.register) as register:
            library.files.enter(register, manifest)
    return len(versions) + len(others)


def store_url(library: Library) -> str | None:
    """The URL of a library's store; None where adapters lie on this machine alone."""
    with library.register.reading() as register:
        return library.files.shared_url or register.setting(STORE)


def leave_store(library: Library) -> None:
    """Fetch all adapters to this machine and use the store no longer. Its files stay where they are."""
    if library.files.make_ready():
        with library.register.reading() as register:
            versions = register.all_versions()
        for version in versions:
            library.files.local(version)
        library.register.unshare()


def evict(library: Library) -> int:
    """Delete this machine's copies of adapters in the store; the bytes freed. Raises AdapterError without a store."""
    url = store_url(library)
    if url is None:
        raise AdapterError(
            "this library has no store: its adapters lie on this machine alone (`loracast store URL` sets one)"
        )
    store, n_bytes = Store(url), 0
    for version, folder in library.files.homes().items():
        if store.has(version):
            n_bytes += size_of(folder)
            with library.files.work("rm") as grave:
                os.replace(folder, grave / folder.name)
    return n_bytes


def verify(library: Library, names: Sequence[str] = ()) -> list[str]:
    """Every fault of a library in a line: files missing, changed or half-written, a damaged register.

    Args:
        names: only these adapters (`name` or `name@hash`); all of them, and the register, if empty.
    """
    if names:
        found = [library.find(name).version for name in names]
        with Register.reading(library.files.register) as register:
            store = library.files.store(register)
        there = set() if store is None else {version for version in found if store.has(version)}
        return [problem for version in found for problem in _verify_one(library, version, store, there)]
    if not library.files.make_ready():
        return []
    shared = library.register.store
    if shared is not None:
        library.register.take_in(shared)
    with Register.reading(library.files.register) as register:
        problems = register.problems() + ([] if shared is None else _verify_names(register, shared))
        versions = set(register.all_versions())
        unrecovered = set(register.unrecovered())
        store = library.files.store(register)
    stored = set() if store is None else {version for version in store.versions() if store.has(version)}
    for version in sorted(versions):
        problems += _verify_one(library, version, store, stored)
    ours = stored if shared is None else set()  # without a name, in a shared store, another machine may be adding it
    for version in sorted((library.files.homes().keys() | ours) - versions - unrecovered):
        problems.append(f"the version {version[:VERSION_DIGITS]} belongs to no name: `loracast gc` deletes it")
    good, bad = library.files.orphans()
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


def _verify_one(library: Library, version: str, store: Store | None, stored: Collection[str]) -> list[str]:
    """The faults of a version: of its files, if they are here, and that its library's store lacks it."""
    problems = []
    if store is not None and version not in stored:
        problems.append(f"the version {version[:VERSION_DIGITS]} is not at {store.url}")
    home = library.files.home(version)
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
