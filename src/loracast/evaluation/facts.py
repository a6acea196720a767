"""`loracast eval facts`: sheets of facts about invented entities, asked for in wordings that no training has seen.

A sheet is cast once, and all baselines answer all of its questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loracast.data.facts import FactSheet, make_sheet
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.evaluation.baseline import check_names
from loracast.evaluation.documents import DocumentCase, DocumentSetup
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.intervals import cluster_bootstrap
from loracast.evaluation.report import Progress, Report, ReportWriter, interval, no_progress, number
from loracast.evaluation.runner import Answered
from loracast.evaluation.synthetic import ANSWER_COLUMNS, BASELINES, Series, by_document, evaluate_sizes
from loracast.library.routing import DEFAULT_ROUTE
from loracast.lora.quantize import DEFAULT_STORAGE, Storage
from loracast.model import Model

_SHEETS_PER_GROUP = 8  # whose questions are answered together

COLUMNS = (
    number("facts", "facts"),
    number("document_tokens", "tokens"),
    number("chunks", "chunks", 1),
    *ANSWER_COLUMNS[:4],
    interval("cluster_low", "cluster_high", "95 % by sheet"),
    *ANSWER_COLUMNS[4:],
)


@dataclass(frozen=True)
class FactsConfig:
    """What `loracast eval facts` measures."""

    facts: tuple[int, ...] = (5, 20)
    """Facts on a sheet, a size each."""
    sheets: int = 50
    """Sheets of each size."""
    route: int = DEFAULT_ROUTE
    """Chunks that a question is given when routed."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk, in tokens."""
    storage: Storage = DEFAULT_STORAGE
    """Storage of the factors."""
    baselines: tuple[str, ...] = tuple(BASELINES)
    """Baselines to run."""
    split: Literal["dev", "test"] = "test"
    """Split of wordings and entities: `dev` to choose between settings, `test` for figures that are reported."""
    seed: int = 0
    """Seed of sheets and questions."""
    budget_s: float | None = None
    """Stop drawing sheets after this many seconds, shared among the sizes; `n` shows how many there were."""

    def __post_init__(self) -> None:
        check_names(self.baselines, BASELINES)
        if not self.facts or min(*self.facts, self.sheets, self.route) < 1:
            raise ConfigError("cannot evaluate fact sheets: facts, sheets and route must be at least 1")


def evaluate_facts(model: Model, config: FactsConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every size of sheet."""
    setup = DocumentSetup(model, config.route)
    writer = ReportWriter(out, "facts", COLUMNS, config, model.base, model.documents.id)
    series = [_series(model, config, n_facts) for n_facts in config.facts]
    return evaluate_sizes(setup, config.baselines, writer, "facts", series, _by_sheet, config.budget_s, progress)


def _series(model: Model, config: FactsConfig, n_facts: int) -> Series[FactSheet]:
    """The sheets of one size, each with a question about every fact."""

    def make(i: int) -> tuple[FactSheet, InMemoryAdapter]:
        sheet = make_sheet(random.Random(f"{config.seed}/{n_facts}/{i}"), n_facts, split=config.split)
        return sheet, InMemoryAdapter(model, sheet.text, sheet.title, config.chunk_tokens, config.storage)

    def cases(sheet: FactSheet, document: InMemoryAdapter, other: InMemoryAdapter) -> list[DocumentCase]:
        places = [sheet.text.index(fact.answer, sheet.text.index(fact.statement)) for fact in sheet.facts]
        return [
            DocumentCase(document, other, fact.question, (fact.answer,), document.chunk_at(place))
            for fact, place in zip(sheet.facts, places, strict=True)
        ]

    return Series(n_facts, config.sheets, _SHEETS_PER_GROUP, make, cases)


def _by_sheet(answered: Sequence[Answered[DocumentCase]]) -> dict[str, Any]:
    """The interval of exact match over sheets, whose questions stand or fall together."""
    sheets = by_document(answered)
    low, high = cluster_bootstrap(sheets)
    return {"sheets": len(sheets), "cluster_low": low, "cluster_high": high}
