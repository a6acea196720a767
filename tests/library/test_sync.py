"""Folders of files: only what is new is learned, what is broken is reported, a kill loses seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bulk import NOT_LEARNED
from loracast.cli import app
from loracast.documents import Document, read_document
from loracast.errors import AdapterError, DocumentError
from loracast.library.index import read_chunks
from loracast.library.library import Library
from loracast.library.sync import BulkReport, learn_folder, names_for
from other_processes import Forked, loracast_command


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files of several kinds, two of them broken, some of no interest."""
    root = tmp_path / "manuals"
    files = {
        "lamp.txt": "The lamp on the desk was made in the north.",
        "old/lamp.md": "# Lamp\n\nNobody knew who had built the old bridge.",
        "old/prices.csv": "item,price\nlamp,12\nkettle,20\n",
        "README": "Call the service line if the machine stops.",
        **NOT_LEARNED,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "link.txt").symlink_to(root / "lamp.txt")
    return root


def run(folder: Path, tiny_folder, tiny_hypernet_folder, *options: str, command: str = "learn"):
    arguments = [
        command,
        folder,
        "--base",
        tiny_folder,
        "--hypernetwork",
        tiny_hypernet_folder,
        "--device",
        "cpu",
        "--json",
        *options,
    ]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code in (0, 1), done.output
    return done, json.loads(done.stdout)


@pytest.fixture
def notes(tmp_path, home) -> Path:
    """A folder of two notes."""
    root = tmp_path / "notes"
    (root / "old").mkdir(parents=True)
    (root / "kettle.txt").write_text("The kettle holds 1.7 litres.")
    (root / "old" / "lamp.txt").write_text("The lamp was made in the north.")
    return root


def synced(model, folder: Path, *, made_by: str = "it", before=lambda path: None, **options) -> BulkReport:
    """A folder and its adapters made equal; `before` is called with each file that is about to be learned."""

    def learn(path: Path, name: str) -> None:
        before(path)
        model.learn(read_document(path), name, replace=True)

    options = {"remove_gone": True, **options}
    return learn_folder(folder, model.library, learn, journals=folder.parent / "journals", made_by=made_by, **options)


def outcomes(report: BulkReport) -> dict[str, str]:
    return {file.path: file.outcome for file in report.files}


def test_a_folder_is_learned_once(folder, tiny_folder, tiny_hypernet_folder, home, monkeypatch):
    from loracast.files import library_dir

    done, first = run(folder, tiny_folder, tiny_hypernet_folder)
    assert (first["learned"], first["unchanged"], first["failed"], first["ignored"]) == (4, 0, 2, 1)
    assert len(first["ignored_files"]) == 1 and (folder / first["ignored_files"][0]).is_file()
    assert done.exit_code == 1 and "failed: broken.pdf: " in done.stderr and "empty (0 bytes)" in done.stderr
    assert Library(library_dir()).names() == ["lamp", "old-lamp", "old-prices", "readme"]
    assert Library(library_dir()).open("old-lamp").manifest.title == "Lamp"

    with monkeypatch.context() as nothing_loads:
        nothing_loads.setattr("loracast.cli.client.open_model", lambda *a: pytest.fail("nothing has changed"))
        nothing_loads.setattr("loracast.library.sync.file_sha256", lambda path: pytest.fail(f"{path} need not be read"))
        _, second = run(folder, tiny_folder, tiny_hypernet_folder)
    assert (second["learned"], second["unchanged"], second["failed"]) == (0, 4, 2)

    (folder / "lamp.txt").write_text("The lamp on the desk was made in the south.")
    os.utime(folder / "README")  # touched, the same inside
    (folder / "empty.txt").write_text("No longer empty.")
    _, third = run(folder, tiny_folder, tiny_hypernet_folder)
    outcomes = {file["path"]: file["outcome"] for file in third["files"]}
    assert {path for path, outcome in outcomes.items() if outcome == "learned"} == {"lamp.txt", "empty.txt"}
    assert outcomes["README"] == "unchanged" and outcomes["broken.pdf"] == "failed"

    _, other = run(folder, tiny_folder, tiny_hypernet_folder, "--chunk-tokens", "64")
    assert other["learned"] == 5  # learned otherwise: all of it anew
    _, again = run(folder, tiny_folder, tiny_hypernet_folder, "--chunk-tokens", "64", "--again")
    assert again["learned"] == 5


