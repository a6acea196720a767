"""Whether a statement denies what a question asks, as "Dogs are not allowed" does to "May I bring my dog?".

Words that deny are counted in the clause that speaks of what is asked, but for phrases that only look like a denial
("no later than 5 May", "at no charge", "do not forget"). Two of them may cancel each other: "Nobody is let in without a
visa". English only.
"""

from __future__ import annotations

import re

from loracast.library.relevance import telling_stems

_NOT = r"(?:not|never|cannot|neither|nor|nobody|no one|nothing|none|nowhere|hardly|no|\w+n['’]t)\b"
_DENYING = re.compile(
    rf"\b(?:{_NOT}(?! only\b)(?!\.? ?\d)"
    r"|(?:abolished|banned|barred|forbidden|prohibited|refrain|sold out|suspended|unable|unavailable|unpaid|void)\b"
    r"|(?:avoid|declin|discontinu|exclud|lack|refus|reject)\w*\b"
    r"|(?:out of the question|called off|removed support|ruled out|turned down|stop(?:s|ped)? \w+ing|we pause)\b"
    r"|(?:are|be|is|remains?|stays?|was|were)(?: \w+)? closed\b|closed (?:at|between|during|for|from|in|on|until)\b"
    r"|(?:keep|leave|remain|stay)\w*(?: \w+){0,3} (?:at home|away|behind|off|out|outside)\b)",
    re.IGNORECASE,
)
"""How a sentence, or a question, denies something."""
_WITHOUT = re.compile(r"\bwithout\b(.*?)(?=\b(?:are|can|has|have|is|may|must|was|were|will)\b|$)", re.I | re.DOTALL)
_CANCELLED = re.compile(
    rf"\b{_NOT}(?: \w+){{0,2}} (?:banned|barred|excluded|forbidden|prohibited|refused|rejected)\b", re.IGNORECASE
)
"""Two denials that cancel each other: "is not forbidden"."""
_HARMLESS = re.compile(
    r"\b(?:no (?:difference|doubt|matter|objections?|obstacles?|problems?|trouble)"
    rf"|{_NOT} (?:forget|hesitate|mind|miss|worry))\b",
    re.IGNORECASE,
)
_MORE = r"(?:earlier|fewer|later|less|longer|more|sooner)"
_LIMIT = re.compile(rf"\b{_NOT}(?: \w+){{0,5}}? (?:{_MORE} than|above|beyond|exceed\w*|over)\b", re.IGNORECASE)
"""A bound, up to which it is allowed: "never put more than 37 kg on it"; not "is no longer accepted"."""
_COMPARING = re.compile(rf"\b(?:{_MORE}|above|beyond|exceed\w*|over)\b", re.IGNORECASE)
_FREE = re.compile(
    r"\b(?:(?<!I )(?<!run )(?<!running )free(?: of charge)?(?! (?:of|from)\b)"
    r"|for nothing|(?:not|n['’]t) charge|(?:costs?|pay) nothing"
    r"|(?:at|for)? ?no (?:additional |extra |further )?(?:charge|cost|fee)s?"
    r"|without (?:(?:additional|any|extra|further) )?(?:charge|cost|fee|payment|paying)s?)\b",
    re.IGNORECASE,
)
_PRICED = re.compile(r"[£$€]|\b(?:charge[ds]?|costs?|extra|fees?|paid|pay|price[ds]?)\b", re.IGNORECASE)
_NEEDLESS = re.compile(
    r"\b(?:no need|needs? no|need not|needn['’]t"
    r"|(?:not|n['’]t) (?:have to|necessary|need(?:ed)?|required|obliged))\b",
    re.IGNORECASE,
)
_NEEDING = re.compile(
    r"\b(?:compulsory|have to|mandatory|must|necessary|need(?:ed|s)?|obliged|required|shall)\b", re.IGNORECASE
)
_UNTIL = re.compile(r"(?:\bnot|n['’]t)\b(?: \w+)? (?:before|until)\b", re.IGNORECASE)
_CLAUSE = re.compile(
    r"[;–—]\s*|,\s+(?=(?:and|as|because|but|even|for|if|or|since|so|unless|when|while|whereas)\b)"
    r"|\s+(?=(?:although|because|though|whereas)\b)",
    re.IGNORECASE,
)
_ANSWERING = re.compile(r"\W*(yes|no)\b\s*[,.;:!–—]", re.IGNORECASE)


def denied(statement: str, question: str) -> bool | None:
    """Whether a statement denies what a question for yes or no asks; None where that cannot be told.

    Args:
        statement: a sentence that speaks of what is asked.
    """
    asked = telling_stems(question)
    asks_free = _FREE.search(question) is not None
    if (answering := _ANSWERING.match(statement)) and not asks_free:
        statement = statement[answering.end() :]
        if asked.isdisjoint(telling_stems(statement)):
            return answering[1].lower() == "no"
    clause = _clause_about(statement, asked)
    is_free = _FREE.search(clause) is not None
    if asks_free and not is_free:
        return True if _PRICED.search(clause) else None
    if is_free and not asks_free and _PRICED.search(question):
        return True
    question, clause = _FREE.sub(" ", question), _FREE.sub(" ", clause)
    if _UNTIL.search(clause) and not _UNTIL.search(question):
        return None
    asks_without, without, needless = _WITHOUT.search(question), _WITHOUT.search(clause), _NEEDLESS.search(clause)
    if needless or (asks_without and _NEEDING.search(clause)):
        return needless is None if asks_without else True if _NEEDING.search(question) else None
    denies = _denies(clause, question)
    if asks_without and not without and not denies:
        return None
    if without and not asked.isdisjoint(telling_stems(without[1])):
        denies = not denies
    return denies != (_denies(question, question) ^ (asks_without is not None))


def _denies(text: str, question: str) -> bool:
    """Whether the words of a text deny something, "without" apart."""
    for harmless in (_HARMLESS, _CANCELLED):
        text = harmless.sub(" ", text)
    if not _COMPARING.search(question):
        text = _LIMIT.sub(" ", text)
    return _DENYING.search(text) is not None


def _clause_about(statement: str, asked: frozenset[str]) -> str:
    """The clauses of a statement that share most words with the question."""
    clauses = _CLAUSE.split(statement)
    shared = [len(asked & telling_stems(clause)) for clause in clauses]
    return " ".join(clause for clause, n in zip(clauses, shared, strict=True) if n == max(shared))
