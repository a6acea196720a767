"""Questions about real text: where a text says an answer, questions by rule, and those that a writer makes."""

from __future__ import annotations

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from loracast.cli import app
from loracast.errors import ConfigError, LoracastError
from loracast.lab.data import questions as writers
from loracast.lab.data.questions import (
    EndpointWriter,
    MakeConfig,
    Passage,
    find_answer,
    make_clozes,
    make_questions,
    parse,
    sentence_spans,
)
from loracast.lab.data.rows import read_questioned, read_texts
from questions import ROWS, write_documents

TEXT = (
    "The abbey was founded in 1132 by Walter Espec. It lies near Helmsley, where 14 monks lived. In 1538 it was dissolved, and 21 "
    "monks had to go.\nIts walls still stand\nin the valley of the Rye. The Rye is 24 miles long."
)


# ---- documents with questions ----


def test_documents_are_read_by_source_and_split(tmp_path):
    path = tmp_path / "qa.jsonl"
    write_documents(path)
    documents = read_questioned([str(path)], ["tales"])
    assert [d.doc_id for d in documents] == ["doc-1", "doc-3", "doc-5"]
    assert documents[0].questions[1].answers == ("Tom Hale", "Tom") and not documents[0].questions[3].is_span
    rows = [{**ROWS[0], "split": "test"}, {**ROWS[1], "split": "train"}, ROWS[2]]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [d.doc_id for d in read_questioned([str(path)], split="train")] == ["doc-1", "doc-2"]