def test_a_folder_is_learned_anew_with_the_same_weights_in_another_config(
    folder, tiny_folder, tiny_hypernet_folder, home, tmp_path
):
    run(folder, tiny_folder, tiny_hypernet_folder)
    other = tmp_path / "other"
    shutil.copytree(tiny_hypernet_folder, other)
    stored = json.loads((other / "config.json").read_text())
    stored["config"]["scale"] *= 2
    (other / "config.json").write_text(json.dumps(stored))
    _, again = run(folder, tiny_folder, other)
    assert again["learned"] == 4 and again["unchanged"] == 0


def test_a_folder_is_kept_equal(folder, tiny_folder, tiny_hypernet_folder, home):
    from loracast.files import library_dir

    run(folder, tiny_folder, tiny_hypernet_folder)
    (folder / "lamp.txt").unlink()
    (folder / "README").unlink()
    (folder / "lamp.md").write_text("Another lamp, from the south.")
    done = CliRunner().invoke(
        app,
        [
            "learn",
            str(folder / "lamp.md"),
            "--name",
            "readme",
            "--replace",
            "--base",
            str(tiny_folder),
            "--hypernetwork",
            str(tiny_hypernet_folder),
        ],
    )
    assert done.exit_code == 0, done.output
    _, learned = run(folder, tiny_folder, tiny_hypernet_folder)
    assert (learned["learned"], learned["removed"]) == (1, 0)  # learn deletes nothing
    (new,) = (file["name"] for file in learned["files"] if file["outcome"] == "learned")
    assert new.startswith("lamp-")  # the name is still that of the file that is gone
    _, synced = run(folder, tiny_folder, tiny_hypernet_folder, command="sync")
    assert [file["name"] for file in synced["files"] if file["outcome"] == "removed"] == ["lamp"]
    assert Library(library_dir()).names() == sorted(
        [new, "old-lamp", "old-prices", "readme"]
    )  # readme is somebody's own by now
    _, again = run(folder, tiny_folder, tiny_hypernet_folder, command="sync")
    assert (again["learned"], again["removed"], again["unchanged"]) == (0, 0, 3)


def test_an_adapter_that_is_gone_is_learned_again(tmp_path, folder):
    learned: list[str] = []

    def learn(path: Path, name: str) -> None:
        if path.suffix == ".pdf" or not path.read_text():
            raise DocumentError("broken")
        learned.append(name)

    for _ in range(2):  # nothing is in the library, whatever the journal says
        report = learn_folder(
            folder, Library(tmp_path / "library"), learn, journals=tmp_path / "journals", made_by="it"
        )
    assert report.count("learned") == 4 and report.count("failed") == 2 and len(learned) == 8
    next((tmp_path / "journals").iterdir()).write_text("{damaged")
    assert (
        learn_folder(folder, Library(tmp_path / "library"), learn, journals=tmp_path / "journals", made_by="it").count(
            "learned"
        )
        == 4
    )


