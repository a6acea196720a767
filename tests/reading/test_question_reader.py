"""Asking a document with the reader: what is kept with it, what a question gets, refusals before the first token."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
import torch

import loracast
from loracast.answering.answers import NOT_SAID
from loracast.base.chat import encode_with_offsets
from loracast.documents import Chunk, Document
from loracast.errors import AdapterError
from loracast.library.index import read_chunks, read_sentences, write_index
from loracast.reading.questions import match_tokens
from loracast.reading.routing import route_adapter
from loracast.reading.search import sentence_scores

TEXT = "The kettle holds two litres. It was built in Riga.\n\nThe lamp needs an amber bulb. Ana Tull repairs it on Mondays."
QUESTION = "How much does the kettle hold?"


@pytest.fixture
def folder(reading_folder):
    return reading_folder


@pytest.fixture
def asked(reading) -> loracast.Model:
    return reading


def saying(asked: loracast.Model, monkeypatch, *, nowhere: float = 0.0, foreign: float = 0.0) -> None:
    """Have the reader add to its logits of "nowhere" and "not meant for a document"."""
    reader = asked.reader.reader
    places = type(reader).places

    def changed(self, *args):
        found = places(self, *args)
        return found._replace(nowhere=found.nowhere + nowhere, foreign=found.foreign + foreign)

    monkeypatch.setattr(type(reader), "places", changed)


def test_vectors_are_kept_and_are_those_that_reading_the_text_gives(asked, base):
    """The pass of learning reads the base down to its last blocks, the other one only those below the reader's."""
    adapter = asked.learn(Document.from_text(TEXT, "Kettle"), "kettle")
    with sqlite3.connect(adapter.index) as database:
        rows = database.execute("SELECT reader, chunk, vectors, units FROM vectors").fetchall()
    chunks, places = read_chunks(adapter.index), read_sentences(adapter.index)
    assert [row[:2] for row in rows] == [(asked.reader.reader.id, i) for i in range(len(chunks))]
    spans = [[(place.start, place.end) for place in places if place.chunk == i] for i in range(len(chunks))]
    for (_, i, vectors, units), one in zip(rows, asked.reader.read([c.prompt for c in chunks], spans), strict=True):
        assert len(vectors) == 16 * len(encode_with_offsets(base.tokenizer, chunks[i].prompt)[0])
        kept = torch.frombuffer(bytearray(vectors), dtype=torch.int8).view(-1, 16)
        assert (kept.int() - one.vectors.int()).abs().max() <= 1
        assert torch.frombuffer(bytearray(units), dtype=torch.int16).tolist() == list(one.units)


def test_a_document_without_vectors_is_read_when_it_is_asked(asked, base, tiny_hypernet_folder, tmp_path):
    old = loracast.Model(base, asked.library, tiny_hypernet_folder)
    without = old.learn(Document.from_text(TEXT), "old")
    assert old.reader is None
    assert not sqlite3.connect(without.index).execute("SELECT 1 FROM sqlite_master WHERE name = 'vectors'").fetchone()
    found = asked.reader.match(without.index, QUESTION)
    (again,) = asked.learn([Document.from_text(TEXT + " ")], ["new"])
    kept = asked.reader.match(again.index, QUESTION)
    assert found.about == pytest.approx(kept.about, abs=0.02)
    assert list(found.chunks) == list(kept.chunks)


def test_the_words_of_a_question_are_looked_up_by_their_stems_in_units_and_headings(base):
    chunks = [
        Chunk("The kettle holds two litres. It boils.", 0, 38, "Kitchen", 9),
        Chunk("Two lamps boil over.", 39, 59, "Garage", 5),
    ]
    question = "Does kitchens' boiling lamp sing?"
    spans = encode_with_offsets(base.tokenizer, question)[1]
    with closing(sqlite3.connect(":memory:")) as index:
        write_index(index, chunks)
        chunk_of = torch.tensor([i for i, chunk in enumerate(chunks) for _ in chunk.units])
        bm25, held = match_tokens(index, question, spans, chunk_of)
        nothing = match_tokens(index, "What is it?", spans[:1], chunk_of)
    texts = [chunk.prompt[start:end] for chunk in chunks for start, end in chunk.units]
    of_words = {"kitchens": "kitchen", "boiling": "boil", "lamp": "lamp", "sing": "sing", "Does": "does"}
    for word, stem in of_words.items():
        at = question.index(word)
        tokens = [i for i, (start, end) in enumerate(spans) if start < at + len(word) and at < end]
        of_chunks = [stem in chunk.prompt.lower() for chunk in chunks for _ in chunk.units]
        of_units = [stem in text.lower() for text in texts]
        expected = [1.0 if unit else 0.5 * chunk for unit, chunk in zip(of_units, of_chunks, strict=True)]
        anywhere = float(any(of_chunks))
        assert tokens and all(held[i].tolist() == [*expected, anywhere] for i in tokens), word
    assert bm25.max() == 1.0 and bm25.argmax() == len(texts) - 1
    assert not nothing[0].any() and not nothing[1].any()


