"""The static LoRA of a hypernetwork is one file on the disk for all adapters of a library, and each folder is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import STATIC_ROWS, write
from loracast.cast.compact import compact
from loracast.documents import Chunk
from loracast.errors import AdapterError
from loracast.files import file_sha256
from loracast.library.adapter import Adapter
from loracast.library.index import read_chunks, read_sentences
from loracast.library.library import Library
from loracast.library.remote import pull_adapter, push_adapter


def links(library: Path) -> dict[str, int]:
    """How many adapters have each static LoRA of a library as one file with the library."""
    return {path.name: path.stat().st_nlink - 1 for path in library.glob("static/*")}


def statics(library: Path) -> list[Path]:
    return sorted(library.glob("objects/*/*/static.safetensors"))


def write_some(library: Path | Library, **changes) -> list[Adapter]:
    return [write(library, seed=i, name=f"doc-{i}", shared=STATIC_ROWS, **changes) for i in range(3)]


def test_adapters_share_one_file_which_goes_with_the_last_of_them(tmp_path):
    library = Library(tmp_path)
    made = write_some(library)
    sha256 = made[0].manifest.static_sha256
    assert links(tmp_path) == {sha256: 3} and file_sha256(tmp_path / "static" / sha256) == sha256
    assert [one.faults() for one in made] == [[], [], []] and library.verify() == []
    assert made[0].n_bytes < sum(path.stat().st_size for path in made[0].folder.iterdir())
    other = write(library, name="other", shared={name: 2 * rows for name, rows in STATIC_ROWS.items()})
    assert links(tmp_path) == {sha256: 3, other.manifest.static_sha256: 1}
    library.remove("other")
    library.remove("doc-0")
    assert links(tmp_path) == {sha256: 2}
    write(library, seed=5, name="doc-1", replace=True)  # without a static LoRA
    assert links(tmp_path) == {sha256: 2}
    library.collect_garbage(keep=1)
    assert links(tmp_path) == {sha256: 1}
    library.remove("doc-2")
    assert not (tmp_path / "static").exists() and library.verify() == []


@pytest.mark.parametrize("failure", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP])
def test_without_hard_links_each_adapter_has_a_file_of_its_own(failure, tmp_path, monkeypatch):
    """FAT and some network drives have none, two file systems share none, and a file may have all that it can have."""

    def refuse(*_):
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(os, "link", refuse)
    library = Library(tmp_path)
    made = write_some(library)
    assert links(tmp_path) == {} and [path.stat().st_nlink for path in statics(tmp_path)] == [1, 1, 1]
    assert library.verify() == [] and [one.faults() for one in made] == [[], [], []]
    library.recover()
    library.collect_garbage()
    assert {path.name for path in tmp_path.iterdir()} == {"objects", "register.sqlite"}
    monkeypatch.undo()  # the library moves to another drive
    write(library, seed=9, name="young", shared=STATIC_ROWS)
    assert links(tmp_path) == {made[0].manifest.static_sha256: 1} and library.verify() == []


def test_an_open_file_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    """Windows replaces no file that somebody has open."""
    real = os.replace

    def refuse(source, target):
        if Path(source).parent.name.startswith(".loracast-link"):
            raise PermissionError(errno.EACCES, "it is used by another process")
        real(source, target)

    library = Library(tmp_path)
    write(library, name="first", shared=STATIC_ROWS)
    monkeypatch.setattr(os, "replace", refuse)
    assert write(library, seed=1, name="second", shared=STATIC_ROWS).faults() == []
    assert list(links(tmp_path).values()) == [1] and library.verify() == [] and len(statics(tmp_path)) == 2
    assert not list(tmp_path.glob(".loracast-*"))


def test_a_damaged_file_is_told_and_gives_way_to_a_good_one(tmp_path):
    library = Library(tmp_path)
    made = write(library, name="first", shared=STATIC_ROWS)
    shared = tmp_path / "static" / made.manifest.static_sha256
    shared.write_bytes(b"0" * 100)  # which is the adapter's own as well
    (problem,) = library.verify()
    assert "static.safetensors is damaged" in problem
    assert write(library, seed=1, name="second", shared=STATIC_ROWS).faults() == []
    assert file_sha256(shared) == made.manifest.static_sha256 and len(library.verify()) == 1


def test_a_folder_without_its_static_lora_is_refused_in_one_sentence(tmp_path):
    made = write(tmp_path / "library", shared=STATIC_ROWS)
    copied = tmp_path / "copied"
    shutil.copytree(made.folder, copied)
    assert Adapter(copied).faults() == []  # a copy has it
    (copied / "static.safetensors").unlink()
    sentence = f"static.safetensors is missing (its library keeps it as static/{made.manifest.static_sha256})"
    assert Adapter(copied).faults() == [sentence] == Adapter(copied).problems()
    with pytest.raises(AdapterError) as caught:
        Adapter(copied).lora()
    assert sentence in str(caught.value)
    with pytest.raises(AdapterError) as caught:
        pull_adapter(Library(tmp_path / "other"), str(copied))
    assert sentence in str(caught.value)
    with pytest.raises(AdapterError) as caught:
        push_adapter(Adapter(copied), str(tmp_path / "pushed"))
    assert sentence in str(caught.value)


def test_what_leaves_a_library_carries_it(tmp_path):
    made = write_some(tmp_path / "library")
    push_adapter(made[0], str(tmp_path / "pushed"))
    pulled = pull_adapter(Library(tmp_path / "other"), str(tmp_path / "pushed"))
    assert pulled.manifest.version == made[0].manifest.version and list(links(tmp_path / "other").values()) == [1]

    library = Library(tmp_path / "library")
    library.use_store(str(tmp_path / "store"))
    library.evict()
    assert not (tmp_path / "library" / "static").exists() and library.verify() == []
    for i in range(3):
        assert library.open(f"doc-{i}").faults() == []
    assert list(links(tmp_path / "library").values()) == [3]

    taken = Library(tmp_path / "taken")
    assert taken.use_store(str(tmp_path / "store"), take_over=True) == 3
    assert taken.names() == ["doc-0", "doc-1", "doc-2"] and list(links(tmp_path / "taken").values()) == [3]


def test_a_register_that_is_lost_is_made_again_with_it(tmp_path):
    made = write_some(tmp_path)
    (tmp_path / "register.sqlite").unlink()
    shutil.rmtree(tmp_path / "static")  # its adapters have the file too
    library = Library(tmp_path)
    assert library.names() == ["doc-0", "doc-1", "doc-2"] and library.verify() == []
    assert library.open("doc-1").lora().rank == made[1].lora().rank
    assert {path.stat().st_nlink for path in statics(tmp_path)} == {3}
    write(library, seed=9, name="young", shared=STATIC_ROWS)
    shutil.copytree(made[0].folder, tmp_path.with_name("by-hand"))
    library.remove("doc-0")
    shutil.move(tmp_path.with_name("by-hand"), tmp_path / "by-hand")  # put into the library by hand
    assert Library(tmp_path).names() == ["doc-0", "doc-1", "doc-2", "young"] and library.verify() == []


def test_machines_that_share_a_store_share_it_too(tmp_path):
    one, two = (Library(tmp_path / name) for name in ("one", "two"))
    write_some(one)
    for library in (one, two):
        library.share(str(tmp_path / "store"))
    assert [two.open(name).faults() for name in two.names()] == [[], [], []]
    assert list(links(two.folder).values()) == [3]
    sizes = [{entry.name: entry.n_bytes for entry in library.entries()[0]} for library in (one, two)]
    assert sizes[0] == sizes[1]
    two.evict()
    assert not (two.folder / "static").exists() and two.verify() == [] == one.verify()


@pytest.mark.parametrize("older", [3, 4])
@pytest.mark.parametrize("storage", ["bf16", "int8", "int4"])
def test_older_adapters_become_format_5_with_the_same_numbers(older, storage, tmp_path):
    library = Library(tmp_path)
    made = write(library, shared=STATIC_ROWS, storage=storage, format=older)
    assert made.faults() == [] and not (tmp_path / "static").exists() and made.manifest.format == older
    young = compact(library, "doc", storage)
    assert young.faults() == [] and young.manifest.format == 5 and young.manifest.merging == made.manifest.merging
    assert library.find("doc").version == young.manifest.version != made.manifest.version
    for chunks in ([0], None):
        before, after = (one.lora(chunks, static=older == 4) for one in (made, young))
        assert all(torch.equal(before.delta(name), after.delta(name)) for name in before.names)
    fresh = write(library, seed=9, name="fresh", shared=STATIC_ROWS, storage=storage)
    assert list(links(tmp_path).values()) == [2] and fresh.manifest.static_sha256 == young.manifest.static_sha256
    assert library.open(f"doc@{made.manifest.version}").manifest.format == older  # a pinned version stays as it is
    with pytest.raises(AdapterError, match=f"is kept as {storage} already"):
        compact(library, "doc", storage)


# ---- what later versions may add


def with_additions(folder: Path) -> None:
    """A reader's vectors, rows of some modules, codes of values, and columns of units."""
    tensors = load_file(folder / "factors.safetensors")
    n, rank = len(tensors["q_proj.a"]), tensors["q_proj.a"].shape[2]
    tensors["reader.3f9a.vectors"] = torch.randint(-127, 128, (n, 4, 16)).to(torch.int8)
    tensors["reader.3f9a.vectors.scale"] = torch.rand(n, 4, 1).bfloat16()
    tensors["q_proj.module"] = torch.zeros(n, rank, dtype=torch.int16)
    tensors["q_proj.code"] = torch.full((n, rank), -1, dtype=torch.int16)
    save_file(tensors, folder / "factors.safetensors")
    with closing(sqlite3.connect(folder / "chunks.sqlite")) as database, database:
        for column in ("kind TEXT", "heading INTEGER", "speaker TEXT", "time TEXT"):
            database.execute(f"ALTER TABLE sentence_places ADD COLUMN {column}")
        database.execute("UPDATE sentence_places SET kind = 'message', speaker = 'Ada', time = '2026-12-02T10:00:00'")


