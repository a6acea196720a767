"""Which chunks a question is given, against BM25 by its formula."""

from __future__ import annotations

import math
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracast.documents import Chunk
from loracast.errors import AdapterError
from loracast.lab.evaluation.documents import best_passages
from loracast.library.index import OpenIndex, read_chunks, write_index
from loracast.reading.routing import route_document
from loracast.reading.search import search

TEXTS = [
    "The warranty of the kettle is 24 months and starts on the day of purchase.",
    "To descale the kettle, boil vinegar and rinse it twice.",
    "The amber lantern opens with the code 4711.",
    "The museum opens at nine on Tuesday mornings.",
    "Naïve café owners in Köln wired the lamps; their e-mail is info@example.org.",
]


def chunks_of(texts: list[str], headings: list[str] | None = None) -> list[Chunk]:
    headings = headings or [""] * len(texts)
    return [Chunk(t, 100 * i, 100 * i + len(t), h, 7) for i, (t, h) in enumerate(zip(texts, headings, strict=True))]


@pytest.fixture
def index(tmp_path) -> Path:
    write_index(tmp_path / "chunks.sqlite", chunks_of(TEXTS))
    return tmp_path / "chunks.sqlite"


@pytest.mark.parametrize(
    ("question", "chunk"),
    [
        ("How long is the warranty?", 0),
        ("How do I descale it?", 1),
        ("What is the code of the amber lantern?", 2),
        ("When does the MUSEUM open on Tuesdays?", 3),
        ("who wired the lamp in koln", 4),
        ("descaling", 1),
        ("What is 4711?", 2),
        ("info@example.org", 4),
        ("Wo in Ko\u0308ln?", 4),
    ],
)
def test_the_right_chunk_comes_first(index, question, chunk):
    route = route_document(index, question, 2)
    assert route.chunks[0] == chunk and len(route.chunks) <= 2
    assert len(route.weights) == len(route.chunks) and list(route.weights) == sorted(route.weights, reverse=True)
    assert "BM25" in route.reason


def test_the_best_passages_are_those_of_bm25_alone(index):
    assert best_passages(index, "How expensive is a ticket?", 5, 2) == list(range(5))  # no word of it occurs
    assert best_passages(index, "When does the museum open with a code?", 5, 2) == [2, 3]
    assert best_passages(index, "When does the museum open?", 5, 5) == list(range(5))


words = st.sampled_from(["zork", "blib", "quax", "frob", "wug"])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.lists(words, max_size=2), st.lists(words, min_size=1, max_size=9)), min_size=2, max_size=8),
    st.sets(words, min_size=1, max_size=3),
    st.integers(1, 8),
)
def test_scores_are_bm25_by_its_formula(documents, question, k):
    """k1 = 1.2, b = 0.75; words in the heading and pairs of words count half; lengths include the heading."""
    asked = sorted(question)
    chunks = chunks_of([" ".join(text) for _, text in documents], [" ".join(heading) for heading, _ in documents])
    with sqlite3.connect(":memory:") as database:
        write_index(database, chunks)
        found = search(database, " ".join(asked), k)
    n = len(documents)
    mean = sum(len(h) + len(t) for h, t in documents) / n

    def count(phrase: tuple[str, ...], words: list[str]) -> int:
        return sum(tuple(words[i : i + len(phrase)]) == phrase for i in range(len(words)))

    scores = [0.0] * n
    met = [False] * n
    for phrase, weight in [((word,), 1.0) for word in asked] + [(pair, 0.5) for pair in pairwise(asked)]:
        n_with = sum(count(phrase, h) + count(phrase, t) > 0 for h, t in documents)
        idf = math.log(1 + (n - n_with + 0.5) / (n_with + 0.5))
        for i, (heading, text) in enumerate(documents):
            f = 0.5 * count(phrase, heading) + count(phrase, text)
            scores[i] += weight * idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * (len(heading) + len(text)) / mean))
            met[i] |= f > 0
    expected = sorted(((s, i) for i, s in enumerate(scores) if met[i]), key=lambda pair: (-pair[0], pair[1]))
    assert [score for _, score in found] == pytest.approx([score for score, _ in expected[:k]], rel=1e-9, abs=1e-12)
    if len({round(score, 9) for score, _ in expected}) == len(expected):
        assert [i for i, _ in found] == [i for _, i in expected[:k]]


def test_a_word_that_most_chunks_have_still_tells_them_apart(tmp_path):
    """A manual says "tank" in half of its chunks, and means it in one."""
    texts = [
        "The tank holds 4 litres. Empty the tank daily.",
        "The spare filter lies in the tank.",
        "The hose holds.",
        "Dust.",
    ]
    write_index(tmp_path / "i.sqlite", chunks_of(texts))
    assert route_document(tmp_path / "i.sqlite", "How much does the tank hold?", 1).chunks == (0,)


