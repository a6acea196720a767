"""Reading and changing a library's names, on this machine alone or together with others that share a store.

`reading` and `changing` are how everything else gets at the register. Of a shared library the store holds the
truth (store.py) and the register a copy that `shared.json` lets a machine make again: readers bring it up to
date every few seconds, and a server has a thread for that (`refreshing`). A change runs in one transaction of the
register, creates the next state of each name that it changed at the store, and then commits. Whoever finds that state
taken rolls back, takes in what is new and tries again.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from typing import TypeVar

from loracast.errors import AdapterError, LoracastError
from loracast.files import write_atomically
from loracast.library.adapter import MANIFEST
from loracast.library.files import SHARED_FILE, STORE, LibraryFiles, texts_unless_damaged
from loracast.library.manifest import Manifest
from loracast.library.register import NameState, Register
from loracast.library.store import SHARED, OvertakenError, SharedStore

REFRESH_S = 3.0
"""Readers look for new names at most this often."""
_RETRY_S = 30.0  # after a store could not be reached
_ATTEMPTS = 12
_LONGEST_CHANGE_S = 3600.0  # far below the day for which the store keeps what a slow change may rely on
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Published = tuple[str, int, NameState, NameState]
"""Name, number, the state before and the new one."""


class SharedRegister:
    """The register of a library, which follows the store that the library shares with others, if it does."""

    def __init__(self, files: LibraryFiles):
        self._files = files
        self._due = (0.0, True)
        """When to look next at the store; whether it could be reached last."""
        self._in_background = False
        """Whether a thread of this process keeps the names up to date."""

    @property
    def store(self) -> SharedStore | None:
        """The store that the library shares with others, if it does."""
        url = self._files.shared_url
        return None if url is None else SharedStore(url)

    @contextmanager
    def reading(self) -> Iterator[Register]:
        """The register, made ready and brought up to date first, for reading; an empty one without a library.

        Where the store of a shared library cannot be reached, the names are those known last, and a warning says so.
        """
        is_ready = self._files.make_ready()
        if is_ready:
            self.refresh()
        with Register.reading(self._files.register) if is_ready else Register.empty() as register:
            yield register

    def changing(self, names: Sequence[str] | None, change: Callable[[Register], _Result]) -> _Result:
        """Change names in one transaction, here and at the store that a library shares; an error undoes everything.

        Args:
            names: those that may change, in the order in which the store learns of them; None for all. A process that
                is killed on the way leaves the first of them changed.
            change: may run several times, each on newer names.

        Raises:
            LoracastError: the store cannot be reached, or others keep changing these names.
        """
        store = self.store
        if store is None:
            with Register.writing(self._files.register) as register:
                return change(register)
        self._files.make_ready()
        for attempt in range(_ATTEMPTS):
            began = time.time()
            published: list[_Published] = []
            try:
                self.take_in(store, names)
                with Register.writing(self._files.register) as register:
                    numbers = register.numbers()
                    changeable = register.names() if names is None else names
                    states = {name: register.state(name) for name in changeable}
                    result = change(register)
                    for name, before in states.items():
                        state, number = register.state(name), numbers.get(name, 0) + 1
                        if state == before:
                            continue
                        self._keep(store, [one for one in state.versions if one not in before.versions])
                        if time.time() - began > _LONGEST_CHANGE_S:
                            raise OvertakenError("the machine slept")
                        store.publish(name, number, state)
                        published.append((name, number, before, state))
                        register.set_number(name, number)
                    return result
            except OvertakenError:
                self._take_back(store, published)
            time.sleep(random.random() * min(2.0, 0.05 * 2**attempt))
        raise AdapterError(f"others keep changing the same names at {store.url}; try again")

    def _take_back(self, store: SharedStore, published: Sequence[_Published]) -> None:
        """Publish the states before a change that was overtaken half-way, but for names on which somebody has built."""
        for name, number, before, state in reversed(published):
            with suppress(OvertakenError):
                self._keep(store, [one for one in before.versions if one not in state.versions])
                store.publish(name, number + 1, before)

    def _keep(self, store: SharedStore, versions: Sequence[tuple[str, str]]) -> None:
        """Have the store keep versions that get a name, and send it those that are gone in the meantime."""
        for version, _ in versions:
            store.keep(version)
            if not store.has(version):
                home = self._files.home(version)
                if not home.is_dir():
                    raise AdapterError(f"the files of the version {version[:12]} are neither here nor at {store.url}")
                store.put(version, home)

    def refresh(self, names: Sequence[str] | None = None) -> None:
        """Take in what others changed: of all names every few seconds, of some names whenever it is asked for."""
        now, (due, is_reachable) = time.monotonic(), self._due
        if now < due and (names is None or not is_reachable):
            return
        if names is None:
            if self._in_background:
                return
            self._due = (now + REFRESH_S, True)  # threads that come meanwhile need not wait
        self._look(names)

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """Take in what others changed every few seconds, in a thread, so that no reader here waits for a slow store.

        Only a name that is not known is still looked for at once.
        """
        stopping = threading.Event()

        def keep_up() -> None:
            while not stopping.is_set():
                if time.monotonic() >= self._due[0]:
                    self._look(None)
                stopping.wait(REFRESH_S)

        self._in_background = True
        threading.Thread(target=keep_up, name="names", daemon=True).start()
        try:
            yield
        finally:
            stopping.set()  # the thread may be waiting for the store, which nobody else need do
            self._in_background = False

    def _look(self, names: Sequence[str] | None) -> None:
        """Take in what others changed, unless the store cannot be reached, of which a warning speaks."""
        store = self.store
        if store is None:
            return
        try:
            self.take_in(store, names)
            if names is None:
                with suppress(OSError):
                    os.utime(self._files.folder / SHARED_FILE)
        except OvertakenError:
            pass  # another process of this machine changed the register just now: next time
        except (LoracastError, OSError) as error:
            self._due = (time.monotonic() + _RETRY_S, False)
            since = datetime.fromtimestamp((self._files.folder / SHARED_FILE).stat().st_mtime)
            _log.warning("%s; the names of the library are those of %s", error, since.isoformat(" ", "seconds"))

    def take_in(self, store: SharedStore, names: Sequence[str] | None = None) -> None:
        """Bring the register up to what the store says of these names, or of all.

        Raises LoracastError where the store cannot be used. A version whose files it has lost is left out, which a
        warning says.
        """
        newest = store.newest(names)
        with Register.reading(self._files.register) as register:
            numbers, versions_here = register.numbers(), set(register.all_versions())
        states = {name: store.read(name, number) for name, number in newest.items() if number > numbers.get(name, 0)}
        if not states:
            return
        new, missing = [], set()
        with self._files.work("new") as work:
            for version in {version for state in states.values() for version, _ in state.versions} - versions_here:
                folder = work / version
                folder.mkdir()
                try:
                    n_bytes, manifest = store.look_at(version, folder), Manifest.read(folder / MANIFEST)
                    if manifest.version != version:
                        raise AdapterError(f"the version {version[:12]} at {store.url} is damaged")
                    new.append((manifest, n_bytes, texts_unless_damaged(folder)))
                except AdapterError as error:
                    missing.add(version)
                    _log.warning("%s", error)
        with Register.writing(self._files.register) as register:
            for manifest, n_bytes, texts in new:
                register.add_version(manifest, n_bytes, texts)
            numbers = register.numbers()
            for name, state in states.items():
                if newest[name] > numbers.get(name, 0):
                    whole = [(version, added) for version, added in state.versions if version not in missing]
                    if not all(register.has_version(version) for version, _ in whole):
                        raise OvertakenError(f"a version of {name} was dropped meanwhile")
                    register.set_state(name, replace(state, versions=tuple(whole)))
                    register.set_number(name, newest[name])
            register.drop_unnamed()

    # ---- beginning and ending

    def share(self, url: str) -> int:
        """Share the library with all machines that give the same URL: names and adapters go there, theirs come here.

        Returns:
            how many adapters the library has now.

        Raises:
            AdapterError: names here mean other adapters there (nothing is changed), the store is another library's, or
                this library is shared at another URL.
            LoracastError: the store cannot be used, or cannot create a file for one of two machines alone.
        """
        self._files.folder.mkdir(parents=True, exist_ok=True)
        self._files.make_ready()
        if (other := self._files.shared_url) not in (None, url):
            raise AdapterError(f"the library is shared at {other}: `loracast store --leave` first")
        store = SharedStore(url)
        with Register.writing(self._files.register) as register:
            own = register.setting("id")
            names = [] if other else register.names()
            states = {name: register.state(name) for name in names}
        store.check()
        store.claim(SHARED, own=own)
        self._give(store, states)
        write_atomically(self._files.folder / SHARED_FILE, json.dumps({"store": url}).encode())
        with Register.writing(self._files.register) as register:
            register.set(STORE, None)
        self.take_in(store)
        with Register.reading(self._files.register) as register:
            return len(register.all_versions())

    def _give(self, store: SharedStore, states: dict[str, NameState]) -> None:
        """Publish names that the store lacks. Raises AdapterError where it means other adapters by some of them."""
        there = store.newest()
        theirs = {name: store.read(name, there[name]) for name in states if name in there}
        taken = [
            name
            for name, state in theirs.items()
            if state.versions and states[name].versions[-1][0] not in dict(state.versions)
        ]
        if taken:
            raise AdapterError(
                f"{', '.join(taken)} mean other adapters at {store.url}: rename or remove them here first"
            )
        for name, state in states.items():
            if name not in theirs or not theirs[name].versions:
                for version, _ in state.versions:
                    store.put(version, self._files.local(version))
                store.publish(name, there.get(name, 0) + 1, state)

    def unshare(self) -> None:
        """Go on with a copy of the names of now; other machines notice nothing. The files are here already."""
        with Register.writing(self._files.register) as register:
            register.forget_numbers()
            register.set(STORE, None)
        (self._files.folder / SHARED_FILE).unlink(missing_ok=True)
