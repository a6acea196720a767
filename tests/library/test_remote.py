"""Adapters pushed and pulled: to a folder, to memory, to a real S3 server, to the hub's API."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from typer.testing import CliRunner

from adapters import write
from loracast.cli import app
from loracast.errors import AdapterError, LoracastError
from loracast.library.adapter import layout
from loracast.library.library import Library
from loracast.library.remote import model_card, pull_adapter, push_adapter
from loracast.library.store import Store


@pytest.fixture(params=["path", "file", "memory", "s3"])
def place(request, tmp_path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("s3") + f"/{tmp_path.name}"
    return {"path": str(tmp_path / "there"), "file": f"file://{tmp_path}/there", "memory": f"memory://{tmp_path.name}"}[
        request.param
    ]


def test_what_was_pushed_is_pulled(place, tmp_path):
    adapter = write(tmp_path / "one", name="press", title="The press")
    push_adapter(adapter, place)
    pulled = pull_adapter(Library(tmp_path / "two"), place)
    assert pulled.version == adapter.version and Library(tmp_path / "two").verify() == []
    for name in adapter.lora().names:
        assert torch.equal(pulled.lora([1]).delta(name), adapter.lora([1]).delta(name))
    assert [hit.name for hit in Library(tmp_path / "two").search("word1")] == ["press"]
    assert pull_adapter(Library(tmp_path / "two"), place, "other").folder == pulled.folder
    with fsspec.open(f"{place}/README.md", "rt") as file:
        assert file.read() == model_card(adapter)
    newer = write(tmp_path / "one", name="press", seed=2, replace=True)
    push_adapter(newer, place)
    with pytest.raises(AdapterError, match="--replace"):
        pull_adapter(Library(tmp_path / "two"), place)
    assert pull_adapter(Library(tmp_path / "two"), place, replace=True).version == newer.version


def files_at(place: str) -> set[str]:
    """Versions that lie at a store."""
    fs, root = fsspec.core.url_to_fs(place)
    fs.invalidate_cache()
    return {path.rpartition("/")[2] for path in fs.glob(f"{root}/??/*")}


def test_a_library_lies_at_a_store(place, tmp_path):
    library = tmp_path / "library"
    first = write(library, name="press", seed=1)
    assert Library(library).store_url is None and Library(library).use_store(place) == 1
    second = write(library, name="lamp", seed=2)
    assert files_at(place) == {a.manifest.version for a in (first, second)} and Library(library).verify() == []
    n_bytes = first.n_bytes + second.n_bytes
    assert Library(library).evict() == n_bytes
    assert not first.folder.exists() and Library(library).verify() == [] and len(Library(library).search("word1")) == 2
    assert Library(library).verify(["press", "lamp"]) == []
    opened = Library(library).open("press")
    assert opened.faults() == [] and opened.folder == first.folder and not second.folder.exists()
    write(library, name="lamp", seed=3, replace=True)
    Library(library).remove(second.version)
    assert second.manifest.version not in files_at(place) and len(files_at(place)) == 2
    Library(library).collect_garbage(keep=1)
    Library(library).evict()
    Library(library).leave_store()
    assert Library(library).store_url is None and len(files_at(place)) == 2
    assert [Library(library).open(name).faults() for name in Library(library).names()] == [[], []]


def test_a_store_is_one_library_s(place, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    adapter = write(one, name="press", seed=1)
    Library(one).use_store(place)
    Library(one).use_store(place)  # again: it is its own
    write(other, name="lamp", seed=2)
    with pytest.raises(AdapterError, match="--take-over"):
        Library(other).use_store(place)
    assert Library(other).store_url is None
    shutil.rmtree(one)  # the machine is lost
    assert Library(other).use_store(place, take_over=True) == 2
    assert Library(other).names() == ["lamp", "press"] and Library(other).open("press").version == adapter.version


def test_the_version_made_last_is_the_newest_after_a_take_over(tmp_path):
    one, there = tmp_path / "one", str(tmp_path / "there")
    for seed in range(1, 6):
        last = write(one, name="press", seed=seed, created=f"2026-01-0{seed}T00:00:00+00:00", replace=True)
    Library(one).use_store(there)
    assert Library(tmp_path / "other").use_store(there, take_over=True) == 5
    assert Library(tmp_path / "other").open("press").version == last.version


def test_damage_at_a_store_is_found(place, tmp_path):
    library = tmp_path / "library"
    adapter = write(library, name="press")
    Library(library).use_store(place)
    Library(library).evict()
    fs, root = fsspec.core.url_to_fs(place)
    there = f"{root}/{adapter.manifest.version[:2]}/{adapter.manifest.version}"
    fs.pipe_file(f"{there}/factors.safetensors", b"other")
    with pytest.raises(AdapterError, match=r"is damaged: factors\.safetensors"):
        Library(library).open("press")
    assert not adapter.folder.exists()
    fs.rm_file(f"{there}/adapter.json")
    fs.invalidate_cache()
    with pytest.raises(AdapterError, match="neither on this machine nor at"):
        Library(library).open("press")
    assert len(Library(library).verify()) == 1 and Library(library).verify(["press"]) == Library(library).verify()


def test_a_store_that_cannot_be_reached_loses_nothing(tmp_path, monkeypatch):
    library = tmp_path / "library"
    write(library, name="press")
    Library(library).use_store(str(tmp_path / "there"))

    def down(self, version, folder):
        raise LoracastError("the store is down")

    with monkeypatch.context() as patch:
        patch.setattr("loracast.library.store.Store.put", down)
        with pytest.raises(LoracastError, match="is down"):
            write(library, name="lamp", seed=2)
    assert Library(library).names() == ["press"] and Library(library).verify() == []
    write(library, name="lamp", seed=2)
    with pytest.raises(AdapterError, match="no store"):
        Library(tmp_path / "another").evict()


def test_what_is_on_its_way_to_a_store_is_left_to_its_process(tmp_path, monkeypatch):
    library, there = tmp_path / "library", tmp_path / "there"
    Library(library).use_store(str(there))
    put = Store.put

    def put_slowly(self, version, folder):
        put(self, version, folder)
        Library(library).recover()  # as another process does that begins to learn
        Library(library).collect_garbage()

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", put_slowly)
        version = write(library, name="press").manifest.version
    assert Library(library).verify() == [] and Store(str(there)).versions() == {version}
    odd = Store(str(there.with_name("team [a]*")))
    odd.put(version, Library(library).home(version))
    assert odd.versions() == {version}
    Library(library).evict()
    assert Library(library).open("press").faults() == []


def test_what_a_killed_process_was_sending_is_deleted(tmp_path):
    library, there = tmp_path / "library", tmp_path / "there"
    Library(library).use_store(str(there))
    child = os.fork()
    if child == 0:
        put = Store.put
        Store.put = lambda *what: (put(*what), os._exit(9))
        write(library, name="press")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(Store(str(there)).versions()) == 1
    kept = write(library, name="lamp", seed=2).manifest.version
    assert Store(str(there)).versions() == {kept} and Library(library).verify() == []


def test_the_store_command(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["store", *(str(a) for a in arguments), "--library", str(tmp_path / "library")])

    write(tmp_path / "library")
    assert run().stdout == f"adapters lie at {tmp_path / 'library'}\n"
    assert run(tmp_path / "there").stdout == f"1 adapters lie at {tmp_path / 'there'}\n"
    assert json.loads(run("--json").stdout)["store"] == str(tmp_path / "there")
    assert "deleted here" in run("--evict").stdout and run("--evict", "--leave").exit_code == 2
    assert run("--leave").exit_code == 0 and json.loads(run("--json").stdout)["store"] is None


def test_what_is_damaged_is_not_taken(tmp_path):
    place = tmp_path / "there"
    adapter = write(tmp_path / "one")
    push_adapter(adapter, str(place))
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    manifest = json.loads(whole["adapter.json"])
    cases = {
        "factors.safetensors is missing": lambda: (place / "factors.safetensors").unlink(),
        "adapter.json is missing": lambda: (place / "adapter.json").unlink(),
        "hash differs.*hash differs": lambda: [(place / n).write_bytes(whole[n][:-3] + b"abc") for n in whole if "json" not in n],
        "not fetched": lambda: (place / "factors.safetensors").open("ab").truncate(10**9),
        "chunks.sqlite has .* not fetched": lambda: (place / "chunks.sqlite").open("ab").truncate(10**9),
        "damaged: '../x' cannot name": lambda: (place / "adapter.json").write_text(json.dumps({**manifest, "name": "../x"})),
    }  # fmt: skip
    for message, damage in cases.items():
        for name, content in whole.items():
            (place / name).write_bytes(content)
        damage()
        with pytest.raises(AdapterError, match=message):
            pull_adapter(Library(tmp_path / "two"), str(place))
    assert Library(tmp_path / "two").names() == []
    sizes = [info.n_bytes for info in layout(adapter.manifest).values()]
    assert sum(sizes) == 2 * 3 * 2 * 2 * (48 + 64 + 96 + 48)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("s4://bucket/x", "Protocol not known: s4"),
        ("file:///nowhere/at/all", "No such file or directory"),
        ("https://127.0.0.1:9/x", "Cannot connect to host"),
        ("nobody:x", "No such file or directory"),
    ],
)
def test_places_that_are_none_are_reported_in_a_line(place, why, tmp_path):
    adapter, expected = write(tmp_path / "one"), f"^{re.escape(place)} cannot be used: .*{why}"
    with pytest.raises(LoracastError, match=expected) as caught:
        pull_adapter(Library(tmp_path / "two"), place)
    assert "\n" not in str(caught.value)
    if "nowhere" not in place and ":x" not in place:
        with pytest.raises(LoracastError, match=expected):
            push_adapter(adapter, place)


def test_the_hub(tmp_path, monkeypatch):
    """The hub's own client with its calls answered by a folder."""
    hub = tmp_path / "hub"
    calls = []

    def create_repo(self, repo_id, *, private, exist_ok):
        calls.append((repo_id, private, exist_ok))

    def create_commit(self, repo_id, operations, *, commit_message):
        hub.mkdir(exist_ok=True)
        for operation in operations:
            source = operation.path_or_fileobj
            content = source if isinstance(source, bytes) else Path(source).read_bytes()
            (hub / operation.path_in_repo).write_bytes(content)

    for call in (create_repo, create_commit):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{call.__name__}", call)

    class Hub(LocalFileSystem):
        """What the hub's file system is asked for, in the folder."""

        def ls(self, path, **options):
            assert path == "team/press"
            return super().ls(str(hub), **options)

        def get_file(self, path, target, **options):
            super().get_file(path.replace("team/press", str(hub)), target, **options)

    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (Hub(), url.removeprefix("hf://")))
    adapter = write(tmp_path / "one", name="press")
    push_adapter(adapter, "team/press")
    assert calls == [("team/press", True, True)]
    assert pull_adapter(Library(tmp_path / "two"), "team/press").version == adapter.version
    shutil.rmtree(hub)
    hub.mkdir()
    with pytest.raises(AdapterError, match="there is no adapter"):
        pull_adapter(Library(tmp_path / "two"), "team/press")


def test_the_commands(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    adapter = write(tmp_path / "one", name="press", title="The press")
    done = run("push-adapter", "press", tmp_path / "there", "--library", tmp_path / "one")
    assert done.exit_code == 0 and done.stdout.startswith(f"{adapter.version} (")
    done = run("pull-adapter", tmp_path / "there", "--name", "mine", "--library", tmp_path / "two")
    assert done.exit_code == 0 and done.stdout.startswith("pulled mine@") and "The press" in done.stdout
    assert Library(tmp_path / "two").open("mine").faults() == []
    again = run("pull-adapter", tmp_path / "nowhere", "--library", tmp_path / "two")
    assert again.exit_code == 1 and again.stderr.count("\n") == 1
