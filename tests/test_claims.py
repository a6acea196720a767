"""Questions that ask for yes or no are checked against the text."""

from __future__ import annotations

import pytest

from loracast.library.claims import claims_in, holds
from loracast.library.routing import Route, said_together

TABLE = "Spin\tAnna\tMonday 7:15\nYoga\tBoris\tFriday 9:30"


@pytest.mark.parametrize(
    ("question", "claims"),
    [
        ("Is the pool open at 9:30?", {"9:30"}),
        ("Does a ticket cost £1,250?", {"1250"}),
        ("Are the bins of Mill Road emptied on Mondays?", {"mill", "road", "monday"}),
        ("Is the bag lighter than 15kg?", {"15"}),
        ("May I bring my dog?", set()),
        ("When is the pool open on Mondays?", set()),
        ("Is it on Monday or Friday?", set()),
        ("Was the tower built in 1911?", {"1911"}),
        ("Was kostet das Zimmer am Montag?", set()),
        ("", set()),
        ("?", set()),
    ],
)
def test_numbers_and_names_are_claimed_by_questions_for_yes_or_no(question, claims):
    assert claims_in(question) == claims


@pytest.mark.parametrize(
    ("question", "sentence", "answer"),
    [
        ("Is the pool open at 9:30?", "The pool opens at 9:30.", True),
        ("Is the pool open at 9:30?", "The pool opens at 9:35 am, every day.", False),
        ("Is the price £5?", "It costs £5.50.", False),
        ("Is it 15 kg?", "The bag weighs 15kg.", True),
        ("Is it on Mondays?", "Anna's class is on Monday.", True),
        ("Does Anna’s class begin at 8?", "Anna's class begins at 8.", True),
        ("Does it run on Windows?", "It does not run on Windows.", None),
        ("Does it run on Windows?", "It doesn’t run on Windows.", None),
        ("Can Anna bring her dog?", "Dogs are welcome, if they are quiet.", None),
        ("Can Anna bring her dog?", "Ask Boris about dogs.", False),
        ("Is Yoga at 9:30?", TABLE, True),
        ("Is Spin at 9:30?", TABLE, False),
    ],
)
def test_claims_are_compared_with_a_sentence(question, sentence, answer):
    assert holds(claims_in(question), sentence) is answer


def test_several_documents_give_one_answer():
    nothing, yes, no = (Route(says_yes=says) for says in (None, True, False))
    assert said_together([nothing, no, no]) == [None, False, None]
    assert said_together([no, nothing, yes]) == [True, None, None]
    assert said_together([nothing]) == [None] and said_together([]) == []