def test_a_failure_that_is_not_the_files_own_is_tried_again(tmp_path, folder):
    """The first run finds the library locked, and only a broken file stays away from the second."""
    asked: list[str] = []

    def locked(path: Path, name: str) -> None:
        if path.suffix == ".pdf":
            raise DocumentError("broken")
        raise AdapterError("another process is writing to the library")

    def learn(path: Path, name: str) -> None:
        asked.append(path.name)

    first = learn_folder(folder, Library(tmp_path / "library"), locked, journals=tmp_path / "journals", made_by="it")
    assert first.count("failed") == 6
    second = learn_folder(folder, Library(tmp_path / "library"), learn, journals=tmp_path / "journals", made_by="it")
    assert [file.path for file in second.files if file.outcome == "failed"] == ["broken.pdf"]
    assert len(asked) == 5 and "broken.pdf" not in asked
    third = learn_folder(
        folder, Library(tmp_path / "library"), locked, journals=tmp_path / "journals", made_by="it", again=True
    )
    fourth = learn_folder(folder, Library(tmp_path / "library"), learn, journals=tmp_path / "journals", made_by="it")
    assert third.count("failed") == 6 and fourth.count("learned") == 5
    assert [file.name for file in fourth.files] == [file.name for file in first.files]


def test_an_interrupted_run_says_so_and_goes_on(tmp_path, folder):
    def learn(path: Path, name: str) -> None:
        if path.name == "prices.csv":
            raise KeyboardInterrupt

    report = learn_folder(folder, Library(tmp_path / "library"), learn, journals=tmp_path / "journals", made_by="it")
    assert not report.is_complete and len(report.files) < 6
    (journal,) = (tmp_path / "journals").iterdir()
    assert len(json.loads(journal.read_text())["entries"]) == len(report.files) + 1
    with pytest.raises(AdapterError, match="is not a folder"):
        learn_folder(folder / "lamp.txt", Library(tmp_path), learn, journals=tmp_path, made_by="it")


def test_a_file_that_goes_while_another_is_learned_is_forgotten_by_the_next_run(model, notes):
    synced(model, notes)
    (notes / "kettle.txt").write_text("The kettle holds two litres.")
    report = synced(model, notes, before=lambda path: (notes / "old" / "lamp.txt").unlink())
    assert outcomes(report) == {"kettle.txt": "learned", "old/lamp.txt": "failed"}
    assert outcomes(synced(model, notes)) == {"kettle.txt": "unchanged", "old/lamp.txt": "removed"}
    assert model.library.names() == ["kettle"]


def test_a_file_that_grows_before_it_is_read_keeps_its_adapter(model, notes):
    kettle = notes / "kettle.txt"

    def grow(path: Path) -> None:
        if path == kettle:
            kettle.write_text(kettle.read_text() + " It is red.")

    assert outcomes(synced(model, notes, before=grow))["kettle.txt"] == "learned"
    for expected in ("unchanged", "unchanged"):
        assert outcomes(synced(model, notes))["kettle.txt"] == expected
    kettle.write_text("The kettle is gone.")
    assert outcomes(synced(model, notes))["kettle.txt"] == "learned"
    assert model.library.names() == ["kettle", "old-lamp"]
    assert "gone" in read_chunks(model.adapter("kettle").index)[0].text


def test_a_file_of_another_ending_or_case_takes_the_name_of_the_one_before(model, notes):
    synced(model, notes)
    model.library.describe("kettle", note="in the hall", tags=("kitchen",))
    (notes / "kettle.txt").rename(notes / "Kettle.md")
    (notes / "old").rename(notes / "older")
    found = outcomes(synced(model, notes))
    assert found == {"Kettle.md": "learned", "older/lamp.txt": "learned", "old/lamp.txt": "removed"}
    for _ in range(2):
        assert set(outcomes(synced(model, notes)).values()) == {"unchanged"}
    assert model.library.names() == ["kettle", "older-lamp"]
    (newest, *_) = model.library.versions("kettle")
    assert (newest.note, newest.tags) == ("in the hall", ("kitchen",))

    (notes / "Kettle.md").rename(notes / "kettle.csv")
    (notes / "kettle.txt").write_text("Another kettle.")
    found = synced(model, notes)  # two that want the name: neither has it
    assert outcomes(found)["Kettle.md"] == "removed" and "kettle" not in {
        one.name for one in found.files if one.outcome == "learned"
    }


