"""`loracast eval gate`: does `ask` tell whether a question is about a document at all?

Sheets of facts, everyday documents, prose with needles and real texts, alone or many in one, are asked their own
questions, and questions about something else: unrelated ones, small talk, and near misses such as another product's
sheet or another part of the same article. No model is loaded: the gate reads the full-text index alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loracast.data.qa import read_questioned
from loracast.errors import ConfigError
from loracast.evaluation.intervals import wilson
from loracast.evaluation.report import Progress, Report, ReportWriter, columns, no_progress
from loracast.training.relevance import measure, read_unrelated_files, shipped_fit

COLUMNS = columns(
    about="about the document", group="questions", source="from", n=("n", 0),
    passed=("taken to be about it %", "%"), low=("95 %", "interval"),
)  # fmt: skip


@dataclass(frozen=True)
class GateConfig:
    """What `loracast eval gate` measures."""

    documents: tuple[str, ...]
    """Files of documents with questions."""
    unrelated: tuple[str, ...]
    """Files of questions that are about no document."""
    sources: tuple[str, ...] = ()
    """Sources to take of documents with a `source` field; all if empty."""
    split: Literal["dev", "test"] = "test"
    """Split of wordings, entities and small talk: `dev` to choose the threshold, `test` for figures."""
    seed: int = 1
    """Seed of all that is drawn."""

    def __post_init__(self) -> None:
        if not self.documents or not self.unrelated:
            raise ConfigError("give documents with questions (--documents FILE) and unrelated questions (--unrelated)")


def evaluate_gate(config: GateConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Put every question to its document, with the parameters that ship. Raises ConfigError as `read_questioned`."""
    documents = read_questioned(config.documents, config.sources, config.split)
    unrelated = read_unrelated_files(config.unrelated)
    kinds, _ = measure(shipped_fit(), documents, unrelated, config.seed, config.split)
    sizes: Counter[tuple[bool, str, str]] = Counter()
    hits: dict[tuple[bool, str, str], float] = defaultdict(float)
    for kind in kinds:  # of a source, one row for each number of texts in a document
        key = not kind["is_about"], kind["group"], kind["source"].partition(",")[0]
        sizes[key] += kind["n"]
        hits[key] += kind["n"] * kind["passed"]
    rows: list[dict[str, Any]] = []
    for (is_not, group, source), n in sizes.items():
        n_passed = round(hits[is_not, group, source])
        low, high = wilson(n_passed, n)
        about = "no" if is_not else "yes"
        rows.append(
            {
                "about": about, "group": group, "source": source or "-", "n": n, "passed": n_passed / n,
                "low": low, "high": high,
            }
        )  # fmt: skip
    progress(1, 1)
    return ReportWriter(out, "gate", COLUMNS, config, None).write(rows)
