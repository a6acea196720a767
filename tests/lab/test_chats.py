"""Generated conversations: every answer stands where it is said to, and what was not said has no answer."""

from __future__ import annotations

import random
from typing import get_args

import pytest

from loracast.answering.answers import NOT_SAID
from loracast.lab.data.chats import Asks, load_themes, make_chat


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_answers_stand_in_messages_of_whom_they_are_about(split):
    asked = set()
    for seed in range(60):
        chat = make_chat(random.Random(seed), split)
        document = chat.as_document()
        lines = document.text.split("\n")
        assert [document.text[row:].partition("\n")[0] for row in document.rows] == lines
        told = [line.partition(": ")[2] for line in lines]
        for fact in chat.facts:
            kind = fact.attribute.partition(":")[0]
            asked.add(kind)
            if fact.kind == "not said":
                assert fact.answer == NOT_SAID and kind in ("other said", "nobody said") and not fact.statement
                continue
            assert fact.statement in lines
            assert fact.statement[fact.value_at :].startswith(fact.answer)
            speaker = fact.statement.partition(" (")[0]
            if kind == "who":
                assert fact.answer == speaker and speaker not in fact.question
                assert sum(value in line for line in told for value in [fact.statement.partition(": ")[2]]) == 1
            else:
                assert speaker in fact.question
            if kind == "changed":  # the newest of what was said
                theme = fact.attribute.partition(": ")[2]
                earlier = [one for one in lines[: lines.index(fact.statement)] if one.startswith(speaker)]
                assert earlier, theme
    assert asked == set(get_args(Asks))


def test_splits_share_no_theme():
    themes, _ = load_themes()
    names = {split: {one.name for one in themes if one.split == split} for split in ("train", "dev", "test")}
    wordings = {s: {w for one in themes if one.split == s for w in (*one.say, *one.ask)} for s in names}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not names[one] & names[other] and not wordings[one] & wordings[other]


def test_the_same_state_gives_the_same_chat():
    assert make_chat(random.Random(3), "train") == make_chat(random.Random(3), "train")
