"""`loracast eval qa`: questions that people asked about real documents, a table by source and one by length."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loracast.base.generate import Sampling
from loracast.data.answer_metrics import best, exact_match, has_value, rouge_l, token_f1
from loracast.data.qa import QuestionedDocument
from loracast.errors import ConfigError
from loracast.evaluation.baseline import Baseline, check_positive, choose_baselines
from loracast.evaluation.documents import DocumentCase, DocumentSetup, QuestionedConfig, WindowedConfig
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.intervals import cluster_bootstrap, mean
from loracast.evaluation.peak import peak_memory
from loracast.evaluation.qa_baselines import BASELINES
from loracast.evaluation.report import Progress, Report, ReportWriter, columns, no_progress
from loracast.evaluation.runner import Answered, Deadline, ask, figures, grouped, groups, warm_up
from loracast.lora.algebra import LoRA
from loracast.model import Model

LENGTHS = (128, 256, 512, 1024)
"""Where the table by length cuts, in tokens."""
MAX_NEW_TOKENS = 32
"""Longest answer: no right one has more than 20 words."""
_DOCUMENTS_PER_GROUP = 16
_N_TIMED = 3

COLUMNS = columns(
    part="documents", label="method", documents=("n", 0), n=("questions", 0), exact=("exact %", "%"),
    contained=("in answer %", "%"), f1=("F1 %", "%"), f1_low=("95 %", "interval"), rouge_l=("ROUGE-L %", "%"),
    of_window=("% of window", "%"), of_window_lora=("% of window LoRA", "%"),
    difference=("adapter minus it (95 %)", "change"), prompt_tokens=("prompt tokens", 0), update_s=("update s", 2),
    answer_s=("answer s", 2), update_mib=("update MiB", 0), answer_mib=("answer MiB", 0),
)  # fmt: skip


@dataclass(frozen=True)
class QaConfig(QuestionedConfig, WindowedConfig):
    """What `loracast eval qa` measures."""

    max_documents: int = 200
    """Most documents of each source, drawn at random."""
    max_questions: int | None = None
    """Most questions about one document; by default all."""
    spans_only: bool = False
    """Ask only questions whose answer stands in the document."""
    baselines: tuple[str, ...] = ()
    """Baselines to run; if empty, all but the optional ones."""
    budget_s: float | None = None
    """Begin no further documents after this many seconds; the table shows how many there were."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "max_documents", "max_questions", "route")


Updates = dict[str, list[tuple[float, float]]]
"""By baseline, what the update of each document took: seconds, and MiB above what was held before."""


@dataclass(frozen=True)
class Scored:
    """An answer with its scores: each is the best over the right answers."""

    answered: Answered[DocumentCase]
    exact: float
    contained: float
    """1 where a right answer stands in what was said, as whole words."""
    f1: float
    rouge_l: float

    @property
    def case(self) -> DocumentCase:
        return self.answered.case


