"""A library that several machines share: each machine is a folder with a register of its own."""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

import shared_writers
from adapters import Killed, write
from loracast.cli import app
from loracast.errors import AdapterError, LoracastError, NameTakenError, NoSuchAdapterError
from loracast.files import create_once
from loracast.library import storage
from loracast.library import store as shared_store
from loracast.library.library import Library
from loracast.library.register import Register
from loracast.library.store import SharedStore


@pytest.fixture(params=["folder", "s3"])
def url(request, tmp_path) -> str:
    return str(tmp_path / "there") if request.param == "folder" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture
def machines(url, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Two machines that look for new names whenever they are asked."""
    monkeypatch.setattr(storage, "REFRESH_S", 0.0)
    for name in ("one", "two"):
        Library(tmp_path / name).share(url)
    return tmp_path / "one", tmp_path / "two"


def before_publishing(monkeypatch, name: str, act) -> None:
    """Do something right before the state of a name is published for the first time."""
    publish, waiting = SharedStore.publish, [act]

    def published(self, what, number, state):
        if what == name and waiting:
            waiting.pop()()
        publish(self, what, number, state)

    monkeypatch.setattr(SharedStore, "publish", published)


def stored_versions(url: str) -> set[str]:
    return SharedStore(url).versions()


def test_names_tags_and_notes_are_seen_by_all(machines):
    one, two = machines
    first = write(one, name="press", seed=1)
    Library(one).describe("press", note="second floor", owner="mia", tags=("machine",))
    second = write(two, name="press", seed=2, replace=True)
    assert not (two / "objects" / first.manifest.version[:2] / first.manifest.version).exists()  # fetched when opened
    assert [e.version for e in Library(one).versions("press")] == [second.manifest.version, first.manifest.version]
    Library(two).rename("press", "press-2")
    entry = Library(one).find("press-2")
    assert (entry.note, entry.owner, entry.tags, entry.n_versions) == ("second floor", "mia", ("machine",), 2)
    assert entry.n_bytes == second.n_bytes and entry.title == second.manifest.title
    assert Library(two).open(first.version.replace("press", "press-2")).faults() == []
    assert {hit.name for hit in Library(two).search("word1")} == {"press-2"} and Library(one).names() == ["press-2"]
    with pytest.raises(NameTakenError):
        write(one, name="press-2", seed=3)
    Library(one).remove("press-2")
    assert Library(two).names() == [] and Library(one).verify() == Library(two).verify() == []
    write(two, name="press-2", seed=4)
    assert Library(one).find("press-2").tags == () and Library(one).find("press-2").n_versions == 1


def test_an_overtaken_writer_tries_again(machines, monkeypatch):
    one, two = machines
    write(one, seed=1)
    before_publishing(monkeypatch, "doc", lambda: write(two, seed=2, replace=True))
    third = write(one, seed=3, replace=True)
    assert Library(one).find("doc").n_versions == 3 and Library(two).find("doc").version == third.manifest.version
    assert Library(one).verify() == Library(two).verify() == []


def test_a_new_name_belongs_to_one_of_two_machines(machines, monkeypatch):
    one, two = machines
    before_publishing(monkeypatch, "doc", lambda: write(two, seed=2))
    with pytest.raises(NameTakenError):
        write(one, seed=3)
    assert Library(one).find("doc").n_versions == 1 and Library(one).verify() == Library(two).verify() == []


def test_a_rename_takes_along_what_is_added_meanwhile(machines, monkeypatch):
    one, two = machines
    write(one, name="old", seed=1)
    before_publishing(monkeypatch, "old", lambda: write(two, name="old", seed=2, replace=True))
    Library(one).rename("old", "new")  # "new" is there when "old" turns out to be another
    for library in machines:
        assert Library(library).names() == ["new"] and Library(library).find("new").n_versions == 2


def test_a_rename_that_comes_too_late_leaves_no_half_of_itself(machines, monkeypatch):
    one, two = machines
    write(one, name="old", seed=1)
    before_publishing(monkeypatch, "old", lambda: Library(two).remove("old"))
    with pytest.raises(NoSuchAdapterError):
        Library(one).rename("old", "new")  # "new" is there when "old" turns out to be gone
    for library in machines:
        assert Library(library).names() == [] and Library(library).verify() == []


def test_a_rename_moves_what_the_name_means_in_the_end(machines, monkeypatch, url):
    one, two = machines
    first = write(one, name="old", seed=1)

    def mean_another() -> None:
        Library(two).remove("old")
        write(two, name="old", seed=2)

    before_publishing(monkeypatch, "old", mean_another)
    Library(one).rename("old", "new")
    for library in machines:
        (only,) = Library(library).versions("new")
        assert only.version != first.manifest.version and Library(library).names() == ["new"]
        assert Library(library).open("new").faults() == [] and Library(library).verify() == []
    states = [SharedStore(url).read("new", number).versions for number in (1, 2, 3)]
    assert [len(found) for found in states] == [1, 0, 1]  # no state takes a version away from the one before


def test_a_machine_that_dies_before_it_commits_has_changed_the_name_or_not(machines, monkeypatch):
    one, two = machines
    write(one, seed=1)
    for target in (SharedStore.publish, Register.set_number):  # before, and after

        def die(*_):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(SharedStore if target is SharedStore.publish else Register, target.__name__, die)
            with pytest.raises(Killed):
                write(one, seed=2, replace=True)
        expected = 1 if target is SharedStore.publish else 2
        assert [Library(library).find("doc").n_versions for library in machines] == [expected] * 2
        assert Library(one).open("doc").faults() == [] and Library(one).verify() == Library(two).verify() == []


def test_an_answer_that_is_lost_is_no_conflict(tmp_path, monkeypatch):
    Library(tmp_path / "one").share(str(tmp_path / "there"))

    def create(path, content):
        create_once(path, content)
        raise OSError("the connection broke")

    monkeypatch.setattr(shared_store, "create_once", create)
    write(tmp_path / "one")
    Library(tmp_path / "one").rename("doc", "manual")
    assert Library(tmp_path / "one").names() == ["manual"] and Library(tmp_path / "one").verify() == []


def test_a_lost_register_is_made_again_with_all_that_was_noted(machines):
    one, _ = machines
    write(one, seed=1)
    write(one, seed=2, replace=True)
    Library(one).describe("doc", note="second floor", owner="mia", tags=("machine",))
    Library(one).rename("doc", "manual")
    before = Library(one).versions("manual")
    (one / "register.sqlite").unlink()
    assert (
        Library(one).names() == ["manual"] and Library(one).versions("manual") == before and Library(one).verify() == []
    )
    write(one, seed=3, name="manual", replace=True)
    assert Library(one).find("manual").n_versions == 3


def test_a_name_is_looked_for_before_it_is_missed(machines, monkeypatch):
    one, two = machines
    monkeypatch.setattr(storage, "REFRESH_S", 1000.0)
    looking = Library(two)
    assert looking.names() == []
    write(one)
    assert looking.names() == []  # looked at a moment ago
    assert looking.find("doc").n_versions == 1


def test_without_the_store_reading_goes_on_and_writing_fails(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(storage, "REFRESH_S", 0.0)
    library, there = tmp_path / "one", tmp_path / "there"
    Library(library).share(str(there))
    write(library)
    there.rename(tmp_path / "away")  # as a drive that is not mounted
    assert Library(library).names() == ["doc"] and Library(library).open("doc").faults() == []
    assert caplog.messages and "the names of the library are those of 20" in caplog.text
    with pytest.raises(LoracastError, match="no shared library at"):
        Library(library).remove("doc")
    with pytest.raises(LoracastError, match="no shared library at"):
        write(library, seed=2, replace=True)
    (tmp_path / "away").rename(there) if not there.exists() else (tmp_path / "away" / "names").rename(there / "names")
    assert Library(library).find("doc").n_versions == 1


def test_garbage_stays_for_a_day(machines, url, monkeypatch):
    one, two = machines
    gone, kept = write(one, name="gone", seed=1).manifest.version, write(one, name="kept", seed=2).manifest.version
    Library(one).remove("gone")
    assert (
        Library(two).collect_garbage().versions == ()
        and stored_versions(url) == {gone, kept}
        and Library(two).verify() == []
    )
    write(two, name="again", seed=1)  # it needs not be sent
    Library(two).remove("again")
    monkeypatch.setattr(shared_store, "_GRACE", timedelta(seconds=-1))  # times of S3 are whole seconds
    assert Library(one).collect_garbage(dry_run=True).versions == (gone,)
    assert Library(one).collect_garbage().versions == (gone,) and stored_versions(url) == {kept}
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    assert len(fs.find(f"{root}/names/gone")) == 1  # the state that says that it is deleted
    write(one, name="gone", seed=3)
    assert Library(two).names() == ["gone", "kept"] and Library(two).verify() == []
    Library(two).evict()
    assert Library(two).open("kept").faults() == []


def test_a_version_that_is_collected_while_it_gets_a_name_is_sent_again(machines, url, monkeypatch):
    one, two = machines
    version = write(one, name="gone", seed=1).manifest.version
    write(two, name="other", seed=1)
    mark_used, asked = SharedStore.mark_used, []

    def marked(self, which):
        asked.append(which)
        if asked.count(version) == 2:  # once when it is put, once when it gets the name
            SharedStore(url).delete(version)
        mark_used(self, which)

    monkeypatch.setattr(SharedStore, "mark_used", marked)
    write(one, name="again", seed=1)
    assert Library(one).verify() == []


def test_a_version_that_gets_a_name_right_before_it_is_deleted_stays(machines, url, monkeypatch):
    one, two = machines
    version = write(one, name="gone", seed=1).manifest.version
    Library(one).remove("gone")
    create, waiting = SharedStore._create, [lambda: write(two, name="again", seed=1)]

    def created(self, path, content):
        if path.startswith("dying/") and waiting:
            waiting.pop()()
        create(self, path, content)

    is_older = SharedStore._is_older

    def is_old_but_for_the_last_second(self, path, now, age):
        return is_older(self, path, now, timedelta(seconds=-1) if len(waiting) else timedelta(days=1))

    monkeypatch.setattr(SharedStore, "_create", created)
    monkeypatch.setattr(SharedStore, "_is_older", is_old_but_for_the_last_second)
    assert Library(one).collect_garbage().versions == () and stored_versions(url) == {version}
    assert Library(one).verify() == Library(two).verify() == [] and Library(one).find("again").version == version


def test_who_names_a_version_waits_for_its_deletion_and_sends_it_again(machines, url, monkeypatch):
    one, two = machines
    version = write(one, name="gone", seed=1).manifest.version
    Library(one).remove("gone")
    monkeypatch.setattr(shared_store, "_GRACE", timedelta(seconds=-1))
    delete, written = SharedStore.delete, []
    naming = threading.Thread(target=lambda: written.append(write(two, name="again", seed=1)))

    def deleted_slowly(self, which):
        if not naming.ident:
            naming.start()
            time.sleep(1.0)
            assert naming.is_alive()
        delete(self, which)

    monkeypatch.setattr(SharedStore, "delete", deleted_slowly)
    assert Library(one).collect_garbage().versions == (version,)
    naming.join(60)
    assert written and Library(one).verify() == Library(two).verify() == [] and stored_versions(url) == {version}
    Library(two).evict()
    assert Library(two).open("again").faults() == []


def test_what_a_killed_collector_began_to_delete_can_be_named_an_hour_later(machines, monkeypatch):
    one, two = machines
    write(one, name="gone", seed=1)
    Library(one).remove("gone")
    monkeypatch.setattr(shared_store, "_GRACE", timedelta(seconds=-1))
    monkeypatch.setattr(shared_store, "_PATIENCE_S", 0.2)

    def die(self, version):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SharedStore, "delete", die)
        Library(one).collect_garbage()
    with pytest.raises(LoracastError, match="another machine is deleting"):
        write(two, name="again", seed=1)
    monkeypatch.setattr(shared_store, "_LONGEST_DELETION", timedelta(seconds=-1))
    write(two, name="again", seed=1)
    assert Library(one).verify() == Library(two).verify() == []


def test_damage_at_the_store_is_found(machines, url):
    one, two = machines
    adapter = write(one, name="press", seed=1)
    write(one, name="lamp", seed=2)
    assert Library(two).names() == ["lamp", "press"]
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{root}/names/press/00000001.json")
    assert any("press is not here what it is at" in problem for problem in Library(two).verify())
    fs.pipe_file(f"{root}/names/press/00000001.json", b'{"versions": [["../x", ""]], "owner": "", "note": ""}')
    (two / "register.sqlite").unlink()
    with pytest.raises(LoracastError, match="is damaged"):
        Library(two).verify()
    fs.rm(f"{root}/names/press", recursive=True)
    write(two, name="press", seed=3)
    fs.rm_file(f"{root}/{adapter.manifest.version[:2]}/{adapter.manifest.version}/adapter.json")
    assert f"the version {adapter.manifest.version[:12]} is not at {url}" in Library(one).verify()


def test_machines_join_with_names_of_their_own(tmp_path, url, monkeypatch):
    monkeypatch.setattr(storage, "REFRESH_S", 0.0)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    write(one, name="press", seed=1)
    Library(one).describe("press", tags=("machine",))
    Library(one).use_store(url)
    assert Library(one).share(url) == 1 and Library(one).share(url) == 1
    write(two, name="press", seed=2)
    write(two, name="lamp", seed=3)
    with pytest.raises(AdapterError, match="press mean other adapters"):
        Library(two).share(url)
    assert (
        Library(two).store_url is None
        and Library(two).names() == ["lamp", "press"]
        and Library(one).names() == ["press"]
    )
    Library(two).rename("press", "press-2")
    assert Library(two).share(url) == 3 and Library(one).names() == ["lamp", "press", "press-2"]
    assert Library(two).find("press").tags == ("machine",)
    with pytest.raises(AdapterError, match="shared by"):
        Library(three).use_store(url, take_over=True)
    for use in (Library.share, Library.use_store):
        with pytest.raises(AdapterError, match="--leave"):
            use(Library(two), str(tmp_path / "elsewhere"))
    Library(two).leave_store()
    Library(one).remove("press")
    assert (
        Library(two).names() == ["lamp", "press", "press-2"]
        and Library(two).store_url is None
        and Library(two).verify() == []
    )
    assert all(Library(two).open(name).faults() == [] for name in Library(two).names())
    Library(three).use_store(str(tmp_path / "another"))
    with pytest.raises(AdapterError, match="belongs to another library"):
        Library(tmp_path / "four").share(str(tmp_path / "another"))


def test_a_place_that_cannot_create_on_condition_is_refused(tmp_path, monkeypatch):
    with pytest.raises(LoracastError, match="cannot be shared at memory"):
        Library(tmp_path / "one").share("memory://somewhere")
    with monkeypatch.context() as patch, pytest.raises(LoracastError, match="cannot be used"):

        def no_links(*_):
            raise PermissionError("no links on this drive")

        patch.setattr(os, "link", no_links)
        Library(tmp_path / "one").share(str(tmp_path / "there"))
    monkeypatch.setattr(shared_store, "create_once", lambda path, content: path.write_bytes(content))
    with pytest.raises(LoracastError, match="overwrites files"):
        Library(tmp_path / "one").share(str(tmp_path / "there"))
    assert Library(tmp_path / "one").store_url is None


def test_machines_that_are_killed_lose_no_name(url, tmp_path, monkeypatch):
    """benchmarks/faults.py --shared makes a thousand writes on each machine."""
    monkeypatch.setattr(shared_writers, "_LONGEST_WAIT_S", 0.03)  # they have few writes to be killed in
    n_writes = 8 if url.startswith("s3") else 30
    found = shared_writers.run(url, tmp_path, n_writes, seed=1)
    assert found["broken"] == [] and found["writes"] == 2 * n_writes and found["kinds"]["add"] >= 4
    assert found["kills"] > 0 or url.startswith("s3")  # a life may be longer than the few writes there


def test_the_command(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["store", *(str(a) for a in arguments), "--library", str(tmp_path / "one")])

    write(tmp_path / "one")
    assert run(tmp_path / "there", "--shared").stdout == f"1 adapters lie at {tmp_path / 'there'}, shared\n"
    assert json.loads(run("--json").stdout)["store"] == str(tmp_path / "there")
    assert run("--shared").exit_code == 2 and run(tmp_path / "there", "--shared", "--take-over").exit_code == 2
    assert run("--leave").exit_code == 0 and Library(tmp_path / "one").names() == ["doc"]
