"""The library: names and versions, what is noted about them, and what a crash leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adapters import STATIC_ROWS, TARGET, Killed, random_factors, refuse_writes, some_chunks, some_manifest, write
from loracast import files as workfolders
from loracast.cli import app
from loracast.documents import Chunk
from loracast.errors import AdapterError
from loracast.files import tidy
from loracast.library import register
from loracast.library import register as schema
from loracast.library import save as writer_module
from loracast.library import storage as library_files
from loracast.library.index import read_chunks
from loracast.library.library import Library
from loracast.library.manifest import Manifest
from loracast.library.save import save_rows, tensors_of
from tiny import PROSE


def first_factor(adapter) -> torch.Tensor:
    return adapter.lora([0]).factors[TARGET.modules[0].name].a


def has_factors_of(adapter, seed: int, n: int = 3) -> bool:
    """Whether its first factor is that of `write(seed=seed)`."""
    return torch.equal(first_factor(adapter), random_factors(n, seed)[TARGET.modules[0].kind][0][0, 0].bfloat16())


def files_in(library: Path) -> set[str]:
    """What lies in a library, down to the adapters' folders."""
    not_counted = {
        "objects",
        "static",
        "shared.json",
        "register.sqlite-journal",
    }  # SQLite's own, which a killed process leaves and the next one uses
    return {path.name for path in library.iterdir()} - not_counted | {p.name for p in library.glob("objects/??/*")}


