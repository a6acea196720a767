"""Near misses: what is called not said is not in the text, and what is still answered is."""

import random
import re
from collections import Counter
from functools import cache

import pytest

from loracast.answering.answers import NOT_SAID
from loracast.documents.units import sentence_spans
from loracast.lab.data.corrections import make_correction
from loracast.lab.data.everyday import EverydayDocument, make_document
from loracast.lab.data.near_misses import as_everyday, keep_part, make_near_misses, swap_names, take_out
from loracast.lab.data.rows import DocumentQuestion, QuestionedDocument
from loracast.lab.data.tables import make_table

MAKERS = {
    "everyday": lambda rng: make_document(rng, split="train", genre="staff directory"),
    "tables": lambda rng: make_table(rng, "train", 12, theme="staff"),
    "corrections": lambda rng: make_correction(rng, "train"),
}
ENGINE = QuestionedDocument(
    "engine",
    "The Analytical Engine was designed by Charles Babbage in London. He began it in 1834 and never finished it. "
    "Ada Lovelace wrote notes about it, which Richard Taylor printed. Its store was to hold 1,000 numbers. "
    "Cards told the engine what to do.",
    (
        DocumentQuestion("Who wrote notes about the Analytical Engine?", ("Ada Lovelace", "Lovelace"), True),
        DocumentQuestion("When was the Analytical Engine begun?", ("1834",), True),
        DocumentQuestion("What told the engine what to do?", ("Cards",), True),
        DocumentQuestion("What did Charles Babbage do with his machine?", ("never finished it",), True),
        DocumentQuestion("Was it a success?", ("no",), False),
    ),
)
ENIGMA = QuestionedDocument(
    "enigma", "The Enigma was a machine. Arthur Scherbius sold it.",
    (DocumentQuestion("What did Arthur Scherbius sell?", ("machine",), True),
     DocumentQuestion("What was the Enigma?", ("a machine",), True)),
)  # fmt: skip


@cache
def pairs(kind: str) -> list[tuple[EverydayDocument, EverydayDocument]]:
    """Documents with near misses that were made of them."""
    rng = random.Random(0)
    documents = [MAKERS[kind](rng) for _ in range(30)]
    return [(one, miss) for one in documents for miss in make_near_misses(rng, one, documents)]


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_not_said_is_not_in_the_text(kind: str) -> None:
    whys: Counter[str] = Counter()
    for document, miss in pairs(kind):
        answers = {fact.question: fact for fact in document.facts}
        assert len({fact.question for fact in miss.facts}) == len(miss.facts)
        for fact in miss.facts:
            why = fact.attribute.partition(": ")[0]
            if why in ("taken out", "other part"):
                was = answers[fact.question]
                values = (was.answer, *was.options)
                assert any(was.answer in document.text for value in values) and fact.answer == NOT_SAID
                assert not any(value.lower() in miss.text.lower() for value in values)
            elif why == "other name":
                assert fact.question not in answers and fact.subject in fact.question
                assert miss.text == document.text and not re.search(rf"\b{re.escape(fact.subject)}\b", miss.text)
            else:
                assert fact == answers[fact.question]
                assert fact.kind != "span" or miss.text.count(fact.statement) == 1
                continue
            whys[why] += 1
    assert len(whys) == 3 and min(whys.values()) > 15


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_left_are_units_of_the_document_with_its_rows(kind: str) -> None:
    for document, miss in pairs(kind):
        left = "".join(miss.text.split())
        for start, end in sentence_spans(document.text, document.rows):
            left = left.removeprefix("".join(document.text[start:end].split()))
        assert not left
        assert "\n\n\n" not in miss.text and miss.text == miss.text.strip()
        lines = {document.text[row:].split("\n")[0] for row in document.rows}
        assert {miss.text[row:].split("\n")[0] for row in miss.rows} == lines & set(miss.text.split("\n"))


def test_a_name_is_swapped_for_one_in_the_same_place_of_another_question() -> None:
    engine, enigma = as_everyday(ENGINE), as_everyday(ENIGMA)
    asked = set()
    for seed in range(10):
        made = swap_names(random.Random(seed), engine, [enigma])
        asked |= {fact.question for fact in made.facts if fact.kind == "not said"} if made else set()
    assert asked == {
        "What did Arthur Scherbius do with his machine?"
    }  # "Analytical Engine" has two words, "Enigma" one
    assert swap_names(random.Random(0), engine, []) is None


def test_peoples_answers_without_a_name_are_not_taken_for_the_only_ones() -> None:
    engine = as_everyday(ENGINE)
    assert [fact.answer for fact in engine.facts] == ["Ada Lovelace", "1834", "Cards", "never finished it"]
    missed = set()
    for seed in range(40):
        for made in (take_out(random.Random(seed), engine), keep_part(random.Random(seed), engine)):
            missed |= {fact.question for fact in made.facts if fact.kind == "not said"} if made else set()
    assert missed == {fact.question for fact in engine.facts[:3]}
