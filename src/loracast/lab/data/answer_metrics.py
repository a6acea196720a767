"""Score answers against right ones: normalised match, last number, SQuAD's exact match and token F1, ROUGE-L."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_WRAPPING = " \t\r\n\"'`“”‘’«»()[]{}*_"
_SENTENCE_MARKS = ".,;:!?…"
_LEADING_ARTICLE = re.compile(r"(?:the|an|a)\s+(?=\S)")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower-case a text, collapse spaces, and strip quotes, brackets, emphasis, a leading article and final marks.

    Only the ends are cleaned and no sign or unit is touched: "4,711", "-4711" and "4711 g" are not "4711".
    """
    text = " ".join(text.lower().split())
    text = text.lstrip(_WRAPPING).rstrip(_WRAPPING + _SENTENCE_MARKS)
    article = _LEADING_ARTICLE.match(text)
    return text[article.end() :].lstrip(_WRAPPING) if article else text


def is_exact(answer: str, value: str) -> bool:
    """Whether the answer is the value and nothing else, after `normalise`."""
    return normalise(answer) == normalise(value)


def last_number(text: str) -> float | None:
    """The last number in a text, or None; commas between groups of three digits are skipped ("1,200" is 1200)."""
    found = re.findall(r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\d)", text.replace("$", ""))
    return float(found[-1].replace(",", "")) if found else None


def is_right(answer: str, outputs: Sequence[str], metric: str) -> bool:
    """Whether an answer is right by a task's metric.

    "exact": the answer is one of the outputs. "number": its last number is the last number of the first output.
    """
    if metric == "number":
        return last_number(answer) is not None and last_number(answer) == last_number(outputs[0])
    return any(is_exact(answer, output) for output in outputs)


def find_value(answer: str, value: str) -> int | None:
    """Where a value stands in the answer as whole words, a number as a whole number; None where it does not.

    The place is an offset in the answer in lower case with single spaces.
    """
    wanted = re.escape(normalise(value))
    inside = rf"(?<!\w)(?<!\d[.,]){wanted}(?!\w)(?![.,]\d)"
    found = re.search(inside, " ".join(answer.lower().split()))
    return found.start() if found else None


def has_value(answer: str, value: str) -> bool:
    """Whether the value stands in the answer, as `find_value` looks for it."""
    return find_value(answer, value) is not None


def squad_normalise(text: str) -> str:
    """SQuAD's normalisation (arXiv 1606.05250): lower case, no ASCII punctuation or articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1 where both texts are the same after SQuAD's normalisation, else 0."""
    return float(squad_normalise(answer) == squad_normalise(gold))


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of the precision and recall of an answer's words; 0 where either text has none."""
    said, wanted = squad_normalise(answer).split(), squad_normalise(gold).split()
    return _harmonic(sum((Counter(said) & Counter(wanted)).values()), len(said), len(wanted))


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequence of words (Lin, 2004), on normalised texts."""
    said, wanted = squad_normalise(answer).split(), squad_normalise(gold).split()
    longest = [0] * (len(wanted) + 1)  # longest[i]: of the words read so far and the first i words wanted
    for word in said:
        diagonal = 0
        for i, other in enumerate(wanted, start=1):
            here = longest[i]
            longest[i] = diagonal + 1 if word == other else max(here, longest[i - 1])
            diagonal = here
    return _harmonic(longest[-1], len(said), len(wanted))


def best(score: Callable[[str, str], float], answer: str, golds: Sequence[str]) -> float:
    """The score against the right answer that fits best."""
    return max(score(answer, gold) for gold in golds)


def _harmonic(n_shared: int, n_said: int, n_wanted: int) -> float:
    return 2 * n_shared / (n_said + n_wanted) if n_shared else 0.0
