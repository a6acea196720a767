"""A base's own chat format, from its tokenizer's template; and text to tokens in which no text can become a control token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from loracast.errors import BaseModelError

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": ...}`"""


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text in which a string such as `<|im_end|>` is text, not a control token."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def encode_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The same, with the character offsets of each token."""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    return encoded["input_ids"], encoded["offset_mapping"]


class ChatFormat:
    """Messages -> token ids, as the base was trained to see them.

    The template is rendered around place holders, and what people wrote is put in as plain text afterwards: a document or a question
    that contains the template's own markers cannot open or close a turn.
    """

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise BaseModelError(
                "this base has no chat template; use an instruction-tuned base (its tokenizer defines one)"
            )
        self.tokenizer = tokenizer
        closed = self._pieces(("user", "assistant"), False)
        after_answer = _encode_template(tokenizer, closed[-1])
        if not after_answer:
            raise BaseModelError(
                "this base's chat template does not close the assistant's turn; loracast cannot use it"
            )
        self.end_of_turn: int = after_answer[0]
        """The token that ends an answer."""

    def prompt(self, question: str, system: str | None = None) -> list[int]:
        """Token ids of a first question. `system` None leaves the system turn to the template, "" makes it empty."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self.conversation([*messages, {"role": "user", "content": question}])

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ending where the assistant's answer begins."""
        pieces = self._pieces(tuple(m["role"] for m in messages), True)
        ids = _encode_template(self.tokenizer, pieces[0])
        for message, piece in zip(messages, pieces[1:], strict=True):
            ids = ids + encode_text(self.tokenizer, message["content"]) + _encode_template(self.tokenizer, piece)
        return ids

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, its end of turn included: what training asks the base to say."""
        return [*encode_text(self.tokenizer, text), self.end_of_turn]

    @lru_cache(maxsize=256)  # noqa: B019  (a ChatFormat lives as long as its base)
    def _pieces(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[str]:
        """The template's text before, between and after the messages' contents."""
        marks = [f"\u27e6content-{i}\u27e7" for i in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # jinja's own errors, and whatever a template raises on a role it refuses
            raise BaseModelError(f"the base's chat template refuses the roles {list(roles)}: {error}") from error
        pieces = []
        for mark in marks:
            before, found, rendered = rendered.partition(mark)
            if not found:
                raise BaseModelError("the base's chat template drops or reorders messages; loracast cannot use it")
            pieces.append(before)
        return [*pieces, rendered]


def _encode_template(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a template's own text, whose markers are control tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
