"""The frozen test: its files are those that were frozen, and a release has one look at them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("frozen", ROOT / "benchmarks" / "frozen.py")
assert _spec is not None and _spec.loader is not None
frozen = importlib.util.module_from_spec(_spec)
sys.modules["frozen"] = frozen
_spec.loader.exec_module(frozen)


@pytest.mark.parametrize("name", frozen.SETS)
def test_files_are_the_frozen_ones_and_well_formed(name):
    for row in frozen.rows_of(name):
        assert row["origin"] and row["licence"] and row["format"] in {"txt", "md", "html", "csv", "tsv"}
        for question in row["questions"]:
            assert (question["kind"] == "unanswerable") == (not question["answers"]) == (not question["evidence"])
            assert not question["evidence"] or row["document"].count(question["evidence"]) == 1, question


def test_a_file_that_was_changed_is_refused(monkeypatch, tmp_path):
    changed = tmp_path / "tables.jsonl"
    changed.write_bytes((frozen.FOLDER / "tables.jsonl").read_bytes() + b"\n")
    monkeypatch.setattr(frozen, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="is not the frozen one"):
        frozen.rows_of("tables")


def test_a_release_looks_once_at_each_test_and_as_often_as_it_likes_at_what_is_for_choosing(monkeypatch, tmp_path):
    monkeypatch.setattr(frozen, "LOOKS", tmp_path / "looks.md")
    frozen.LOOKS.write_text("| day | release | set | what |\n")
    frozen.note_look("manuals_dev", ("adapter",))
    frozen.check_looks(["manuals_dev", "everyday"])
    assert frozen.LOOKS.read_text().count("\n") == 1
    frozen.note_look("tables", ("adapter", "place"))
    assert frozen.LOOKS.read_text().count("\n") == 2 and "| tables | adapter, place |" in frozen.LOOKS.read_text()
    with pytest.raises(SystemExit, match="has looked at tables already"):
        frozen.check_looks(["everyday", "tables"])
    monkeypatch.setattr(frozen.loracast, "__version__", "99.0")
    frozen.check_looks(["tables"])


def test_a_tiny_model_is_asked_and_scored(monkeypatch, tmp_path, base):
    from loracast.answering.model import Model
    from tiny import make_hypernet

    rows = [{"doc_id": f"d{i}", "format": "csv", "document": "Name,Room\nAda,B2\nBo,C3\n", "questions": [
        {"question": "Which room is Ada in?", "answers": ["B2"], "kind": "value"},
        {"question": "What does Bo earn?", "answers": [], "kind": "unanswerable"}]} for i in range(2)]  # fmt: skip
    model = Model(base, tmp_path, make_hypernet(base))
    monkeypatch.setattr(frozen, "rows_of", lambda name: rows)
    monkeypatch.setattr(frozen.loracast, "load", lambda: model)
    monkeypatch.setattr(frozen, "LOOKS", tmp_path / "looks.md")
    frozen.LOOKS.write_text("")
    out = tmp_path / "out"
    frozen.main(["tables"], out=out, baselines="place,adapter,none")
    report = json.loads((out / "results.json").read_text())
    place = next(row for row in report["rows"] if row["baseline"] == "place")
    assert report["is_complete"] and place["n"] == 4 and place["documents"] == 2 and place["n_unsaid"] == 2
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and {line["answered_by"] for line in lines} <= {"adapter", "base", "refusal", "text"}
    said = [line for line in lines if line["baseline"] == "place" and line["answers"]]
    assert place["right_said"] == sum(line["right"] for line in said) / 2
