"""`loracast eval library`: questions to a library of documents, none of which is named."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from loracast.cli import app
from loracast.documents import Document
from loracast.errors import ConfigError
from loracast.lab.data.rows import read_questioned
from loracast.lab.evaluation.documents import DocumentSetup, RoutedConfig
from loracast.lab.evaluation.runner import made
from loracast.lab.evaluation.whole_library import (
    ALL,
    BASELINES,
    NAMING,
    LibraryConfig,
    evaluate_library,
    rank_all,
)
from questions import ROWS


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents about mills, whose second question names the mill's town and whose first could be about any of them."""
    rows = []
    for row in ROWS:
        first, second, *_ = row["questions"]
        town = row["document"].split()[3]
        rows.append(
            {**row, "title": "", "questions": [first, {**second, "question": f"Who owned the mill in {town}?"}]}
        )
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_ranks_and_the_rule(model, documents):
    asked = rank_all(DocumentSetup(model), read_questioned([documents]))
    assert [one.names_something for one in asked] == [False, True] * len(ROWS)
    assert [one.name for one in asked] == [f"d{i}" for i in range(len(ROWS)) for _ in "ab"]
    assert [one.rank for one in asked if one.names_something] == [1] * len(ROWS)
    assert sum(one.rank == 1 for one in asked if not one.names_something) == 1  # a tie, which the first one wins


def test_what_a_question_gets_is_what_asking_the_library_gives(model, documents):
    drawn = read_questioned([documents])
    for i, one in enumerate(drawn):
        model.learn(Document.from_text(one.text, one.title), f"d{i}", max_chunk_tokens=64)
    setup = DocumentSetup(model, RoutedConfig(chunk_tokens=64))
    about = rank_all(setup, drawn)[3]
    requests = [BASELINES[name].request(setup, about) for name in ("library", "named")]
    setup.cast_ahead(requests)
    for chosen, request, found in zip(("*", about.name), requests, made(model.base, requests), strict=True):
        wanted, routed = model.lora_for(about.asked.question, chosen)
        assert [route for _, route in routed] == [route for _, route in request.prepared.routed]
        for name in wanted.names:
            torch.testing.assert_close(found.delta(name), wanted.delta(name), rtol=0.02, atol=0.02)


def test_the_run(model, documents, tmp_path):
    config = LibraryConfig(documents=(documents,), library_size=5, answered=6, timed=2)
    report = evaluate_library(model, config, tmp_path)
    ranks = {row["questions"]: row for row in report.rows if row["label"] == "search and reader"}
    assert (ranks[ALL]["n"], ranks[NAMING]["n"], ranks[NAMING]["first"], ranks[NAMING]["three"]) == (10, 5, 1, 1)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    by_baseline = {name: [line for line in lines if line["baseline"] == name] for name in BASELINES}
    assert {len(some) for some in by_baseline.values()} == {6}
    for row in report.rows:
        if row["questions"] == ALL and "baseline" in row:
            f1 = [line["f1"] for line in by_baseline[row["baseline"]]]
            assert row["f1"] == pytest.approx(sum(f1) / 6, abs=1e-4)
    changes = [a["f1"] - b["f1"] for a, b in zip(by_baseline["library"], by_baseline["named"], strict=True)]
    (row,) = [row for row in report.rows if row["questions"] == ALL and row.get("baseline") == "library"]
    assert row["difference"] == pytest.approx(sum(changes) / 6, abs=1e-4)
    timed = {row["baseline"]: row for row in report.rows if "prepare_s" in row}
    assert timed.keys() == BASELINES.keys() and timed["named"]["ratio"] == 1
    assert all(row["first_token_s"] > row["prepare_s"] for row in timed.values()) and timed["library"]["n"] == 2


def test_the_command(documents, tiny_folder, tiny_hypernet_folder, tmp_path):
    models = ("--base", str(tiny_folder), "--hypernetwork", str(tiny_hypernet_folder), "--device", "cpu")
    arguments = ("--documents", documents, "--answered", "0", "--timed", "0", "--out", str(tmp_path), *models)
    done = CliRunner().invoke(app, ["eval", "library", *arguments])
    assert done.exit_code == 0, done.output
    assert "search and reader" in (tmp_path / "table.md").read_text()
    with pytest.raises(ConfigError, match="library_size"):
        LibraryConfig(documents=(documents,), library_size=0)
