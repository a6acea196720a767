"""Word vectors: what they are made from, how they match, and that training makes them find other words."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from loracast.documents import Chunk
from loracast.lab.data.rows import DocumentQuestion, QuestionedDocument
from loracast.lab.training import word_vectors
from loracast.lab.training.word_vectors import Asked, Matcher, draw_asked, example, train_word_vectors, vocabulary
from loracast.library.index import OpenIndex, write_index
from loracast.reading.matching import matches
from loracast.reading.routing import pick
from loracast.reading.search import search
from loracast.reading.word_vectors import (
    WordVectors,
    load_vectors,
    read_index,
    shipped_vectors,
    words_of_question,
    words_of_sentence,
)


def test_numbers_and_names_are_kinds_of_words():
    words = words_of_sentence("Anna pays £12.50 at 9:30 on Monday, 3 May 2031.")
    assert [word.names for word in words] == [
        ("anna",), ("pai",), ("<money>",), ("at",), ("<time>", "<number>"), ("on",), ("<day>", "mondai"),
        ("<number>",), ("<month>", "mai"), ("<year>", "<number>"),
    ]  # fmt: skip
    assert [word.names for word in words_of_sentence("Ask Anna?")] == [("ask",), ("<name>", "anna")]
    assert words_of_question("How long is it?") == ["how", "long", "is", "it", "how_long"]
    assert words_of_sentence("") == words_of_sentence("... !") == []


def test_what_is_parted_stands_further_apart():
    text = "Tea, 2 cups and a spoon"
    words = words_of_sentence(text)
    assert [(text[word.start : word.end], word.position) for word in words] == [
        ("Tea", 0), ("2", 3), ("cups", 4), ("and", 5), ("a", 7), ("spoon", 8),
    ]  # fmt: skip
    cafe = "Cafe\u0301 Roma"  # an accent of its own, which the normal form does not have
    assert [(word.start, word.end) for word in words_of_sentence(cafe)] == [(0, 4), (5, 9)]


def _random_vectors(numbers: dict[str, int]) -> WordVectors:
    rng = np.random.default_rng(0)
    n = len(numbers) + 1
    tables = {name: rng.normal(size=(n, 3)).astype(np.float32) for name in ("asked", "said")}
    kinds = {side: rng.normal(size=(n, 2)).astype(np.float32) for side in ("own", "before", "behind")}
    for table in kinds.values():
        table[0] = 0
    weights, least = rng.random((2, n), dtype=np.float32)
    wanted = rng.normal(size=(n, 4)).astype(np.float32)
    return WordVectors(numbers, weights=weights, least=least, wanted=wanted, kinds=kinds, fade=0.1, bm25=2.0,
                       **tables)  # fmt: skip


def test_a_place_matches_by_the_nearest_words_and_by_the_kinds_around_it():
    numbers = {"cost": 1, "pai": 2, "open": 3, "<money>": 4, "mondai": 5, "<day>": 6}
    vectors = _random_vectors(numbers)
    sentences = ["You pay, on Monday, £20 in all, all in all, so they say, and that day, too, pay.", "Open it.", "..."]
    text = vectors.read(sentences)
    found = vectors.places("Does it cost much to open?", text)
    of_each = [words_of_sentence(sentence) for sentence in sentences]
    asked, expected = [1, 3], []
    for words in of_each:
        at = {word.position: [numbers.get(name, 0) for name in word.names] for word in words}

        def alike(word, named):
            known = [vectors.asked[word] @ vectors.said[n] for n in named if n]
            return max([*known, -5.0])

        for place in at or [0]:
            of_place = 0.0
            for word in asked:
                near = [alike(word, named) - 0.1 * abs(place - p) for p, named in at.items()]
                of_place += vectors.weights[word] * max([*near, -5.0])
            wanted = vectors.wanted[asked].sum(0)
            of_place += sum(vectors.kinds["own"][n] for n in at.get(place, [0])) @ wanted[:2]
            for side, distances in (("behind", (1, 2)), ("before", (-1, -2))):
                for distance in distances:
                    beside = sum(vectors.kinds[side][n] for n in at.get(place + distance, [0]))
                    of_place += beside @ wanted[2:] / abs(distance)
            expected.append(of_place)
    np.testing.assert_allclose(found.words, expected, rtol=1e-4, atol=1e-4)
    sizes = [len(words) or 1 for words in of_each]
    parts = np.split(np.exp(expected), np.cumsum(sizes)[:-1])
    np.testing.assert_allclose(found.sentences, [np.log(part.sum()) for part in parts], rtol=1e-4)
    assert found.nowhere == pytest.approx(float(vectors.weights[asked] @ vectors.least[asked]))
    assert vectors.places("Zork?", text) is None


def test_what_is_saved_matches_as_in_training(tmp_path):
    torch.manual_seed(0)
    text = "You pay £20, Anna pays on Monday.\nIt opens at 9:30. It is far."
    drawn = [Asked("x", text, (("How much is it?", 8, 11), ("When does it open?", 0, 0)))] * 5
    numbers = vocabulary(drawn)
    matcher = Matcher(torch.randn(len(numbers) + 1, 8))
    matcher.save(numbers, tmp_path / "vectors.safetensors")
    vectors = load_vectors(tmp_path / "vectors.safetensors")
    one = example(drawn[0], numbers)
    assert one.right.nonzero().tolist() == [[0, 2], [1, len(one.names)]]  # £20, and nowhere
    expected = matcher(one, matcher.tables()).detach().numpy()
    expected[:, :-1] -= vectors.bm25 * one.bm25[:, one.sentences].numpy()
    read = vectors.read(["You pay £20, Anna pays on Monday.", "It opens at 9:30.", "It is far."])
    for (question, _, _), of_question in zip(drawn[0].questions, expected, strict=True):
        given = vectors.places(question, read)
        np.testing.assert_allclose([*given.words, given.nowhere], of_question, rtol=0.02, atol=0.1)  # a byte a number


def test_the_sentences_of_an_index_are_read_once_while_it_is_open(tmp_path):
    texts = ["You pay £20. It opens at 9:30.", "Dogs are welcome."]
    write_index(tmp_path / "i.sqlite", [Chunk(text, 0, len(text), "", 9) for text in texts])
    kept = OpenIndex(tmp_path / "i.sqlite")
    read = read_index(kept)
    assert read.spans == {0: (0, 2), 1: (2, 3)} and read_index(kept) is read
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
    found = matches(tmp_path / "i.sqlite", "How long is the warranty?", 1)
    assert len(found.sentences) == 16 and next(iter(found.chunks)) == 40 and found.sentences[40] == (1.0,)


def test_documents_are_drawn_with_the_places_of_their_answers(monkeypatch):
    for name, n in (("_N_EVERYDAY", 30), ("_N_SHEETS", 5), ("_N_TEXTS", 5)):
        monkeypatch.setattr(word_vectors, name, n)
    spans = (DocumentQuestion("Who built it?", ("Anna",), is_span=True),)
    texts = [QuestionedDocument("d", "It is old. Anna built it.", spans), QuestionedDocument("e", "Bo sang.", spans)]
    drawn = [*draw_asked(texts, 0)]
    assert [one.source for one in drawn] == ["everyday"] * 30 + ["sheet"] * 5 + [""] * 2
    (built,) = (one for one in drawn if one.text == texts[0].text)
    assert built.questions[0] == ("Who built it?", 11, 12)
    ranges = [(start, end) for one in drawn for _, start, end in one.questions]
    assert sum(end - start == 1 for start, end in ranges) > 150 and (0, 0) in ranges  # some are not answered


def test_training_finds_what_bm25_misses(monkeypatch, tmp_path):
    means = {"price": "cost", "bike": "bicycle", "dog": "puppy", "car": "automobile", "boat": "vessel", "hat": "cap"}

    def draw(documents, seed):
        rng = random.Random(seed)
        for _ in range(300):
            some = rng.sample([*means.items()], 4)
            text, questions = "", list[tuple[str, int, int]]()
            for said, asked in some:
                questions.append((f"What of a {asked}?", len(text), len(text) + 1))
                text += f"{said.title()}.\n"
            yield Asked("x", text, tuple(questions))

    monkeypatch.setattr(word_vectors, "draw_asked", draw)
    monkeypatch.setattr(word_vectors, "features_of", lambda numbers, drawn: torch.zeros(len(numbers) + 1, 4))
    monkeypatch.setattr(word_vectors, "_LR", 2e-2)
    monkeypatch.setattr(word_vectors, "_EPOCHS", 5)
    said = []
    found = train_word_vectors([], tmp_path / "vectors.safetensors", say=said.append)
    assert found["x"].n > 40 and found["x"].sentence > 0.9 > 0.5 > found["x"].bm25 and "300 documents" in said[0]
    assert found["x"].place == found["x"].sentence
    vectors = load_vectors(tmp_path / "vectors.safetensors")
    assert vectors.places("What of a vessel?", vectors.read(["Hat.", "Boat."])).words.argmax() == 1


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