@pytest.mark.parametrize(
    "row", ["{", '{"document": "text"}', '{"document": "t", "questions": [{"question": "q?"}]}', "[1]"]
)
def test_a_row_of_another_shape_is_named(row, tmp_path):
    (tmp_path / "qa.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + row)
    with pytest.raises(ConfigError, match="line 2"):
        read_questioned([str(tmp_path / "qa.jsonl")])
    if row != "[1]":
        (tmp_path / "texts.jsonl").write_text('{"text": "Once upon a time."}\n' + row.replace("document", "body"))
        with pytest.raises(ConfigError, match="line 2"):
            read_texts([str(tmp_path / "texts.jsonl")])
    with pytest.raises(ConfigError, match="no such file"):
        read_questioned([str(tmp_path / "none.jsonl")])


# ---- where a text answers ----


def test_sentences_go_over_wrapped_lines_and_table_rows_stand_alone():
    spans = [TEXT[a:b] for a, b in sentence_spans(TEXT)]
    assert spans[0] == "The abbey was founded in 1132 by Walter Espec."
    assert spans[3] == "Its walls still stand\nin the valley of the Rye." and len(spans) == 5
    table = "Team | Wins\nKelby | 3\nOstra | 5"
    assert [table[a:b] for a, b in sentence_spans(table)] == table.split("\n")


@pytest.mark.parametrize(
    ("question", "answers", "sentence"),
    [
        ("How many monks lived there?", ("14",), "It lies near"),
        ("How many monks had to go when it was dissolved?", ("21",), "In 1538"),
        ("Which river is near the walls?", ("the rye",), "Its walls"),  # said twice: the sentence of walls
        ("How long is the Rye?", ("24 miles",), "The Rye"),
        ("Who founded it?", ("Espec", "Walter Espec"), "The abbey"),
    ],
)
def test_an_answer_is_found_in_the_sentence_that_fits_the_question(question, answers, sentence):
    found = find_answer(TEXT, question, answers)
    assert found is not None and found.statement.startswith(sentence)
    assert found.value.lower() == answers[0].lower()
    assert found.value_at is not None and found.statement[found.value_at :].startswith(found.value)


def test_an_answer_inside_a_word_or_nowhere_is_not_found():
    assert find_answer(TEXT, "How many?", ("4",)) is None and find_answer(TEXT, "Who?", ("Henry", "")) is None


def test_questions_by_rule_have_their_answers_in_the_text_and_do_not_tell_them():
    text = " ".join(row["document"] for row in ROWS)
    seen = set()
    for seed in range(30):
        for question, fact in make_clozes(random.Random(seed), text, 8):
            start = text.index(fact.statement)
            assert fact.value_at is not None
            at = start + fact.value_at
            assert text[at : at + len(fact.value)] == fact.value
            assert f" {fact.value.lower()} " not in f" {question.lower()} "
            seen.add(fact.value)
    assert {"March", "Osla Brandt"} & seen and any(answer.isdecimal() for answer in seen)
    same = [make_clozes(random.Random(3), text, 5) for _ in range(2)]
    assert same[0] == same[1] and len(same[0]) == 5
    assert make_clozes(random.Random(0), "nothing here. or here.", 5) == []


# ---- a writer ----


@pytest.mark.parametrize(
    "said",
    [
        "Q: Who built it?\nA: Ann Lee\nQ: When was it built?\nA: 1901.",
        "1. Who built it? Ann Lee\n2. When was it built? 1901",
        "Here you are:\n\nQuestion 1: Who built it?\nAnswer: Ann Lee\n\n**Question 2:** When was it built?\nAnswer: 1901",
        "Q: Who built it? A: Ann Lee\nQ: What is left without an answer?\nQ: When was it built? A: 1901",
    ],
)
def test_pairs_are_read_however_they_are_written(said):
    assert parse(said) == [("Who built it?", "Ann Lee"), ("When was it built?", "1901")]


class Script:
    """A writer that knows one passage."""

    name = "script"

    def __init__(self):
        self.asked: list[str] = []

    def write(self, messages, max_tokens):
        last = messages[-1]["content"]
        self.asked.append(last)
        if "harder questions" in last:
            return (
                "Q: Why did 21 monks have to go?\nA: it was dissolved\nQ: In what year was the abbey founded?\nA: 1132"
            )
        if "questions that the text answers" in last:
            return "Q: When was the abbey founded?\nA: 1132\nQ: How many miles long is the Rye?\nA: 30 miles\nQ: What is the capital of France?\nA: Paris"
        if "France" in last:
            return "Paris"  # with the passage and without it
        return (
            {"founded": "in 1132", "long": "24 miles", "Why": "it was dissolved"}[
                next(word for word in ("founded", "long", "Why") if word in last.split("Question:")[1])
            ]
            if "abbey was founded" in last
            else "I do not know"
        )


def test_what_is_not_answered_repeated_or_known_anyway_is_left_out(tmp_path):
    out, writer = tmp_path / "deep" / "qa.jsonl", Script()
    tally = make_questions([Passage("a#1", "Abbey", TEXT)], out, writer, MakeConfig(per_passage=5))
    (row,) = map(json.loads, out.read_text().splitlines())
    assert [(q["question"], q["answers"], q["span"], q["level"]) for q in row["questions"]] == [
        ("When was the abbey founded?", ["1132"], True, 1),
        ("Why did 21 monks have to go?", ["it was dissolved"], True, 2),
    ]
    assert vars(tally) == {"kept": 2, "repeated": 1, "not_answerable": 1, "known_anyway": 1}
    assert row["made_by"] == "script" and len(read_questioned([str(out)])) == 1


def test_making_goes_on_where_it_was_killed(tmp_path):
    out = tmp_path / "qa.jsonl"
    passages = [Passage(f"a#{i}", "", row["document"]) for i, row in enumerate(ROWS)]
    make_questions(passages, tmp_path / "whole.jsonl", None)
    make_questions(passages[:3], out, None)
    with open(out, "a") as file:
        file.write('{"doc_id": "a#3", "questi')  # killed while it wrote
    seen = []
    make_questions(passages, out, None, progress=lambda done, total: seen.append((done, total)))
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert seen[-1] == (3, 3)
    out.write_text("something else\n")
    with pytest.raises(ConfigError, match="line 1"):
        make_questions(passages, out, None)
    assert out.read_text() == "something else\n"


@pytest.fixture
def endpoint():
    """A server that fails once and then answers with what it was asked."""
    state = {"n": 0, "orders": [], "status": 503, "authorization": ""}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["n"] += 1
            state["orders"].append(order)
            state["authorization"] = self.headers["Authorization"] or ""
            if state["n"] == 1:
                self.send_response(state["status"])
                self.end_headers()
                self.wfile.write(b"busy")
                return
            body = json.dumps({"choices": [{"message": {"content": "echo " + order["messages"][-1]["content"]}}]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", state
    server.shutdown()


def test_an_endpoint_is_asked_again_when_it_is_busy_and_not_when_it_refuses(endpoint, monkeypatch):
    url, state = endpoint
    monkeypatch.setattr(writers, "_FIRST_WAIT_S", 0.01)
    writer = EndpointWriter(url, "some-model", "secret")
    assert writer.write([{"role": "user", "content": "hello"}], 7) == "echo hello"
    assert state["orders"][1] == {
        "model": "some-model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 7, "temperature": 0,
    }  # fmt: skip
    assert state["n"] == 2 and state["authorization"] == "Bearer secret" and "secret" not in repr(writer)
    state.update(n=0, status=401)
    with pytest.raises(LoracastError, match="401: busy"):
        writer.write([{"role": "user", "content": "hello"}], 7)
    assert state["n"] == 1
    with pytest.raises(ConfigError, match="no endpoint"):
        EndpointWriter("file:///etc", "m").write([], 1)
    with pytest.raises(LoracastError, match="cannot be reached"):
        EndpointWriter("http://127.0.0.1:9/v1", "m", timeout_s=0.2).write([], 1)


def test_the_command_makes_questions_by_rule_and_by_the_base(tiny_folder, tmp_path, home):
    file = tmp_path / "mill.txt"
    file.write_text(" ".join(row["document"] for row in ROWS))
    options = ["--out", str(tmp_path / "qa.jsonl"), "--base", str(tiny_folder), "--passage-tokens", "128", "--json"]
    done = CliRunner().invoke(app, ["make-questions", str(file), "--rules", *options])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["kept"] > 5 and said["passages"] > 2
    assert all(d.questions[0].is_span for d in read_questioned([str(tmp_path / "qa.jsonl")]))
    again = json.loads(CliRunner().invoke(app, ["make-questions", str(file), "--rules", *options]).stdout)
    assert again["kept"] == 0 and again["passages"] == said["passages"]
    options[1] = str(tmp_path / "written.jsonl")
    done = CliRunner().invoke(app, ["make-questions", str(file), "--per-passage", "1", *options])
    assert done.exit_code == 0, done.output  # a tiny random base writes no question
    assert len((tmp_path / "written.jsonl").read_text().splitlines()) == said["passages"]
    for wrong in (["--rules", "--endpoint", "http://x", "--model", "m"], ["--endpoint", "http://x"]):
        assert CliRunner().invoke(app, ["make-questions", str(file), *wrong, *options]).exit_code == 1
