"""How much of a right answer an answer is: SQuAD's exact match and token F1, and ROUGE-L. Knows text only."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_normalise(text: str) -> str:
    """SQuAD's official normalisation (Rajpurkar et al., arXiv 1606.05250): lower case, without ASCII punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1 where both are the same after normalisation, else 0."""
    return float(squad_normalise(answer) == squad_normalise(gold))


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of the precision and recall of an answer's words; 0 where either text has none."""
    said, wanted = squad_normalise(answer).split(), squad_normalise(gold).split()
    return _harmonic(sum((Counter(said) & Counter(wanted)).values()), len(said), len(wanted))


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequence of words (Lin, 2004), on normalised texts."""
    said, wanted = squad_normalise(answer).split(), squad_normalise(gold).split()
    longest = [0] * (len(wanted) + 1)  # of what was said so far and the first i words wanted
    for word in said:
        diagonal = 0
        for i, other in enumerate(wanted, start=1):
            here = longest[i]
            longest[i] = diagonal + 1 if word == other else max(here, longest[i - 1])
            diagonal = here
    return _harmonic(longest[-1], len(said), len(wanted))


def best(score: Callable[[str, str], float], answer: str, golds: Sequence[str]) -> float:
    """The score against the alternative that fits best."""
    return max(score(answer, gold) for gold in golds)


def _harmonic(n_shared: int, n_said: int, n_wanted: int) -> float:
    return 2 * n_shared / (n_said + n_wanted) if n_shared else 0.0
