"""The document in the window: several prompts, the middle left out, and the base trained to read it there (the ceiling)."""

from __future__ import annotations

from collections.abc import Callable

from loracast.base.chat import Message
from loracast.data.qa import DocumentQuestion
from loracast.evaluation.cut import without_middle
from loracast.evaluation.qa.baseline import MAX_NEW_TOKENS, Baseline, Given, Request, Setup
from loracast.model import ASK_SYSTEM_TURN
from loracast.training.episode_maker import reading_prompt

TRUNCATED_TOKENS = 128
"""Tokens that are left of a document whose middle is left out."""
_EXAMPLES = (
    (
        "The Hartwell Bridge was opened in 1897 and is 312 metres long. It was designed by Clara Menzies, who had built two "
        "lighthouses before. Since 1975 only trams and cyclists may cross it.",
        (
            ("Who designed the Hartwell Bridge?", "Clara Menzies"),
            ("How long is the bridge?", "312 metres"),
            ("What may cross the bridge since 1975?", "only trams and cyclists"),
        ),
    ),
)
"""A document with questions and answers as they are wanted: without it, the base answers with sentences."""

Compose = Callable[[str, str], list[Message]]
"""(document, question) -> the conversation."""


def _naive(document: str, question: str) -> list[Message]:
    return [{"role": "user", "content": f"{document}\n\n{question}"}]


def _brief(document: str, question: str) -> list[Message]:
    return [{"role": "user", "content": f"{document}\n\nQuestion: {question}\nAnswer in a few words."}]


def _quoting(document: str, question: str) -> list[Message]:
    asked = f"Text: {document}\n\nAnswer the question with words from the text, as short as possible.\nQuestion: {question}\nAnswer:"
    return [{"role": "user", "content": asked}]


def _shots(document: str, question: str) -> list[Message]:
    """Examples as turns: a document with its first question, then further ones; then the real one in the same way."""
    messages: list[Message] = []
    for text, asked in _EXAMPLES:
        for number, (example, answer) in enumerate(asked):
            content = _quoted(text, example) if number == 0 else f"Question: {example}\nShort answer:"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": _quoted(document, question)}]


def _twice(document: str, question: str) -> list[Message]:
    """The same with the question before the document too, so that the base knows what to read for."""
    messages: list[Message] = []
    for text, asked in _EXAMPLES:
        for example, answer in asked:
            content = f"Question: {example}\n\n{_quoted(text, example)}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": f"Question: {question}\n\n{_quoted(document, question)}"}]


def _quoted(document: str, question: str) -> str:
    return f"{document}\n\nQuestion: {question}\nShort answer:"


PROMPTS: dict[str, Compose] = {"naive": _naive, "brief": _brief, "quoting": _quoting, "shots": _shots, "twice": _twice}
BEST = "quoting"
"""The best of them on the dev split (docs/experiments.md)."""


def with_text(setup: Setup, compose: Compose, text: str, question: str, max_tokens: int | None = None) -> Request:
    """A prompt with a text in it, whose middle gives way where the window, or `max_tokens`, is too small."""
    base = setup.model.base

    def prompt(document: str) -> list[int]:
        return base.chat.conversation([{"role": "system", "content": ASK_SYSTEM_TURN}, *compose(document, question)])

    room = base.window - MAX_NEW_TOKENS - len(prompt("")) - 8  # joints may be encoded otherwise than inside the text
    return Request(tuple(prompt(without_middle(base.tokenizer, text, max(1, min(room, max_tokens or room))))))


def _whole(compose: Compose) -> Callable[[Setup, Given, DocumentQuestion], Request]:
    return lambda setup, given, question: with_text(setup, compose, given.adapter.full_text, question.question)


def _truncated(setup: Setup, given: Given, question: DocumentQuestion) -> Request:
    return with_text(setup, PROMPTS[BEST], given.adapter.full_text, question.question, TRUNCATED_TOKENS)


def _read(setup: Setup, given: Given, question: DocumentQuestion) -> Request:
    base = setup.model.base
    empty = len(reading_prompt(base.chat, "", question.question))
    text = without_middle(base.tokenizer, given.adapter.full_text, base.window - MAX_NEW_TOKENS - empty - 8)
    return Request(tuple(reading_prompt(base.chat, text, question.question)), setup.reader)


BASELINES = {
    "window": Baseline("in the window", _whole(PROMPTS[BEST])),
    **{
        f"window_{name}": Baseline(f"window, prompt {name!r}", _whole(prompt), is_optional=True)
        for name, prompt in PROMPTS.items()
        if name != BEST
    },
    "truncated": Baseline(f"window, cut to {TRUNCATED_TOKENS} tokens", _truncated),
    "ceiling": Baseline("window, trained reader (ceiling)", _read, needs_reader=True),
}
