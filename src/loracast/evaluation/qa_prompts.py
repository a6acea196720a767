"""Prompts that show a document and ask a question about it, of which `loracast eval qa` compares several."""

from __future__ import annotations

from collections.abc import Callable

from loracast.base.chat import ChatFormat, Message
from loracast.evaluation.documents import Prompt
from loracast.question_answering import ASK_SYSTEM_TURN

_EXAMPLE = (
    "The Hartwell Bridge was opened in 1897 and is 312 metres long. It was designed by Clara Menzies, who had built "
    "two lighthouses before. Since 1975 only trams and cyclists may cross it."
)
_EXAMPLE_ANSWERS = (
    ("Who designed the Hartwell Bridge?", "Clara Menzies"),
    ("How long is the bridge?", "312 metres"),
    ("What may cross the bridge since 1975?", "only trams and cyclists"),
)
# A document with questions and answers as they are wanted: without it, the base answers with sentences.


def _naive(document: str, question: str) -> list[Message]:
    return [{"role": "user", "content": f"{document}\n\n{question}"}]


def _brief(document: str, question: str) -> list[Message]:
    return [{"role": "user", "content": f"{document}\n\nQuestion: {question}\nAnswer in a few words."}]


def _quoting(document: str, question: str) -> list[Message]:
    order = "Answer the question with words from the text, as short as possible."
    return [{"role": "user", "content": f"Text: {document}\n\n{order}\nQuestion: {question}\nAnswer:"}]


def _shots(document: str, question: str) -> list[Message]:
    """Examples as turns: a document with its first question, then further ones; then the real one in the same way."""
    messages: list[Message] = []
    for number, (example, answer) in enumerate(_EXAMPLE_ANSWERS):
        content = _quoted(_EXAMPLE, example) if number == 0 else f"Question: {example}\nShort answer:"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": _quoted(document, question)}]


def _twice(document: str, question: str) -> list[Message]:
    """Examples as turns; each question stands before its document too, so that the base knows what to read for."""
    messages: list[Message] = []
    for example, answer in _EXAMPLE_ANSWERS:
        content = f"Question: {example}\n\n{_quoted(_EXAMPLE, example)}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": f"Question: {question}\n\n{_quoted(document, question)}"}]


def _quoted(document: str, question: str) -> str:
    return f"{document}\n\nQuestion: {question}\nShort answer:"


def _prompt(compose: Callable[[str, str], list[Message]]) -> Prompt:
    """A prompt of an empty system turn and the composed turns."""

    def prompt(chat: ChatFormat, document: str, question: str) -> list[int]:
        return chat.conversation([{"role": "system", "content": ASK_SYSTEM_TURN}, *compose(document, question)])

    return prompt


PROMPTS: dict[str, Prompt] = {
    "naive": _prompt(_naive),
    "brief": _prompt(_brief),
    "quoting": _prompt(_quoting),
    "shots": _prompt(_shots),
    "twice": _prompt(_twice),
}
BEST = "quoting"
"""The best of them on the dev split (docs/notebook)."""
