"""`loracast eval verbatim`: how much of a document's own continuation is the likeliest, after a passage's first tokens.

Teacher-forced: each token is predicted after the true ones before it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loracast.base.chat import encode_with_offsets
from loracast.data.qa import QuestionedDocument
from loracast.errors import ConfigError
from loracast.evaluation.baseline import Baseline, check_names, check_positive
from loracast.evaluation.documents import DocumentCase, DocumentSetup, QuestionedConfig, adapter, no_document, whole
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.intervals import mean_with_interval
from loracast.evaluation.qa_prompts import PROMPTS
from loracast.evaluation.report import Progress, Report, ReportWriter, columns, no_progress
from loracast.evaluation.runner import Deadline, groups, made
from loracast.lora.algebra import stack
from loracast.model import Model
from loracast.scoring.episodes import Episode, Question, pack
from loracast.scoring.likelihood import score_answers
from loracast.training.episode_maker import CONTINUE, PASSAGE_TOKENS, split_passage

_DOCUMENTS_PER_GROUP = 8

COLUMNS = columns(
    label="method", documents=("documents", 0), passages=("passages", 0), tokens=("tokens", 0),
    accuracy=("token accuracy %", "%"), low=("95 %", "interval"), of_way=("of the way to the window %", "%"),
)  # fmt: skip
BASELINES: dict[str, Baseline[DocumentSetup, DocumentCase]] = {
    "none": Baseline("no document", no_document),
    "adapter": Baseline("adapter of the document", adapter("document", is_routed=False)),
    "other": Baseline("another document's adapter", adapter("other", is_routed=False)),
    "window": Baseline("document in the window", whole(PROMPTS["naive"])),
}


@dataclass(frozen=True)
class VerbatimConfig(QuestionedConfig):
    """What `loracast eval verbatim` measures."""

    max_documents: int = 100
    """Most documents, drawn at random from those that are long enough."""
    passages: int = 4
    """Most passages of each document, which do not overlap."""
    baselines: tuple[str, ...] = tuple(BASELINES)
    """Baselines to run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.baselines, BASELINES)
        check_positive(self, "max_documents", "passages")


@dataclass(frozen=True)
class Passage:
    """A passage that is to be continued: its beginning as a question, and the token ids that follow."""

    case: DocumentCase
    continuation: tuple[int, ...]


def evaluate_verbatim(model: Model, config: VerbatimConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; the table is in `out` at the end."""
    setup = DocumentSetup(model)
    writer = ReportWriter(out, "verbatim", COLUMNS, config, model.base, model.documents.id)
    documents = _choose(model, config)

    def make(i: int) -> tuple[QuestionedDocument, InMemoryAdapter]:
        document = documents[i % len(documents)]  # the other document of the last is the first
        return document, InMemoryAdapter(model, document.text, "", config.chunk_tokens)

    hits: dict[str, list[list[float]]] = {name: [] for name in check_names(config.baselines, BASELINES)}
    n_done = n_passages = 0
    for group in groups(len(documents), _DOCUMENTS_PER_GROUP, make, Deadline(None)):
        passages = [_passages(model, config, *one) for one in group]
        for name, of_documents in hits.items():
            of_documents += _hits(setup, BASELINES[name], passages)
        n_done, n_passages = n_done + len(group), n_passages + sum(map(len, passages))
        progress(n_done, len(documents))
    return writer.write(_rows(hits, n_passages))


def of_way(value: float, none: float, window: float) -> float | None:
    """How far a figure goes from no document (0) to the document in the window (1); None if the window adds nothing."""
    return (value - none) / (window - none) if window > none else None


def _choose(model: Model, config: VerbatimConfig) -> list[QuestionedDocument]:
    """Draw the documents. Raises ConfigError where none is long enough for two passages."""
    known = config.read()
    random.Random(config.seed).shuffle(known)
    least = 2 * PASSAGE_TOKENS
    long_enough = (d for d in known if len(encode_with_offsets(model.base.tokenizer, d.text)[0]) >= least)
    chosen = [document for document, _ in zip(long_enough, range(config.max_documents), strict=False)]
    if not chosen:
        raise ConfigError(f"no document has {least} tokens or more")
    return chosen


def _passages(
    model: Model, config: VerbatimConfig, document: QuestionedDocument, adapter: InMemoryAdapter, other: InMemoryAdapter
) -> list[Passage]:
    """The passages of one document, drawn at random."""
    ids, offsets = encode_with_offsets(model.base.tokenizer, document.text)
    places = range(0, len(ids) - PASSAGE_TOKENS + 1, PASSAGE_TOKENS)
    rng = random.Random(f"{config.seed}/{document.doc_id}")
    chosen = sorted(rng.sample(places, min(config.passages, len(places))))
    split = [split_passage(document.text, ids, offsets, first) for first in chosen]
    return [Passage(DocumentCase(adapter, other, CONTINUE[0].format(start)), rest) for start, rest in split]


@torch.no_grad()
def _hits(
    setup: DocumentSetup, baseline: Baseline[DocumentSetup, DocumentCase], documents: Sequence[Sequence[Passage]]
) -> list[list[float]]:
    """For each document, whether each token of its passages is the likeliest."""
    base = setup.base
    requests = [[baseline.request(setup, passage.case) for passage in passages] for passages in documents]
    setup.prepare([request for of_document in requests for request in of_document])
    found = []
    # Document by document: its passages share a LoRA and what stands before them.
    for of_document, passages in zip(requests, documents, strict=True):
        (lora,) = made(base, of_document[:1])
        questions = [Question(r.prompt, p.continuation) for r, p in zip(of_document, passages, strict=True)]
        batch = pack([Episode((), tuple(questions))], base.pad_id).to(base.device)
        logits = score_answers(base.model, stack([lora]), batch).logits
        found.append((logits.argmax(-1) == batch.answer_ids).float().tolist())
    return found


def _rows(hits: Mapping[str, Sequence[Sequence[float]]], n_passages: int) -> list[dict[str, Any]]:
    """A row for each baseline."""
    means = {name: mean_with_interval(some) for name, some in hits.items()}
    rows = []
    for name, some in hits.items():
        row: dict[str, Any] = {
            "baseline": name,
            "label": BASELINES[name].label,
            "documents": len(some),
            "passages": n_passages,
            "tokens": sum(map(len, some)),
            **dict(zip(("accuracy", "low", "high"), means[name], strict=True)),
        }
        if {"none", "window"} <= means.keys():
            row["of_way"] = of_way(*(means[which][0] for which in (name, "none", "window")))
        rows.append(row)
    return rows
