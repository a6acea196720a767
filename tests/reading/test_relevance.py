"""Whether a question is about a document: the features against a plain count, and the fitted coefficients on texts."""

from __future__ import annotations

import dataclasses
import math
import random
import sqlite3
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracast import text as stemming
from loracast.documents import Chunk
from loracast.documents.chunks import split_text
from loracast.errors import AdapterError, TrainingError
from loracast.lab.data.rows import DocumentQuestion, QuestionedDocument, read_content
from loracast.lab.evaluation.gate import GateConfig, evaluate_gate
from loracast.lab.training import relevance as relevance_pairs
from loracast.lab.training.relevance import (
    _words_as_tokens,
    draw_asked,
    fit_logistic,
    make_table,
    observe,
    shipped_fit,
    train_relevance,
)
from loracast.library.index import write_index
from loracast.reading import relevance
from loracast.reading.relevance import FEATURES, THRESHOLD, WordTable, about, features, read_question, shipped_words
from loracast.text import stem_words
from suites import write_rows

KETTLE = [
    ("The Velmo kettle / Warranty", "The Velmo kettle is guaranteed for 24 months from the day of purchase. Keep the receipt."),
    ("The Velmo kettle / Care", "To descale the kettle, boil a litre of vinegar in it and rinse twice. The lid comes off."),
    ("The Velmo kettle / Technical data", "It holds 1.7 litres and takes 2,200 watts. The cord is 75 cm long."),
]  # fmt: skip
MEETING = [
    (
        "",
        "Notes of the allotment club. Present: Ines Moreau, Tom Ritter and nine others. The water pump is mended, and",
    ),
    ("", "Tom Ritter collects the fees until 4 May. The summer party is on the lawn; everybody brings a salad."),
]


def write(texts: list[tuple[str, str]], database: sqlite3.Connection) -> None:
    write_index(database, [Chunk(text, 0, len(text), heading, len(text.split())) for heading, text in texts])


def probability(texts: list[tuple[str, str]], question: str) -> float:
    with closing(sqlite3.connect(":memory:")) as database:
        write(texts, database)
        return about(database, question)


@pytest.mark.parametrize(
    ("texts", "question"),
    [
        (KETTLE, "How long is the Velmo kettle covered for repairs?"),
        (KETTLE, "how long is the velmo kettle guaranteed"),
        (KETTLE, "How do I descale it?"),
        (KETTLE, "How many watts does the kettle take?"),
        (KETTLE, "What is this manual about?"),
        (MEETING, "Who collects the fees?"),
        (MEETING, "By when does Tom Ritter want the money?"),
        (MEETING, "What should I bring to the summer party?"),
    ],
)
def test_questions_about_the_document_pass(texts, question):
    assert probability(texts, question) >= THRESHOLD


@pytest.mark.parametrize("texts", [KETTLE, MEETING])
@pytest.mark.parametrize(
    "question",
    [
        "How long is the Zarkona toaster covered for repairs?",
        "What is the warranty of the Brimdal 4000?",
        "What is the capital of France?",
        "Write a poem about the sea.",
        "How are you?",
        "What is 12 times 7?",
        "is there a season 5 of vampire diaries",
        "Which gas do plants take from the air?\n- oxygen\n- carbon dioxide\n- helium",
    ],
)
def test_other_questions_do_not(texts, question):
    assert probability(texts, question) < THRESHOLD


def test_another_products_manual_is_told_by_its_name():
    own = "How long is the Velmo kettle covered for repairs?"
    assert probability(KETTLE, own) > 0.8 > 0.2 > probability(KETTLE, own.replace("Velmo", "Zarkona"))


