"""A base's chat format, from its tokenizer's template, and tokenisation in which no text becomes a control token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from threading import Lock
from typing import Any

from loracast.errors import BaseModelError

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)
"""For a base that was never tuned to a chat: a line for each message, and the end of a text after each answer."""
_ENCODING = Lock()
Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": ...}`"""


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text in which a string such as `<|im_end|>` is text, not a control token."""
    ids = _encode(tokenizer, text, split_special_tokens=True)["input_ids"]
    return ids if control_ids(tokenizer).isdisjoint(ids) else encode_with_offsets(tokenizer, text)[0]


def encode_inside(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as it stands inside a sentence, after a space: most words have other tokens at a beginning.

    A token that is the space alone is dropped.
    """
    ids = encode_text(tokenizer, f" {text.strip()}")
    return ids[1:] if len(ids) > 1 and not tokenizer.decode(ids[:1]).strip() else ids


def encode_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """As `encode_text`, with the character offsets of each token."""
    encoded = _encode(tokenizer, text, split_special_tokens=True, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    control = control_ids(tokenizer)
    # The tokenizer splits special tokens, but not other markers of the template: these are cut in two here.
    cuts = [start + 1 for i, (start, end) in zip(ids, offsets, strict=True) if i in control and end - start > 1]
    if not cuts:
        return ids, offsets
    ids, offsets = [], []
    for low, high in pairwise([0, *cuts, len(text)]):
        part, part_offsets = encode_with_offsets(tokenizer, text[low:high])
        ids += part
        offsets += [(low + start, low + end) for start, end in part_offsets]
    return ids, offsets


@lru_cache(maxsize=4)
def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of control tokens: the tokenizer's special tokens, and added tokens in its chat template (`<think>`)."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    added = tokenizer.added_tokens_decoder.items()
    control = frozenset(i for i, t in added if t.special or (t.content.strip() and t.content in template))
    # The token for unknown characters occurs in ordinary text.
    unknown = _encode(tokenizer, "\U000f1234", split_special_tokens=True)["input_ids"]
    return control.difference(unknown)


class ChatFormat:
    """Messages -> token ids, as in the base's training.

    The template is rendered around placeholders, and contents are put in as plain text afterwards: a document or a
    question that contains the template's own markers cannot open or close a turn.
    """

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise BaseModelError(
                "this base has no chat template: use an instruction-tuned one, or give --chat-template FILE, or 'plain'"
            )
        self.tokenizer = tokenizer
        closed = self._pieces(("user", "assistant"), False)
        after_answer = _encode_template(tokenizer, closed[-1])
        if not after_answer:
            raise BaseModelError("the base's chat template does not close the assistant's turn: give another base")
        self.end_of_turn: int = next((i for i in after_answer if i in control_ids(tokenizer)), after_answer[0])
        """The token that ends an answer."""
        try:
            self._pieces(("system", "user"), True)
            self.has_system_turn = True
        except BaseModelError:
            self.has_system_turn = False
        """Whether the template has system turns (Gemma's has none)."""

    def prompt(self, question: str, system: str | None = None) -> list[int]:
        """Token ids of a first question. A `system` of None leaves that turn to the template; "" is an empty one."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self.conversation([*messages, {"role": "user", "content": question}])

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ending where the assistant's answer begins.

        If the template has no system turn, its text is put before the user's first turn.
        """
        if not self.has_system_turn and len(messages) > 1 and messages[0]["role"] == "system":
            system, user, *others = messages
            joined = "\n\n".join(text for text in (system["content"], user["content"]) if text)
            messages = [{"role": user["role"], "content": joined}, *others]
        pieces = self._pieces(tuple(m["role"] for m in messages), True)
        frame = [_encode_template(self.tokenizer, piece) for piece in pieces]
        contents = [m["content"] for m in messages]
        # Encoded as a whole, as in training: a token may span the border of a content. Unless a content holds control
        # tokens.
        text = pieces[0] + "".join(c + piece for c, piece in zip(contents, pieces[1:], strict=True))
        ids = _encode_template(self.tokenizer, text)
        if self._control(ids) == self._control(chain(*frame)):
            return ids
        encoded = (encode_text(self.tokenizer, content) for content in contents)
        return [*frame[0], *chain(*(ids + after for ids, after in zip(encoded, frame[1:], strict=True)))]

    def _control(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if i in control_ids(self.tokenizer)]

    def frame(self) -> tuple[list[int], list[int]]:
        """Token ids before and after a user's only message, with an empty system turn, up to the assistant's turn.

        Where the template has no system turn, an empty text and an empty line stand in front of the message.
        """
        if self.has_system_turn:
            first, between, last = self._pieces(("system", "user"), True)
        else:
            (first, last), between = self._pieces(("user",), True), "\n\n"
        return _encode_template(self.tokenizer, first + between), _encode_template(self.tokenizer, last)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer in training, its end of turn included.

        They are the tokens that the answer has inside a document, so that they can be copied: the first may begin with
        a space.
        """
        return [*encode_inside(self.tokenizer, text), self.end_of_turn]

    def reply(self, text: str) -> list[int]:
        """Token ids of an assistant's turn, its end included; no space stands before its first word."""
        return [*encode_text(self.tokenizer, text.strip()), self.end_of_turn]

    @lru_cache(maxsize=256)  # noqa: B019  (a ChatFormat lives as long as its base)
    def _pieces(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[str]:
        """The template's text before, between and after the messages' contents."""
        placeholders = [f"\u27e6content-{i}\u27e7" for i in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, placeholders, strict=True)]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
            )
        except Exception as error:  # jinja's errors, and any that a template raises for a role
            raise BaseModelError(f"the base's chat template refuses the roles {list(roles)}: {error}") from error
        pieces = []
        for text in placeholders:
            before, found, rendered = rendered.partition(text)
            if not found or text in rendered:
                raise BaseModelError("the base's chat template drops, reorders or repeats messages: give another base")
            pieces.append(before)
        return [*pieces, rendered]


def _encode_template(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the template's own text, in which markers become control tokens."""
    return _encode(tokenizer, text)["input_ids"] if text else []


def _encode(tokenizer: Any, text: str, **options: bool) -> Any:
    """What a tokenizer makes of a text, for one thread at a time: its options become its state while it encodes."""
    with _ENCODING:
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def without_middle(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The text; only its beginning and end where it has more than `max_tokens` tokens."""
    if len(encode_text(tokenizer, text)) <= max_tokens:
        return text
    offsets = encode_with_offsets(tokenizer, text)[1]
    head, tail = offsets[max_tokens // 2][0], offsets[-(max_tokens - max_tokens // 2)][0]
    return f"{text[:head].rstrip()}\n{text[tail:].lstrip()}"
