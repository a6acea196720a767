"""What a question that asks for yes or no claims, and whether a sentence says the same.

"Is the pool open at 9:30?" claims 9:30. The rows of a memory add up, so that none can compare two values: the words of
the sentence that matches the question best can. Only numbers and names are compared, since what a question says in
other words than the document is no contradiction. English, as the verdicts of a memory (hypernets/memory.py).
"""

from __future__ import annotations

import re
from unicodedata import normalize

_ASKING = re.compile(
    r"(?:am|are|can|could|did|do|does|had|has|have|is|may|might|must|shall|should|was|were|will|would)\b", re.I
)
"""How a question begins that asks for yes or no."""
_DENYING = frozenset(("cannot", "neither", "never", "nobody", "not"))
_TERM = re.compile(r"\w+(?:[.:,/'’-]\w+)*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_UNIT = re.compile(r"(?<=\d)(?=[^\W\d_])")
_CELLS = re.compile(r"[\t|]")


def claims_in(question: str) -> frozenset[str]:
    """The numbers and names that a question claims; empty where it does not ask for yes or no."""
    terms = _terms(question)
    if not terms or not _ASKING.fullmatch(terms[0]) or "or" in terms:
        return frozenset()
    return frozenset(
        _plain(term)
        for i, term in enumerate(terms)
        if any(c.isdigit() for c in term) or (i > 0 and term[0].isupper() and term != "I")
    )


def holds(claims: frozenset[str], sentence: str) -> bool | None:
    """Whether all claims stand in a sentence, or in one row of a table; None where it also denies something."""
    for row in sentence.splitlines() if _CELLS.search(sentence) else [sentence]:
        if claims <= terms_of(row):
            words = {term.lower().replace("’", "'") for term in _terms(row)}
            return None if words & _DENYING or any(word.endswith("n't") for word in words) else True
    return False


def terms_of(text: str) -> frozenset[str]:
    """The words and numbers of a text as claims are compared with them."""
    return frozenset(map(_plain, _terms(text)))


def _terms(text: str) -> list[str]:
    return _TERM.findall(_UNIT.sub(" ", _THOUSANDS.sub("", normalize("NFC", text))))


def _plain(term: str) -> str:
    """Without a plural or a genitive: "Mondays", "Anna's"."""
    return term.lower().replace("’", "'").removesuffix("'s").removesuffix("s")
