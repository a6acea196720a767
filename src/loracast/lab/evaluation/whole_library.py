"""`loracast eval library`: questions to a library of many documents, none of which is named.

Three figures: how often the right document is among the first three; how good the answers are beside those that naming
the document gives, for the same questions; and how long the first token takes with and without a name.

People ask about a document that they have before them, so many of their questions name nothing ("What did the man
buy?"), and no search can tell whose they are. Rows are therefore given for all questions and for those that name
something of their document. The rule: one of the question's words, those aside that nearly every question has
(`routing.phrases`), stands in the document's text, headings or title, up to its ending (Porter stemming), and in no
more than 1 % of the library's documents.

The documents' texts are learned into a temporary library, so the search is that of `loracast ask --all`; their chunks
are cast when they are picked, and for times whole adapters are kept on disk.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from loracast.answering.model import Model
from loracast.base.generate import Sampling
from loracast.documents import Document
from loracast.lab.data.answer_metrics import best, has_value, token_f1
from loracast.lab.data.rows import DocumentQuestion, QuestionedDocument
from loracast.lab.evaluation.documents import DocumentSetup, QuestionedConfig, RoutedConfig
from loracast.lab.evaluation.qa import MAX_NEW_TOKENS
from loracast.lab.evaluation.report import Progress, Report, columns, mean, no_progress, with_interval
from loracast.lab.evaluation.runner import Answered, Baseline, ask, ask_one, grouped, in_turn, warm_up
from loracast.reading.routing import CHUNKS_RANKED, DOCUMENTS_READ, weigh_documents
from loracast.reading.search import phrases

MAX_HOLDER_SHARE = 0.01
"""Share of the documents that may hold a word that names something of one of them."""
_N_FIRST = 3
_CHUNKS_LOOKED_AT = 60  # for the first three documents: a long one owns many of the best chunks
_QUESTIONS_AT_ONCE = 16  # whose documents are held in memory
_N_WARM_UP = 1
ALL, NAMING = "all", "name something"

COLUMNS = columns(
    questions="questions", label="method", n=("n", 0), first=("document first %", "%"),
    three=("among three %", "%"), three_low=("95 %", "interval"), contained=("in answer %", "%"), f1=("F1 %", "%"),
    f1_low=("95 %", "interval"), of_named=("% of named (F1)", "%"), contained_of_named=("(in answer)", "%"),
    difference=("F1 minus named (95 %)", "change"), prepare_s=("routing and LoRA s", 3),
    first_token_s=("first token s", 3), ratio=("x named", 2),
)  # fmt: skip


@dataclass(frozen=True)
class LibraryConfig(QuestionedConfig, RoutedConfig):
    """Settings of `loracast eval library`."""

    POSITIVE = ("library_size", "route")
    library_size: int = 1000
    """Documents in the library, drawn at random; all of their questions are looked up."""
    answered: int = 60
    """Most questions that are answered, drawn at random; 0 for none."""
    timed: int = 12
    """Most of those whose first token is timed, with adapters on disk, after one that is not counted."""


@dataclass(frozen=True)
class Asked:
    """A question with its document, and how the library ranked it."""

    name: str
    """The document's in the library."""
    doc_id: str
    asked: DocumentQuestion
    names_something: bool
    rank: int | None
    """The document's place among those that the question finds, from 1; None where it is not near the top."""


BASELINES: dict[str, Baseline[DocumentSetup, Asked]] = {
    "library": Baseline("none named", lambda setup, one: setup.request(one.asked.question, "*", outlines=False)),
    "named": Baseline(
        "the document named", lambda setup, one: setup.request(one.asked.question, one.name, outlines=False)
    ),
    "none": Baseline("no document", lambda setup, one: setup.request(one.asked.question)),
}


