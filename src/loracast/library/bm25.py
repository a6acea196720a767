"""BM25 over the full-text indices of a document or a library: which chunks and sentences share words with a question.

The scores are SQLite's own `bm25` (Porter stemming, k1 = 1.2, b = 0.75), since the index is SQLite's anyway. Only a
word's IDF is computed here: SQLite ignores a word that is in half of the chunks, as most words of a short manual are.
Neighbouring words of the question count once more where a text has them side by side (Metzler and Croft, A Markov
random field model for term dependencies, 2005).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from sqlite3 import Connection
from unicodedata import normalize

from loracast.library.index import Index, has_sentences, open_index

_WORD = re.compile(r"\w+")
_LEAST_IDF = 1e-6  # SQLite's own floor, a factor of its scores
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


def search(index: Index, question: str, k: int) -> list[tuple[int, float]]:
    """The k chunks that match a question best, as (chunk, score), higher scores first; fewer where fewer match."""
    with open_index(index) as database:
        (n_chunks,) = database.execute("SELECT count(*) FROM places").fetchone()
        scores = match_scores(database, "chunks", "bm25(chunks, 0.5, 1.0)", n_chunks, question)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:k]


def best_passages(index: Index, question: str, n_chunks: int, k: int) -> list[int]:
    """The k of a document's chunks that match a question best, in the document's order; all where none matches."""
    found = search(index, question, k) if n_chunks > k else []
    return sorted(chunk for chunk, _ in found) or list(range(n_chunks))


def sentence_scores(index: Index, question: str) -> list[float] | None:
    """How well each sentence of a document matches a question, 0 where no word does; None if none matches at all.

    A sentence gets a share of its neighbours' scores, since it may continue what they speak of ("It weighs 3 kg.").
    None also for an index without sentences.
    """
    with open_index(index) as database:
        if not has_sentences(database):
            return None
        (n_sentences,) = database.execute("SELECT count(*) FROM sentence_places").fetchone()
        scores = match_scores(database, "sentences", "bm25(sentences)", n_sentences, question)
    if not scores:
        return None
    own = [scores.get(i, 0.0) for i in range(n_sentences)]
    around = zip([0.0, *own], own, [*own[1:], 0.0], strict=False)
    return [max(score, _NEIGHBOUR_SHARE * before, _NEIGHBOUR_SHARE * after) for before, score, after in around]


def match_scores(
    database: Connection, table: str, rank: str, n_rows: int, question: str, documents: Sequence[range] = ()
) -> dict[int, float]:
    """BM25 of the rows of a full-text table that match a question, by their numbers.

    Args:
        rank: the call of SQLite's `bm25` with the weights of the columns.
        n_rows: of the table.
        documents: rows of each document, ascending, where a word's rarity is counted over documents: a product's name
            in all chunks of its manual is rare if no other manual has it. Other rows get no score. If empty, all rows
            count, and rarity is counted over them.
    """
    scores: dict[int, float] = {}
    firsts = [rows.start for rows in documents]
    for phrase, weight in phrases(question):
        rows = database.execute(f"SELECT rowid, -{rank} FROM {table} WHERE {table} MATCH ?", (f'"{phrase}"',))
        found = rows.fetchall()
        theirs = max(math.log(_odds(len(found), n_rows)), _LEAST_IDF)
        ours = math.log(1 + _odds(len(found), n_rows))
        if documents:
            owners = {row: bisect_right(firsts, row) - 1 for row, _ in found}
            found = [(row, score) for row, score in found if owners[row] >= 0 and row in documents[owners[row]]]
            ours = math.log(1 + _odds(len({owners[row] for row, _ in found}), len(documents)))
        for row, score in found:
            scores[row] = scores.get(row, 0.0) + weight * ours / theirs * score
    return scores


def _odds(n_holders: int, n: int) -> float:
    """The smoothed odds that a text lacks a word that n_holders of n texts contain, as in BM25's IDF."""
    return (n - n_holders + 0.5) / (n_holders + 0.5)


def phrases(question: str) -> list[tuple[str, float]]:
    """The question's telling words and the pairs of them that are neighbours, each with its weight."""
    words = [word.lower() for word in _WORD.findall(normalize("NFC", question))]  # as documents are
    words = words[1:] if words and words[0] in _ASKING else words
    telling = [word for word in dict.fromkeys(words) if word not in _STOP]
    pairs = [(one, other) for one, other in dict.fromkeys(pairwise(words)) if _STOP.isdisjoint((one, other))]
    return [(word, 1.0) for word in telling] + [(f"{one} {other}", _PAIR_WEIGHT) for one, other in pairs]
