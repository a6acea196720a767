"""Whether a sentence says yes or no to a question.

"Is the pool open at 9:30?" claims 9:30. The rows of a memory add up, so that none can compare two values: the words of
the sentence that matches the question best can. Only numbers and names are compared, since what a question says in
other words than the document is no contradiction. Where all that is claimed stands there, or nothing is, the sentence
says yes unless it denies what the question asks ("Dogs are not allowed"). English, as the verdicts of a memory
(hypernets/memory.py).
"""

from __future__ import annotations

import re

from loracast.library.terms import has_digit, is_value, plain, terms, terms_of

_ASKING = re.compile(
    r"(?:are|can|could|did|do|does|had|has|have|is|may|might|must|shall|should|was|were|will|would)\b", re.I
)
"""How a question begins that asks for yes or no."""
_ENGLISH = re.compile(
    r"\b(?:a|allowed|any|at|be|by|child(?:ren)?|for|from|he|i|included|it|its|my|of|on|permitted|possible|she|that|the"
    r"|their|there|they|this|to|with|you|your)\b",
    re.IGNORECASE,
)
"""Words that German and Dutch lack, whose questions may begin like English ones ("Was kostet ...?", "Is het ...?")."""
_DENYING = re.compile(
    r"\b(?:not|never|cannot|neither|nor|nobody|nothing|none|nowhere|without|forbidden|prohibited|banned|barred|refus\w+"
    r"|exclud\w+|unable|unavailable|void|avoid|refrain|declin\w+|out of the question|(?:stay|keep) (?:away|off|out)"
    r"|no(?! (?:difference|doubt|matter|objection|problem|trouble)))\b|n['’]t\b",
    re.IGNORECASE,
)
"""How a sentence, or a question, denies something."""
_CELLS = re.compile(r"[\t|]")


def asks_yes_or_no(question: str) -> bool:
    """Whether a question asks for yes or no."""
    first, *others = (term.lower() for term in terms(question) or ("",))
    return bool(_ASKING.fullmatch(first)) and "or" not in others and (first != "was" or _is_english(question))


def claims_in(question: str) -> frozenset[str]:
    """The numbers and names that a question for yes or no claims: 9:30 in "Is the pool open at 9:30?"."""
    return frozenset(plain(term) for i, term in enumerate(terms(question)) if i and is_value(term, i))


def without_numbers(question: str) -> str:
    """The question by which to find the sentence that it is about: a number that it claims may stand in another one."""
    return " ".join(word for word in question.split() if not has_digit(word))


def answer_of(sentence: str, question: str, known: frozenset[str] = frozenset()) -> bool | None:
    """Whether a sentence says yes or no to a question, None where it says neither.

    Args:
        known: terms that are claimed already where the sentence stands, such as its heading's.
    """
    claims = claims_in(question) - known
    for row in sentence.splitlines() if _CELLS.search(sentence) else [sentence]:
        if claims <= terms_of(row):
            return denies(row) == denies(question) if claims or _is_english(question) else None
    there = {plain(term): has_digit(term) for i, term in enumerate(terms(sentence)) if is_value(term, i)}
    missing = {has_digit(claim) for claim in claims - terms_of(sentence)}
    # Another number or name stands in the place of each that is missing.
    return False if missing <= {is_number for term, is_number in there.items() if term not in claims} else None


def denies(text: str) -> bool:
    """Whether a sentence or a question denies something."""
    return _DENYING.search(text) is not None


def _is_english(question: str) -> bool:
    return _ENGLISH.search(question) is not None
