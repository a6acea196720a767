"""API keys with scopes: read (ask, list), write (learn, rename), admin (delete, load and unload).

Each scope includes those before it. Keys come from the variable LORACAST_API_KEYS, "read:KEY,admin:KEY", or from a file
with one `SCOPE:KEY` a line.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from loracast.errors import ConfigError

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
VARIABLE = "LORACAST_API_KEYS"
_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{16,512}")


@dataclass(frozen=True)
class ApiKey:
    """The hash of a key and what it allows: the key itself is not kept, and is in no message."""

    sha256: bytes
    scope: Scope

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


def granted(keys: Iterable[ApiKey], authorization: str | None) -> Scope | None:
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
