"""Statements that deny what is asked, and rows that share it out."""

from __future__ import annotations

import sqlite3

import pytest

from loracast.documents import Chunk
from loracast.library.denial import denied
from loracast.library.index import write_index
from loracast.library.routing import pick


@pytest.mark.parametrize(
    ("question", "statement", "answer"),
    [
        ("May I bring my dog?", "Please leave your dog at home.", True),
        ("Is there support for Windows?", "Removed support for Windows.", True),
        ("Is the pool open on Mondays?", "We are closed on Mondays.", True),
        ("May I bring a bottle?", "Closed bottles are welcome.", False),
        ("Is a dog welcome?", "Bringing a dog is not forbidden.", False),
        ("Are dogs welcome?", "We do not mind dogs.", False),
        ("Do I need a visa?", "Nobody is let into the country without a visa.", False),
        ("Is photography permitted?", "Photography without flash is permitted.", False),
        ("Can I come without a ticket?", "Children do not need a ticket.", False),
        ("Can I come without a ticket?", "Children need a ticket, too.", True),
        ("Can I come without an adult?", "Children may come alone.", None),
        ("Must I bring a towel?", "There is no need to bring a towel.", True),
        ("Are the towels in the room?", "There is no need to bring towels.", None),
        ("Is the load 37 kg?", "Never put more than 37 kg on it, or the load falls.", False),
        ("Can it take more than 37 kg?", "Never put more than 37 kg on it.", True),
        ("Will the old password be accepted?", "The old password will no longer be accepted.", True),
        ("Do I get a meal?", "A meal is given to all children, so no food is needed from home.", False),
        ("Do I get a meal?", "Children are welcome, but no meal is given to them.", True),
        ("Can I park for free?", "Parking costs 5 euros.", True),
        ("Can I park for free?", "Parking is free of charge.", False),
        ("Can I park for free?", "There is a car park.", None),
        ("Do I have to pay for parking?", "Parking is free of charge.", True),
        ("Is there a towel?", "Yes, and it costs nothing.", False),
        ("Is there a towel?", "No, please bring one.", True),
        ("Is there a towel?", "Yes, but towels are not handed out on Sundays.", True),
        ("Is it open at 10?", "It does not open until 10.", None),
    ],
)
def test_what_a_statement_denies(question, statement, answer):
    assert denied(statement, question) is answer


TASKS = "Who does what:\n* repair the gate (Zdenek Finch, until Monday)\n* design a logo (Nils Goddard, until Friday)"
MEALS = "Day | Main course\nMonday | chicken stew\nTuesday | roast lamb\nFriday (dogs) | not served"
FEEDING = "12:33 ..... elephants ..... fresh leaves\n14:56 ..... iguanas ..... grapes"
PRICES = "Place | Low | High\nTent | £12 | £15\nMotorhome | £20 | £27"


@pytest.mark.parametrize(
    ("text", "question", "said"),
    [
        (TASKS, "Will Nils Goddard repair the gate?", False),
        (TASKS, "Will Nils Goddard design a logo?", True),
        (TASKS, "Will Zdenek Finch repair the gate?", True),
        (MEALS, "Is there chicken stew on Tuesday?", False),
        (MEALS, "Is there chicken stew on Monday?", True),
        (MEALS, "Are dogs served on Friday?", False),
        (FEEDING, "Do the iguanas get fresh leaves?", False),
        (FEEDING, "Do the elephants get fresh leaves?", True),
        (FEEDING, "Do the elephants get no fresh leaves?", False),
        (PRICES, "Is the tent £15 in the high season?", True),
        (PRICES, "Is the tent £27 in the high season?", False),
        (PRICES, "Is the tent £99?", False),
        ("The tent costs £12. Dogs sleep in the motorhome.", "May dogs sleep in the tent?", True),  # no rows
    ],
)
def test_the_rows_of_a_list_or_table_are_compared(text, question, said):
    index = sqlite3.connect(":memory:")
    write_index(index, [Chunk(text, 0, len(text), "", len(text.split()))])
    assert pick(index, 1, question).says_yes is said
    index.close()