def evaluate_qa(model: Model, config: QaConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out`, the tables after every few documents."""
    setup = config.setup(model, MAX_NEW_TOKENS)
    baselines = choose_baselines(BASELINES, config.baselines, config.missing)
    chosen = choose(config)
    writer = ReportWriter(out, "qa", COLUMNS, config, model.base, model.documents.id)
    scored: list[Scored] = []
    updates: Updates = {name: [] for name in baselines}
    deadline, n_done = Deadline(config.budget_s), 0
    warm_up(model.base)
    for some in grouped(chosen, _source).values():
        if n_done and deadline.is_over:
            break
        for i, group in enumerate(_groups(model, config, some, deadline)):
            for name, baseline in baselines.items():
                new = _answer(setup, name, baseline, group, updates[name], n_timed=0 if i else _N_TIMED)
                writer.add_answers(map(_line, new))
                scored += new
            n_done += len(group)
            progress(n_done, len(chosen))
            writer.write(_tables(scored, updates), is_complete=False)
    return writer.write(_tables(scored, updates), is_complete=n_done == len(chosen))


def draw(report: Report, out: Path) -> None:
    """Draw F1 by length, and F1 by what an answer costs."""
    from loracast.evaluation import plots

    by_length = [row for row in report.rows if row["kind"] == "length"]
    if by_length:
        plots.f1_by_length(out / "by_length.png", by_length)
    last = [row for row in report.rows if row["kind"] == "source"][-1]["part"]  # all, or the only source
    plots.f1_by_cost(out / "by_cost.png", [row for row in report.rows if row["part"] == last])


def choose(config: QaConfig) -> list[QuestionedDocument]:
    """Draw the documents and their questions, source by source. Raises ConfigError where none is left."""
    chosen: list[QuestionedDocument] = []
    for source, of_source in grouped(sorted(config.read(), key=_source), _source).items():
        rng = random.Random(f"{config.seed}/{source}")
        some = rng.sample(of_source, min(config.max_documents, len(of_source)))
        for document in some:
            asked = [question for question in document.questions if question.is_span or not config.spans_only]
            if config.max_questions is not None:
                asked = rng.sample(asked, min(config.max_questions, len(asked)))
            if asked:
                chosen.append(replace(document, questions=tuple(asked)))
    if not chosen:
        raise ConfigError("no document has a question whose answer it says; ask all questions (without --spans-only)")
    return chosen


def _source(document: QuestionedDocument) -> str:
    return document.source


def _groups(
    model: Model, config: QaConfig, documents: Sequence[QuestionedDocument], deadline: Deadline
) -> Iterator[list[list[DocumentCase]]]:
    """A few documents at a time, each as its questions; the last document's other one is the first."""

    def make(i: int) -> tuple[QuestionedDocument, InMemoryAdapter]:
        document = documents[i % len(documents)]
        return document, InMemoryAdapter(model, document.text, document.title, config.chunk_tokens)

    for group in groups(len(documents), _DOCUMENTS_PER_GROUP, make, deadline):
        cases = [cases_of(*one) for one in group]
        yield cases
        for of_document in cases:
            of_document[0].learned.clear()


def cases_of(document: QuestionedDocument, adapter: InMemoryAdapter, other: InMemoryAdapter) -> list[DocumentCase]:
    """The questions about one document."""
    learned: dict[str, LoRA] = {}
    return [
        DocumentCase(
            adapter, other, q.question, q.answers, doc_id=document.doc_id, source=document.source, learned=learned
        )
        for q in document.questions
    ]


def _answer(
    setup: DocumentSetup,
    name: str,
    baseline: Baseline[DocumentSetup, DocumentCase],
    group: Sequence[Sequence[DocumentCase]],
    updates: list[tuple[float, float]],
    n_timed: int,
) -> list[Scored]:
    """One baseline's answers to all questions about some documents, which are learned one by one as a user would."""
    for first, *_ in group:
        with peak_memory() as peak:
            started = time.perf_counter()
            if baseline.learn is not None:
                baseline.learn(setup, first)
            seconds = time.perf_counter() - started
        updates.append((seconds, peak.above_mib))
    cases = {name: [case for of_document in group for case in of_document]}
    answered = ask(setup, {name: baseline}, cases, Sampling(max_new_tokens=setup.max_new_tokens), n_timed)
    scores = (exact_match, has_value, token_f1, rouge_l)
    return [Scored(a, *(best(score, a.text, a.case.answers) for score in scores)) for a in answered]


def _tables(scored: Sequence[Scored], updates: Updates) -> list[dict[str, Any]]:
    """The rows of every source by itself, of all of them, and of every length."""
    parts = grouped(scored, lambda s: s.case.source or "documents")
    if len(parts) > 1:
        parts["all"] = list(scored)
    by_length = grouped(scored, lambda s: sum(s.case.document.n_tokens >= limit for limit in LENGTHS))
    rows = [row for part, some in parts.items() for row in _rows(part, some, updates, "source")]
    if len(by_length) > 1:
        for i, some in sorted(by_length.items()):
            rows += _rows(_length_name(i), some, updates, "length")
    return rows


def _length_name(i: int) -> str:
    low, high = (0, *LENGTHS)[i], (*LENGTHS, None)[i]
    return f"{low} to {high - 1} tokens" if high else f"{low} tokens or more"


def _rows(part: str, scored: Sequence[Scored], updates: Updates, kind: str) -> list[dict[str, Any]]:
    """One row a baseline, over some documents."""
    by_baseline = grouped(scored, lambda s: s.answered.baseline)
    f1 = {name: mean([s.f1 for s in some]) for name, some in by_baseline.items()}
    rows = []
    for name, some in by_baseline.items():
        by_document = _by_document(some)
        low, high = cluster_bootstrap(list(by_document.values()))
        row: dict[str, Any] = {
            "kind": kind,
            "part": part,
            "baseline": name,
            "label": BASELINES[name].label,
            "documents": len(by_document),
            **figures([s.answered for s in some]),
            "exact": mean([s.exact for s in some]),
            "contained": mean([s.contained for s in some]),
            "f1": f1[name],
            "f1_low": low,
            "f1_high": high,
            "rouge_l": mean([s.rouge_l for s in some]),
            "of_window": f1[name] / f1["window"] if f1.get("window") else None,
            "of_window_lora": f1[name] / f1["window_lora"] if f1.get("window_lora") else None,
            "document_tokens": mean([s.case.document.n_tokens for s in some]),
            "update_s": mean([seconds for seconds, _ in updates[name]]),
            "update_mib": max(mib for _, mib in updates[name]),
        }
        if "adapter" in by_baseline and name != "adapter":
            mine = _by_document(by_baseline["adapter"])
            gains = [[x - y for x, y in zip(mine[key], by_document[key], strict=True)] for key in mine]
            row["difference"] = f1["adapter"] - f1[name]
            row["difference_low"], row["difference_high"] = cluster_bootstrap(gains)
        rows.append(row)
    return rows


def _by_document(scored: Sequence[Scored]) -> dict[str, list[float]]:
    """The F1 of each document's questions."""
    return {key: [s.f1 for s in some] for key, some in grouped(scored, lambda s: s.case.doc_id).items()}


def _line(s: Scored) -> dict[str, Any]:
    """One line of answers.jsonl."""
    return {
        "baseline": s.answered.baseline, "source": s.case.source, "doc_id": s.case.doc_id, "question": s.case.question,
        "answers": s.case.answers, **s.answered.said, "exact": s.exact, "contained": s.contained,
        "f1": round(s.f1, 4), "rouge_l": round(s.rouge_l, 4), "document_tokens": s.case.document.n_tokens,
    }  # fmt: skip
