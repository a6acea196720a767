"""String tasks: rules and conditions that apply to any text, such as its longest word or whether it has a digit.

The questions for them are content (`content/task_augmentation.toml`, `[rules]` and `[conditions]`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


def words_in(text: str) -> list[str]:
    return _WORD.findall(text)


def _extreme(text: str, sign: int) -> str | None:
    """The longest (sign 1) or shortest word; None if two words tie."""
    ordered = sorted(words_in(text), key=lambda word: -sign * len(word))
    return ordered[0] if len(ordered) > 1 and len(ordered[0]) != len(ordered[1]) else None


def _nth(text: str, n: int) -> str | None:
    words = words_in(text)
    return words[n] if len(words) > max(n, 1) else None


def _of_one_word(rule: Callable[[str], str]) -> Callable[[str, str], str | None]:
    """A rule for texts of a single word with more than three letters."""
    return lambda text, word: rule(text) if len(text) > 3 and _WORD.fullmatch(text) else None


def _of_words(rule: Callable[[list[str]], str | None]) -> Callable[[str, str], str | None]:
    """A rule for texts of two to eight words."""
    return lambda text, word: rule(text.split()) if 1 < len(text.split()) <= 8 else None


RULES: dict[str, Callable[[str, str], str | None]] = {
    "copy": lambda text, word: text,
    "first_word": lambda text, word: _nth(text, 0),
    "second_word": lambda text, word: _nth(text, 1),
    "last_word": lambda text, word: _nth(text, -1),
    "longest_word": lambda text, word: _extreme(text, 1),
    "shortest_word": lambda text, word: _extreme(text, -1),
    "initials": lambda text, word: _of_words(lambda words: "".join(w[0] for w in words).upper())(text, word),
    "without_first_word": _of_words(lambda words: " ".join(words[1:])),
    "without_last_word": _of_words(lambda words: " ".join(words[:-1])),
    "words_backwards": _of_words(lambda words: " ".join(reversed(words))),
    "hyphens": _of_words("-".join),
    "first_word_replaced": lambda text, word: _of_words(lambda words: " ".join([word, *words[1:]]))(text, word),
    "word_before": lambda text, word: f"{word} {text}" if len(text.split()) <= 6 else None,
    "word_after": lambda text, word: f"{text} {word}" if len(text.split()) <= 6 else None,
    "ending_added": lambda text, word: f"{text}{word[-2:]}" if _WORD.fullmatch(text) else None,
    "without_first_letter": _of_one_word(lambda text: text[1:]),
    "without_last_letter": _of_one_word(lambda text: text[:-1]),
    "last_two_letters": _of_one_word(lambda text: text[-2:]),
    "first_three_letters": _of_one_word(lambda text: text[:3]),
    "first_letter_doubled": _of_one_word(lambda text: text[0] + text),
    "always": lambda text, word: word,
}
"""By name: (text, a word given to the rule) -> the answer; None if the rule does not apply to the text."""

CONDITIONS: dict[str, Callable[[str, str], bool]] = {
    "has_letter": lambda text, word: word[0].lower() in text.lower(),
    "longer": lambda text, word: len(text) > len(word),
    "ends_with": lambda text, word: text.lower().endswith(word[-1].lower()),
    "several_words": lambda text, word: len(text.split()) > 1,
    "more_than_five_words": lambda text, word: len(text.split()) > 5,
    "capital": lambda text, word: text[:1].isupper(),
    "number": lambda text, word: any(c.isdigit() for c in text),
}
"""By name: (text, a word given to the condition) -> whether it holds."""