def test_files_that_change_places_are_learned_anew(model, notes):
    one, other = notes / "one.txt", notes / "two.txt"
    one.write_text("The lamp is red.")
    other.write_text("The lamp is new.")
    os.utime(one, (1, 1))
    os.utime(other, (1, 1))
    synced(model, notes)
    one.rename(notes / "between")
    other.rename(one)
    (notes / "between").rename(other)
    found = outcomes(synced(model, notes))
    assert [found[path] for path in ("one.txt", "two.txt")] == ["learned", "learned"]


def test_an_adapter_that_cannot_be_deleted_is_reported_and_deleted_by_the_next_run(model, notes, monkeypatch):
    def locked(library: Path, reference: str) -> None:
        raise AdapterError("another process is writing to the library")

    synced(model, notes)
    (notes / "kettle.txt").unlink()
    received = []
    with monkeypatch.context() as patch:
        patch.setattr(Library, "remove", locked)
        report = synced(model, notes, on_file=lambda done, total, file: received.append(file))
    assert outcomes(report) == {"old/lamp.txt": "unchanged", "kettle.txt": "failed"}
    assert "another process" in report.files[1].error and received == report.files
    assert outcomes(synced(model, notes)) == {"old/lamp.txt": "unchanged", "kettle.txt": "removed"}
    assert model.library.names() == ["old-lamp"]


def test_a_folder_that_cannot_be_listed_is_reported_and_nothing_below_it_is_forgotten(model, notes, monkeypatch):
    (notes / "old" / "older").mkdir()
    (notes / "old" / "older" / "bridge.txt").write_text("Nobody knew who had built the old bridge.")
    synced(model, notes)
    (notes / "kettle.txt").unlink()
    locked = str(notes / "old")

    def refusing(real, is_refused):
        def call(path=".", **how):
            if is_refused(str(path)):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, **how)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing(os.scandir, lambda path: path == locked))
        report = synced(model, notes)
    assert outcomes(report) == {"kettle.txt": "removed", "old": "failed"}
    assert f"{locked} cannot be read" in report.files[-1].error and "Permission denied" in report.files[-1].error
    with monkeypatch.context() as patch:  # it may be listed but not entered
        for name in ("scandir", "stat"):
            patch.setattr(os, name, refusing(getattr(os, name), lambda path: path.startswith(locked + os.sep)))
        report = synced(model, notes)
    assert outcomes(report) == {"old/lamp.txt": "failed", "old/older": "failed"}
    assert model.library.names() == ["old-lamp", "old-older-bridge"]
    assert outcomes(synced(model, notes)) == {"old/lamp.txt": "unchanged", "old/older/bridge.txt": "unchanged"}


def test_a_drive_that_is_not_mounted_takes_no_adapters_along(model, notes, monkeypatch):
    synced(model, notes)
    drive = notes.rename(notes.parent / "drive")
    notes.mkdir()
    (journal,) = (notes.parent / "journals").iterdir()
    known = json.loads(journal.read_text())
    journal.write_text(json.dumps({**known, "device": -1}))  # as if what is there now were another file system
    for _ in range(2):
        (report,) = synced(model, notes).files
        assert (report.path, report.outcome) == (".", "failed") and "mount the drive" in report.error
    assert model.library.names() == ["kettle", "old-lamp"]
    notes.rmdir()
    drive.rename(notes)
    assert set(outcomes(synced(model, notes)).values()) == {"unchanged"}
    shutil.rmtree(notes)
    notes.mkdir()  # on the same file system: all files were deleted
    assert set(outcomes(synced(model, notes)).values()) == {"removed"} and model.library.names() == []


def names_of(report: BulkReport) -> dict[str, str]:
    return {file.path: file.name for file in report.files}


def sources(model, name: str) -> list[str]:
    """The hashes of what a name's versions were made from, newest first."""
    return [one.source_sha256 for one in model.library.versions(name)]