def with_hashes(adapter: Adapter) -> Adapter:
    hashes = {"factors_sha256": "factors.safetensors", "chunks_sha256": "chunks.sqlite"}
    changes = {key: file_sha256(adapter.folder / name) for key, name in hashes.items()}
    replace(adapter.manifest, **changes).write(adapter.folder / "adapter.json")
    return Adapter(adapter.folder)


def test_what_later_versions_add_opens_and_is_kept(tmp_path):
    chunks = [Chunk(f"Ada spoke of the lamp {i}. Then she went on.", 0, 42, "", 5) for i in range(3)]
    plain = write(tmp_path / "made", shared=STATIC_ROWS, chunks=chunks)
    expected = plain.lora()
    with_additions(plain.folder)
    added = with_hashes(plain)
    assert added.faults() == [] and len(added.optional) == 4 and len(read_sentences(added.index)) >= 3
    assert all(torch.equal(added.lora().delta(name), expected.delta(name)) for name in expected.names)

    push_adapter(added, str(tmp_path / "pushed"))
    library = Library(tmp_path / "library")
    pulled = pull_adapter(library, str(tmp_path / "pushed"))
    small = compact(library, "doc", "int8")
    for adapter in (pulled, small):
        assert adapter.faults() == [] and len(read_chunks(adapter.index)) == 3
        before, after = (load_file(one.folder / "factors.safetensors") for one in (added, adapter))
        assert all(torch.equal(before[name], after[name]) for name in added.optional)
        with closing(sqlite3.connect(adapter.index)) as database:
            query = "SELECT DISTINCT kind, heading, speaker, time FROM sentence_places"
            assert database.execute(query).fetchall() == [("message", None, "Ada", "2026-12-02T10:00:00")]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("readers.vectors", torch.zeros(3, 2, dtype=torch.int8)),
        ("reader.vectors", torch.zeros(2, 2, dtype=torch.int8)),
        ("reader.vectors", torch.zeros(3, 2)),
        ("q_proj.module", torch.zeros(3, 3, dtype=torch.int16)),
        ("q_proj.code", torch.zeros(3, 2, dtype=torch.int8)),
        ("up_proj.code", torch.zeros(3, 2, dtype=torch.int16)),
        ("q_proj.modules", torch.zeros(3, 2, dtype=torch.int16)),
    ],
)
def test_whatever_else_is_unknown_is_refused(name, tensor, tmp_path):
    adapter = write(tmp_path)
    save_file(
        load_file(adapter.folder / "factors.safetensors") | {name: tensor}, adapter.folder / "factors.safetensors"
    )
    assert f"{name} is unknown" in with_hashes(adapter).faults()


