"""Texts that correct themselves: the newest value answers, nobody told what is not said, and splits are disjoint."""

import itertools
import random
import re
from collections import Counter
from functools import cache

import pytest

from loracast.answering.answers import NOT_SAID
from loracast.lab.data.corrections import CHANGED, load_topics, make_correction
from loracast.lab.data.everyday import EverydayDocument
from loracast.lab.data.facts import Split, entity_split, expand, pick_alternatives, variants
from loracast.lab.evaluation.synthetic import is_right

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
TOPICS, PHRASES = load_topics()


@cache
def drawn(split: Split) -> list[EverydayDocument]:
    return [make_correction(random.Random(f"0/{i}"), split) for i in range(200)]


def test_there_is_enough_content_and_wordings_have_their_slots() -> None:
    topics = Counter(topic.split for topic in TOPICS)
    assert topics["train"] >= 10 and min(topics["dev"], topics["test"]) >= 5
    rng = random.Random(0)
    for topic in TOPICS:
        assert len(topic.facts) >= 6
        for fact in topic.facts:
            assert all(text.count("{v}") == 1 for text in (*fact.state, *fact.change))
            assert not any(text.startswith("{") for text in fact.change)  # it may begin with a small letter
            assert all(text.count("{s}") == 1 and text.endswith("?") for text in fact.ask)
            assert "{" not in expand(rng, pick_alternatives(rng, fact.value))
        for phrases in PHRASES.values():
            assert all(layout.count("<say>") < len(topic.facts) for layout in phrases.notices)  # some remain untold


@pytest.mark.parametrize(("one", "other"), itertools.combinations(SPLITS, 2))
def test_splits_share_no_topic_wording_or_layout(one: Split, other: Split) -> None:
    def everything(split: Split) -> set[str]:
        facts = [fact for topic in TOPICS if topic.split == split for fact in topic.facts]
        of_topics = [text for fact in facts for text in (*fact.state, *fact.change, *fact.ask)]
        phrases = PHRASES[split]
        of_all = [*phrases.change, *phrases.notices, *phrases.fillers, *phrases.lines, *phrases.opens]
        of_all += [*phrases.leads, *phrases.replies, *phrases.proposes, *phrases.rejects]
        return {text.lower() for wording in (*of_topics, *of_all) for text in variants(wording)}

    assert not everything(one) & everything(other)
    subjects = [{fact.subject for document in drawn(split) for fact in document.facts} for split in (one, other)]
    assert not subjects[0] & subjects[1]


def test_an_entity_is_of_its_split() -> None:
    names = [re.search(r"the (\w+) (concert|workshop)$", d.title, re.IGNORECASE) for d in drawn("train")]
    assert sum(name is not None for name in names) > 10
    assert all(entity_split(name[1]) == "train" for name in names if name)


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_is_the_newest_value(split: Split) -> None:
    n_changed = n_twice = 0
    for document in drawn(split):
        assert not re.search(r"[{}\[<]say|[{}]", document.text)
        is_above = re.match(r"UPDATED|Attention|Important", document.text)  # these name what stands below as outdated
        for fact in document.facts:
            if fact.kind != "span":
                continue
            assert document.text.count(fact.statement) == 1
            assert fact.statement[fact.value_at :].startswith(fact.answer)
            assert not fact.options or fact.options[0].lower() == fact.answer.lower()
            if fact.attribute.startswith(CHANGED):
                n_changed += 1
                n_twice += len(fact.options) > 2
                first = document.text.lower().index(fact.options[1].lower())
                assert (document.text.index(fact.statement) < first) == bool(is_above)
            elif not fact.options:
                assert document.text.lower().count(fact.answer.lower()) == 1
    assert n_changed > 200 and n_twice > 10


@pytest.mark.parametrize("split", SPLITS)
def test_nobody_tells_what_is_not_said(split: Split) -> None:
    topics = {topic.name: topic for topic in TOPICS if topic.split == split}
    n_not_said = 0
    for document in drawn(split):
        topic = topics[document.genre.split(": ")[1]]
        for fact in document.facts:
            if fact.kind == "not said":
                n_not_said += 1
                assert fact.answer == NOT_SAID
                (told,) = (one for one in topic.facts if one.name == fact.attribute)
                for wording in (*told.state, *told.change):
                    pattern = re.sub(r"\\{\w+\\}", "[^.]{1,60}?", re.escape(wording.replace("{s}", fact.subject)))
                    assert not re.search(pattern, document.text, re.IGNORECASE), document.text
    assert n_not_said > 200


def test_an_older_or_a_rejected_value_is_wrong() -> None:
    facts = [fact for document in drawn("dev") for fact in document.facts if fact.options]
    rejected = [fact for fact in facts if not fact.attribute.startswith(CHANGED)]
    assert len(facts) > 100 and rejected
    for fact in facts:
        assert is_right(f"It is {fact.answer}.", fact)
        assert not any(is_right(f"It is {value}.", fact) for value in fact.options[1:])


def test_notices_and_chats_are_drawn_on_demand() -> None:
    chats = [make_correction(random.Random(i), "train", is_chat=True) for i in range(20)]
    assert all(chat.genre.startswith("chat: ") and len(chat.text.splitlines()) > 5 for chat in chats)
    assert sum("Assistant: " in chat.text for chat in chats) > 3
    assert make_correction(random.Random(3), "train", is_chat=False).genre.startswith("notice: ")
    assert make_correction(random.Random(3), "dev") == make_correction(random.Random(3), "dev")
