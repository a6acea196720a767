"""Signatures of pushed adapters: a changed file, another key and a missing signature are refused, and minisign agrees."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters import some_chunks, write
from loracast.cli import app
from loracast.errors import AdapterError, PackageError
from loracast.library.library import Library
from loracast.library.remote import SIGNATURE, pull_adapter, push_adapter

minisign = pytest.importorskip("minisign", reason="run `pip install py-minisign` first")


class Keys:
    """A pair of keys in files, as `minisign -G` writes them."""

    def __init__(self, folder: Path, password: str = ""):
        folder.mkdir()
        pair = minisign.KeyPair.generate()
        self.secret, self.public, self.text = folder / "me.key", folder / "me.pub", pair.public_key.to_base64().decode()
        self.public.write_bytes(bytes(pair.public_key) + b"\n")
        if password:
            pair.secret_key.encrypt(password, opslimit=2**15, memlimit=2**24)
        self.secret.write_bytes(bytes(pair.secret_key) + b"\n")


@pytest.fixture
def keys(tmp_path) -> Keys:
    return Keys(tmp_path / "keys")


@pytest.fixture
def signed(tmp_path, keys) -> Path:
    """Where a signed adapter lies."""
    push_adapter(write(tmp_path / "one", name="press"), str(tmp_path / "there"), signing_key=keys.secret)
    return tmp_path / "there"


def change_factors(there: Path) -> None:
    """Another byte, and its hash in the manifest: what an attacker would do who can write there."""
    from loracast.files import file_sha256

    path = there / "factors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    stored = json.loads((there / "adapter.json").read_text())
    stored["factors_sha256"] = file_sha256(path)
    (there / "adapter.json").write_text(json.dumps(stored))


def flip_a_byte(there: Path) -> None:
    path = there / "chunks.sqlite"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def drop_hashes(there: Path) -> None:
    """A manifest of before hashes of the text were kept, which its owner signed at that time."""
    stored = json.loads((there / "adapter.json").read_text())
    del stored["chunks_sha256"]
    (there / "adapter.json").write_text(json.dumps(stored))
    secret = minisign.SecretKey.from_file(there.parent / "keys" / "me.key")
    (there / SIGNATURE).write_bytes(bytes(secret.sign((there / "adapter.json").read_bytes())))


@pytest.mark.parametrize("by_file", [True, False])
def test_a_signed_adapter_is_taken(signed, keys, by_file, tmp_path):
    pulled = pull_adapter(Library(tmp_path / "two"), str(signed), signed_by=str(keys.public) if by_file else keys.text)
    assert sorted(path.name for path in pulled.folder.iterdir()) == [
        "adapter.json",
        "chunks.sqlite",
        "factors.safetensors",
    ]
    assert pull_adapter(Library(tmp_path / "three"), str(signed)).version == pulled.version  # nobody has to look


@pytest.mark.parametrize(
    "damage, message",
    [
        (change_factors, "not signed with this key, or was changed since"),
        (flip_a_byte, "chunks.sqlite is damaged"),
        (drop_hashes, "from before adapters kept a hash of their text"),
        (lambda there: (there / SIGNATURE).unlink(), "the adapter is not signed"),
        (lambda there: (there / SIGNATURE).write_bytes(b"untrusted comment: x\nAAAA\n"), "invalid"),
        (lambda there: (there / SIGNATURE).write_bytes(b"x" * 20_000), "no more than 10,000"),
    ],
)
def test_what_was_changed_is_refused(signed, keys, damage, message, tmp_path):
    damage(signed)
    with pytest.raises(AdapterError, match=message):
        pull_adapter(Library(tmp_path / "two"), str(signed), signed_by=keys.text)
    assert Library(tmp_path / "two").names() == []


def test_another_key_is_refused(signed, tmp_path):
    other = Keys(tmp_path / "other")
    with pytest.raises(AdapterError, match="not signed with this key"):
        pull_adapter(Library(tmp_path / "two"), str(signed), signed_by=other.text)
    for key in (other.text[:-4], str(other.secret), str(tmp_path / "none.pub")):
        with pytest.raises(AdapterError, match="no public key of minisign"):
            pull_adapter(Library(tmp_path / "two"), str(signed), signed_by=key)


@pytest.mark.parametrize("has_store", [False, True])
def test_a_copy_with_another_text_is_not_vouched_for(signed, keys, has_store, tmp_path):
    two = tmp_path / "two"
    copy = write(two, name="mine", chunks=[replace(one, text="Forged.") for one in some_chunks(3)])
    if has_store:
        Library(two).use_store(str(tmp_path / "store"))
        Library(two).evict()
    with pytest.raises(AdapterError, match=f"another text.*loracast rm {copy.version}"):
        pull_adapter(Library(two), str(signed), signed_by=keys.text)
    assert Library(two).names() == ["mine"]
    Library(two).remove(copy.version)
    for _ in range(2):
        pulled = pull_adapter(Library(two), str(signed), signed_by=keys.text)
        assert pulled.version == f"press@{copy.manifest.version[:12]}" and not pulled.faults()
    flip_a_byte(pulled.folder)
    with pytest.raises(AdapterError, match="another text"):
        pull_adapter(Library(two), str(signed), signed_by=keys.text)


def test_a_password_opens_a_key(tmp_path, monkeypatch):
    keys, adapter = Keys(tmp_path / "keys", "a secret"), write(tmp_path / "one", name="press")
    monkeypatch.setattr("loracast.library.remote.getpass", lambda: "a guess")
    with pytest.raises(AdapterError, match="wrong password"):
        push_adapter(adapter, str(tmp_path / "there"), signing_key=keys.secret)
    assert not (tmp_path / "there").exists()
    monkeypatch.setattr("loracast.library.remote.getpass", lambda: "a secret")
    push_adapter(adapter, str(tmp_path / "there"), signing_key=keys.secret)
    assert (
        pull_adapter(Library(tmp_path / "two"), str(tmp_path / "there"), signed_by=keys.text).version == adapter.version
    )


@pytest.mark.skipif(not shutil.which("minisign"), reason="the minisign program is not installed")
def test_the_program_minisign_reads_and_writes_the_same(signed, keys, tmp_path):
    def run(*arguments: object) -> None:
        subprocess.run(["minisign", *map(str, arguments)], check=True, capture_output=True, timeout=60)

    run("-Vm", signed / "adapter.json", "-P", keys.text)
    run("-G", "-W", "-p", tmp_path / "its.pub", "-s", tmp_path / "its.key")
    run("-Sm", signed / "adapter.json", "-s", tmp_path / "its.key")
    assert pull_adapter(Library(tmp_path / "two"), str(signed), signed_by=str(tmp_path / "its.pub")).name == "press"
    adapter = write(tmp_path / "one", name="other")
    push_adapter(adapter, str(tmp_path / "again"), signing_key=tmp_path / "its.key")
    run("-Vm", tmp_path / "again" / "adapter.json", "-p", tmp_path / "its.pub")


def test_the_commands(keys, tmp_path):
    def run(*arguments: object):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    write(tmp_path / "one", name="press")
    done = run("push-adapter", "press", tmp_path / "there", "--sign", keys.secret, "--library", tmp_path / "one")
    assert done.exit_code == 0 and done.output.endswith("there, signed\n")
    pulling = ("pull-adapter", tmp_path / "there", "--library", tmp_path / "two", "--signed-by")
    done = run(*pulling, keys.public)
    assert done.exit_code == 0 and done.output.endswith(", the signature is right\n")
    done = run(*pulling, Keys(tmp_path / "other").text, "--replace")
    assert done.exit_code == 1 and "not signed with this key" in done.output


def test_without_the_package_the_remedy_is_reported(signed, keys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "minisign", None)
    with pytest.raises(PackageError, match=r"pip install 'loracast\[sign\]'"):
        pull_adapter(Library(tmp_path / "two"), str(signed), signed_by=keys.text)
