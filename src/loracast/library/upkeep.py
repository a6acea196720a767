"""Upkeep of a library: garbage, damage, and moves to and from a store."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from loracast.errors import AdapterError
from loracast.files import tidy
from loracast.library.adapter import MANIFEST, Adapter
from loracast.library.library import Library
from loracast.library.manifest import VERSION_DIGITS, Manifest
from loracast.library.register import Register
from loracast.library.storage import SHARED_FILE, STORE, size_of
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
    if not library.make_ready():
        return Collected((), 0)
    shared = library.shared_store
    if dry_run:
        with library.reading() as register:
            named = {e.version for name in register.names() for e in register.versions_of(name)[:keep]}
            gone = _everywhere(library, register) - named
        gone |= set() if shared is None else set(shared.garbage(named))
        return Collected(tuple(sorted(gone)), sum(size_of(library.home(version)) for version in gone))

    def sweep(register: Register) -> tuple[set[str], set[str]]:
        if keep is not None:
            register.drop_older(keep)
        register.drop_unnamed()
        named = set(register.all_versions())
        gone = _everywhere(library, register) - named
        for version in gone:
            register.mark_unrecovered(version)
        return gone, named

    gone, named = library.changing(None, sweep)
    n_bytes = sum(size_of(library.home(version)) for version in gone)
    tidy(library.folder)  # first: the folder of a killed process says that it is still at work
    library.recover()
    if shared is not None:
        for version in shared.garbage(named):
            if shared.delete_unless_used(version):
                gone.add(version)
        shared.tidy()
    return Collected(tuple(sorted(gone)), n_bytes)


def _everywhere(library: Library, register: Register) -> set[str]:
    """The versions on this machine, or in a store that is this library's own."""
    store = library.store(register)
    return library.homes().keys() | (set() if store is None or isinstance(store, SharedStore) else store.versions())


def use_store(library: Library, url: str, *, take_over: bool = False) -> int:
    """Copy a library's adapters to a URL and keep them there from now on, with this machine's folder as a cache.

    Args:
        take_over: make another library's store this one's, with its adapters, each under the name it was made under.

    Returns:
        how many adapters the store holds now.
    """
    library.folder.mkdir(parents=True, exist_ok=True)
    library.make_ready()
    if shared := library.shared_url:
        raise AdapterError(f"the library is shared at {shared}: `loracast store --leave` first")
    store = Store(url)
    with Register.writing(library.register_file) as register:
        owner = register.setting("id") or uuid.uuid4().hex
        store.claim(owner, take_over=take_over)
        register.set("id", owner)
        versions = register.all_versions()
    for version in versions:
        store.put(version, library.local(version))
    with Register.writing(library.register_file) as register:
        register.set(STORE, url)
    others = {version for version in store.versions() if store.has(version)} - set(versions) if take_over else set()
    manifests = [Manifest.read(library.local(version) / MANIFEST) for version in others]
    with Register.writing(library.register_file) as register:
        library.enter(register, manifests)
    return len(versions) + len(others)


def store_url(library: Library) -> str | None:
    """The URL of a library's store; None where adapters lie on this machine alone."""
    with library.reading() as register:
        return library.shared_url or register.setting(STORE)


def leave_store(library: Library) -> None:
    """Fetch all adapters to this machine and use the store no longer. Its files stay where they are."""
    if library.make_ready():
        with library.reading() as register:
            versions = register.all_versions()
        for version in versions:
            library.local(version)
        with Register.writing(library.register_file) as register:
            register.forget_numbers()
            register.set(STORE, None)
        (library.folder / SHARED_FILE).unlink(missing_ok=True)


def evict(library: Library) -> int:
    """Delete this machine's copies of adapters in the store; the bytes freed. Raises AdapterError without a store."""
    url = store_url(library)
    if url is None:
        raise AdapterError(
            "this library has no store: its adapters lie on this machine alone (`loracast store URL` sets one)"
        )
    store, n_bytes = Store(url), 0
    for version, folder in library.homes().items():
        if store.has(version):
            n_bytes += size_of(folder)
            with library.work("rm") as grave:
                os.replace(folder, grave / folder.name)
    return n_bytes


def verify(library: Library, names: Sequence[str] = ()) -> list[str]:
    """Every fault of a library in a line: files missing, changed or half-written, a damaged register.

    Args:
        names: only these adapters (`name` or `name@hash`); all of them, and the register, if empty.
    """
    if names:
        found = [library.find(name).version for name in names]
        with Register.reading(library.register_file) as register:
            store = library.store(register)
        return [problem for version in found for problem in _verify_one(library, version, store)]
    if not library.make_ready():
        return []
    shared = library.shared_store
    if shared is not None:
        library.take_in(shared)
    with Register.reading(library.register_file) as register:
        problems = register.problems() + ([] if shared is None else _verify_names(register, shared))
        versions, store = register.all_versions(), library.store(register)
        # Without a name, in a shared store, another machine may be adding it.
        nameless = _everywhere(library, register).difference(versions, register.unrecovered())
    for version in versions:
        problems += _verify_one(library, version, store)
    for version in sorted(nameless):
        problems.append(f"the version {version[:VERSION_DIGITS]} belongs to no name: `loracast gc` deletes it")
    good, bad = library.orphans()
    problems += [f"{folder} cannot be taken into the register: {why}" for folder, why in bad]
    return problems + [
        f"{folder} is in no register: `loracast pull-adapter {folder}` takes it in" for folder, _ in good
    ]


def _verify_names(register: Register, store: SharedStore) -> list[str]:
    """Names that are not in the register what they are at a shared store, one a line."""
    numbers, newest = register.numbers(), store.newest()
    wrong = [name for name in register.names() if name not in newest]
    for name, number in newest.items():
        if numbers.get(name) == number and store.read(name, number) != register.state(name):
            wrong.append(name)
    return [f"{name} is not here what it is at {store.url}" for name in sorted(wrong)]


def _verify_one(library: Library, version: str, store: Store | None) -> list[str]:
    """The faults of a version: of its files, if they are here, and that its library's store lacks it."""
    home, missing = library.home(version), []
    if store is not None and not store.has(version):
        missing = [f"the version {version[:VERSION_DIGITS]} is not at {store.url}"]
    if store is not None and not home.exists():
        return missing
    try:
        adapter = Adapter(home)
    except AdapterError as error:
        return [str(error), *missing]
    found = adapter.problems()
    if adapter.manifest.version != version:
        found.append("adapter.json is not the one it was stored with")
    return [f"{home}: {problem}" for problem in found] + missing