def test_words_of_a_question():
    table = WordTable({stem: i for i, stem in enumerate(["of", *(f"w{i}x" for i in range(98)), "kettl"])}, frozenset())
    words = read_question("Kettles of the Velmo, 24 cafés: Old my_pump", table)
    assert [word.stem for word in words] == ["kettl", "of", "the", "velmo", "24", "cafe", "old", "my", "pump"]
    assert [word.is_name for word in words] == [False, False, False, True, True, False, False, True, True]
    assert words[0].weight == pytest.approx(math.log(99 / 50))  # rank 99, of which the first 50 have no weight
    assert words[1].weight == 0
    assert words[3].weight == pytest.approx(math.log(200 / 50))  # unlisted: as if twice as rare as the rarest
    assert words[4].weight == words[3].weight < 2 * math.log(10)
    assert read_question("7", shipped_words())[0].weight == pytest.approx(math.log(10))  # ten numbers of one digit


def test_stems_are_those_of_the_index_whatever_was_stemmed_before_and_by_whichever_thread():
    words = ["Running", "houses", "!!", "", "a b", "Ärzte", "Kettles"]
    with closing(sqlite3.connect(":memory:")) as database:
        write([(f"{i}", word) for i, word in enumerate(words) if word.isalpha()], database)
        database.execute("CREATE VIRTUAL TABLE terms USING fts5vocab(chunks, 'col')")
        expected = {term for term, column in database.execute("SELECT term, col FROM terms") if column == "text"}
    stems = stem_words(words)
    assert {stem for word, stem in zip(words, stems, strict=True) if word.isalpha()} == expected
    assert stems[2:4] == ["", ""] and len(stems) == len(words)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(stem_words, [words[:n] for n in range(len(words) + 1)])) == [
            stems[:n] for n in range(len(words) + 1)
        ]


def test_accents_that_stand_by_themselves_cut_no_word():
    asked = "How large is the Größe of a café in Köln?"
    assert read_question(normalize("NFD", asked), shipped_words()) == read_question(asked, shipped_words())


words = st.sampled_from(["zork", "blib", "quax", "frob", "wug", "the"])
TABLE = WordTable({"the": 0} | {f"{i}": i for i in range(1, 60)} | {"zork": 60, "blib": 80, "quax": 99}, frozenset({"blib"}))  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.lists(words, max_size=2), st.lists(words, min_size=1, max_size=60)), min_size=1, max_size=5),
    st.lists(words, min_size=1, max_size=5),
)
def test_features_are_plain_counts(texts, asked):
    weight = {"zork": math.log(60 / 50), "blib": math.log(80 / 50), "quax": math.log(99 / 50), "the": 0.0}
    weight |= dict.fromkeys(["frob", "wug"], math.log(2 * 63 / 50))
    with closing(sqlite3.connect(":memory:")) as database:
        write([(" ".join(heading), " ".join(text)) for heading, text in texts], database)
        found = dict(zip(FEATURES, features(database, " ".join(asked), TABLE), strict=True))
    telling = {word for word in asked if weight[word]}

    def mass(some) -> float:
        return sum(weight[word] for word in telling & set(some))

    everywhere = {word for heading, text in texts for word in (*heading, *text)}
    pairs = {pair for pair in pairwise(asked) if set(pair) <= telling and pair[0] != pair[1]}
    side_by_side = {pair for _, text in texts for pair in pairwise(text)}
    absent = telling - everywhere
    assert found == pytest.approx(
        {
            "share": max(mass(heading + text) for heading, text in texts) / (mass(asked) or 1),
            "window": max(mass(h + text[i : i + 25]) for h, text in texts for i in range(len(text))) / 10,
            "absent": sum(0.3 if word == "blib" else 1 + weight[word] / 3 for word in absent) / 10,
            "missing_name": 0,
            "neighbours": len(pairs & side_by_side) / (len(pairs) or 1),
            "refers": 0,
            "empty": 0 if telling else 1,
            "length": math.log(1 + sum(len(text) for _, text in texts)) / 5,
        }
    )


