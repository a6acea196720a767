"""Retrieval: the passages of the document that BM25 finds for the question, in the window."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from loracast.base.chat import encode_with_offsets
from loracast.data.qa import DocumentQuestion
from loracast.documents import split_text
from loracast.evaluation.qa.baseline import Baseline, Given, Request, Setup
from loracast.evaluation.qa.window import BEST, PROMPTS, with_text
from loracast.library.index import write_index
from loracast.library.routing import pick

PASSAGE_TOKENS = 64
"""Longest passage: two or three sentences."""


def passages(setup: Setup, given: Given, question: str, k: int) -> list[str]:
    """The k best passages for a question, in the document's order; all where there are no more."""
    tokenizer = setup.model.base.tokenizer
    chunks = split_text(
        given.document.text, lambda text: encode_with_offsets(tokenizer, text), max_tokens=PASSAGE_TOKENS
    )
    if len(chunks) <= k:
        return [chunk.text for chunk in chunks]
    index = sqlite3.connect(":memory:")
    try:
        write_index(index, chunks)
        picked = pick(index, len(chunks), question, k).picked
    finally:
        index.close()
    return [chunks[i].text for i in (range(len(chunks)) if picked is None else sorted(picked))]


def _best(k: int) -> Callable[[Setup, Given, DocumentQuestion], Request]:
    def ask(setup: Setup, given: Given, question: DocumentQuestion) -> Request:
        text = "\n\n".join(passages(setup, given, question.question, k))
        return with_text(setup, PROMPTS[BEST], text, question.question)

    return ask


BASELINES = {
    "bm25": Baseline("BM25, 1 passage", _best(1)),
    "bm25_3": Baseline("BM25, 3 passages", _best(3)),
}
