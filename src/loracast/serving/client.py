"""How commands find the running server of a library, and talk with it: questions, uploads, jobs.

Each server keeps a file about itself in the user's state folder; `find` and `running` look there.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partialmethod
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from loracast import __version__
from loracast.errors import LoracastError
from loracast.files import servers_dir, write_with

if TYPE_CHECKING:
    from loracast.library.library import Library


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
        servers_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
        write_with(self.path, lambda path: path.write_text(json.dumps(asdict(self)), encoding="utf-8"), is_private=True)

    def remove(self) -> None:
        """Let no command find this server any more; a socket that a killed one left goes, too."""
        self.path.unlink(missing_ok=True)
        if self.url.startswith(UNIX):
            Path(self.url.removeprefix(UNIX)).unlink(missing_ok=True)

    def client(self) -> HTTPClient:
        return HTTPClient(self.url, self.key)

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


def running(library: Library) -> list[Running]:
    """The servers of a library that live and answer, whatever they have loaded. Files of others are removed."""
    here = str(library.folder.resolve())
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
            server.remove()


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


_CONNECT_S = 2.0
"""Longest wait for a server to say who it is; those here answer in milliseconds."""
_TALK_S = 600.0
"""Longest silence while a server works: it may have a full queue."""


class NoServer(LoracastError):
    """Nobody answers at a server's address, or not to the end; `is_refused` where nobody listens there."""

    def __init__(self, url: str, error: Exception):
        why = str(error) or type(error).__name__
        super().__init__(f"the server at {url} does not answer ({why}); --local goes without it")
        self.is_refused = isinstance(error, (ConnectionRefusedError, FileNotFoundError))


class Refused(LoracastError):
    """A server does not do what was asked of it; the message says why."""

    def __init__(self, status: int, error: Mapping[str, Any]):
        super().__init__(str(error.get("message") or f"the server answered with status {status}"))
        self.status, self.code = status, error.get("code")


UNIX = "unix:"
"""Before the path of a Unix socket in a server's URL."""


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float):
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class HTTPClient:
    """A server, as a client sees it. Each request has a connection of its own, which ends with the response.

    Raises NoServer or Refused.
    """

    no_server: Callable[[str, Exception], LoracastError] = NoServer
    """Makes the error that is raised where nobody answers, from the address and its cause."""

    def __init__(self, url: str, key: str = ""):
        self.url = url
        self._key = {"Authorization": f"Bearer {key}"} if key else {}

    def instance(self) -> str | None:
        """The id that a server draws when it starts; None where another program listens. The key is not sent."""
        try:
            with HTTPClient(self.url)._exchange("GET", "/health", timeout_s=_CONNECT_S) as response:
                body = response.read()
            parsed = json.loads(body)
        except (Refused, ValueError):
            return None
        return parsed.get("instance") if isinstance(parsed, dict) else None

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that answers a request."""
        with self._exchange(method, path, body) as response:
            return json.loads(response.read())

    get = partialmethod(_json, "GET")
    post = partialmethod(_json, "POST")
    delete = partialmethod(_json, "DELETE")

    def stream(self, path: str, body: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The server-sent events of a response, each an object; leaving the loop closes the connection.

        Args:
            body: is posted; None for a GET request.
        """
        with self._exchange("GET" if body is None else "POST", path, body) as response:
            for line in response:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event and "status" not in event:  # an error after the response has begun; jobs have both
                    raise Refused(200, event["error"])
                yield event

    def upload(self, path: str, fields: Mapping[str, str], file_name: str, content: bytes) -> Any:
        """Post a form with one file, as multipart/form-data (RFC 7578)."""
        boundary = secrets.token_hex(16)
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
            for name, value in fields.items()
        ]
        quoted = file_name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")  # as browsers do
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{quoted}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n".encode("utf-8", "surrogateescape")
        )
        body = b"".join([*parts, content, f"\r\n--{boundary}--\r\n".encode()])
        with self._exchange("POST", path, body, f"multipart/form-data; boundary={boundary}") as response:
            return json.loads(response.read())

    @contextmanager
    def _exchange(
        self, method: str, path: str, body: bytes | Mapping[str, Any] | None = None, kind: str = "application/json",
        timeout_s: float = _TALK_S,
    ) -> Iterator[HTTPResponse]:  # fmt: skip
        """A request and its response, whose connection is closed at the end. Raises NoServer, or Refused from 400 on.

        Args:
            body: a form, or what becomes JSON.
            kind: type of the body.
        """
        address = urlsplit(self.url)
        headers = {"Connection": "close", **self._key} | ({} if body is None else {"Content-Type": kind})
        sent = json.dumps(body).encode() if isinstance(body, Mapping) else body
        connection: HTTPConnection
        if self.url.startswith(UNIX):
            connection, folder = _UnixConnection(self.url.removeprefix(UNIX), timeout_s), ""
        else:
            connect = HTTPSConnection if address.scheme == "https" else HTTPConnection
            connection, folder = connect(address.hostname or "", address.port, timeout=timeout_s), address.path
        try:
            with closing(connection):
                connection.request(method, folder.rstrip("/") + path, sent, headers)
                response = connection.getresponse()
                if response.status >= 400:
                    raise Refused(response.status, _error_in(response.read()))
                yield response
        except (OSError, HTTPException, ValueError) as error:
            raise self.no_server(self.url, error) from error


def _error_in(body: bytes) -> dict[str, Any]:
    """The error that a response tells, in OpenAI's form; {} where it tells none."""
    try:
        parsed = json.loads(body)["error"]
    except (ValueError, TypeError, KeyError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
