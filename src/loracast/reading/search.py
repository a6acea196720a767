"""Finds the chunks and sentences of a document that share words with a question, by BM25 on its index.

A question that follows others may name what it is about only with them: `queries` says what is looked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from unicodedata import normalize

from loracast.library.index import Index, has_sentences, match_scores, open_index

_WORD = re.compile(r"\w+")
_PAIR_WEIGHT = 0.5
_ASKING = frozenset({"may", "might", "must", "shall"})  # at the beginning of a question; elsewhere May is a month
_NEIGHBOUR_SHARE = 0.35  # of a sentence's score, for the sentences before and after it

# Words of nearly every question that do not tell where its answer is. FTS5 has no stop list of its own, and in a
# document of a few chunks even "what" and "the" are rare enough to decide.
_STOP = frozenset(
    _WORD.findall("""
    a about an and any are as at be been by can could did do does for from give had has have he her his how i in is
    it its me my of on or please she so some tell that the their them then there these they this those to was we
    were what when where which who whom whose why will with would you your
    """)
)


def search(index: Index, question: str, k: int | None = None) -> list[tuple[int, float]]:
    """The k chunks, or all (None), that match a question, as (chunk, score), higher scores first."""
    with open_index(index) as database:
        (n_chunks,) = database.execute("SELECT count(*) FROM places").fetchone()
        scores = match_scores(database, "chunks", "bm25(chunks, 0.5, 1.0)", n_chunks, phrases(question))
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:k]


def sentence_scores(index: Index, question: str) -> list[float] | None:
    """How well each sentence of a document matches a question, 0 where no word does; None if none matches at all.

    A sentence gets a share of its neighbours' scores, since it may continue what they speak of ("It weighs 3 kg.").
    None also for an index without sentences.
    """
    with open_index(index) as database:
        if not has_sentences(database):
            return None
        (n_sentences,) = database.execute("SELECT count(*) FROM sentence_places").fetchone()
        scores = match_scores(database, "sentences", "bm25(sentences)", n_sentences, phrases(question))
    if not scores:
        return None
    own = [scores.get(i, 0.0) for i in range(n_sentences)]
    around = zip([0.0, *own], own, [*own[1:], 0.0], strict=False)
    return [max(score, _NEIGHBOUR_SHARE * before, _NEIGHBOUR_SHARE * after) for before, score, after in around]


def words_held(index: Index, question: str) -> list[tuple[tuple[int, int], list[int], list[int]]]:
    """Of each telling word of a question: its characters, and the sentences and the chunks that hold it.

    Words are compared by their stems. The heading of a chunk belongs to it.
    """
    found = list[tuple[tuple[int, int], list[int], list[int]]]()
    with open_index(index) as database:
        for match in _WORD.finditer(question):
            word = normalize("NFC", match[0].lower())
            if word in _STOP:
                continue
            sentences, chunks = (
                [row for (row,) in database.execute(f"SELECT rowid FROM {table} WHERE {table} MATCH ?", (f'"{word}"',))]
                for table in ("sentences", "chunks")
            )
            found.append((match.span(), sentences, chunks))
    return found


def phrases(question: str) -> list[tuple[str, float]]:
    """The question's telling words and the pairs of them that are neighbours, each with its weight."""
    words = [word.lower() for word in _WORD.findall(normalize("NFC", question))]  # as documents are
    words = words[1:] if words and words[0] in _ASKING else words
    telling = [word for word in dict.fromkeys(words) if word not in _STOP]
    pairs = [(one, other) for one, other in dict.fromkeys(pairwise(words)) if _STOP.isdisjoint((one, other))]
    return [(word, 1.0) for word in telling] + [(f"{one} {other}", _PAIR_WEIGHT) for one, other in pairs]


# ---- questions that follow others

_ALONE_WORDS = 7
"""A question of so many words stands alone."""
_LEADS = frozenset({"and", "but", "or", "so", "then", "also"})
_REFERRING = frozenset(
    _WORD.findall("it its he him his she her they them their this that these those there one ones same other")
)
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")  # kana and Chinese characters, two of which count as a word
_QUESTIONS_BEFORE = 2  # that go along


def queries(question: str, before: Sequence[str]) -> list[str]:
    """What routing looks for, in turn, until a document has something.

    A question that stands alone is looked up alone, so that the questions before it make it neither more nor less
    about a document. Any other one ("And in winter?", "How heavy is it?") goes with those before it, and alone if that
    finds nothing. Each of those before it is a line of its own.
    """
    if not before or stands_alone(question):
        return [question]
    return ["\n".join([*(" ".join(one.split()) for one in before[-_QUESTIONS_BEFORE:]), question]), question]


def stands_alone(question: str) -> bool:
    """Whether a question says by itself what it is about: it is long, or names two things and refers to nothing."""
    words = [word.lower() for word in _WORD.findall(question)]
    n_unspaced = len(_UNSPACED.findall(question)) // 2
    if max(len(question.split()), n_unspaced) >= _ALONE_WORDS:
        return True
    if not words or words[0] in _LEADS or words[:2] in (["what", "about"], ["how", "about"]):
        return False
    n_telling = sum(" " not in phrase for phrase, _ in phrases(question))
    return _REFERRING.isdisjoint(words) and max(n_telling, n_unspaced) >= 2