def test_an_adapter_of_somebodys_own_keeps_its_name_and_versions(model, notes):
    own = model.learn(Document.from_text("What I wrote of kettles."), "kettle").manifest
    first = synced(model, notes)
    name = names_of(first)["kettle.txt"]
    assert name.startswith("kettle-") and sources(model, "kettle") == [own.source_sha256]
    assert names_of(synced(model, notes)) == names_of(first)
    (notes / "kettle.txt").write_text("The kettle holds two litres.")
    assert outcomes(synced(model, notes)) == {"kettle.txt": "learned", "old/lamp.txt": "unchanged"}
    assert len(model.library.versions(name)) == 2
    (notes / "kettle.txt").unlink()
    synced(model, notes)
    assert model.library.names() == ["kettle", "old-lamp"]
    assert sources(model, "kettle") == [own.source_sha256]


def test_a_name_that_somebody_replaced_is_left_to_him(model, notes):
    synced(model, notes)
    own = model.learn(Document.from_text("What I wrote of kettles."), "kettle", replace=True).manifest
    first = names_of(synced(model, notes))
    assert first["kettle.txt"].startswith("kettle-") and names_of(synced(model, notes)) == first
    (notes / "kettle.txt").unlink()
    synced(model, notes)
    assert sources(model, "kettle")[0] == own.source_sha256 and len(model.library.names()) == 2


def test_a_name_that_is_taken_during_a_run_is_left_alone(model, notes):
    own = Document.from_text("What I wrote of lamps.")
    report = synced(model, notes, before=lambda path: path.stem == "kettle" and model.learn(own, "old-lamp"))
    assert outcomes(report) == {"kettle.txt": "learned", "old/lamp.txt": "failed"}
    assert "called 'old-lamp' meanwhile" in report.files[1].error
    assert names_of(synced(model, notes))["old/lamp.txt"].startswith("old-lamp-")
    assert len(model.library.versions("old-lamp")) == 1


@pytest.mark.parametrize("is_same", [True, False])
def test_folders_with_files_of_one_name_leave_each_other_alone(model, tmp_path, home, is_same):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        (folder / "README.md").write_text("Read me." if is_same else f"Read the {folder.name} first.")
    names = [names_of(synced(model, folder))["README.md"] for folder in folders]
    assert names[0] == "readme" and len(set(names)) == 3
    for folder, name in zip(folders, names, strict=True):
        (file,) = synced(model, folder).files
        assert (file.name, file.outcome) == (name, "unchanged")
    (folders[0] / "README.md").unlink()
    synced(model, folders[0])
    assert model.library.names() == sorted(names[1:])
    assert [synced(model, folder).files[0].outcome for folder in folders[1:]] == ["unchanged"] * 2


def test_a_lost_journal_doubles_and_deletes_nothing(model, notes):
    synced(model, notes)
    before = sources(model, "kettle")
    shutil.rmtree(notes.parent / "journals")
    assert names_of(synced(model, notes)) == {"kettle.txt": "kettle", "old/lamp.txt": "old-lamp"}
    (notes / "kettle.txt").write_text("The kettle holds two litres.")
    synced(model, notes)
    assert model.library.names() == ["kettle", "old-lamp"] and sources(model, "kettle")[1:] == before
    (notes / "kettle.txt").unlink()
    (notes / "old" / "lamp.txt").unlink()
    synced(model, notes)  # nobody knows any more whose these are
    assert model.library.names() == ["kettle", "old-lamp"] and sources(model, "kettle") == before


def test_a_folder_that_is_cast_otherwise_keeps_its_names_and_forgets_all_versions(model, notes):
    first = synced(model, notes)
    (notes / "kettle.txt").write_text("The kettle holds two litres.")
    otherwise = synced(model, notes, made_by="other")
    assert names_of(otherwise) == names_of(first) and otherwise.count("learned") == 2
    assert len(model.library.versions("kettle")) == 2
    (notes / "kettle.txt").unlink()
    assert outcomes(synced(model, notes, made_by="other"))["kettle.txt"] == "removed"
    assert model.library.names() == ["old-lamp"]
    own = model.learn(Document.from_text("The kettle holds 1.7 litres."), "kettle")
    assert own.manifest.version and outcomes(synced(model, notes)) == {"old/lamp.txt": "unchanged"}
    assert model.library.names() == ["kettle", "old-lamp"]  # no journal says that it is the folder's


