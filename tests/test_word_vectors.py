"""Word vectors: what they are made from, how they match, and that training makes them find other words."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from loracast.data.qa import QuestionedDocument
from loracast.documents import Chunk
from loracast.library.bm25 import search
from loracast.library.index import OpenIndex, write_index
from loracast.library.matching import matches
from loracast.library.routing import pick
from loracast.library.word_vectors import (
    WordVectors,
    load_vectors,
    read_index,
    shipped_vectors,
    words_of_question,
    words_of_sentence,
)
from loracast.training import word_vectors
from loracast.training.word_vectors import Asked, Matcher, draw_asked, example, train_word_vectors, vocabulary


def test_numbers_and_names_are_kinds_of_words():
    assert words_of_sentence("Anna pays £12.50 at 9:30 on Monday, 3 May 2031.") == [
        "anna", "pai", "<money>", "at", "<time>", "<number>", "on", "<day>", "mondai", "<number>", "<month>", "mai",
        "<year>", "<number>",
    ]  # fmt: skip
    assert words_of_sentence("Ask Anna?") == ["ask", "<name>", "anna", "<?>"]
    assert words_of_question("How long is it?") == ["how", "long", "is", "it", "how_long"]
    assert words_of_sentence("") == words_of_sentence("... !") == []


def test_a_sentence_matches_by_the_best_word_for_each_word_of_the_question():
    rng = np.random.default_rng(0)
    numbers = {"cost": 1, "pai": 2, "open": 3, "<money>": 4}
    asked, said = (rng.normal(size=(5, 3)).astype(np.float32) for _ in range(2))
    weights = np.array([9, 1, 2, 3, 4], dtype=np.float32)
    vectors = WordVectors(numbers, asked, said, weights, 2.0)
    sentences = ["You pay £20 in all.", "Open it.", "Zork!", "..."]
    found = vectors.match("Does it cost much to open?", vectors.read(sentences))
    of_each = [[2, 4], [3], [], []]  # the known words
    for i, known in enumerate(of_each):
        alike = {word: max([asked[word] @ said[n] for n in known], default=-5.0) for word in (1, 3)}
        unknown = i != 1 or len(words_of_sentence(sentences[i])) > 1
        best = {word: max(value, -5.0) if unknown else value for word, value in alike.items()}
        assert found[i] == pytest.approx(sum(weights[word] * value for word, value in best.items()), rel=1e-4)
    assert not vectors.match("Zork?", vectors.read(sentences)).any()


def test_what_is_saved_matches_as_in_training(tmp_path):
    torch.manual_seed(0)
    drawn = [Asked("x", ("You pay £20.", "It opens at 9:30."), ("How much is it?", "When?"), (frozenset({0}),) * 2)] * 5
    numbers = vocabulary(drawn)
    matcher = Matcher(torch.randn(len(numbers) + 1, 8))
    matcher.save(numbers, tmp_path / "vectors.safetensors")
    vectors = load_vectors(tmp_path / "vectors.safetensors")
    one = example(drawn[0], numbers)
    expected = matcher(one, matcher.tables()).detach().numpy() - vectors.bm25 * one.bm25.numpy()
    read = vectors.read(drawn[0].sentences)
    given = np.stack([vectors.match(question, read) for question in drawn[0].questions])
    np.testing.assert_allclose(given, expected, rtol=0.02, atol=0.1)  # a byte a number


def test_the_sentences_of_an_index_are_read_once_while_it_is_open(tmp_path):
    texts = ["You pay £20. It opens at 9:30.", "Dogs are welcome."]
    write_index(tmp_path / "i.sqlite", [Chunk(text, 0, len(text), "", 9) for text in texts])
    kept = OpenIndex(tmp_path / "i.sqlite")
    read = read_index(kept)
    assert read.chunks == {0: (0, 2), 1: (2, 3)} and read_index(kept) is read
    assert read_index(tmp_path / "i.sqlite") is not read


@pytest.mark.parametrize(
    ("question", "chunk"),
    [
        ("How expensive is a ticket?", 0),
        ("At what time can I come in?", 1),
        ("How much is it to get in?", 0),
        ("Whom do I phone?", 3),
    ],
)
def test_sentences_are_found_in_other_words(tmp_path, question, chunk):
    texts = ["Adults pay £20.", "We open at 9:30 am.", "Dogs are welcome.", "Call Anna Boyd on 034 556."]
    write_index(tmp_path / "i.sqlite", [Chunk(text, 0, len(text), "", 9) for text in texts])
    assert not search(tmp_path / "i.sqlite", question, 4)  # not by their words
    route = pick(tmp_path / "i.sqlite", 4, question, 1)
    assert route.chunks == (chunk,) and route.weights == (1.0,) and route.sentences == ((1.0,),)


def test_of_a_long_document_only_the_best_chunks_are_compared(tmp_path):
    texts = [f"Prose number {i} is about nothing much." for i in range(40)] + ["The warranty lasts two years."]
    write_index(tmp_path / "i.sqlite", [Chunk(text, 0, len(text), "", 9) for text in texts])
    found = matches(tmp_path / "i.sqlite", "How long is the warranty?", 41)
    assert len(found.sentences) == 16 and next(iter(found.chunks)) == 40 and found.sentences[40] == (1.0,)


def test_documents_are_drawn_with_the_sentences_of_their_answers(monkeypatch):
    for name, n in (("_N_EVERYDAY", 30), ("_N_SHEETS", 5), ("_N_TEXTS", 5)):
        monkeypatch.setattr(word_vectors, name, n)
    drawn = [*draw_asked([QuestionedDocument("d", "It is old. Anna built it.", ())], 0)]
    assert [one.source for one in drawn] == ["everyday"] * 30 + ["sheet"] * 5 + [""]
    assert all(holders for one in drawn for holders in one.holders) and drawn[-1].questions == ()
    assert sum(len(one.questions) for one in drawn) > 150
    assert all(max(holders) < len(one.sentences) for one in drawn for holders in one.holders)


def test_training_finds_what_bm25_misses(monkeypatch, tmp_path):
    means = {"price": "cost", "bike": "bicycle", "dog": "puppy", "car": "automobile", "boat": "vessel", "hat": "cap"}

    def draw(documents, seed):
        rng = random.Random(seed)
        for _ in range(400):
            some = rng.sample([*means.items()], 4)
            yield Asked(
                "x", tuple(f"{said.title()}." for said, _ in some),
                tuple(f"What of a {asked}?" for _, asked in some), tuple(frozenset({i}) for i in range(4)),
            )  # fmt: skip

    monkeypatch.setattr(word_vectors, "draw_asked", draw)
    monkeypatch.setattr(word_vectors, "features_of", lambda numbers, drawn: torch.zeros(len(numbers) + 1, 4))
    monkeypatch.setattr(word_vectors, "_LR", 2e-2)
    monkeypatch.setattr(word_vectors, "_EPOCHS", 5)
    said = []
    found = train_word_vectors([], tmp_path / "vectors.safetensors", say=said.append)
    n, both, bm25 = found["x"]
    assert n == 64 and both > 0.9 > 0.5 > bm25 and "400 documents" in said[0]
    vectors = load_vectors(tmp_path / "vectors.safetensors")
    assert vectors.match("What of a vessel?", vectors.read(["Hat.", "Boat."])).argmax() == 1


def test_the_shipped_vectors_are_small():
    vectors = shipped_vectors()
    assert vectors.asked.shape == vectors.said.shape and 10_000 < len(vectors.numbers) < 13_000
    assert vectors.asked.dtype == np.float32 and (vectors.weights > 0).all() and vectors.bm25 > 0


def test_a_route_of_more_chunks_than_are_compared_has_the_sentences_of_all(tmp_path):
    texts = [f"Lamp number {i} is amber. It is old." for i in range(30)]
    write_index(tmp_path / "i.sqlite", [Chunk(text, 0, len(text), "", 9) for text in texts])
    route = pick(tmp_path / "i.sqlite", 30, "Which lamp is amber?", 25)
    assert len(route.chunks) == 25 and [len(some) for some in route.sentences] == [2] * 25
    whole = pick(tmp_path / "i.sqlite", 30, "Which lamp is amber?", 30)
    assert sorted(whole.chunks) == list(range(30)) and len(whole.sentences) == 30