@pytest.fixture(params=["local", "shared folder", "s3"])
def anywhere(request, tmp_path) -> Path:
    """An empty library: on this machine alone, or shared over a folder or an object store."""
    library = tmp_path / "library"
    library.mkdir()
    if request.param == "shared folder":
        Library(library).share(str(tmp_path / "there"))
    elif request.param == "s3":
        Library(library).share(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    return library


# ---- names and versions


def test_list_open_replace_and_remove(anywhere):
    assert Library(anywhere / "nothing").names() == []
    first = write(anywhere, seed=1)
    with pytest.raises(AdapterError, match="--replace"):
        write(anywhere, seed=2)
    assert has_factors_of(Library(anywhere).open("doc"), 1)
    second = write(anywhere, 2, seed=2, replace=True)
    new = Library(anywhere).open("doc")
    assert new.manifest.n_chunks == 2 and has_factors_of(new, 2, 2)
    assert first.manifest.n_chunks == 3 and first.version != second.version == new.version
    assert [Library(anywhere).open(name).name for name in Library(anywhere).names()] == ["doc"]
    assert [entry.version for entry in Library(anywhere).versions("doc")] == [
        second.manifest.version,
        first.manifest.version,
    ]
    for digits in (4, 12, 64):
        old = Library(anywhere).open(f"doc@{first.manifest.version[:digits]}")
        assert has_factors_of(old, 1) and old.version == first.version
    with pytest.raises(AdapterError, match=f"none of its versions: {second.version.partition('@')[2]}, "):
        Library(anywhere).open("doc@" + "0" * 12)
    for bad in ("doc@", "doc@12", "doc@xyzw", "doc@../x", "doc@" + "a" * 65, "@abcd"):
        with pytest.raises(AdapterError, match=r"names no version|cannot name"):
            Library(anywhere).open(bad)
    with pytest.raises(AdapterError, match="there are: doc"):
        Library(anywhere).open("other")
    Library(anywhere).remove("doc")
    assert files_in(anywhere) == {"register.sqlite"}
    for gone in (Library.open, Library.remove, Library.versions):
        with pytest.raises(AdapterError, match="none yet"):
            gone(Library(anywhere), "doc")


def test_one_version_is_removed_and_the_others_stay(anywhere):
    first, second, third = (write(anywhere, seed=seed, replace=True) for seed in (1, 2, 3))
    Library(anywhere).remove(second.version)
    assert [e.version for e in Library(anywhere).versions("doc")] == [third.manifest.version, first.manifest.version]
    Library(anywhere).remove(third.version)
    assert has_factors_of(Library(anywhere).open("doc"), 1)  # the one before is the newest again
    Library(anywhere).remove(first.version)
    assert Library(anywhere).names() == [] and files_in(anywhere) == {"register.sqlite"}


def test_a_version_that_is_named_again_is_the_newest_again(anywhere):
    first, second = (write(anywhere, seed=seed, replace=True) for seed in (1, 2))
    write(anywhere, seed=1, replace=True)  # back to the first
    assert Library(anywhere).open("doc").version == first.version
    assert [e.version for e in Library(anywhere).versions("doc")] == [first.manifest.version, second.manifest.version]
    assert Library(anywhere).collect_garbage(keep=1).versions == (second.manifest.version,)
    assert has_factors_of(Library(anywhere).open("doc"), 1)


def test_the_same_adapter_is_kept_once(anywhere):
    one = write(anywhere, name="one")
    other = write(anywhere, name="other", created="2027-01-01T00:00:00+00:00", learn_s=9.0)
    assert one.folder == other.folder and (one.name, other.name) == ("one", "other")
    assert [Library(anywhere).open(name).name for name in ("one", "other")] == ["one", "other"]
    write(anywhere, name="one")  # again: it is the same, nothing is replaced
    assert [e.n_versions for e in Library(anywhere).entries()[0]] == [1, 1]
    Library(anywhere).remove("one")
    Library(anywhere).open("other").verify()
    Library(anywhere).remove("other")
    assert not one.folder.exists()


def test_names_that_are_not_there_tell_which_come_near(tmp_path):
    adapter = write(tmp_path)
    with register.Register.writing(tmp_path / "register.sqlite") as r:
        for i in range(30):
            r.name_version(f"manual-{i}", adapter.manifest.version)
    with pytest.raises(AdapterError, match="near it are: manual-7"):
        Library(tmp_path).open("manual7")
    with pytest.raises(AdapterError, match="`loracast list` shows the 31 there are"):
        Library(tmp_path).open("qqqq")


def test_what_is_noted_about_a_name_goes_along_with_it(anywhere):
    write(anywhere, name="press")
    write(anywhere, name="lamp", seed=2)
    Library(anywhere).describe("press", note="second floor", owner="mia", tags=("machine", "old"))
    Library(anywhere).describe("press", untag=("old",))
    write(anywhere, name="press", seed=3, replace=True)
    Library(anywhere).rename("press", "press-2")
    entry = Library(anywhere).find("press-2")
    assert (entry.note, entry.owner, entry.tags, entry.n_versions) == ("second floor", "mia", ("machine",), 2)
    for wanted in (
        {"tag": "machine"},
        {"owner": "mia"},
        {"like": "SECOND"},
        {"like": "press"},
        {"kind": "document", "like": "2"},
    ):
        found, n = Library(anywhere).entries(**wanted)
        assert [e.name for e in found] == ["press-2"] and n == 1
    assert Library(anywhere).entries(like="%")[1] == 0 == Library(anywhere).entries(kind="task")[1]
    assert [e.name for e in Library(anywhere).entries(limit=1, offset=1)[0]] == ["press-2"] and Library(
        anywhere
    ).entries(limit=1)[1] == 2
    with pytest.raises(AdapterError, match="already"):
        Library(anywhere).rename("lamp", "press-2")
    with pytest.raises(AdapterError, match="cannot name"):
        Library(anywhere).rename("lamp", "../x")
    with pytest.raises(AdapterError, match="cannot name"):
        Library(anywhere).describe("lamp", tags=("a b",))
    for change in (lambda: Library(anywhere).rename("no", "new"), lambda: Library(anywhere).describe("no", note="x")):
        with pytest.raises(AdapterError, match="no adapter is called 'no'"):
            change()
    Library(anywhere).remove("press-2")
    write(anywhere, name="press-2")
    assert Library(anywhere).find("press-2").tags == ()


def test_words_are_found_in_all_that_was_learned(anywhere):
    texts = {"pump": ["The valve is red.", "Turn the valves off first."], "lamp": ["Größe XL is here.", "A red lamp."]}
    for i, (name, some) in enumerate(texts.items()):
        write(anywhere, 2, name=name, seed=i, chunks=[Chunk(t, 0, len(t), f"{name} / part", 5) for t in some])
    assert [(h.name, h.chunk) for h in Library(anywhere).search("valve first")] == [("pump", 1)]
    assert {(h.name, h.chunk) for h in Library(anywhere).search("RED")} == {("pump", 0), ("lamp", 1)}
    assert [h.snippet for h in Library(anywhere).search("red lamp")] == ["A [red] [lamp]."]
    assert [(h.name, h.chunk) for h in Library(anywhere).search("Gro\u0308ße")] == [("lamp", 0)]
    assert len(Library(anywhere).search("part", limit=3)) == 3
    assert Library(anywhere).search("absent") == [] == Library(anywhere / "nothing").search("red")
    for text in ('"', "AND OR", "red* (", "' OR 1=1 --"):
        assert len(Library(anywhere).search(text + " zzz")) == 0
    with pytest.raises(AdapterError, match="no word"):
        Library(anywhere).search("?!")
    write(anywhere, 1, name="pump", seed=7, chunks=[Chunk("All is blue.", 0, 9, "", 5)], replace=True)
    assert [h.name for h in Library(anywhere).search("red")] == ["lamp"]  # only newest versions
    assert [h.name for h in Library(anywhere).search("blue")] == ["pump"]
    Library(anywhere).remove("pump")
    assert Library(anywhere).search("blue") == []


def test_the_same_document_is_answered_from_the_library(model, tmp_path, monkeypatch):
    path = tmp_path / "lamp.txt"
    path.write_text(PROSE)
    learned = model.learn(path, "lamp")
    with monkeypatch.context() as patch:
        patch.setattr("loracast.cast.document.cast_chunks", lambda *a: pytest.fail("it is there already"))
        assert model.learn(path, "lamp").version == learned.version  # needs no --replace: it is the same
        assert model.learn(path, "other").folder == learned.folder
        path.touch()
        model.learn(path, "lamp", replace=True)
    assert model.library.find("lamp").n_versions == 1
    model.library.check_free("lamp", unless_from=learned.manifest.source_sha256)
    with pytest.raises(AdapterError, match="already"):
        model.library.check_free("lamp", unless_from="0" * 64)
    model.learn(path, "lamp", max_chunk_tokens=32, replace=True)  # other options, another adapter
    assert model.library.find("lamp").n_versions == 2
    with pytest.raises(AdapterError, match="already"):
        model.learn(path, "lamp")


# ---- libraries from before the register, and registers that are lost


def old_library(folder: Path, names=("doc", "other")) -> None:
    """A library as it was before there was a register: a folder for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        made = write(folder / "made", seed=i, name=name)
        stored = json.loads((made.folder / "adapter.json").read_text())
        del stored["chunks_sha256"]
        (made.folder / "adapter.json").write_text(json.dumps(stored))
        os.replace(made.folder, folder / name)
    shutil.rmtree(folder / "made")


def test_adapters_from_before_the_register_are_taken_in(tmp_path):
    old_library(tmp_path)
    assert Library(tmp_path).names() == ["doc", "other"] and Library(tmp_path).verify() == []
    assert has_factors_of(Library(tmp_path).open("other"), 1)
    assert [h.name for h in Library(tmp_path).search("word1")] == ["doc", "other"]
    old_library(tmp_path, ["late"])  # put there by hand
    assert Library(tmp_path).names() == ["doc", "late", "other"]
    assert files_in(tmp_path) == {"register.sqlite", *(e.version for e in Library(tmp_path).entries()[0])}
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter.json").write_text("{")
    (problem,) = Library(tmp_path).verify()
    assert "cannot be taken into the register" in problem and Library(tmp_path).names() == ["doc", "late", "other"]


def test_a_lost_register_is_made_again(tmp_path):
    write(tmp_path, seed=1)
    write(tmp_path, seed=2, replace=True, created="2026-02-01T00:00:00+00:00")
    write(tmp_path, seed=3, name="other")
    (tmp_path / "register.sqlite").unlink()
    assert Library(tmp_path).names() == ["doc", "other"] and has_factors_of(Library(tmp_path).open("doc"), 2)
    assert Library(tmp_path).find("doc").n_versions == 2 and Library(tmp_path).verify() == []
    assert len(Library(tmp_path).search("word1")) == 2
    (tmp_path / "register.sqlite").write_bytes(b"not a database, but long enough to look like one" * 20)
    with pytest.raises(AdapterError, match="move it away"):
        Library(tmp_path).names()


def test_a_register_of_a_newer_loracast_is_left_alone(tmp_path):
    write(tmp_path)
    with sqlite3.connect(tmp_path / "register.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    for use in (lambda folder: Library(folder).names(), lambda library: write(library, seed=2, replace=True)):
        with pytest.raises(AdapterError, match="newer loracast"):
            use(tmp_path)


def test_a_register_of_an_older_loracast_is_brought_up_to_date(tmp_path, monkeypatch):
    write(tmp_path)
    more = "CREATE TABLE later (x TEXT); INSERT INTO later VALUES ('new')"
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, more))
    assert Library(tmp_path).names() == ["doc"]
    with sqlite3.connect(tmp_path / "register.sqlite") as database:
        assert database.execute("SELECT * FROM later").fetchall() == [("new",)]
        assert database.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)


def test_a_register_of_the_first_schemas_opens_with_everything_in_it(tmp_path):
    """Written by hand in the words of then: tables namings and unsettled, column made_from."""
    adapter = write(tmp_path, seed=1)
    m, path = adapter.manifest, tmp_path / "register.sqlite"
    for n_scripts in (1, 2):
        path.unlink()
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            for script in schema.MIGRATIONS[:n_scripts]:
                database.executescript(script)
            database.execute(f"PRAGMA user_version = {n_scripts}")
            row = (
                m.version,
                m.cache_keys()[0],
                m.kind,
                m.title,
                m.source,
                m.source_sha256,
                "tiny",
                "h",
                "{}",
                3,
                15,
                9,
                m.created,
            )
            database.execute(f"INSERT INTO versions VALUES ({', '.join('?' * 13)})", row)
            database.execute("INSERT INTO names VALUES ('mine', 'mia', 'second floor')")
            database.execute("INSERT INTO namings VALUES (7, 'mine', ?, ?)", (m.version, m.created))
            database.execute("INSERT INTO tags VALUES ('mine', 'machine')")
            database.execute("INSERT INTO texts (rowid, heading, text) VALUES (1, 'Manual', 'the valve is red')")
            database.execute("INSERT INTO texts_of VALUES (?, 1, 1)", (m.version,))
            database.execute("INSERT INTO unsettled VALUES (?)", ("ab" * 32,))
        assert Library(tmp_path).names() == ["mine"] and has_factors_of(Library(tmp_path).open("mine"), 1)
        entry = Library(tmp_path).find("mine")
        assert (entry.owner, entry.note, entry.tags, entry.n_versions) == ("mia", "second floor", ("machine",), 1)
        assert [hit.name for hit in Library(tmp_path).search("valve")] == ["mine"] and Library(tmp_path).verify() == []
        assert Library(tmp_path).find_cached(["unknown", *m.cache_keys()]) == m.version
        with register.Register.reading(tmp_path / "register.sqlite") as r:
            assert r.unrecovered() == ["ab" * 32]
        Library(tmp_path).recover()
        Library(tmp_path).rename("mine", "ours")
        write(tmp_path, seed=2, name="ours", replace=True)
        assert Library(tmp_path).find("ours").n_versions == 2
        Library(tmp_path).remove(Library(tmp_path).find("ours").name + "@" + Library(tmp_path).find("ours").version)
        assert Library(tmp_path).find("ours").version == m.version


def test_an_adapter_is_found_under_an_earlier_id_of_its_hypernetwork(tmp_path):
    made = write(tmp_path, hypernetwork="of the weights alone")
    now = dataclasses.replace(made.manifest, hypernetwork="of weights and config")
    assert Library(tmp_path).find_cached(now.cache_keys()) is None
    assert Library(tmp_path).find_cached(now.cache_keys(["another", "of the weights alone"])) == made.manifest.version
    for changes in ({"max_chunk_tokens": 64}, {"storage": "int8"}, {"strength": 0.5}, {"source_sha256": "t" * 64}):
        other = dataclasses.replace(now, **changes)
        assert Library(tmp_path).find_cached(other.cache_keys(["of the weights alone"])) is None


def test_a_library_that_cannot_be_written_can_be_read(tmp_path, monkeypatch):
    write(tmp_path, seed=1)
    refuse_writes(monkeypatch, tmp_path)
    with pytest.raises(AdapterError, match="readonly"):
        write(tmp_path, seed=2, name="other")
    assert Library(tmp_path).names() == ["doc"]
    assert has_factors_of(Library(tmp_path).open("doc"), 1)


def test_a_register_that_another_process_holds_is_waited_for(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(register, "_WAIT_S", 0.05)
    other = sqlite3.connect(tmp_path / "register.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert Library(tmp_path).names() == ["doc"]
    with pytest.raises(AdapterError, match="another process is writing"):
        Library(tmp_path).remove("doc")
    other.execute("ROLLBACK")
    Library(tmp_path).remove("doc")


# ---- upkeep


def test_garbage_is_what_no_name_has(tmp_path):
    made = [write(tmp_path, seed=seed, replace=True) for seed in (1, 2, 3)]
    write(tmp_path, seed=1, name="other")
    assert Library(tmp_path).collect_garbage() == Library(tmp_path / "nothing").collect_garbage()
    would = Library(tmp_path).collect_garbage(keep=1, dry_run=True)
    assert (
        would.versions == (made[1].manifest.version,) and would.n_bytes == made[1].n_bytes
    )  # the first is "other" too
    assert Library(tmp_path).collect_garbage(keep=1) == would
    assert Library(tmp_path).find("doc").n_versions == 1 and has_factors_of(Library(tmp_path).open("doc"), 3)
    orphan = tmp_path / "objects" / "ab" / ("ab" * 32)
    orphan.mkdir(parents=True)
    (orphan / "factors.safetensors").write_bytes(b"123")
    (problem,) = Library(tmp_path).verify()
    assert "belongs to no name" in problem
    assert Library(tmp_path).collect_garbage().n_bytes == 3 and Library(tmp_path).verify() == [] and not orphan.exists()
    with pytest.raises(AdapterError, match="at least one"):
        Library(tmp_path).collect_garbage(keep=0)


@pytest.mark.parametrize("file", ["factors.safetensors", "chunks.sqlite", "adapter.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damage_is_found(file, damage, tmp_path):
    write(tmp_path, name="good", seed=1)
    path = write(tmp_path, name="bad", seed=2).folder / file
    if damage == "missing":
        path.unlink()
    elif file == "adapter.json":
        path.write_text(path.read_text().replace("A manual", "A Manual"))
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert (
        len(Library(tmp_path).verify()) == 1 == len(Library(tmp_path).verify(["bad"]))
        and Library(tmp_path).verify(["good"]) == []
    )


# ---- crashes


def test_an_adapter_in_use_survives_its_replacement_and_removal(anywhere):
    write(anywhere, seed=1)
    using = Library(anywhere).open("doc")
    using.lora([0])
    write(anywhere, seed=2, replace=True)
    Library(anywhere).remove("doc")
    assert using.lora([2]).rank == 2 and has_factors_of(using, 1)


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def killed():
        yield tensors_of(random_factors(2))
        assert len(files_in(tmp_path)) == 2 and Library(tmp_path).names() == []
        raise Killed

    def full(*_):
        raise OSError("disk full")

    given = Library(tmp_path), some_manifest(3), some_chunks(3)
    with pytest.raises(Killed):
        save_rows(*given, killed(), {})
    assert files_in(tmp_path) == {"register.sqlite"}
    with pytest.raises(AdapterError, match="2 of 3 chunks"):
        save_rows(*given, [tensors_of(random_factors(2))], {})
    assert files_in(tmp_path) == {"register.sqlite"}
    with pytest.raises(OSError, match="disk full"):
        save_rows(*given, [], {}, index=full)
    assert files_in(tmp_path) == {"register.sqlite"}
    kept = write(tmp_path, seed=1)
    steps = [
        (writer_module, "file_sha256"), (writer_module, "sync_folder"), (library_files, "sync_folder"),
        (register.Register, "add_version"), (register.Register, "name_version"), (library_files.os, "replace"),
    ]  # fmt: skip
    for module, step in steps:
        with monkeypatch.context() as patch:
            patch.setattr(module, step, full)
            with pytest.raises(OSError, match="disk full"):
                write(tmp_path, seed=2, replace=True)
        assert files_in(tmp_path) == {"register.sqlite", kept.manifest.version}, step
        assert has_factors_of(Library(tmp_path).open("doc"), 1) and Library(tmp_path).verify() == []


def test_two_writers_of_one_name(anywhere):
    def save(seed: int, meanwhile=lambda: None):
        def batches():
            yield tensors_of(random_factors(3, seed))
            meanwhile()

        return save_rows(Library(anywhere), some_manifest(3), some_chunks(3), batches(), {})

    def others() -> None:
        with pytest.raises(AdapterError, match="already"):
            save(2, lambda: first.append(save(1)))

    first = []
    assert save(1, others).folder == first[0].folder
    assert files_in(anywhere) == {"register.sqlite", first[0].manifest.version}


def in_child(target, *args, kill_after_s: float | None = None) -> int:
    """Run a function in a forked process; the exit code."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    return process.exitcode


def die_while_writing(library: Path) -> None:
    def batches():
        yield tensors_of(random_factors(1))
        os._exit(9)

    save_rows(Library(library), some_manifest(3), some_chunks(3), batches(), {})


def die_before_the_commit(library: Path) -> None:
    register.Register.name_version = lambda *_: os._exit(9)
    write(library, seed=2, replace=True)


def die_while_removing(library: Path) -> None:
    library_files.LibraryStorage.recover = lambda *_: os._exit(9)
    Library(library).remove("doc")


def test_a_work_folder_is_left_until_its_process_can_have_locked_it(tmp_path, monkeypatch):
    def die_before_the_lock(library: Path) -> None:
        workfolders.try_lock = lambda *_: os._exit(9)
        write(library)

    assert in_child(die_before_the_lock, tmp_path) == 9
    (left,) = tmp_path.glob(".loracast-*")
    tidy(tmp_path)
    assert left.exists()
    monkeypatch.setattr(workfolders, "_GRACE_S", 0.0)
    tidy(tmp_path)
    assert not left.exists()


def test_the_next_run_clears_up_after_a_killed_one(tmp_path):
    assert in_child(die_while_writing, tmp_path) == 9
    (left,) = tmp_path.glob(".loracast-*")
    assert Library(tmp_path).names() == []

    def while_writing(*_) -> None:
        assert not left.exists()
        (living,) = tmp_path.glob(".loracast-*")
        tidy(tmp_path)
        assert living.exists()  # another process is writing it: not ours to delete
        raise Killed

    with pytest.raises(Killed):
        save_rows(Library(tmp_path), some_manifest(1, name="other"), some_chunks(1), [], {}, index=while_writing)
    kept = write(tmp_path, seed=1)
    assert in_child(die_before_the_commit, tmp_path) == 9
    assert (
        len(files_in(tmp_path)) == 4 and Library(tmp_path).verify() == []
    )  # files that no row names, and a work folder
    write(tmp_path, seed=1)
    assert files_in(tmp_path) == {"register.sqlite", kept.manifest.version}
    assert has_factors_of(Library(tmp_path).open("doc"), 1)
    assert in_child(die_while_removing, tmp_path) == 9
    assert Library(tmp_path).names() == []  # what was removed does not come back
    Library(tmp_path).recover()
    assert files_in(tmp_path) == {"register.sqlite"}


def test_tidying_touches_nothing_of_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(workfolders, "_GRACE_S", 0.0)
    write(tmp_path)
    for name in (".vscode", ".config.d", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / ".loracast-old-file").write_text("not a folder")
    before = files_in(tmp_path)
    tidy(tmp_path)
    Library(tmp_path).recover()
    assert files_in(tmp_path) == before


def at_work_for_ever(library: Path, seed: int) -> None:
    """Learn, rename, replace and delete, at random."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    while True:
        name = rng.choice(("doc", "lamp", "pump"))
        try:
            rng.choice(
                (
                    lambda name=name: write(
                        library,
                        2,
                        seed=rng.randrange(5),
                        name=name,
                        replace=True,
                        shared=rng.choice((None, STATIC_ROWS, {key: 2 * rows for key, rows in STATIC_ROWS.items()})),
                    ),
                    lambda name=name: Library(library).rename(name, rng.choice(("doc", "lamp", "pump"))),
                    lambda name=name: Library(library).remove(name),
                    lambda name=name: Library(library).collect_garbage(keep=2),
                )
            )()
        except AdapterError as error:
            assert "already" in str(error) or "no adapter is called" in str(error), error


def test_sigkill_in_a_loop_never_leaves_half_an_adapter(tmp_path, monkeypatch):
    """As many kills as LORACAST_KILLS says (docs/notebook has a run of a hundred)."""
    monkeypatch.setattr(workfolders, "_GRACE_S", 0.0)
    kept = write(tmp_path, 2, name="kept", seed=9)
    for i in range(int(os.environ.get("LORACAST_KILLS", "8"))):
        ended = in_child(at_work_for_ever, tmp_path, i, kill_after_s=0.05 + 0.4 * random.Random(i).random())
        assert ended == -signal.SIGKILL
        assert [problem for problem in Library(tmp_path).verify() if "belongs to no name" not in problem] == []
        for adapter in [Library(tmp_path).open(name) for name in Library(tmp_path).names()]:
            assert adapter.lora().rank in (4, 7) and len(read_chunks(adapter.index)) == 2
        assert Library(tmp_path).open("kept").version == kept.version
        Library(tmp_path).collect_garbage()
        named = {entry.version for name in Library(tmp_path).names() for entry in Library(tmp_path).versions(name)}
        assert files_in(tmp_path) == {"register.sqlite", *named}
        statics = Counter(Manifest.read(path).static_sha256 for path in tmp_path.glob("objects/*/*/adapter.json"))
        links = {path.name: path.stat().st_nlink - 1 for path in tmp_path.glob("static/*")}
        assert links == {sha256: n for sha256, n in statics.items() if sha256}


def test_several_processes_write_at_once(anywhere):
    def write_some(first: int) -> None:
        torch.set_num_threads(1)
        for i in range(first, first + 5):
            write(anywhere, 1, name=f"doc-{i}", seed=i % 7)

    processes = [multiprocessing.get_context("fork").Process(target=write_some, args=(k * 5,)) for k in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(Library(anywhere).names()) == 20 and Library(anywhere).verify() == []
    assert len({entry.version for entry in Library(anywhere).entries()[0]}) == 7


# ---- many


def test_thousands_of_adapters_are_opened_and_listed_at_once(tmp_path):
    adapter = write(tmp_path)
    stored = json.loads((adapter.folder / "adapter.json").read_text())
    with register.Register.writing(tmp_path / "register.sqlite") as r:
        for i in range(3_000):
            manifest = some_manifest(3, name=f"manual-{i:05d}", title=f"Manual {i}", source_sha256=f"{i:064d}")
            r.add_version(manifest, 1000, [("", f"the text of number {i}")])
            r.name_version(manifest.name, manifest.version)
            if i == 2_000:
                home = Library(tmp_path).home(manifest.version)
                shutil.copytree(adapter.folder, home)
                changed = {**stored, "name": manifest.name, "title": manifest.title, "source_sha256": f"{i:064d}"}
                (home / "adapter.json").write_text(json.dumps(changed))

    def seconds(call) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return sorted(times)[2]

    assert seconds(lambda: Library(tmp_path).open("manual-02000")) < 0.02
    for page in (0, 2_900):
        listed, n = Library(tmp_path).entries(limit=100, offset=page)
        assert len(listed) == 100 and n == 3_001
        assert seconds(lambda page=page: Library(tmp_path).entries(limit=100, offset=page)) < 0.2
    assert seconds(lambda: Library(tmp_path).entries(like="manual 27", limit=100)) < 0.2
    assert seconds(lambda: Library(tmp_path).search("number 2321")) < 0.2


# ---- commands


def run(library: Path, *arguments: str):
    return CliRunner().invoke(app, [*arguments, "--library", str(library)])


def test_commands_of_the_library(anywhere):
    first = write(anywhere, name="press", title="The press", seed=1)
    write(anywhere, name="press", title="The press", seed=2, replace=True)
    write(anywhere, name="lamp", title="A lamp", seed=3)
    assert run(anywhere, "edit", "press", "--tag", "machine", "--note", "second floor", "--owner", "mia").exit_code == 0
    assert run(anywhere, "edit", "press").exit_code == 2
    listed = json.loads(run(anywhere, "list", "--json").stdout)
    assert listed["n_adapters"] == 2 and [a["name"] for a in listed["adapters"]] == ["lamp", "press"]
    assert listed["adapters"][1]["tags"] == ["machine"] and listed["adapters"][1]["n_versions"] == 2
    shown = run(anywhere, "list", "--tag", "machine").stdout
    assert "press" in shown and "of 2" in shown and "machine" in shown and "lamp" not in shown
    paged = run(anywhere, "list", "--per-page", "1", "--page", "2")
    assert "press" in paged.stdout and "page 2 of 2" in paged.stderr
    assert "no such adapter" in run(anywhere, "list", "zzz").stderr
    shown = run(anywhere, "show", "press").stdout
    assert "one of 2" in shown and "second floor" in shown and "mia" in shown
    old = json.loads(run(anywhere, "show", first.version, "--json").stdout)
    assert old["version"] == first.manifest.version and len(old["versions"]) == 2
    assert run(anywhere, "edit", "press", "--rename", "press-2").stdout == "press is now called press-2\n"
    hits = json.loads(run(anywhere, "search", "word1", "chunk", "--json").stdout)["hits"]
    assert {hit["name"] for hit in hits} == {"lamp", "press-2"} and all(hit["chunk"] == 1 for hit in hits)
    assert "[word1]" in run(anywhere, "search", "word1").stdout
    assert "nothing in" in run(anywhere, "search", "absent").stderr
    assert "would delete 1 version," in run(anywhere, "gc", "--keep", "1", "--dry-run").stdout
    assert json.loads(run(anywhere, "gc", "--keep", "1", "--json").stdout)["versions"] == [first.manifest.version]
    assert run(anywhere, "verify").stdout == "2 adapters whole\n"
    (Library(anywhere).open("lamp").folder / "factors.safetensors").write_bytes(b"")
    damaged = run(anywhere, "verify")
    assert damaged.exit_code == 1 and "factors.safetensors is damaged" in damaged.stdout
    assert run(anywhere, "rm", "lamp", "--yes").stdout == "removed lamp\n"
    assert run(anywhere, "verify", "press-2").stdout == "1 adapter whole\n"