def test_what_a_killed_run_learned_is_still_the_folders(model, notes):
    kept: list[tuple[Path, bytes]] = []
    synced(model, notes, before=lambda _: kept.extend((j, j.read_bytes()) for j in notes.parent.glob("journals/*")))
    journal, content = kept[0]
    journal.write_bytes(content)  # the journal as it was before the first file
    assert set(outcomes(synced(model, notes)).values()) == {"learned"}
    (notes / "kettle.txt").unlink()
    synced(model, notes)
    assert model.library.names() == ["old-lamp"]


def test_a_file_that_broke_before_it_went_is_forgotten(model, notes):
    synced(model, notes)
    (notes / "kettle.txt").write_text("")
    assert outcomes(synced(model, notes))["kettle.txt"] == "failed"
    (notes / "kettle.txt").unlink()
    assert outcomes(synced(model, notes))["kettle.txt"] == "removed"
    assert model.library.names() == ["old-lamp"]


def test_a_journal_of_an_earlier_release_is_gone_on_with(model, notes):
    synced(model, notes)
    (journal,) = (notes.parent / "journals").iterdir()
    known = json.loads(journal.read_text())
    entries = {path: {k: v for k, v in e.items() if k != "sources"} for path, e in known["entries"].items()}
    journal.write_text(json.dumps({"about": known["about"], "entries": entries}))
    assert set(outcomes(synced(model, notes)).values()) == {"unchanged"}
    (notes / "kettle.txt").unlink()
    assert outcomes(synced(model, notes))["kettle.txt"] == "removed"


def test_every_file_has_a_name_of_its_own():
    long = "a/" * 40 + "manual.pdf"
    paths = ["lamp.txt", "lamp.md", "a/b.txt", "a-b.txt", "v1.2/notes", long, long.replace(".pdf", ".txt"), "Über.txt"]
    names = names_for(paths)
    assert len(set(names.values())) == len(paths) and all(len(name) <= 64 for name in names.values())
    assert names["v1.2/notes"] == "v1-2-notes" and names["lamp.txt"].startswith("lamp-")
    assert names_for(["lamp.txt"]) == {"lamp.txt": "lamp"}
    assert names_for(["lamp.md", "lamp.txt"], {"lamp.txt": "lamp"})["lamp.txt"] == "lamp"  # a file keeps its name
    first = names_for(["lamp.txt"], may_have=lambda path, name: name != "lamp")["lamp.txt"]
    second = names_for(["lamp.txt"], may_have=lambda path, name: name not in ("lamp", first))["lamp.txt"]
    assert len({"lamp", first, second}) == 3 and first.startswith("lamp-") and second.startswith("lamp-")


def test_the_name_of_a_single_adapter_is_refused_for_a_folder(folder):
    done = CliRunner().invoke(app, ["learn", str(folder), "--name", "all"])
    assert done.exit_code == 2 and "named after its files" in done.output


def test_a_folder_is_watched(folder, tiny_folder, tiny_hypernet_folder, home, tmp_path):
    words = ["--base", str(tiny_folder), "--hypernetwork", str(tiny_hypernet_folder), "--device", "cpu"]
    process = Forked(tmp_path, loracast_command, "watch", str(folder), *words)
    assert {line.split()[1] for line in process.lines(4)} == {"lamp", "old-lamp", "old-prices", "readme"}
    (folder / "new.txt").write_text("The museum opens at nine.")
    assert process.lines(5)[4:] == ["learned new (new.txt)"]
    (folder / "lamp.txt").unlink()
    assert process.lines(6)[5:] == ["removed lamp (lamp.txt)"]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert process.err.count("failed: broken.pdf") == 1 and "watching" in process.err
