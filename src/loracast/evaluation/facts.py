"""`loracast eval facts`: sheets of facts about invented entities, asked for in wordings that no training has seen.

A sheet is cast once, and all baselines answer all of its questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracast.data.facts import FactSheet, make_sheet
from loracast.evaluation.baseline import check_positive
from loracast.evaluation.documents import DocumentCase
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.intervals import cluster_bootstrap
from loracast.evaluation.report import Progress, Report, ReportWriter, columns, no_progress
from loracast.evaluation.runner import Answered
from loracast.evaluation.synthetic import ANSWER_COLUMNS, Series, SyntheticConfig, by_document, evaluate_sizes
from loracast.model import Model

_SHEETS_PER_GROUP = 8  # whose questions are answered together

COLUMNS = (
    *columns(facts=("facts", 0), document_tokens=("tokens", 0), chunks=("chunks", 1)),
    *ANSWER_COLUMNS[:4],
    *columns(cluster_low=("95 % by sheet", "interval")),
    *ANSWER_COLUMNS[4:],
)


@dataclass(frozen=True)
class FactsConfig(SyntheticConfig):
    """What `loracast eval facts` measures."""

    facts: tuple[int, ...] = (5, 20)
    """Facts on a sheet, a size each."""
    sheets: int = 50
    """Sheets of each size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "facts", "sheets")


def evaluate_facts(model: Model, config: FactsConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every size of sheet."""
    writer = ReportWriter(out, "facts", COLUMNS, config, model.base, model.documents.id)
    series = [_series(model, config, n_facts) for n_facts in config.facts]
    return evaluate_sizes(model, config, writer, "facts", series, _by_sheet, progress)


def _series(model: Model, config: FactsConfig, n_facts: int) -> Series[FactSheet]:
    """The sheets of one size, each with a question about every fact."""

    def make(i: int) -> tuple[FactSheet, InMemoryAdapter]:
        sheet = make_sheet(random.Random(f"{config.seed}/{n_facts}/{i}"), n_facts, split=config.split)
        return sheet, config.adapter(model, sheet.text, sheet.title)

    def cases(sheet: FactSheet, document: InMemoryAdapter, other: InMemoryAdapter) -> list[DocumentCase]:
        return [
            DocumentCase(
                document, other, f.question, (f.answer,), document.chunk_of(f.statement, f.statement.index(f.answer))
            )
            for f in sheet.facts
        ]

    return Series(n_facts, config.sheets, _SHEETS_PER_GROUP, make, cases)


def _by_sheet(answered: Sequence[Answered[DocumentCase]]) -> dict[str, Any]:
    """The interval of exact match over sheets, whose questions stand or fall together."""
    sheets = by_document(answered)
    low, high = cluster_bootstrap(sheets)
    return {"sheets": len(sheets), "cluster_low": low, "cluster_high": high}
