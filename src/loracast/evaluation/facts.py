"""Fact sheets: documents of N facts about invented entities, every fact asked for in wordings that no training has seen.

One document, many questions: a sheet is cast once, and all rivals answer all of its questions.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracast.data.facts import FactSheet, Split, make_sheet
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.intervals import cluster_bootstrap
from loracast.evaluation.report import ANSWER_COLUMNS, Progress, Report, environment, interval, number, write_answers
from loracast.evaluation.run import N_TIMED, Outcome, ask_all, groups, summary, warm_up
from loracast.evaluation.synthetic_baselines import SYSTEMS, Case, Setup, check_systems
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
    """Facts on a sheet."""
    sheets: int = 50
    """Sheets of each size."""
    route: int = DEFAULT_ROUTE
    """Chunks that a question is given when routed."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk."""
    storage: Storage = DEFAULT_STORAGE
    """How factors are kept."""
    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Rivals to run."""
    split: Split = "test"
    """Whose wordings and entities: `dev` to choose between settings, `test` for the figures that are reported."""
    seed: int = 0
    """Seed of sheets and questions."""
    budget_s: float | None = None
    """Stop drawing sheets after this many seconds, shared among the sizes; the tables show how many there were."""

    def __post_init__(self) -> None:
        check_systems(self.systems)
        if not self.facts or min(*self.facts, self.sheets, self.route) < 1:
            raise ConfigError("cannot evaluate fact sheets: facts, sheets and route must be at least 1")


def evaluate_facts(
    model: Model, config: FactsConfig, out: Path, progress: Progress = lambda done, total: None
) -> Report:
    """Run the evaluation; tables and answers are in `out` after every size of sheet."""
    setup = Setup(model, config.route)
    out.mkdir(parents=True, exist_ok=True)
    (out / "answers.jsonl").unlink(missing_ok=True)
    about = environment(model.base, model.documents.id)
    ends_s = None if config.budget_s is None else time.monotonic() + config.budget_s
    n_total = config.sheets * len(config.facts)
    rows: list[dict[str, Any]] = []
    report = Report("facts", COLUMNS, rows, asdict(config), about, is_complete=False)
    warm_up(setup.model.base)
    for position, n_facts in enumerate(config.facts):
        share_s = None if ends_s is None else (ends_s - time.monotonic()) / (len(config.facts) - position)
        outcomes: list[Outcome] = []
        for n_done, some in _ask(setup, config, n_facts, share_s):
            outcomes += some
            progress(position * config.sheets + n_done, n_total)
        rows += _rows(setup, n_facts, outcomes)
        write_answers(out, outcomes, facts=n_facts)
        report.write(out)
    report = Report("facts", COLUMNS, rows, asdict(config), about)
    report.write(out)
    return report


def _ask(
    setup: Setup, config: FactsConfig, n_facts: int, budget_s: float | None
) -> Iterator[tuple[int, list[Outcome]]]:
    """Sheets done so far and the outcomes of the last few."""

    def make(i: int) -> tuple[FactSheet, InMemoryAdapter]:
        sheet = make_sheet(random.Random(f"{config.seed}/{n_facts}/{i}"), n_facts, split=config.split)
        return sheet, InMemoryAdapter(setup.model, sheet.text, sheet.title, config.chunk_tokens, config.storage)

    for first, documents in groups(config.sheets, _SHEETS_PER_GROUP, make, budget_s):
        cases = []
        for sheet, document, other in documents:
            for fact in sheet.facts:
                place = sheet.text.index(fact.answer, sheet.text.index(fact.statement))
                cases.append(Case(document, other, fact.question, fact.answer, document.chunk_at(place)))
        asked = dict.fromkeys(check_systems(config.systems), cases)
        yield first + len(documents), ask_all(setup, asked, n_timed=0 if first else N_TIMED)


def _rows(setup: Setup, n_facts: int, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """A table's rows for one size of sheet, one a rival."""
    rows = []
    for name in dict.fromkeys(outcome.system for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.system == name]
        sheets: dict[InMemoryAdapter, list[bool]] = {}
        for outcome in mine:
            sheets.setdefault(outcome.case.document, []).append(outcome.is_exact)
        low, high = cluster_bootstrap(list(sheets.values()))
        rows.append(
            {
                "facts": n_facts,
                **summary(setup, mine),
                "sheets": len(sheets),
                "cluster_low": low,
                "cluster_high": high,
                "document_tokens": sum(sheet.n_tokens for sheet in sheets) / len(sheets),
                "chunks": sum(len(sheet.chunks) for sheet in sheets) / len(sheets),
            }
        )
    return rows
