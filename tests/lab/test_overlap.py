"""The decontamination report, against sets counted by hand and pairs counted in public tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from typer.testing import CliRunner

from loracast.cli import app
from loracast.documents.task_spec import Example
from loracast.errors import ConfigError
from loracast.lab.data.rows import read_rows
from loracast.lab.data.tasks import read_tasks
from loracast.lab.evaluation.overlap import Index, OverlapConfig, evaluate_overlap, words_of
from suites import DATA, write_rows, write_suite


def test_similarities_are_jaccard_indices():
    texts = ["The red lamp, the lamp", "a red lamp", "", "nothing else"]
    words = [{"the", "red", "lamp"}, {"a", "red", "lamp"}, set(), {"nothing", "else"}]
    for asked in ("Red LAMP!", "a red lamp", "", "new"):
        own = {word.strip("!").lower() for word in asked.split()}
        expected = [len(own & other) / max(1, len(own | other)) for other in words]
        np.testing.assert_allclose(Index(map(words_of, texts)).similarities(words_of(asked)), expected)


def test_what_is_the_same_and_what_is_nearly_so(tmp_path):
    held = [
        ("Seven green bottles stand on the wall.", "seven"),  # the same row, but for case and a mark
        ("seven green bottles stand on the wall", "7"),  # the same input
        ("seven green bottles stand on the tall wall", "tall"),  # nearly
        ("something else altogether", "x"),
    ]
    rows = [{"task": "h", "task_split": "heldout", "split": "test", "input": i, "output": o} for i, o in held]
    rows += [{"task": "t", "split": "train", "input": "seven green bottles stand on the wall", "output": "SEVEN"}]
    rows += [{"task": "u", "split": "test", "input": "who knows", "output": "x"}]
    write_rows(tmp_path / "tasks.jsonl", rows)
    described = [("h", "heldout", "Count the bottles."), ("t", "train", "Count bottles"), ("u", "train", "Guess.")]
    write_rows(
        tmp_path / "task_descriptions.jsonl", [{"task": t, "kind": k, "description": d} for t, k, d in described]
    )
    (row,) = evaluate_overlap(OverlapConfig(str(tmp_path)), tmp_path / "out").rows
    assert (row["n"], row["same"], row["same_input"], row["near_input"]) == (4, 0.25, 0.5, 0.75)
    assert (row["near_task"], row["description_task"]) == ("t", "t") and row["description"] == pytest.approx(2 / 3)


def test_the_command_and_its_refusals(tmp_path):
    suite = write_suite(tmp_path)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["eval", "overlap", "--tasks", str(suite), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert [row["task"] for row in json.loads(done.stdout)["rows"]] == ["first"]
    assert "held-out task" in (out / "table.md").read_text()
    suite.write_text(suite.read_text().replace("heldout", "train"))
    refused = CliRunner().invoke(app, ["eval", "overlap", "--tasks", str(suite), "--out", "x"])
    assert refused.exit_code != 0 and "needs held-out tasks" in refused.output


def test_documents_that_hold_a_held_out_paragraph(tmp_path):
    """Shingles counted by hand: a held-out text of 22 words has ten, and its first 14 words have two of them."""
    words = [f"word{i}" for i in range(22)]
    held_out = " ".join(words)
    texts = {
        "whole": f"Before it. {held_out.upper()}! And after it.",
        "two of ten": " ".join([*words[:14], "and", "then", "others"]),
        "one of ten": " ".join([*words[:13], "and", "then", "others"]),
        "in another order": " ".join(reversed(words)),
    }
    train = [{"document": text, "source": source, "questions": []} for source, text in texts.items()]
    write_rows(tmp_path / "train.jsonl", train)
    write_rows(tmp_path / "test.jsonl", [{"text": held_out}, {"document": "too short to be cut", "source": "short"}])
    files = {"documents": (str(tmp_path / "train.jsonl"),), "held_out": (str(tmp_path / "test.jsonl"),)}
    keep = tmp_path / "kept.jsonl.gz"
    report = evaluate_overlap(OverlapConfig(**files, keep=str(keep)), tmp_path / "out")
    *found, whole = report.rows
    assert [(row["source"], row["n_sharing"], row["n_shared"]) for row in found] == [
        ("two of ten", 1, 1),
        ("whole", 1, 1),
    ]
    assert (whole["n"], whole["n_sharing"], whole["n_held_out"], whole["n_shared"]) == (4, 2, 2, 1)
    assert read_rows(keep) == train[2:]
    (row, _) = evaluate_overlap(OverlapConfig(**files, shared=0.3), tmp_path / "out").rows
    assert row["source"] == "whole"


@pytest.mark.parametrize(
    "given", [{}, {"tasks": "a", "documents": ("b",)}, {"documents": ("b",)}, {"held_out": ("b",)}]
)
def test_tasks_or_documents_are_compared(given):
    with pytest.raises(ConfigError, match="either --tasks, or --documents"):
        OverlapConfig(**given)


def test_overlap_of_public_tasks_against_sets(tmp_path):
    """The share of a held-out task's test examples that a training task has too, but for case and spaces at the ends."""
    found = {r["task"]: r["same"] for r in evaluate_overlap(OverlapConfig(str(DATA / "tasks.jsonl.gz")), tmp_path).rows}
    tasks = read_tasks(DATA / "tasks.jsonl.gz")

    def pairs(examples: Sequence[Example]) -> list[tuple[str, str]]:
        return [(e.input.strip().lower(), e.outputs[0].strip().lower()) for e in examples]

    known = {pair for task in tasks if not task.is_heldout for pair in pairs(task.train + task.test)}
    held_out = {task.name: pairs(task.test) for task in tasks if task.is_heldout}
    shares = {name: sum(pair in known for pair in own) / len(own) for name, own in held_out.items()}
    assert found == pytest.approx(shares) and shares["alphabetically_first"] > 0.05
