"""Which questions of a chat are looked up with those before them."""

from __future__ import annotations

import pytest

from loracast.answering.answers import NOT_SAID
from loracast.answering.model import Model
from loracast.documents import Document
from loracast.reading.search import queries, stands_alone

BEFORE = ["One", "Two", "Three"]


@pytest.mark.parametrize(
    "question",
    [
        "And in winter?",
        "How heavy is it?",
        "What about Sundays?",
        "Why?",
        "Which colour?",
        "Does she live there?",
        "它多重？",
    ],
)
def test_a_question_that_refers_to_the_ones_before_goes_with_two_of_them_and_then_alone(question):
    assert queries(question, BEFORE) == [f"Two\nThree\n{question}", question] and queries(question, []) == [question]


@pytest.mark.parametrize(
    "question",
    [
        "How long is the warranty?", "Who wrote Hamlet?", "What is the capital of France?", "东京的博物馆几点开门和关门？",
        "How long is it until the warranty of the kettle ends?",
    ],
)  # fmt: skip
def test_a_question_that_says_what_it_is_about_goes_alone(question):
    assert stands_alone(question) and queries(question, BEFORE) == [question]


def test_the_questions_before_make_a_question_neither_more_nor_less_about_a_document(model: Model):
    """Strict answers show what the gate lets pass."""
    text = "The paper lanterns are sold in the market hall for twelve euros each. A lantern weighs 90 grams."
    model.learn(Document.from_text(text, title="Paper lanterns"), "lanterns")

    def is_refused(*questions: str) -> bool:
        turns = [{"role": "user", "content": one} for one in questions]
        prepared = model.prepare(turns, "lanterns", strict=True)
        return prepared.answer is not None and prepared.answer.text == NOT_SAID

    about, other = "Where are paper lanterns sold?", "What is the capital of France?"
    assert not is_refused(about) and is_refused(other)
    assert is_refused(about, other) and not is_refused(other, other, about)
    assert not is_refused(about, "And how much?") and not is_refused(about, "How heavy is it?")
