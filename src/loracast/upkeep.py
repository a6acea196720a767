"""Keeping a library whole and small: what nobody needs is deleted, what is damaged is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loracast.adapter import Adapter
from loracast.errors import AdapterError
from loracast.library import find
from loracast.library_files import folders, home_of, is_ready, settle, size_of, strangers
from loracast.register import Register
from loracast.workfolders import tidy


@dataclass(frozen=True)
class Collected:
    """What `collect_garbage` deleted, or would."""

    versions: tuple[str, ...]
    n_bytes: int


def collect_garbage(library: Path, *, keep: int | None = None, dry_run: bool = False) -> Collected:
    """Delete what no name has, and what killed processes left.

    Args:
        keep: of each name, keep the newest so many versions; None keeps all.
        dry_run: only say what would go.
    """
    if keep is not None and keep < 1:
        raise AdapterError("keep at least one version of each name; `loracast rm NAME` deletes all")
    if not is_ready(library):
        return Collected((), 0)
    if dry_run:
        with Register.reading(library) as register:
            named = {e.version for name in register.names() for e in register.versions_of(name)[:keep]}
        gone = sorted(folders(library).keys() - named)
        return Collected(tuple(gone), sum(size_of(home_of(library, version)) for version in gone))
    with Register.writing(library) as register:
        if keep is not None:
            register.drop_older(keep)
        register.drop_unnamed()
        there = set(register.all_versions())
        gone = sorted(folders(library).keys() - there)
        for version in gone:
            register.unsettle(version)
    n_bytes = sum(size_of(home_of(library, version)) for version in gone)
    settle(library)
    tidy(library)
    return Collected(tuple(gone), n_bytes)


def verify(library: Path, names: Sequence[str] = ()) -> list[str]:
    """What is wrong with a library, a line each: files that are missing, changed or half-written, a damaged register.

    Args:
        names: only these adapters (`name` or `name@hash`); all of them, and the register, if none are given.
    """
    if names:
        return [problem for name in names for problem in _verify_one(library, find(library, name).version)]
    if not is_ready(library):
        return []
    with Register.reading(library) as register:
        problems = register.problems()
        known = register.all_versions()
        unsettled = set(register.unsettled())
    for version in known:
        problems += _verify_one(library, version)
    for version, folder in sorted(folders(library).items()):
        if version not in known and version not in unsettled:
            problems.append(f"{folder} belongs to no name: `loracast gc` deletes it")
    problems += [f"{folder} cannot be taken into the register: {why}" for folder, why in strangers(library)[1]]
    return problems


def _verify_one(library: Path, version: str) -> list[str]:
    home = home_of(library, version)
    try:
        adapter = Adapter(home)
    except AdapterError as error:
        return [str(error)]
    found = adapter.problems()
    if adapter.manifest.version != version:
        found.append("adapter.json is not the one it was stored with")
    return [f"{home}: {problem}" for problem in found]
