"""Pushes adapters to, and pulls them from, URLs that fsspec knows (s3://, gs://, file://, ...) or the Hugging Face hub.

Whatever is pulled is checked before the library takes it in: its signature if a key is given, the sizes before anything
large is fetched, then `Adapter.faults`.
"""

from __future__ import annotations

import re
from getpass import getpass
from pathlib import Path
from typing import Any

from loracast.base.embedded import HUB_IDS
from loracast.errors import AdapterError, PackageError
from loracast.library.adapter import Adapter, layout
from loracast.library.library import Library
from loracast.library.manifest import FACTORS, INDEX, MANIFEST, STATIC_FILE, VERSION_DIGITS, Manifest, check_name
from loracast.library.store import file_system

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SIGNATURE = f"{MANIFEST}.minisig"
_MAX_MANIFEST_BYTES = 10_000_000
_MAX_SIGNATURE_BYTES = 10_000
_MAX_INDEX_BYTES_PER_TOKEN = 1_000
_SLACK_BYTES = 10_000_000


def push_adapter(adapter: Adapter, where: str, *, private: bool = True, signing_key: Path | None = None) -> None:
    """Copy an adapter's files, with a model card, to where `pull_adapter` finds them.

    Args:
        where: a URL, as a folder; or `owner/name` on the hub, made if need be.
        private: whether a repository that is made is private.
        signing_key: file of a secret key of minisign, with which the adapter is signed.

    Raises:
        LoracastError: nothing can be written there. AdapterError: the adapter is damaged, or the key is none.
    """
    adapter.verify()
    texts = {CARD: model_card(adapter).encode()}
    if signing_key is not None:
        texts[SIGNATURE] = sign(adapter.folder / MANIFEST, signing_key)
    # The manifest comes last: without it an adapter is not whole.
    files = {name: str(adapter.folder / name) for name in (*adapter.manifest.hashes, MANIFEST)}
    with file_system(_url(where)) as (fs, root):
        if is_hub_id(where):
            from huggingface_hub import CommitOperationAdd, HfApi

            HfApi().create_repo(where, private=private, exist_ok=True)
            added = [CommitOperationAdd(name, content) for name, content in (texts | files).items()]
            HfApi().create_commit(where, added, commit_message=f"{adapter.version}, by loracast")
            return
        fs.makedirs(root, exist_ok=True)
        for name, text in texts.items():
            fs.pipe_file(f"{root}/{name}", text)
        for name, path in files.items():
            fs.put_file(path, f"{root}/{name}")


def pull_adapter(
    library: Library, where: str, name: str | None = None, *, replace: bool = False, signed_by: str | None = None
) -> Adapter:
    """Fetch an adapter into the library.

    Args:
        where: as in `push_adapter`.
        name: the one it was made under if None.
        signed_by: public key of minisign, or its file, that must have signed it; None asks for no signature.

    Raises:
        LoracastError: nothing can be read there.
        AdapterError: there is no adapter, it is damaged (the message lists every fault), the key has not signed it, the
            library has this version with another text, or the name is taken.
    """
    library.folder.mkdir(parents=True, exist_ok=True)
    with library.work("new") as work:
        folder = work / "adapter"
        folder.mkdir()
        with file_system(_url(where)) as (fs, root):
            manifest = _fetch_checked(fs, root, folder, signed_by)
        if faults := Adapter(folder).faults():
            raise AdapterError(f"the adapter at {where} is not taken: {'; '.join(faults)}")
        if signed_by is not None:
            _check_copy(library, manifest)
        return library.add(check_name(name or manifest.name), folder, manifest, replace=replace)


