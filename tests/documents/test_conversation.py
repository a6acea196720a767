"""Conversations as documents: who said it and when stands before every message, in every form that is read."""

from __future__ import annotations

import io
import json
from datetime import datetime

import pytest

from loracast.documents import Document, read_document
from loracast.documents.dates import with_dates
from loracast.errors import DocumentError


def read(text: str, name: str) -> Document:
    return read_document(io.BytesIO(text.encode()), file_name=name)


def rows_of(document: Document) -> list[str]:
    return [document.text[row:].partition("\n")[0] for row in document.rows]


SAID = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "I painted\nthe kitchen.", "time": "2023-05-08T13:56:00"},
    {
        "role": "assistant",
        "name": "Ben",
        "content": [{"type": "text", "text": "Which colour?"}],
        "timestamp": 1683554400,
    },
    {"speaker": "Ada", "text": "Green.", "date": "1:56 pm on 8 May, 2023"},
]
LINES = [
    "user (Monday 8 May 2023, 13:56): I painted the kitchen.",
    "Ben (Monday 8 May 2023, 14:00): Which colour?",
    "Ada (1:56 pm on 8 May, 2023): Green.",
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, SAID)) + "\n\n"),
        ("a.json", json.dumps(SAID)),
        ("a.json", json.dumps({"messages": SAID}, indent=2)),
    ],
)
def test_messages_in_json_are_rows(name, text):
    document = read(text, name)
    assert rows_of(document) == document.text.split("\n") == LINES
    assert document.title == "Conversation of user, Ben, Ada"


def test_an_export_of_slack_names_people():
    ada = {"type": "message", "user": "U1", "user_profile": {"real_name": "Ada Olsen"}, "ts": "1512085950.000216"}
    export = [
        {**ada, "text": "The van is at Kim's, <@U2>."},
        {**ada, "subtype": "channel_join", "text": "<@U1> has joined"},
        {"type": "message", "user": "U2", "username": "kim", "ts": "1512085960.0", "text": "ok <@U1|ada>"},
    ]
    assert read(json.dumps(export), "day.json").text.split("\n") == [
        "Ada Olsen (Thursday 30 November 2017, 23:52): The van is at Kim's, kim.",
        "kim (Thursday 30 November 2017, 23:52): ok Ada Olsen",
    ]


NEW_YEAR = ("Sunday 31 December 2023, 21:41", "Monday 1 January 2024, 00:05")
JANUARY = ("Tuesday 2 January 2024, 09:07", "Wednesday 3 January 2024, 09:08")


@pytest.mark.parametrize(
    ("one", "two", "dates"),
    [
        ("31/12/23, 21:41 - ", "1/1/24, 00:05 - ", NEW_YEAR),
        ("[12/31/23, 9:41:07\u202fPM] ", "\u200e[1/1/24, 12:05:00\u202fAM] ", NEW_YEAR),
        ("02.01.2024, 09:07 - ", "03.01.2024, 09:08 - ", JANUARY),
        ("2024-01-02, 9.07 - ", "2024-01-03, 9.08 - ", JANUARY),
    ],
)
def test_an_export_of_whatsapp_in_the_dates_of_its_country(one, two, dates):
    text = f"{one}Messages are encrypted.\n{one}Ada: Bring: bread\nand milk\n\nplease\n{two}Kim Novak: Yes"
    assert read(text, "_chat.txt").text.split("\n") == [
        f"Ada ({dates[0]}): Bring: bread and milk please",
        f"Kim Novak ({dates[1]}): Yes",
    ]


def test_what_is_no_conversation_stays_a_text():
    for name, text in (
        ("a.json", '{"lamp": 3}'), ("a.json", "[1, 2]"), ("a.jsonl", '{"lamp": 3}\n{"lamp": 4}'),
        ("a.txt", "31/12/23, 21:41 - a note of mine"), ("a.txt", "Ada: yes\nKim: no"), ("a.json", "not json"),
    ):  # fmt: skip
        assert read(text, name).text == text
    broken = json.dumps(SAID[1]) + '\n{"role": "user"}'
    with pytest.raises(DocumentError, match="line 2 is no message"):
        read(broken, "a.jsonl")


MONDAY = datetime(2023, 5, 8, 13, 56)


@pytest.mark.parametrize(
    ("said", "dated"),
    [
        ("I went there yesterday.", "I went there yesterday [7 May 2023]."),
        ("We met last Sunday in May's garden.", "We met last Sunday [7 May 2023] in May's garden."),
        ("Two days ago, or last night?", "Two days ago [6 May 2023], or last night [7 May 2023]?"),
        ("Last year I ran; next month I start.", "Last year [2022] I ran; next month [June 2023] I start."),
        ("See you in two weeks", "See you in two weeks [the week of 22 May 2023]"),
    ],
)
def test_relative_dates_stand_beside_what_is_said(said, dated):
    assert with_dates(said, MONDAY) == dated
    message = json.dumps({"name": "Ada", "content": said, "time": MONDAY.isoformat() + "+02:00"})
    assert read(message, "a.jsonl").text == f"Ada (Monday 8 May 2023, 13:56): {dated}"
    assert dated not in read(message.replace("2023-05-08", "some day "), "a.jsonl").text


@pytest.mark.parametrize(
    "said",
    [
        "I may come on Sun if it works, wait a second.", "We go there every Sunday.", "I have 3 cats, since 2019.",
        "Now I am in March mood.", "She is 3 years old and has worked 10 hours today.", "On Monday I bought food for 2 months.",
    ],
)  # fmt: skip
def test_what_does_not_go_by_the_day_of_the_message_stays(said):
    assert with_dates(said, MONDAY) == said