def test_names_and_references():
    with closing(sqlite3.connect(":memory:")) as database:
        write(KETTLE, database)
        at = FEATURES.index("missing_name"), FEATURES.index("refers")

        def two(question: str) -> list[float]:
            found = features(database, question, TABLE)
            return [found[i] for i in at]

        unlisted = math.log(2 * 63 / 50)
        assert two("Is the Velmo kettle here?") == [0, 0]
        assert two("Is the Zarkona kettle here?") == pytest.approx([unlisted / 5, 0])
        assert two("is the zarkona kettle here?") == [0, 0]  # not written as a name
        assert two("Is it the wug?") == pytest.approx([0, 1 / 3])  # beside two telling words: is, wug


def test_a_document_of_500_chunks_takes_less_than_15_ms(tmp_path):
    rng = np.random.default_rng(0)
    common = list(shipped_words().ranks)
    n = len(common)
    zipf = 1 / np.arange(10, n + 10)
    texts = [("A heading", " ".join(rng.choice(common, 150, p=zipf / zipf.sum()))) for _ in range(500)]
    with closing(sqlite3.connect(tmp_path / "chunks.sqlite")) as database:
        write(texts, database)
    about(tmp_path / "chunks.sqlite", "warm up")
    seconds = []
    for i in range(7):  # the fastest: other processes run too
        start = time.perf_counter()
        about(
            tmp_path / "chunks.sqlite",
            f"How many litres of water does the Velmo kettle number {i} boil in two minutes?",
        )
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.015


def test_questions_of_any_length():
    assert probability(KETTLE, " ".join(f"unknown{i}" for i in range(5000))) == 0
    assert 0 <= probability(KETTLE, "") <= 1
    assert 0 <= probability([("", "?")], "What?") <= 1


