"""Finds the running server of a library: each server keeps a file about itself in the user's state folder.

A command uses a server only where it would have loaded the same things itself: library, base, hypernetworks and version
are compared, the process must live, and /health must answer with the instance id of the file. Files of servers that
were killed are removed. Nothing heavy is imported here, since `loracast ask` waits for it.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from loracast import __version__
from loracast.paths import servers_dir
from loracast.serving.client import Client, NoServer


@dataclass(frozen=True)
class Loaded:
    """What a server has loaded, and what a command would load: the one serves the other where they agree."""

    library: str
    """The folder's real path."""
    base: str = ""
    """The base as `source_key` writes it."""
    hypernetworks: Mapping[str, str] = field(default_factory=dict)
    """By modality as `source_key` writes them; of a command, the one that it needs."""
    chat_template: str = ""
    """The text of a template in place of the base's own."""
    how: Mapping[str, str] = field(default_factory=dict)
    """Device, dtype and other options of loading that the user gave; a command takes whatever it did not ask for."""
    version: str = __version__

    def serves(self, wanted: Loaded) -> bool:
        """Whether a server with this may do what a command wants."""
        if any(self.how.get(option) != value for option, value in wanted.how.items()):
            return False
        own = {modality: self.hypernetworks.get(modality, "") for modality in wanted.hypernetworks}
        return replace(self, hypernetworks=own, how=wanted.how) == wanted


@dataclass(frozen=True)
class Running:
    """A running server, as its file tells of it."""

    instance: str
    """Drawn when the server starts, and given by /health: nobody else on that port is taken for the server."""
    url: str
    loaded: Loaded
    model: str
    """What the base is called in requests."""
    fingerprint: Mapping[str, str]
    """Of the base."""
    key: str = ""
    """The server's own key for its user's commands; "" where it asks for none."""
    drain_timeout_s: float = 30.0
    pid: int = field(default_factory=os.getpid)

    @property
    def path(self) -> Path:
        return servers_dir() / f"{self.instance}.json"

    def write(self) -> None:
        """Let commands find this server."""
        folder = servers_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".new-")  # only its user may read it
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(self), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Let no command find this server any more."""
        self.path.unlink(missing_ok=True)

    def client(self) -> Client:
        return Client(self.url, self.key)

    def terminate(self) -> None:
        """Tell the server to end when its answers are given."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout_s: float) -> bool:
        """Whether the process has ended within this time."""
        until = time.monotonic() + timeout_s
        while lives(self.pid):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True


def source_key(source: str | os.PathLike[str] | None) -> str:
    """A base or hypernetwork that a user gave, as two processes can compare it; "" for the default.

    A folder is its real path with the time of its newest file: one that has been trained further is another.
    """
    if source is None:
        return ""
    from loracast.base.embedded import DEFAULT_BASE

    folder = Path(source)
    if str(source) == DEFAULT_BASE or not folder.is_dir():
        return "" if str(source) == DEFAULT_BASE else str(source)
    newest = max((entry.stat().st_mtime_ns for entry in os.scandir(folder)), default=0)
    return f"{folder.resolve()} {newest}"


def running(library: Path) -> list[Running]:
    """The servers of a library that live and answer, whatever they have loaded. Files of others are removed."""
    here = str(library.resolve())
    return [server for server in _known() if server.loaded.library == here and _answers(server)]


def of_process(pid: int) -> Running | None:
    """The server that a process runs, once it answers."""
    return next((server for server in _known() if server.pid == pid and _answers(server)), None)


def find(wanted: Loaded) -> Running | None:
    """A server that does what a command would do by itself, or None."""
    return next((server for server in _known() if server.loaded.serves(wanted) and _answers(server)), None)


def _known() -> Iterator[Running]:
    """What the files tell. Those that cannot be read, and those of processes that are gone, are removed."""
    folder = servers_dir()
    for path in sorted(folder.glob("*.json")):
        if not _is_ours(path):
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            server = Running(**{**values, "loaded": Loaded(**values["loaded"])})
        except (OSError, ValueError, TypeError, KeyError):
            path.unlink(missing_ok=True)
            continue
        if lives(server.pid):
            yield server
        else:
            path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have written the file."""
    if os.name != "posix":
        return True
    try:
        about = path.lstat()
    except OSError:
        return False
    return about.st_uid == os.getuid() and not about.st_mode & 0o077


def _answers(server: Running) -> bool:
    """Whether the server is the one of the file. Where another is on its port, it is gone, and its file goes too."""
    try:
        instance = server.client().instance()
    except NoServer as error:
        if error.is_refused:
            server.remove()
        return False
    if instance != server.instance:
        server.remove()
    return instance == server.instance


def lives(pid: int) -> bool:
    """Whether there is a process with this id that has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # not on Linux
        return True
    return state != "Z"  # it has ended, and its parent has not asked how
