"""Sentences about another subject than the one that a question names weigh less."""

from __future__ import annotations

import sqlite3

import pytest

from loracast.documents.chunks import Chunk
from loracast.lab.training.losses import sentence_weights
from loracast.library.index import write_index
from loracast.reading.matching import about_others, names_in
from loracast.reading.routing import pick
from loracast.reading.search import sentence_scores

CAFES = [
    "Opening time of Cafe Nidetsu: 11:15.",
    "Do not ring the bell of Cafe Burmbi before 19:10.",
    "A table at Cafe Burmbi is yours with a call to 605.",
    "Dogs stay outside.",
]


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("When does Cafe Burmbi open?", [{"cafe", "burmbi"}]),
        ("Does Anna meet Ben in Room 5?", [{"anna"}, {"ben"}, {"room", "5"}]),
        ("How hot is Node FH55's case?", [{"node", "fh55"}]),
        ("What happens after 30 days?", []),
        ("May I bring my dog?", []),
        ("", []),
    ],
)
def test_names_stand_with_capitals_inside_a_question(question, names):
    assert names_in(question) == names


@pytest.mark.parametrize(
    ("question", "heading", "sentences", "others"),
    [
        ("When does Cafe Burmbi open?", "", CAFES, [True, False, False, False]),
        ("When do you open?", "", CAFES, [False] * 4),
        ("When does Bar Yuradrel open?", "", CAFES, [False] * 4),  # which nothing names
        ("When does Cafe Burmbi open?", "Cafe Burmbi / Hours", CAFES, [False] * 4),  # all below it are about that
        (
            "Who cooks at Cafe Burmbi?",
            "Where to eat",
            ["Cafe Burmbi", "The cook is Leon Ricci.", "Cafe Nidetsu", "The cook is Mei Rixin."],
            [False, False, False, True],
        ),
        (
            "What does Anna like?",
            "",
            ["Ben lives in Rome.", "He likes Wine Bars.", "Anna lives in Bonn.", "She likes Jazz.", "Most like Blues."],
            [True, True, False, False, True],
        ),
        ("Where does Anna meet Ben?", "", ["On Monday, Anna is in Room 5.", "Room 6 is Carla's."], [False, True]),
    ],
)
def test_a_sentence_with_another_name_alone_is_about_another_subject(question, heading, sentences, others):
    assert about_others(question, [(heading, sentences)]) == [others]


def test_names_are_looked_for_in_all_chunks():
    found = about_others("When does Cafe Burmbi open?", [("", CAFES[:1]), ("", CAFES[1:])])
    assert found == [[True], [False, False, False]]


def index_of(*chunks: str) -> sqlite3.Connection:
    database, at = sqlite3.connect(":memory:"), 0
    made = []
    for text in chunks:
        made.append(Chunk(text, at, at + len(text), "", len(text.split())))
        at += len(text) + 1
    write_index(database, made)
    return database


def test_the_named_subject_outweighs_more_words_in_common():
    index, question = index_of("\n".join(CAFES)), "What opening time has Cafe Burmbi?"
    other, named, *_ = sentence_scores(index, question)
    assert other > named  # by its words alone
    other, named, *_ = sentence_weights(index, question)
    assert named == 1 > other
    route = pick(index, 1, question)
    assert route.sentences == (tuple(sentence_weights(index, question)),)


def test_chunks_of_an_order_of_their_own_keep_their_sentences():
    index, question = index_of(CAFES[3], CAFES[0], CAFES[1]), "What opening time has Cafe Burmbi?"
    route = pick(index, 3, question, 2)
    weights = dict(zip(route.chunks, route.sentences, strict=True))
    assert weights[2][0] > weights[1][0]
