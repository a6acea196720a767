"""Whether a sentence says yes or no to a question.

"Is the pool open at 9:30?" claims 9:30. The rows of a memory add up, so that none can compare two values: the words of
the sentence that matches the question best can. Only numbers and names are compared, since what a question says in
other words than the document is no contradiction. Where all that is claimed stands there, or nothing is, the sentence
says yes unless it denies what the question asks ("Dogs are not allowed"). English, as the verdicts of a memory
(hypernets/memory.py).
"""

from __future__ import annotations

import re

from loracast.library.denial import denied
from loracast.library.terms import has_digit, is_value, last_line, plain, terms, terms_asked, terms_of

_ASKING = re.compile(
    r"(?:am|are|can|could|did|do|does|had|has|have|is|may|might|must|shall|should|was|were|will|would)\b", re.I
)
"""How a question begins that asks for yes or no."""
_INDIRECT = re.compile(
    r"\b(?:(?:anybody|anyone|somebody|someone|you)(?: \w+)? (?:give|remind|show|tell) (?:me|us)\b"
    r"(?!.* (?:if|whether)\b)"
    r"|(?:ask|check|clear|describe|explain|find out|idea|know|known|list|look up|name|recall|remember|say|stated"
    r"|sure|tell|work out|written)(?: (?:about|exactly|me|please|us))*"
    r" (?:how|what|when|where|which|who|whom|whose|why)\b)",
    re.IGNORECASE,
)
"""How a question begins like one for yes or no and asks for something else: "Can you tell me who has the key?"."""
_ENGLISH = re.compile(
    r"\b(?:a|allowed|any|at|be|by|child(?:ren)?|for|from|he|i|included|it|its|my|of|on|permitted|possible|she|that|the"
    r"|their|there|they|this|to|with|you|your)\b",
    re.IGNORECASE,
)
"""Words that German and Dutch lack, whose questions may begin like English ones ("Was kostet ...?", "Is het ...?")."""
_ENGLISH_FIRST = re.compile(r"\W*(?:can|could|did|does|might|must|shall|should|were|will|would)\b", re.I)
"""How no question of those languages begins."""
_CELLS = re.compile(r"[\t|]")


def asks_yes_or_no(question: str) -> bool:
    """Whether a question asks for yes or no. Of several lines the last one counts, as in all of this module."""
    asked = last_line(question)
    first, *others = (term.lower() for term in terms(asked) or [""])
    if not _ASKING.fullmatch(first) or "or" in others or _INDIRECT.search(asked):
        return False
    return first != "was" or _is_english(asked)


def claims_in(question: str) -> frozenset[str]:
    """The numbers and names that a question for yes or no claims: 9:30 in "Is the pool open at 9:30?"."""
    return frozenset(plain(term) for i, term in terms_asked(last_line(question)) if i and is_value(term, i))


def without_numbers(question: str) -> str:
    """The question by which to find the sentence that it is about: a number that it claims may stand in another one."""
    *before, asked = question.rstrip().splitlines() or [""]
    return "\n".join([*before, " ".join(word for word in asked.split() if not has_digit(word))])


def answer_of(sentence: str, question: str, known: frozenset[str] = frozenset()) -> bool | None:
    """Whether a sentence says yes or no to a question, None where it says neither.

    Args:
        known: terms that are claimed already where the sentence stands, such as its heading's.
    """
    claims, asked = claims_in(question) - known, last_line(question)
    for row in sentence.splitlines() if _CELLS.search(sentence) else [sentence]:
        if claims <= terms_of(row):
            is_denied = denied(row, asked) if claims or _is_english(asked) else None
            return None if is_denied is None else not is_denied
    there = {plain(term): has_digit(term) for i, term in enumerate(terms(sentence)) if is_value(term, i)}
    missing = claims - terms_of(sentence)
    others = there.keys() - claims
    if any(one.startswith(other) or other.startswith(one) for one in missing for other in others if not has_digit(one)):
        return None  # one may be short for the other
    # Another number or name stands in the place of each that is missing.
    return False if {has_digit(one) for one in missing} <= {there[other] for other in others} else None


def _is_english(question: str) -> bool:
    return _ENGLISH.search(question) is not None or _ENGLISH_FIRST.match(question) is not None
