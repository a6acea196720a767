"""Signs adapters with a key of minisign, and verifies who made one, where a hash only says that it is whole.

What is signed is adapter.json, which holds the hashes of the other files. The `minisign` program reads and writes the
same keys and signatures (https://jedisct1.github.io/minisign).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loracast.errors import AdapterError, PackageError
from loracast.library.manifest import Manifest

SUFFIX = ".minisig"


def sign(manifest: Path, key: Path, ask_password: Callable[[], str]) -> bytes:
    """The signature of an adapter.json.

    Args:
        key: file of the secret key, as `minisign -G` writes it.
        ask_password: gives the key's password; called if it has one.

    Raises:
        AdapterError: the key or its password is none, or the manifest does not hold all hashes.
        PackageError: py-minisign is not installed.
    """
    minisign = _minisign()
    parsed = Manifest.read(manifest)
    check_covers(parsed)
    try:
        with minisign.SecretKey.from_file(key) as secret:
            if secret.is_encrypted():
                secret.decrypt(ask_password())
            signature = secret.sign(manifest.read_bytes(), trusted_comment=f"{parsed.name}@{parsed.version}")
    except (OSError, ValueError, EOFError) as error:
        raise AdapterError(f"nothing can be signed with {key}: {error}") from error
    return bytes(signature) + b"\n"


def verify(manifest: Path, signature: Path, key: str) -> None:
    """Raise AdapterError unless a signature of an adapter.json was made with the secret half of a public key.

    Args:
        key: the public key, or its file. Raises AdapterError if it is none, PackageError without py-minisign.
    """
    minisign = _minisign()
    try:
        read = minisign.PublicKey.from_file if Path(key).is_file() else minisign.PublicKey.from_base64
        public = read(key)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{key[:200]!r} is no public key of minisign and no file of one ({error})") from error
    try:
        public.verify(manifest.read_bytes(), minisign.Signature.from_file(signature))
    except FileNotFoundError as error:
        raise AdapterError("the adapter is not signed") from error
    except ValueError as error:
        raise AdapterError(f"the adapter is not signed with this key, or was changed since ({error})") from error


def check_covers(manifest: Manifest) -> None:
    """Raise AdapterError unless a manifest holds the hashes of all other files, so that its signature is theirs too."""
    if not manifest.chunks_sha256 or not (manifest.factors_sha256 or manifest.storage == "text"):
        raise AdapterError(
            f"{manifest.name!r} is from before adapters kept a hash of their text, which a signature needs: learn it "
            "again"
        )


def _minisign() -> Any:
    try:
        import minisign
    except ImportError as error:
        raise PackageError("signatures need py-minisign: pip install 'loracast[sign]'") from error
    return minisign