def evaluate_library(model: Model, config: LibraryConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; the tables and answers are in `out`."""
    documents = list({(one.title, one.text): one for one in config.read()}.values())  # the same text is one document
    drawn = random.Random(f"{config.seed}/library").sample(documents, min(config.library_size, len(documents)))
    writer = Report(out, "library", COLUMNS, config, model.base, model.documents.id)
    setup = DocumentSetup(model, config, MAX_NEW_TOKENS)
    asked = rank_all(setup, drawn, progress)
    rows = _ranks(asked)
    writer.write(rows, is_complete=False)
    some = random.Random(f"{config.seed}/answered").sample(asked, min(config.answered, len(asked)))
    answered: list[Answered[Asked]] = []
    for first in range(0, len(some), _QUESTIONS_AT_ONCE):
        cases = dict.fromkeys(BASELINES, some[first : first + _QUESTIONS_AT_ONCE])
        given = ask(setup, BASELINES, cases, Sampling(max_new_tokens=setup.max_new_tokens))
        answered += map(_scored, given)
        setup.free(setup.learned.values())
        progress(first + _QUESTIONS_AT_ONCE, len(some))
    writer.add_answers(map(_line, answered))
    rows += _answers(answered)
    if config.timed and some:
        rows += _times(_time(setup, drawn, some[: config.timed + _N_WARM_UP]))
    return writer.write(rows)


def rank_all(
    setup: DocumentSetup, drawn: Sequence[QuestionedDocument], progress: Progress = no_progress
) -> list[Asked]:
    """All questions of all documents, with how a library of the documents ranks theirs.

    Adapters get names that say nothing: file names often tell more, so questions are found no worse than here.
    """
    names = [setup.keep(one.text, one.title).adapter.name for one in drawn]
    asked = []
    with setup.library.reading() as register:
        holders = cache(lambda word: frozenset(hit.name for hit in register.search(word, -1)))
        most = max(1, int(MAX_HOLDER_SHARE * len(drawn)))
        for i, (name, document) in enumerate(zip(names, drawn, strict=True)):
            for question in document.questions:
                words = [word for word, _ in phrases(question.question) if " " not in word]
                telling = any(name in holders(word) and len(holders(word)) <= most for word in words)
                matches = register.best_chunks(phrases(question.question), _CHUNKS_LOOKED_AT)
                looked_at = question.question, setup.config.route, setup.library.open, setup.reader, True
                weighed = [document.name for _, document, _ in weigh_documents(matches, *looked_at)]
                found = list(dict.fromkeys([*weighed, *(match.name for match in matches)]))
                rank = found.index(name) + 1 if name in found else None
                asked.append(Asked(name, document.doc_id, question, telling, rank))
            progress(i + 1, len(drawn))
    return asked


def _time(
    setup: DocumentSetup, drawn: Sequence[QuestionedDocument], some: Sequence[Asked]
) -> dict[str, list[tuple[float, float]]]:
    """By baseline, the seconds until a question's LoRA is there and until its first token, asked in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in BASELINES}
    warm_up(setup.base)
    on_disk: set[str] = set()
    for i, one in enumerate(some):
        while missing := {one.name, *_read(setup, one.asked.question)} - on_disk:
            on_disk |= missing
            for name in sorted(missing):  # each is now the youngest: of equal chunks others may come first
                about = drawn[int(name.removeprefix("d"))]
                document = Document.from_text(about.text, about.title)
                setup.learn(document, name, max_chunk_tokens=setup.config.chunk_tokens, replace=True)
        for name in in_turn(list(BASELINES), i):
            timed, _ = ask_one(setup, name, BASELINES[name], one, Sampling(max_new_tokens=1))
            if i >= _N_WARM_UP:
                times[name].append((timed.prepare_s or 0.0, timed.first_token_s or 0.0))
    return times


def _read(setup: DocumentSetup, question: str) -> list[str]:
    """The documents that the reader ranks."""
    with setup.library.reading() as register:
        matches = register.best_chunks(phrases(question), CHUNKS_RANKED)
        return list(dict.fromkeys(match.name for match in matches))[:DOCUMENTS_READ]


def _parts(asked: Sequence[Any], about: Callable[[Any], Asked]) -> dict[str, list[Any]]:
    """All questions, and those that name something of their document."""
    return {ALL: list(asked), NAMING: [one for one in asked if about(one).names_something]}


def _by_document(asked: Sequence[Asked], values: Sequence[float]) -> list[list[float]]:
    """The values of questions, those about one document together."""
    pairs = grouped(zip(asked, values, strict=True), lambda pair: pair[0].name)
    return [[value for _, value in some] for some in pairs.values()]


def _ranks(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """How often the right document comes first, and among the first three."""
    rows = []
    for part, some in _parts(asked, lambda one: one).items():
        if some:
            hits = [float(one.rank is not None and one.rank <= _N_FIRST) for one in some]
            row = {"questions": part, "label": "search and reader", "n": len(some)}
            row |= {"first": mean([one.rank == 1 for one in some]), **with_interval("three", _by_document(some, hits))}
            rows.append(row)
    return rows


def _scored(one: Answered[Asked]) -> Answered[Asked]:
    """The answer with whether it contains a right one, and its F1."""
    measures = {"contained": has_value, "f1": token_f1}
    return replace(one, scores={key: float(best(f, one.text, one.case.asked.answers)) for key, f in measures.items()})


def _answers(answered: Sequence[Answered[Asked]]) -> list[dict[str, Any]]:
    """How good the answers are, beside those that naming the document gives."""
    rows = []
    for part, some in _parts(answered, lambda one: one.case).items():
        by_baseline = grouped(some, lambda one: one.baseline)
        for name, given in by_baseline.items():
            row: dict[str, Any] = {"questions": part, "baseline": name, "label": BASELINES[name].label, "n": len(given)}
            asked, f1 = [one.case for one in given], [one.scores["f1"] for one in given]
            row["contained"] = statistics.mean(one.scores["contained"] for one in given)
            row |= with_interval("f1", _by_document(asked, f1))
            if name != "named":
                named = by_baseline["named"]
                of_contained, of_f1 = (statistics.mean(one.scores[key] for one in named) for key in ("contained", "f1"))
                row["of_named"] = row["f1"] / of_f1 if of_f1 else None
                row["contained_of_named"] = row["contained"] / of_contained if of_contained else None
                gains = [own - of.scores["f1"] for own, of in zip(f1, named, strict=True)]
                row |= with_interval("difference", _by_document(asked, gains))
            rows.append(row)
    return rows


def _times(times: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Medians of the seconds, beside those with the document named."""
    medians = {name: [statistics.median(column) for column in zip(*some, strict=True)] for name, some in times.items()}
    rows = []
    for name, (prepare_s, first_s) in medians.items():
        row = {"questions": "timed, on disk", "baseline": name, "label": BASELINES[name].label, "n": len(times[name])}
        rows.append({**row, "prepare_s": prepare_s, "first_token_s": first_s, "ratio": first_s / medians["named"][1]})
    return rows


def _line(one: Answered[Asked]) -> dict[str, Any]:
    """One line of answers.jsonl."""
    about = one.case
    return {
        "baseline": one.baseline, "doc_id": about.doc_id, "question": about.asked.question,
        "answers": about.asked.answers, **one.said, **one.scores, "f1": round(one.scores["f1"], 4),
        "names_something": about.names_something, "rank": about.rank,
    }  # fmt: skip
