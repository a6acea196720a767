"""What a server is started with: its address, limits, and API keys with scopes.

A key may read (ask, list), write (learn, rename) or administer (delete, load and unload).
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, get_args

from loracast.errors import ConfigError

KeyScope = Literal["read", "write", "admin"]
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
VARIABLE = "LORACAST_API_KEYS"
_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{16,512}")


@dataclass(frozen=True)
class ApiKey:
    """The hash of a key and what it allows: the key itself is not kept, and is in no message."""

    sha256: bytes
    scope: KeyScope

    @classmethod
    def read(cls, text: str) -> ApiKey:
        """A key written as `SCOPE:KEY`. Raises ConfigError."""
        scope, _, key = text.strip().partition(":")
        if scope not in SCOPES or not _KEY.fullmatch(key):
            raise ConfigError(
                f"an API key is written as SCOPE:KEY, with a scope of {', '.join(SCOPES)} and a key of 16 to 512 "
                "characters without spaces or commas"
            )
        return cls(_hash(key), scope)


def keys_in(text: str) -> tuple[ApiKey, ...]:
    """The keys of a variable: `SCOPE:KEY,SCOPE:KEY`. Raises ConfigError."""
    return tuple(ApiKey.read(part) for part in text.split(",") if part.strip())


def keys_in_file(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file, `SCOPE:KEY` a line; empty lines and those that begin with # are left out.

    Raises ConfigError for a file that cannot be read, that others may read, or that has no key.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"others may read the keys in {path}: chmod 600 {path}")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the keys in {path} ({error})") from error
    keys = tuple(ApiKey.read(line) for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"{path} has no key: write one as SCOPE:KEY")
    return keys


def granted(keys: Iterable[ApiKey], authorization: str | None) -> KeyScope | None:
    """The scope of an Authorization header, None where it bears no known key.

    All keys are compared, by their hashes and in constant time, so that the time tells nothing.
    """
    kind, _, key = (authorization or "").partition(" ")
    given, found = _hash(key.strip()), None
    for known in keys:
        if hmac.compare_digest(known.sha256, given):
            found = known.scope
    return found if kind.lower() == "bearer" else None


def _hash(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The settings of a server. Raises ConfigError where others could reach it without a key."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address demands a key."""
    port: int = 8000
    """0 takes a free one."""
    unix_socket: Path | None = None
    """Unix socket to listen on in place of host and port; only its user can open it."""
    idle_s: float = 0.0
    """End after this many seconds without a request or job; 0: never."""
    engine: str = "local"
    """What generates: `local`; or vLLM: the URL of a running server (several, separated by commas), or the Python
    executable of an environment with vLLM, to start one there (`vllm`: the Python that runs this command)."""
    keys: tuple[ApiKey, ...] = ()
    """Keys that requests may bear (`ApiKey`); none: whoever reaches the loopback address may do everything."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the server may be called besides localhost and addresses (against DNS rebinding)."""
    cors_origins: tuple[str, ...] = ()
    """Origins, such as "https://chat.example.org", whose pages may call the API from a browser; none by default."""
    lora_folder: Path | None = None
    """Folder whose subfolders are the PEFT adapters that /v1/load_lora_adapter may read; without it, none."""
    watched: tuple[Path, ...] = ()
    """Folders whose documents are learned while the server runs, and forgotten when they are gone."""
    max_body_bytes: int = 4 * MIB
    """Longest body of a JSON request."""
    max_upload_bytes: int = 64 * MIB
    """Longest body of an upload (multipart/form-data)."""
    max_stored_bytes: int = 4096 * MIB
    """Most bytes of all uploads together."""
    max_queued_jobs: int = 2500
    """Most documents, images and tasks that wait to be learned; OpenAI's clients attach up to 2,000 files at once."""
    max_tokens: int = 4096
    """Most tokens of an answer that a request may ask for."""
    max_prompt_tokens: int = 8192
    """Longest prompt; the base's window is another limit."""
    max_answers: int = 8
    """Most answers to a prompt (`n`), and most prompts of a completion times `n`."""
    max_adapters: int = 8
    """Most adapters that a request may add up."""
    adapter_memory_bytes: int = 512 * MIB
    """LoRAs that are kept in memory; one that answers stays until its answer is whole."""
    prompt_cache_bytes: int = 256 * MIB
    """Keys and values that are kept of prompts and answers."""
    body_timeout_s: float = 30.0
    """Longest wait for the next piece of a request's body."""
    answer_timeout_s: float = 300.0
    """Longest time for an answer, its wait in the queue included."""
    drain_timeout_s: float = 30.0
    """Time that running answers have to finish after SIGTERM."""
    instance: str = field(default_factory=lambda: secrets.token_hex(16))
    """Told by /health: by it commands know the server that their user started (client.py)."""

    def __post_init__(self) -> None:
        if not self.is_loopback and not self.keys:
            raise ConfigError(
                f"{self.host} can be reached from other machines: set a key (LORACAST_API_KEYS or a file of keys), or "
                "listen on 127.0.0.1"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.unix_socket or self.host == "localhost":
            return True
        return _is_address(self.host) and ip_address(self.host).is_loopback

    @contextmanager
    def bound(self) -> Iterator[socket.socket]:
        """A socket at the address of the self. Connections are refused until the server runs.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        if self.unix_socket:
            with _unix_socket(self.unix_socket) as sock:
                yield sock
            return
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((self.host, self.port))
            except (OSError, OverflowError) as error:
                raise ConfigError(
                    f"cannot listen on {self.host}, port {self.port} ({error}); give another --port, 0 for any"
                ) from error
            yield sock

    def allows_host(self, header: str) -> bool:
        """Whether a request with this Host header is meant for this server.

        A page that has its own name resolved to this machine (DNS rebinding) sends that name; an address cannot be
        rebound, so that all addresses are let pass.
        """
        name = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header
        name = name.removeprefix("[").removesuffix("]").lower()
        return _is_address(name) or name in ("localhost", self.host.lower(), *map(str.lower, self.allowed_hosts))


@contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket]:
    """A socket at a path, which only this user can open, and which is removed at the end. Raises ConfigError."""
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError("this system has no Unix sockets: listen on a port (--port)")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        except OSError as error:
            raise ConfigError(f"cannot listen on the Unix socket {path} ({error}); give another path") from error
        finally:
            os.umask(mask)
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
