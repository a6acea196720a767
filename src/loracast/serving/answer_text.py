"""Turns token ids into text piece by piece, and ends it before a stop string, for streamed and for whole answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"


class AnswerText:
    """The text of one answer, as its tokens come in.

    Held back are bytes of an incomplete character, what may be the beginning of a stop string, and whitespace that may
    be the answer's last. All pieces together are the whole text, cut before the first stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), strips: bool = True):
        """
        Args:
            strips: leave out whitespace before and after the answer.
        """
        self._tokenizer, self._stop, self._strips = tokenizer, [text for text in stop if text], strips
        self._ids: list[int] = []
        self._n_decoded = 0  # ids whose text is in `_waiting` or was given
        self._n_context = 0  # ids before these no longer change what follows them
        self._waiting = ""
        self._has_begun = False

    def add(self, token: int) -> tuple[str, bool]:
        """The text that may be shown after one more token, and whether a stop string has ended the answer."""
        self._ids.append(token)
        context = self._decode(self._n_context, self._n_decoded)
        text = self._decode(self._n_context, len(self._ids))
        if text.endswith(_INCOMPLETE):
            return "", False
        self._n_context, self._n_decoded = self._n_decoded, len(self._ids)
        return self._show(text[len(context) :])

    def rest(self) -> str:
        """The text that is still held back when the answer ends."""
        context = self._decode(self._n_context, self._n_decoded)
        piece, is_stopped = self._show(self._decode(self._n_context, len(self._ids))[len(context) :])
        if is_stopped:
            return piece
        held, self._waiting = self._waiting, ""
        return piece + (held.rstrip() if self._strips else held)

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _show(self, new: str) -> tuple[str, bool]:
        self._waiting += new
        if self._strips and not self._has_begun:
            self._waiting = self._waiting.lstrip()
        self._has_begun = self._has_begun or bool(self._waiting)
        found = [at for text in self._stop if (at := self._waiting.find(text)) >= 0]
        if found:
            piece, self._waiting = self._waiting[: min(found)], ""
            return piece.rstrip() if self._strips else piece, True
        n_held = max((_overlap(self._waiting, text) for text in self._stop), default=0)
        shown = self._waiting[: len(self._waiting) - n_held]
        if self._strips:
            shown = shown.rstrip()
        self._waiting = self._waiting[len(shown) :]
        return shown, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
