"""Lists and tables of a text, how many rows they have, and which of two rows has more."""

from __future__ import annotations

import sqlite3

import pytest

from loracast.documents import Chunk
from loracast.library.comparing import compared
from loracast.library.counting import counted
from loracast.library.index import write_index
from loracast.library.routing import Route, answer_in_words, pick, route_question, route_set
from loracast.library.rows import lists_in

TEXT = """Welcome to our school. It has 14 teachers.

Our courses
* Drawing for couples (Mondays, 9:30 am; £40)
* Sailing for nurses (Fridays, 1:15 pm; £105)
* Pottery for engineers (Sundays, 11:00 am; £60)

Please be on time.
Bring a towel.

Room | Seats | Windows
Blue room | 20 | 3
Green room | 35 | 12
"""


def test_lists_are_lines_of_one_form_with_what_stands_above():
    courses, rooms = lists_in(TEXT)
    assert len(courses.rows) == 3 and courses.above == "Our courses" and not courses.header and courses.has_columns
    assert rooms.rows == ("Blue room | 20 | 3", "Green room | 35 | 12")
    assert rooms.header == "Room | Seats | Windows" and rooms.above == "Bring a towel."
    assert not lists_in("One line: 3\n\nAnother sentence.\nAnd one more.")
    assert not lists_in("* eggs\n* milk")[0].has_columns and lists_in("") == []


def test_sentences_of_one_form_are_a_list():
    acts = "At 5:40 pm: the Ants, in tent 15. At 8:40 pm: the Busy Bees, in tent 13. At 9:05 pm: the Cats, in tent 1."
    (found,) = lists_in(acts)
    assert len(found.rows) == 3 and counted("How many acts are there?", acts, [found]) == 3
    assert not lists_in("The lamp is red. The desk is old. It was made in the north by a man of sixty years.")
    assert not lists_in("We charge £4 for a cup and £5 for a mug. " * 3)  # two in each


@pytest.mark.parametrize(
    ("question", "number"),
    [
        ("How many courses are on offer?", 3),
        ("Between how many courses can I choose?", 3),
        ("How many rooms are there?", 2),
        ("How many teachers are there?", None),  # stated in the text
        ("How many seats are in the green room?", None),  # of one row
        ("How many weeks does a course take?", None),  # a unit
        ("How many holidays are there each year?", None),
        ("How many cats are there?", None),  # two lists, neither of cats
        ("Which courses are there?", None),
    ],
)
def test_rows_are_counted_where_the_question_asks_for_their_number(question, number):
    assert counted(question, TEXT, lists_in(TEXT)) == number


def test_the_only_list_is_counted_without_a_word_that_names_it():
    stops = "Timetable\n* Mill Road at 9:05\n* Town Hall at 9:12\n* Harbour at 9:30"
    assert counted("How many stops are there?", stops, lists_in(stops)) == 3
    assert counted("How many stops does it have in winter?", stops, lists_in(stops)) is None
    assert counted("How many stops are there?", f"{stops}\nTwo stops are new.", lists_in(stops)) is None


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which is cheaper, Drawing for couples or Pottery for engineers?", "Drawing for couples"),
        ("Which costs more: Drawing for couples or Pottery for engineers?", "Pottery for engineers"),
        ("Which is earlier, Sailing for nurses or Pottery for engineers?", "Pottery for engineers"),
        ("Are there more seats in the blue room or in the green room?", "the green room"),
        ("Which has fewer windows, the blue room or the green room?", "the blue room"),
        ("Which is larger, the blue room or the green room?", None),  # two numbers
        ("Which is cheaper, Drawing for couples or Dancing for couples?", None),
        ("Which is better, the blue room or the green room?", None),
        ("Is the blue room cheaper?", None),
    ],
)
def test_two_rows_are_compared_by_the_number_that_is_asked_for(question, answer):
    assert compared(question, lists_in(TEXT)) == answer


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which has the higher maximum, the heater or the sensor?", None),  # volts and millivolts
        ("Which has the higher minimum, the heater or the sensor?", "the sensor"),
        ("Which has the lower minimum, the heater or the sensor?", "the heater"),
        ("Which opens later, the shop or the bar?", "the bar"),
    ],
)
def test_numbers_are_compared_in_one_column_and_one_unit(question, answer):
    text = "Part | Minimum | Maximum\nHeater | 470 mV | 5.85 V\nSensor | 600 mV | 900 mV\n\nShop: 9:30\nBar: 11:00"
    assert compared(question, lists_in(text)) == answer


def test_a_route_has_the_answer_of_the_rows_of_all_chunks():
    head, tail = TEXT[:150], TEXT[150:]
    index = sqlite3.connect(":memory:")
    write_index(index, [Chunk(part, 0, len(part), "", len(part.split())) for part in (head, tail)])
    route = pick(index, 2, "How many rooms are there?")
    assert route.answer == "2" and answer_in_words([route]) == "2" and answer_in_words([route, route]) is None
    assert pick(index, 2, "Where is the green room?").answer is None
    assert pick(index, 2, "How many rooms are there?\nWhere are they?").answer is None
    assert pick(index, 2, "Where is it?\nAnd how many rooms are there?").answer == "2"
    away = route_question(index, 2, "How many penguins live in Antarctica?", 2, 0.2)
    assert away.is_empty and away.answer is None
    assert route_set(index, 2, ["How many rooms are there?"] * 2).answer is None
    index.close()


def test_any_document_that_says_yes_answers_and_rows_answer_alone():
    none, yes, no, rows = Route(), Route(says_yes=True), Route(says_yes=False), Route(answer="3", says_yes=True)
    away = Route((), says_yes=True, answer="3")
    for routes, answer in (
        ([], None), ([none], None), ([away], None), ([yes], "Yes"), ([none, no], "No"), ([no, yes], "Yes"),
        ([rows], "3"), ([away, rows], "3"), ([rows, no], "Yes"), ([away, no], "No"),
    ):  # fmt: skip
        assert answer_in_words(routes) == answer