def test_a_damaged_index_is_an_error(tmp_path):
    (tmp_path / "chunks.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(AdapterError, match="learn the document again"):
        about(tmp_path / "chunks.sqlite", "What?")


def test_regression_finds_the_log_odds():
    """With one feature of 0 and 1, the coefficients of logistic regression are the log odds of the two groups."""
    x = np.array([[0.0]] * 40 + [[1.0]] * 40)
    y = np.array([True] * 10 + [False] * 30 + [True] * 20 + [False] * 20)
    weights = np.array([1.0] * 40 + [2.0] * 20 + [1.0] * 20)
    bias, (coefficient,) = fit_logistic(x, y, weights)
    assert bias == pytest.approx(math.log(10 / 30), abs=0.02)
    assert bias + coefficient == pytest.approx(math.log(40 / 20), abs=0.02)
    with pytest.raises(TrainingError):  # no question of the other kind
        fit_logistic(x, np.ones_like(y), weights)


def document(i: int, source: str) -> QuestionedDocument:
    text = f"The lamp number {i} stands in the garden. It was bought by Anna. She paints it every spring and autumn."
    text += " " + " ".join(f"filler{j} {j}th" for j in range(60))
    questions = tuple(DocumentQuestion(q, ("Anna",), True) for q in (f"Who bought lamp {i}?", "Why is it painted?"))
    return QuestionedDocument(f"{source}/{i}", text, questions, source=source)


def test_the_fit_is_reproduced(tmp_path, monkeypatch):
    for sizes in (relevance_pairs._N_SHEETS, relevance_pairs._N_EVERYDAY, relevance_pairs._N_NEEDLES):
        monkeypatch.setitem(sizes, "train", 12)
    monkeypatch.setitem(relevance_pairs._N_SINGLE, "train", 6)
    documents = [document(i, source) for source in ("one", "two", "three") for i in range(10)]
    unrelated = {"quiz": ["What is the largest planet?", "Do fish sleep?", "Who wrote Faust?"]}
    for name in ("a.toml", "b.toml"):
        fit = train_relevance(documents, unrelated)
        fit.write(tmp_path / name)
    assert (tmp_path / "a.toml").read_bytes() == (tmp_path / "b.toml").read_bytes()
    fitted = tomllib.loads((tmp_path / "a.toml").read_text())
    assert list(fitted["coefficients"]) == list(FEATURES)
    assert {"lamp", "garden"} <= set(fitted["stems"].split())
    x, pairs = observe(draw_asked(random.Random(1), documents, unrelated, "train"), fit.table)
    found = fit.probabilities(x)
    is_about = np.array([pair.is_about for pair in pairs])
    assert found[is_about].mean() > found[~is_about].mean() + 0.3


def test_the_table_has_words_of_three_sources_and_those_of_asking(monkeypatch):
    monkeypatch.setattr("loracast.lab.training.relevance.N_FUNCTION", 3)
    documents = [document(i, source) for source in ("one", "two", "three") for i in range(10)]
    table = make_table([*documents, document(0, "four")], {"quiz": ["Do penguins bark?"]})
    assert "lamp" in table.ranks and "penguin" not in table.ranks and "3" not in table.ranks
    assert {"who", "why"} <= table.asking and table.asking.isdisjoint({"lamp", "bought", "paint"})


def test_the_shipped_table_is_small():
    path = Path(relevance.__file__).with_name("relevance.toml")
    assert path.stat().st_size < 60_000
    assert {"why", "kind"} <= shipped_words().asking and "kettl" in shipped_words().ranks


def test_the_gate_is_measured_with_the_parameters_that_ship(tmp_path, monkeypatch):
    for sizes in (
        relevance_pairs._N_SHEETS, relevance_pairs._N_EVERYDAY, relevance_pairs._N_NEEDLES, relevance_pairs._N_SINGLE,
    ):  # fmt: skip
        monkeypatch.setitem(sizes, "test", 4)
    documents = [document(i, "letters") for i in range(3)]
    rows = [
        {"document": one.text, "source": one.source, "questions": [dataclasses.asdict(q) | {"span": True} for q in one.questions]}
        for one in documents
    ]  # fmt: skip
    write_rows(tmp_path / "documents.jsonl", rows)
    quiz = ["What is the largest planet?", "Do penguins bark?"]
    write_rows(tmp_path / "quiz.jsonl", [{"question": question, "answer": "x"} for question in quiz])
    config = GateConfig((str(tmp_path / "documents.jsonl"),), (str(tmp_path / "quiz.jsonl"),))
    found = {(row["about"], row["group"], row["source"]): row for row in evaluate_gate(config, tmp_path / "out").rows}
    own, other = found["yes", "text", "letters"], found["no", "unrelated", "quiz"]
    assert own["low"] <= own["passed"] <= own["high"] and other["passed"] < 0.5
    fit = shipped_fit()
    for asked in (*quiz, "Who bought lamp 1?"):
        with closing(sqlite3.connect(":memory:")) as database:
            write_index(database, split_text(documents[1].text, _words_as_tokens, max_tokens=200))
            (probability,) = fit.probabilities(np.array([features(database, asked, fit.table)]))
            assert probability == pytest.approx(about(database, asked), abs=1e-9)


def test_the_splits_of_small_talk_share_nothing():
    talk = read_content("small_talk")
    for group in ("", "any_document_"):
        parts = [{text.lower().strip(".!?") for text in talk[f"{group}{split}"]} for split in ("train", "dev", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts))


def test_each_word_is_stemmed_once(monkeypatch):
    asked = []
    stemmed = stemming._stemmed
    monkeypatch.setattr(stemming, "_stemmed", lambda words: asked.append([*words]) or stemmed(words))
    monkeypatch.setattr(stemming, "_STEMS", {})
    assert stem_words(["walking", "dogs", "walking", "..."]) == ["walk", "dog", "walk", ""]
    assert stem_words(["dogs", "cats"]) == ["dog", "cat"] and asked == [["walking", "dogs", "..."], ["cats"]]
    monkeypatch.setattr(stemming, "_MOST_STEMS", 1)
    assert stem_words(["birds", "dogs"]) == ["bird", "dog"] and stemming._STEMS == {"birds": "bird"}
