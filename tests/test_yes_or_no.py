"""Questions that ask for yes or no are checked against the text."""

from __future__ import annotations

import pytest

from loracast.library.routing import Route, said_together
from loracast.library.yes_or_no import answer_of, asks_yes_or_no, claims_in

TABLE = "Spin\tAnna\tMonday 7:15\nYoga\tBoris\tFriday 9:30"


@pytest.mark.parametrize(
    ("question", "claims"),
    [
        ("Is the pool open at 9:30?", {"9:30"}),
        ("Does a ticket cost £1,250?", {"1250"}),
        ("Are the bins of Mill Road emptied on Mondays?", {"mill", "road", "monday"}),
        ("Is the bag lighter than 15kg?", {"15"}),
        ("May I bring my dog?", set()),
        ("When is the pool open on Mondays?", None),
        ("Is it on Monday or Friday?", None),
        ("Was the tower built in 1911?", {"1911"}),
        ("Was kostet das Zimmer am Montag?", None),
        ("Can you tell me who has the key of the shed?", None),
        ("Could you please give us the number of the shed?", None),
        ("Do you know where Anna is?", None),
        ("Does the lease say how long it runs?", None),
        ("Can you tell me whether Anna is there?", {"anna"}),
        ("Do you know if dogs are allowed?", set()),
        ("Will they give us sheets?", set()),
        ("May I come to see how you work?", set()),
        ("Is the shed locked?\nand who has its key?", None),
        ("What does a ticket cost on Monday?\nIs it £30?", {"30"}),
        ("Is it Monday? Where is it?", {"monday"}),
        ("May I come if I'm late?", set()),
        ("", None),
        ("?", None),
    ],
)
def test_numbers_and_names_are_claimed_by_questions_for_yes_or_no(question, claims):
    assert (claims_in(question) if asks_yes_or_no(question) else None) == claims


@pytest.mark.parametrize(
    ("question", "sentence", "answer"),
    [
        ("Is the pool open at 9:30?", "The pool opens at 9:30.", True),
        ("Is the pool open at 9:30?", "The pool opens at 9:35 am, every day.", False),
        ("Is the price £5?", "It costs £5.50.", False),
        ("Is it 15 kg?", "The bag weighs 15kg.", True),
        ("Is it on Mondays?", "Anna's class is on Monday.", True),
        ("Does Anna’s class begin at 8?", "Anna's class begins at 8.", True),
        ("Does it run on Windows?", "It does not run on Windows.", False),
        ("Does it run on Windows?", "It doesn’t run on Windows.", False),
        ("May I bring my dog?", "Dogs are welcome.", True),
        ("May I bring my dog?", "Dogs must stay outside, without exception.", False),
        ("May I bring my dog?", "No dogs, please.", False),
        ("May I bring my dog?", "A dog is no problem.", True),
        ("Is it forbidden to bring a dog?", "Dogs are not allowed.", True),
        ("Is it forbidden to bring a dog?", "Dogs are welcome.", False),
        ("Is parkeren gratis?", "Parkeren is niet gratis.", None),
        ("Can Anna bring her dog?", "Dogs are welcome, if they are quiet.", None),
        ("Can Anna bring her dog?", "Ask Boris about dogs.", False),
        ("Is check-out at 11?", "Check-out is at 11:00.", True),
        ("Is it open at 9.30 PM?", "It opens at 9:30 p.m.", True),
        ("Is the party on 3 Sept?", "The party is on 3 September.", True),
        ("Is Anna there on Mon?", "Anna comes on Tuesdays.", False),
        ("Is it in Hall Bern?", "It is in Hall Bernard.", None),
        ("Is the meeting in room 12?", "The meeting is in room No. 12.", True),
        ("Is it open on Monday?", "It is not only open on Monday.", True),
        ("Must I apply by 5 May?", "Apply no later than 5 May.", True),
        ("Is breakfast included?", "It is included without extra charge.", True),
        ("May I park without charge?", "You may park here without charge.", True),
        ("Is it open at 10?", "It does not open until 10.", None),
        ("Is it still allowed?", "It is no longer allowed.", False),
        ("What does it cost?\nIs it forbidden?", "It is not allowed.", True),
        ("Is Yoga at 9:30?", TABLE, True),
        ("Is Spin at 9:30?", TABLE, False),
    ],
)
def test_claims_are_compared_with_a_sentence(question, sentence, answer):
    assert answer_of(sentence, question) is answer


def test_several_documents_give_one_answer():
    nothing, yes, no = (Route(says_yes=says) for says in (None, True, False))
    assert said_together([nothing, no, no]) == [None, False, None]
    assert said_together([no, nothing, yes]) == [True, None, None]
    assert said_together([no, no, yes], [False, True, True]) == [None, True, None]  # an old adapter has no Yes
    assert said_together([yes, nothing], [False, True]) == [None, None]
    assert said_together([nothing]) == [None] and said_together([]) == []
