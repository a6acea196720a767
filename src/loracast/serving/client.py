"""Talks with a running server of this machine: questions, uploads, jobs.

`loracast ask` waits for what is imported here: the standard library's HTTP client, since httpx alone takes 0.1 s.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from loracast.errors import LoracastError

_CONNECT_S = 2.0
"""Longest wait for a server to say who it is; those here answer in milliseconds."""
_TALK_S = 600.0
"""Longest silence while a server works: it may have a full queue."""


class NoServer(LoracastError):
    """Nobody answers at a server's address, or not to the end; `is_refused` where nobody listens there."""

    def __init__(self, url: str, error: Exception):
        why = str(error) or type(error).__name__
        super().__init__(f"the server at {url} does not answer ({why}); --local goes without it")
        self.is_refused = isinstance(error, ConnectionRefusedError)


class Refused(LoracastError):
    """A server does not do what was asked of it; the message says why."""

    def __init__(self, status: int, error: Mapping[str, Any]):
        super().__init__(str(error.get("message") or f"the server answered with status {status}"))
        self.status, self.code = status, error.get("code")


class Client:
    """A server, as a client sees it. Each request has a connection of its own, which ends with the response.

    Raises NoServer or Refused.
    """

    def __init__(self, url: str, key: str = ""):
        self.url = url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def instance(self) -> str | None:
        """The id that a server draws when it starts; None where another program listens. The key is not sent."""
        try:
            with _Exchange(self.url, "GET", "/health", {}, None, _CONNECT_S) as response:
                body = response.read()
            parsed = json.loads(body)
        except (Refused, ValueError):
            return None
        return parsed.get("instance") if isinstance(parsed, dict) else None

    def get(self, path: str) -> Any:
        with self._exchange("GET", path) as response:
            return json.loads(response.read())

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        with self._post(path, body) as response:
            return json.loads(response.read())

    def delete(self, path: str) -> Any:
        with self._exchange("DELETE", path) as response:
            return json.loads(response.read())

    def stream(self, path: str, body: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The server-sent events of a response, each an object; leaving the loop closes the connection.

        Args:
            body: is posted; None for a GET request.
        """
        with self._exchange("GET", path) if body is None else self._post(path, body) as response:
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

    def _post(self, path: str, body: Mapping[str, Any]) -> _Exchange:
        return self._exchange("POST", path, json.dumps(body).encode(), "application/json")

    def _exchange(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> _Exchange:
        headers = {**self._headers, **({"Content-Type": kind} if kind else {})}
        return _Exchange(self.url, method, path, headers, body, _TALK_S)


class _Exchange:
    """A request and its response. Errors of the connection become NoServer, and statuses from 400 on Refused."""

    def __init__(
        self, url: str, method: str, path: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float
    ):
        self._url, self._sent = url, (method, path, body, {**headers, "Connection": "close"})
        address = urlsplit(url)
        self._connection = HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)

    def __enter__(self) -> HTTPResponse:
        try:
            self._connection.request(*self._sent)
            response = self._connection.getresponse()
            if response.status >= 400:
                raise Refused(response.status, _error_in(response.read()))
            return response
        except (OSError, HTTPException) as error:
            self._connection.close()
            raise NoServer(self._url, error) from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._connection.close()
        if isinstance(error, (OSError, HTTPException, ValueError)):
            raise NoServer(self._url, error) from error


def _error_in(body: bytes) -> dict[str, Any]:
    """The error that a response tells, in OpenAI's form; {} where it tells none."""
    try:
        parsed = json.loads(body)["error"]
    except (ValueError, TypeError, KeyError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