def test_a_question_gets_the_units_by_their_probabilities(asked):
    adapter = asked.learn(Document.from_text(TEXT), "kettle")
    reader, index = asked.reader.reader, adapter.index
    matched = asked.reader.match(index, QUESTION)
    places, chunks = read_sentences(index), read_chunks(index)
    spans = [[(place.start, place.end) for place in places if place.chunk == i] for i in range(len(chunks))]
    read = asked.reader.read([chunk.prompt for chunk in chunks], spans)
    scores = torch.tensor(sentence_scores(index, QUESTION))
    given = asked.reader._asked_as(QUESTION)
    held = match_tokens(index, QUESTION, given.spans, torch.tensor([place.chunk for place in places]))[1]
    units = torch.tensor([sum(map(len, spans[:i])) + unit for i, one in enumerate(read) for unit in one.units])
    text = reader.unpacked(torch.cat([one.vectors for one in read]))
    found = reader.find(given.read, given.ids, text, units, scores / scores.max(), held)
    flat = [weight for _, some in sorted(matched.sentence_weights.items()) for weight in some]
    for unit, probability in zip(found.units, found.of_units, strict=True):
        assert flat[unit] == pytest.approx((probability / max(found.of_units)) ** 0.5, abs=0.05)
    assert sum(weight > 0 for weight in flat) == len(found.units) == 3
    assert matched.nowhere == pytest.approx(found.nowhere, abs=0.02)
    route = route_adapter(adapter, QUESTION, reader=asked.reader)
    assert "the reader" in route.reason or route.reason == "the document has only one chunk"
    assert max(max(of_chunk) for of_chunk in route.sentences) == 1.0
    prompts = " ".join(chunk.prompt for chunk in chunks)
    assert route.candidates and all(candidate.text in prompts for candidate in route.candidates)


def test_what_a_document_does_not_say_is_refused_before_the_first_token(asked, monkeypatch):
    """By default where documents alone are named; not with `always`, nor with strict=False, nor by a pattern."""
    asked.learn(Document.from_text(TEXT), "kettle")
    assert asked.answer(QUESTION, "kettle").answered_by == "adapter"
    saying(asked, monkeypatch, nowhere=50.0)
    asked.reader.reader.refusing.fill_(1.0)
    monkeypatch.setattr(
        "loracast.answering.model.answers", lambda *a, **k: pytest.fail("the model was asked") if a[1] else []
    )
    pieces = list(asked.stream(QUESTION, "kettle"))
    given = asked.answer(QUESTION, "kettle")
    assert (given.text, given.answered_by, pieces) == (NOT_SAID, "refusal", [NOT_SAID])
    assert asked.answer(QUESTION, "kettle", strict=True).answered_by == "refusal"
    monkeypatch.undo()
    saying(asked, monkeypatch, nowhere=50.0)
    assert asked.answer(QUESTION, "kettle", strict=False).answered_by == "base"
    assert asked.answer(QUESTION, "kettle", always=True).answered_by == "adapter"


def test_small_talk_goes_to_the_base(asked, monkeypatch):
    asked.learn(Document.from_text(TEXT), "kettle")
    saying(asked, monkeypatch, foreign=50.0)
    assert asked.answer("Hello!", "kettle").answered_by == "base"
    assert asked.answer("Hello!", "kettle", strict=True).answered_by == "refusal"


@pytest.mark.parametrize("vectors", [b"", b"xyz", "text", b"x" * 160])
def test_vectors_of_a_stranger_are_checked(asked, vectors):
    adapter = asked.learn(Document.from_text(TEXT), "kettle")
    adapter.index.chmod(0o600)
    with sqlite3.connect(adapter.index) as database:
        database.execute("UPDATE vectors SET vectors = ?", (vectors,))
        if len(vectors) == 160:
            database.execute("UPDATE vectors SET units = ?", (b"\xff\x00" * 10,))
    with pytest.raises(AdapterError, match="vectors"):
        asked.reader.match(adapter.index, QUESTION)
