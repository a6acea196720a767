"""Upkeep of a library: what nothing needs is deleted, and damage is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loracast.errors import AdapterError
from loracast.files import tidy
from loracast.library.adapter import Adapter
from loracast.library.library import Library
from loracast.library.manifest import VERSION_DIGITS
from loracast.library.register import Register
from loracast.library.storage import size_of
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

    def sweep(register: Register) -> tuple[set[str], set[str]]:
        if keep is not None:
            register.drop_older(keep)
        register.drop_unnamed()
        named = set(register.all_versions())
        gone = _everywhere(library, register) - named
        for version in gone:
            register.mark_unrecovered(version)
        return gone, named

    if dry_run:
        with library.reading() as register:
            named = {e.version for name in register.names() for e in register.versions_of(name)[:keep]}
            gone = _everywhere(library, register) - named
    else:
        gone, named = library.changing(None, sweep)
    n_bytes = sum(size_of(library.home(version)) for version in gone)
    if not dry_run:
        tidy(library.folder)  # first: the folder of a killed process says that it is still at work
        library.recover()
    if (shared := library.shared_store) is not None:
        gone |= {version for version in shared.garbage(named) if dry_run or shared.delete_unless_used(version)}
        if not dry_run:
            shared.tidy()
    return Collected(tuple(sorted(gone)), n_bytes)


def _everywhere(library: Library, register: Register) -> set[str]:
    """The versions on this machine, or in a store that is this library's own."""
    store = library.store(register)
    return library.homes().keys() | (set() if store is None or isinstance(store, SharedStore) else store.versions())


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
