"""`loracast route`: what a question would be answered with, explained."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from loracast.answering.model import load
from loracast.cli import app
from loracast.export.adapter import export_adapter
from loracast.library.library import Library
from loracast.library.save import save_lora
from loracast.lora.algebra import LoRA
from loracast.lora.peft_format import read_peft
from loracast.reading.routing import route_adapter
from tiny import PROSE


@pytest.fixture(scope="module")
def library(tiny_folder, tiny_hypernet_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    model = load(tiny_folder, tiny_hypernet_folder, library=folder, device="cpu")
    for name, text in (("lamp", "The lamp on the desk was made in the north."), ("prose", PROSE * 2)):
        (folder / f"{name}.txt").write_text(text)
        model.learn(folder / f"{name}.txt", name, max_chunk_tokens=40)
    lora = Library(folder).open("lamp").lora()
    save_lora(lora, Library(folder), "shout", kind="task", title="Shout.", made_for=model.base.fingerprint)
    return folder


@pytest.fixture
def run(library, tiny_folder, tiny_hypernet_folder):
    """Runs `loracast route` with the tiny base, whose hypernetwork has no reader: words alone choose."""
    models = ["--base", str(tiny_folder), "--hypernetwork", str(tiny_hypernet_folder), "--device", "cpu"]

    def invoke(*arguments):
        done = CliRunner().invoke(app, ["route", *map(str, arguments), *models, "--library", str(library)])
        assert done.exit_code == 0, done.output
        return done

    return invoke


def test_the_chunks_of_an_adapter_are_those_that_ask_takes(run, library):
    question = "Who built the bridge over the river?"
    report = json.loads(run(question, "-a", "prose", "-a", "shout", "--route", 2, "--json").stdout)
    prose, shout = report["adapters"]
    expected = route_adapter(Library(library).open("prose"), question, 2)
    assert [chunk["chunk"] for chunk in prose["chunks"]] == list(expected.chunks)
    assert [chunk["weight"] for chunk in prose["chunks"]] == pytest.approx(list(expected.weights), abs=1e-3)
    assert "bridge" in prose["chunks"][0]["text"] and prose["reason"] == expected.reason
    assert shout["chunks"] == [] and shout["reason"] == "task: always whole" and not shout["is_empty"]
    assert prose["likely"] == shout["likely"] == []
    shown = run(question, "-a", "prose", "-a", "shout").stdout
    assert "bridge" in shown and "always whole" in shown


@pytest.mark.parametrize("name", ["lamp", "prose"])
def test_a_question_about_something_else_gets_none(run, name, library):
    question = "Who wrote Hamlet?"
    (found,) = json.loads(run(question, "-a", name, "--json").stdout)["adapters"]
    assert found["chunks"] == [] and found["is_empty"] and "no word of the question" in found["reason"]
    shown = run(question, "-a", name).stdout
    assert "none" in shown and "1.00" not in shown and "all" not in shown


def test_without_an_adapter_the_whole_library_is_looked_through(run, library):
    report = json.loads(run("Which desk was made in the north?", "--json").stdout)
    assert {one["adapter"] for one in report["adapters"]} == {
        "lamp",
        "prose",
    }  # a document of one chunk too, a task never
    weights = [chunk["weight"] for one in report["adapters"] for chunk in one["chunks"]]
    assert weights == sorted(weights, reverse=True) and weights[0] == 1 and weights[-1] > 0
    assert "is about the question" in run("zzz").stderr


def test_the_adapters_of_an_exported_document(run, library, tmp_path):
    adapter = Library(library).open("prose")
    export_adapter(adapter, "peft", tmp_path / "out", each_chunk=True)
    question = "Who built the bridge over the river?"
    (found,) = json.loads(run(question, "--exported", tmp_path / "out", "--route", 2, "--json").stdout)["adapters"]
    expected = route_adapter(adapter, question, 2)
    assert [chunk["chunk"] for chunk in found["chunks"]] == list(expected.chunks)
    assert [chunk["path"] for chunk in found["chunks"]] == [
        str(tmp_path / f"out/chunk-{i:05d}") for i in expected.chunks
    ]
    assert LoRA(read_peft(tmp_path / "out" / f"chunk-{expected.chunks[0]:05d}")).rank == adapter.lora([0]).rank
    (every,) = json.loads(run("zzz", "--exported", tmp_path / "out", "--json").stdout)["adapters"]
    assert len(every["chunks"]) == adapter.manifest.n_chunks and {chunk["weight"] for chunk in every["chunks"]} == {1.0}
    refused = CliRunner().invoke(app, ["route", "x", "--exported", str(tmp_path), "--library", str(library)])
    assert refused.exit_code == 1 and "chunks.json cannot be read" in refused.stderr