def test_neighbours_in_the_question_are_looked_for_side_by_side(tmp_path):
    texts = ["The amber code of a lantern, amber or not, and of another lantern.", "The amber lantern is 4711."] + [
        "Prose."
    ] * 9
    write_index(tmp_path / "i.sqlite", chunks_of(texts))
    assert route_document(tmp_path / "i.sqlite", "What about the amber lantern?", 1).chunks == (1,)


@pytest.mark.parametrize("question", ["What is it about?", "", "   ", "?!", "who and when and why", "\ud800 \x00"])
def test_a_question_without_a_word_to_go_by_gets_everything(index, question):
    route = route_document(index, question, 2)
    assert route.chunks is None and "all chunks" in route.reason


def test_an_index_that_stays_open_answers_threads_as_a_file_does(index):
    questions = [f"What of the {word}?" for word in ("lantern", "kettle", "museum", "harbour")] * 8
    kept = OpenIndex(index)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda q: route_document(kept, q, 2), questions)) == [
            route_document(index, q, 2) for q in questions
        ]
    index.unlink()  # what is open can still be read
    assert route_document(kept, questions[0], 2).chunks
    with pytest.raises(AdapterError, match="is missing"):
        route_document(OpenIndex(index), questions[0], 2)
    index.write_bytes(b"SQLite format 3\0" + bytes(4000))
    for _ in range(2):
        with pytest.raises(AdapterError, match="cannot be used"):
            route_document(OpenIndex(index), questions[0], 2)


def test_a_chunk_counts_less_the_lower_its_score_is_beside_the_best(index):
    route = route_document(index, "the amber lantern of the museum, and the kettle", 4)
    assert route.chunks[0] == 2 and route.weights[0] == 1 and len(route.chunks) == 4
    found = search(index, "the amber lantern of the museum, and the kettle", 4)
    assert route.weights == pytest.approx([score / found[0][1] for _, score in found])
    assert route.chunk_weights == dict(zip(route.chunks, route.weights, strict=True))


def test_a_question_gets_nothing_where_none_of_its_words_occurs(index):
    assert route_document(index, "zygote xylophone", 2).is_empty
    assert route_document(index, "zygote xylophone", 2, always=True).chunks is None


def test_k(index):
    assert route_document(index, "kettle", None).chunks is None
    for k in (2, 5, 6, 1000):
        route = route_document(index, "kettle", k)
        assert (
            set(route.chunks) == {0, 1} and route.weights[0] == 1 > route.weights[1] > 0.8
        )  # those that have the word
    assert route_document(index, "kettle", 1).chunks in ((0,), (1,))
    assert set(route_document(index, "kettle opens", 4).chunks) == {0, 1, 2, 3}
    for k in (0, -1):
        with pytest.raises(AdapterError, match=f"not {k}"):
            route_document(index, "kettle", k)


@pytest.mark.parametrize(
    "question",
    [
        '"kettle', "kettle OR", "NEAR(kettle, 2", "heading: kettle", "kettle*", "-kettle", "(kettle", "^kettle",
        "'; DROP TABLE chunks; --kettle",
    ],
)  # fmt: skip
def test_query_syntax_in_a_question_is_text(index, question):
    assert 0 in [i for i, _ in search(index, question, 5)]


def test_a_question_as_long_as_a_book(index):
    assert search(index, " ".join(f"word{i}" for i in range(10_000)) + " museum", 3)[0][0] == 3


def test_words_of_the_heading_find_their_chunk(tmp_path):
    chunks = chunks_of(["It is 24 months.", "It is blue.", "It is heavy."], ["Warranty", "Colour", "Weight"])
    write_index(tmp_path / "i.sqlite", chunks)
    assert route_document(tmp_path / "i.sqlite", "How long is the warranty?", 1).chunks == (0,)


def test_texts_and_places_come_back(index):
    assert [chunk.text for chunk in read_chunks(index)] == TEXTS
    assert [chunk.text for chunk in read_chunks(index, [3, 0])] == [TEXTS[3], TEXTS[0]]
    places = read_chunks(index)
    assert [(p.start, p.end, p.n_tokens, p.heading) for p in places] == [
        (100 * i, 100 * i + len(t), 7, "") for i, t in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("content", [None, b"", b"not a database" * 200])
def test_a_missing_or_damaged_index_is_an_error_that_says_so(tmp_path, content):
    path = tmp_path / "chunks.sqlite"
    if content is not None:
        path.write_bytes(content)
    for use in (
        lambda: search(path, "kettle", 1),
        lambda: read_chunks(path),
        lambda: route_document(path, "kettle", 1),
    ):
        with pytest.raises(AdapterError, match="learn the document again"):
            use()


def test_a_chunk_that_an_index_lacks_is_an_error(index):
    with pytest.raises(AdapterError, match="learn the document again"):
        read_chunks(index, [0, len(TEXTS)])


def test_reading_an_index_leaves_no_file_behind(index):
    search(index, "kettle", 1)
    assert [path.name for path in index.parent.iterdir()] == ["chunks.sqlite"]
    index.chmod(0o444)
    assert search(index, "kettle", 1)
