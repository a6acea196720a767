"""What a question that asks for yes or no claims, and whether a sentence says the same.

"Is the pool open at 9:30?" claims 9:30. The rows of a memory add up, so that none can compare two values: the words of
the sentence that matches the question best can. Only numbers and names are compared, since what a question says in
other words than the document is no contradiction. English, as the verdicts of a memory (hypernets/memory.py).
"""

from __future__ import annotations

import re

from loracast.library.terms import has_digit, is_value, plain, terms, terms_of

_ASKING = re.compile(
    r"(?:are|can|could|did|do|does|had|has|have|is|may|might|must|shall|should|was|were|will|would)\b", re.I
)
"""How a question begins that asks for yes or no."""
_ENGLISH = frozenset(
    ("a", "at", "by", "for", "from", "he", "it", "of", "on", "she", "that", "the", "they", "to", "with")
)
"""Words that a German question ("Was kostet ...?") has not."""
_DENYING = frozenset(("cannot", "neither", "never", "nobody", "not"))
_CELLS = re.compile(r"[\t|]")


def claims_in(question: str) -> frozenset[str]:
    """The numbers and names that a question claims; empty where it does not ask for yes or no."""
    first, *others = terms(question) or [""]
    if not _ASKING.fullmatch(first) or "or" in others or (first.lower() == "was" and _ENGLISH.isdisjoint(others)):
        return frozenset()
    return frozenset(plain(term) for i, term in enumerate(others, 1) if is_value(term, i))


def without_numbers(question: str) -> str:
    """The question by which to find the sentence that it is about: a number that it claims may stand in another one."""
    return " ".join(word for word in question.split() if not has_digit(word))


def holds(claims: frozenset[str], sentence: str) -> bool | None:
    """Whether all claims stand in a sentence, or in one row of a table.

    None where it also denies something, or has nothing of a missing claim's kind, number or name, in its place.
    """
    for row in sentence.splitlines() if _CELLS.search(sentence) else [sentence]:
        if claims <= terms_of(row):
            words = {term.lower().replace("’", "'") for term in terms(row)}
            return None if words & _DENYING or any(word.endswith("n't") for word in words) else True
    there = {plain(term): has_digit(term) for i, term in enumerate(terms(sentence)) if is_value(term, i)}
    missing = {has_digit(claim) for claim in claims - terms_of(sentence)}
    return False if missing <= {is_number for term, is_number in there.items() if term not in claims} else None