def test_formats_before_5_hold_nothing_that_is_unknown(tmp_path):
    adapter = write(tmp_path, format=4)
    more = {"q_proj.code": torch.zeros(3, 2, dtype=torch.int16)}
    save_file(load_file(adapter.folder / "factors.safetensors") | more, adapter.folder / "factors.safetensors")
    assert with_hashes(adapter).faults() == ["q_proj.code is unknown"]


# ---- machines of an older version


def test_an_older_machine_stops_at_the_names_of_a_newer_one(tmp_path):
    """Up to format 4 it read `versions`, left out what it could not read, and wrote the name without that."""
    library, store = Library(tmp_path / "one"), tmp_path / "store"
    write(library, shared=STATIC_ROWS)
    library.share(str(store))
    states = sorted(path.relative_to(store / "names").as_posix() for path in store.glob("names/*/*.json"))
    assert states == ["0-this-loracast-is-too-old-update-it/00000001.json", "doc/00000001.json"]
    assert not any("versions" in json.loads((store / "names" / state).read_text()) for state in states)
    assert library.names() == ["doc"] and library.verify() == []
    library.collect_garbage()
    assert len(list(store.glob("names/0-*/*.json"))) == 1


def test_names_that_an_older_machine_wrote_are_read(tmp_path):
    one, two = (Library(tmp_path / name) for name in ("one", "two"))
    made = write(one, shared=STATIC_ROWS, format=4)
    one.share(str(tmp_path / "store"))
    state = tmp_path / "store" / "names" / "doc" / "00000001.json"
    stored = json.loads(state.read_text())
    state.write_text(json.dumps({**stored, "format": 1, "versions": stored.pop("history")}))
    two.share(str(tmp_path / "store"))
    assert two.open("doc").faults() == [] and two.find("doc").version == made.manifest.version
    two.describe("doc", note="an old one")
    one.refresh(["doc"])
    assert one.find("doc").note == "an old one"
