"""Folders that a server watches: new files are learned, those that are gone are forgotten, faults are reported."""

from __future__ import annotations

import pytest
import watchfiles

from loracast.serving import learning
from loracast.serving.learning import Watcher
from servers import eventually


@pytest.fixture
def folder(tmp_path, home):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "kettle.txt").write_text("The kettle holds 1.7 litres.")
    return folder


def test_files_come_and_go_while_it_watches(model, folder):
    watcher = Watcher(model, [folder])
    watcher.start()
    try:
        eventually(lambda: watcher.states[0].n_documents == 1)
        assert model.library.names() == ["kettle"]
        (folder / "lamp.txt").write_text("The lamp was made in the north.")
        eventually(lambda: model.library.names() == ["kettle", "lamp"])
        (folder / "kettle.txt").unlink()
        eventually(lambda: model.library.names() == ["lamp"])
        eventually(lambda: not watcher.states[0].is_learning)
        assert watcher.states[0].n_documents == 1
    finally:
        watcher.close()


def test_faults_are_reported_and_end_nothing(model, folder):
    (folder / "empty.txt").write_text("")
    gone = folder.parent / "gone"
    watcher = Watcher(model, [gone, folder])
    watcher.start()
    try:
        eventually(lambda: watcher.states[1].n_documents == 1)
        missing, notes = watcher.states
        assert missing.folder == "gone" and "not a folder" in missing.error
        assert [path for path, _ in notes.failed] == ["empty.txt"] and "empty" in notes.failed[0][1]
        assert str(folder.parent) not in repr(notes)
    finally:
        watcher.close()


def test_where_watching_fails_it_is_reported_and_folders_are_looked_at(model, folder, monkeypatch):
    def watch(*folders, ignore_permission_denied, **options):
        assert ignore_permission_denied  # a folder below, say, that only root may list
        raise OSError(f"OS file watch limit reached about {folders}")
        yield

    monkeypatch.setattr(watchfiles, "watch", watch)
    monkeypatch.setattr(learning, "_LOOK_EVERY_MS", 50)
    watcher = Watcher(model, [folder])
    watcher.start()
    try:
        eventually(lambda: watcher.states[0].error)
        assert "watch limit reached" in watcher.states[0].error and str(folder.parent) not in watcher.states[0].error
        (folder / "lamp.txt").write_text("The lamp was made in the north.")
        eventually(lambda: model.library.names() == ["kettle", "lamp"])
        eventually(lambda: watcher.states[0].n_documents == 2 and "watch limit reached" in watcher.states[0].error)
    finally:
        watcher.close()
    assert not watcher._thread.is_alive()


def test_nothing_is_watched_without_folders(model):
    watcher = Watcher(model, [])
    watcher.start()
    watcher.close()
    assert watcher.states == []