def _check_copy(library: Library, signed: Manifest) -> None:
    """Raise AdapterError where a library has a signed version with other files, which `Library.add` would keep.

    The version says nothing of the text's file.
    """
    with library.reading() as register:
        is_here, store = register.has_version(signed.version), library.store(register)
        named = (entry for name in register.names() for entry in register.versions_of(name))
        names = [f"{one.name}@{one.version[:VERSION_DIGITS]}" for one in named if one.version == signed.version]
    if not is_here and (store is None or not store.has(signed.version)):
        return
    copy = Adapter(library.local(signed.version))
    kept = copy.manifest
    if (kept.version, kept.chunks_sha256) != (signed.version, signed.chunks_sha256) or copy.problems():
        remedy = f"`loracast rm {' '.join(names)}`" if names else "`loracast gc`"
        raise AdapterError(
            f"the library has {signed.version[:VERSION_DIGITS]} already, with another text than the signed one: "
            f"{remedy}, then pull it again"
        )


def is_hub_id(where: str) -> bool:
    """Whether this is `owner/name` on the hub and not a URL or a path."""
    return bool(_HUB_ID.fullmatch(where)) and not Path(where).exists()


def _url(where: str) -> str:
    """The URL of a place, which may be `owner/name` on the hub."""
    return f"hf://{where}" if is_hub_id(where) else where


def model_card(adapter: Adapter) -> str:
    """The README of an adapter, as the hub shows it."""
    m = adapter.manifest
    base = HUB_IDS.get(m.made_for.base, m.made_for.base)
    made = {"document": "cast from a document", "task": "cast from the description of a task"}.get(m.kind, m.kind)
    return f"""---
base_model: {base}
library_name: loracast
tags:
- lora
- loracast
---

# {adapter.name}

{m.title}

A LoRA adapter for {base}, {made} with loracast (version {m.version[:12]}, {m.created[:10]}).
It holds the text it was made from.

    loracast pull-adapter WHERE --name {adapter.name}
    loracast ask "..." -a {adapter.name}

To use it with PEFT, vLLM, llama.cpp or mlx-lm: `loracast export {adapter.name} --to peft`.
"""


def _fetch_checked(fs: Any, root: str, folder: Path, signed_by: str | None) -> Manifest:
    """Fetch the manifest, then the files that it speaks of, each after a look at its size."""
    sizes = {entry["name"].rpartition("/")[2]: entry["size"] or 0 for entry in fs.ls(root, detail=True)}

    def fetch(name: str, max_bytes: int) -> None:
        if sizes[name] > max_bytes:
            fault = f"{name} has {sizes[name]:,} bytes, and no more than {max_bytes:,} fit what adapter.json says"
            raise AdapterError(f"{fault}; it is not fetched")
        fs.get_file(f"{root}/{name}", str(folder / name))

    if MANIFEST not in sizes:
        raise AdapterError(f"there is no adapter: {MANIFEST} is missing")
    fetch(MANIFEST, _MAX_MANIFEST_BYTES)
    if signed_by is not None:  # the signature is verified before the manifest is read
        if SIGNATURE in sizes:
            fetch(SIGNATURE, _MAX_SIGNATURE_BYTES)
        verify(folder / MANIFEST, folder / SIGNATURE, signed_by)
        (folder / SIGNATURE).unlink()
    manifest = Manifest.read(folder / MANIFEST)
    if signed_by is not None:
        check_covers(manifest)
    of_text = _SLACK_BYTES + _MAX_INDEX_BYTES_PER_TOKEN * manifest.n_tokens
    of_factors = sum(info.n_bytes for info in layout(manifest).values())
    # A reader's vectors belong to the text.
    limits = {INDEX: of_text, FACTORS: _SLACK_BYTES + of_text + of_factors, STATIC_FILE: 2 * _SLACK_BYTES}
    for name in manifest.hashes.keys() & sizes.keys():  # what is missing is reported with all other faults
        fetch(name, limits[name])
    return manifest


def sign(manifest: Path, key: Path) -> bytes:
    """The signature of an adapter.json.

    Args:
        key: file of the secret key, as `minisign -G` writes it; for its password, if it has one, the user is asked.

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
                secret.decrypt(getpass())
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
    if not all(manifest.hashes.values()):
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
