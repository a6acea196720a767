"""Baselines of `loracast eval qa`: adapters, the document or its passages in the prompt, and the window LoRA."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from loracast.base.chat import encode_with_offsets
from loracast.documents import split_text
from loracast.evaluation.baseline import Baseline, Request
from loracast.evaluation.distilled import N_QUESTIONS, learn_distilled, request_distilled
from loracast.evaluation.documents import (
    WITHOUT_PARTS,
    DocumentCase,
    DocumentSetup,
    adapter,
    in_window_lora,
    learn,
    no_document,
    whole,
    with_text,
)
from loracast.evaluation.qa_prompts import BEST, PROMPTS
from loracast.library.bm25 import best_passages
from loracast.library.index import write_index

TRUNCATED_TOKENS = 128
"""Tokens that are left of a document whose middle is left out."""
PASSAGE_TOKENS = 64
"""Longest passage: two or three sentences."""


def passages(setup: DocumentSetup, case: DocumentCase, k: int) -> list[str]:
    """The k passages that BM25 finds best for the question, in the document's order; all where there are no more."""
    tokenizer = setup.base.tokenizer
    text = case.document.document.text
    chunks = split_text(text, lambda part: encode_with_offsets(tokenizer, part), max_tokens=PASSAGE_TOKENS)
    if len(chunks) <= k:
        return [chunk.text for chunk in chunks]
    index = sqlite3.connect(":memory:")
    try:
        write_index(index, chunks)
        picked = best_passages(index, case.question, len(chunks), k)
    finally:
        index.close()
    return [chunks[i].text for i in picked]


def _retrieved(k: int) -> Callable[[DocumentSetup, DocumentCase], Request]:
    """The k best passages in the prompt."""

    def request(setup: DocumentSetup, case: DocumentCase) -> Request:
        return Request(with_text(setup, PROMPTS[BEST], "\n\n".join(passages(setup, case, k)), case.question))

    return request


BASELINES: dict[str, Baseline[DocumentSetup, DocumentCase]] = {
    "adapter": Baseline("adapter", adapter("document"), learn("document")),
    "none": Baseline("no document", no_document),
    "other": Baseline("another's adapter", adapter("other"), learn("other")),
    "beside": Baseline(
        "adapter beside another's", adapter("document", "other"), learn("document", "other"), is_optional=True
    ),
    **WITHOUT_PARTS,
    "window": Baseline("in the window", whole(PROMPTS[BEST])),
    **{
        f"window_{name}": Baseline(f"window, prompt {name!r}", whole(prompt), is_optional=True)
        for name, prompt in PROMPTS.items()
        if name != BEST
    },
    "truncated": Baseline(f"window, cut to {TRUNCATED_TOKENS} tokens", whole(PROMPTS[BEST], TRUNCATED_TOKENS)),
    "window_lora": Baseline(
        "window LoRA, the text in its window",
        lambda setup, case: in_window_lora(setup, case.document.full_text, case.question),
        needs=("window LoRA",),
    ),
    "bm25_lora": Baseline(
        "window LoRA, BM25 passage",
        lambda setup, case: in_window_lora(setup, "\n\n".join(passages(setup, case, 1)), case.question),
        needs=("window LoRA",),
    ),
    "bm25": Baseline("BM25, 1 passage", _retrieved(1)),
    "bm25_3": Baseline("BM25, 3 passages", _retrieved(3)),
    "distilled": Baseline(
        f"context distillation, {N_QUESTIONS} questions", request_distilled, learn_distilled, is_optional=True
    ),
}
