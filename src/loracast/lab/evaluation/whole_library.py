"""`loracast eval library`: questions to a library of many documents, none of which is named.

Three figures: how often the right document is among the first three; how good the answers are beside those that naming
the document gives, for the same questions; and how long the first token takes with and without a name.

People ask about a document that they have before them, so many of their questions name nothing ("What did the man
buy?"), and no search can tell whose they are. Rows are therefore given for all questions and for those that name
something of their document. The rule: one of the question's words, those aside that nearly every question has
(`routing.phrases`), stands in the document's text, headings or title, up to its ending (Porter stemming), and in no
more than 1 % of the library's documents.

The documents are entered in the register of a temporary library, so the search is that of `loracast ask --all`; their
adapters are cast when they are picked, in memory for answers and on disk for times.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from loracast.answering.model import Model
from loracast.base.generate import Sampling, answer
from loracast.lab.data.answer_metrics import best, has_value, token_f1
from loracast.lab.data.rows import DocumentQuestion, QuestionedDocument
from loracast.lab.evaluation.documents import DocumentSetup, QuestionedConfig, RoutedConfig, adapters, plain
from loracast.lab.evaluation.qa import MAX_NEW_TOKENS
from loracast.lab.evaluation.report import (
    Progress,
    Report,
    ReportWriter,
    columns,
    mean,
    mean_with_interval,
    named_interval,
    no_progress,
)
from loracast.lab.evaluation.runner import (
    Answered,
    Baseline,
    InMemoryAdapter,
    Request,
    ask,
    check_positive,
    grouped,
    in_turn,
    warm_up,
)
from loracast.library.manifest import Manifest
from loracast.library.register import Register
from loracast.reading.relevance import THRESHOLD_OF_MANY
from loracast.reading.routing import Route
from loracast.reading.search import phrases
from loracast.reading.wide_route import share_out

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

    library_size: int = 1000
    """Documents in the library, drawn at random; all of their questions are looked up."""
    answered: int = 60
    """Most questions that are answered, drawn at random; 0 for none."""
    timed: int = 12
    """Most of those whose first token is timed, with adapters on disk, after one that is not counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "library_size", "route")


@dataclass(frozen=True)
class Asked:
    """A question with its document, and how the library ranked it."""

    place: int
    """The document's number."""
    asked: DocumentQuestion
    names_something: bool
    rank: int | None
    """The document's place among those that the question finds, from 1; None where it is not near the top."""


@dataclass(frozen=True, eq=False)
class LibraryCase:
    """A question, with what it gets of its document by name, and of the library."""

    about: Asked
    named: Sequence[tuple[InMemoryAdapter, Route]]
    picked: Sequence[tuple[InMemoryAdapter, Route]]

    @property
    def question(self) -> str:
        return self.about.asked.question


BASELINES: dict[str, Baseline[DocumentSetup, LibraryCase]] = {
    "library": Baseline("none named", lambda s, case: Request(plain(s, case.question), adapters(s, case.picked))),
    "named": Baseline("the document named", lambda s, case: Request(plain(s, case.question), adapters(s, case.named))),
    "none": Baseline("no document", lambda s, case: Request(plain(s, case.question))),
}


def evaluate_library(model: Model, config: LibraryConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; the tables and answers are in `out`."""
    documents = list({(one.title, one.text): one for one in config.read()}.values())  # the same text is one document
    drawn = random.Random(f"{config.seed}/library").sample(documents, min(config.library_size, len(documents)))
    writer = ReportWriter(out, "library", COLUMNS, config, model.base, model.documents.id)
    with tempfile.TemporaryDirectory(prefix="loracast-eval-") as scratch:
        library = TemporaryLibrary(model, drawn, config.chunk_tokens, Path(scratch) / "library")
        asked = library.rank_all(progress)
        rows = _ranks(asked)
        writer.write(rows, is_complete=False)
        some = random.Random(f"{config.seed}/answered").sample(asked, min(config.answered, len(asked)))
        answered = _answer(library, some, config, progress)
        writer.add_answers(_line(library, one) for one in answered)
        rows += _answers(answered)
        if config.timed and some:
            rows += _times(_time(library, some[: config.timed + _N_WARM_UP], config.route))
    return writer.write(rows)


class TemporaryLibrary:
    """A library whose register has all documents, and whose adapters are cast when they are needed."""

    def __init__(self, model: Model, drawn: Sequence[QuestionedDocument], chunk_tokens: int, folder: Path):
        self.drawn, self.chunk_tokens = drawn, chunk_tokens
        self.model = Model(model.base, folder, model.documents.hypernetwork)
        self._on_disk: set[str] = set()
        target = model.documents.hypernetwork.config.target
        folder.mkdir()
        with Register.writing(self.model.library.register_file) as register:
            for i, document in enumerate(map(self.document, range(len(drawn)))):
                about = document.document
                manifest = Manifest(
                    name=self.name(i), title=about.title, source_sha256=about.sha256, made_for=model.base.fingerprint,
                    modules=target.rows, ranks=dict.fromkeys(target.kinds, 1), n_chunks=len(document.chunks),
                    n_tokens=document.n_tokens, max_chunk_tokens=chunk_tokens,
                )  # fmt: skip
                register.add_version(manifest, 0, [(chunk.heading, chunk.text) for chunk in document.chunks])
                register.name_version(self.name(i), manifest.version)
                document.close()

    def name(self, place: int) -> str:
        """A name that says nothing: file names often tell more, so questions are found no worse than here."""
        return f"d{place}"

    def place(self, name: str) -> int:
        return int(name.removeprefix("d"))

    def document(self, place: int) -> InMemoryAdapter:
        """One of the documents, with nothing cast."""
        drawn = self.drawn[place]
        return InMemoryAdapter(self.model, drawn.text, drawn.title, self.chunk_tokens)

    def rank_all(self, progress: Progress) -> list[Asked]:
        """All questions of all documents, with how the library ranks their documents."""
        asked = []
        with self.model.library.reading() as register:
            holders = cache(lambda word: frozenset(hit.name for hit in register.search(word, -1)))
            most = max(1, int(MAX_HOLDER_SHARE * len(self.drawn)))
            for i, document in enumerate(self.drawn):
                for question in document.questions:
                    words = [word for word, _ in phrases(question.question) if " " not in word]
                    telling = any(self.name(i) in holders(word) and len(holders(word)) <= most for word in words)
                    matches = register.best_chunks(phrases(question.question), _CHUNKS_LOOKED_AT)
                    names = list(dict.fromkeys(match.name for match in matches))
                    rank = names.index(self.name(i)) + 1 if self.name(i) in names else None
                    asked.append(Asked(i, question, telling, rank))
                progress(i + 1, len(self.drawn))
        return asked

    def case(self, about: Asked, route: int, document: Callable[[int], InMemoryAdapter]) -> LibraryCase:
        """What a question gets by the name of its document, and of the library."""
        question, own = about.asked.question, document(about.place)
        with self.model.library.reading() as register:
            matches = register.best_chunks(phrases(question), route)
        picked = share_out(
            matches, question, route, THRESHOLD_OF_MANY, lambda match: document(self.place(match.name)),
            InMemoryAdapter.route,
        )  # fmt: skip
        return LibraryCase(about, [(own, own.route(question, route))], picked)

    def learn_for(self, about: Asked, route: int) -> None:
        """Have the adapters that a question picks on disk, and that of its document."""
        while missing := {self.name(about.place), *self._picked(about, route)} - self._on_disk:
            for name in sorted(missing):
                self.model.library.remove(name)  # it has a row in the register and no files
                document = self.document(self.place(name))
                self.model.learn(document.document, name, max_chunk_tokens=self.chunk_tokens)
                document.close()
                self._on_disk.add(name)  # it is now the youngest: of equal chunks others may come first

    def _picked(self, about: Asked, route: int) -> list[str]:
        with self.model.library.reading() as register:
            return [match.name for match in register.best_chunks(phrases(about.asked.question), route)]


def _answer(
    library: TemporaryLibrary, some: Sequence[Asked], config: LibraryConfig, progress: Progress
) -> list[Answered[LibraryCase]]:
    """The answers of all baselines to some questions."""
    setup = DocumentSetup(library.model, config.route, MAX_NEW_TOKENS)
    answered: list[Answered[LibraryCase]] = []
    for first in range(0, len(some), _QUESTIONS_AT_ONCE):
        document = cache(library.document)
        cases = [library.case(about, config.route, document) for about in some[first : first + _QUESTIONS_AT_ONCE]]
        answered += ask(
            setup, BASELINES, dict.fromkeys(BASELINES, cases), Sampling(max_new_tokens=setup.max_new_tokens)
        )
        for case in cases:
            for adapter, _ in (*case.named, *case.picked):
                adapter.close()
        progress(first + len(cases), len(some))
    return answered


def _time(library: TemporaryLibrary, some: Sequence[Asked], route: int) -> dict[str, list[tuple[float, float]]]:
    """By baseline, the seconds until a question's LoRA is there and until its first token, asked in turn."""
    model = library.model
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in BASELINES}
    warm_up(model.base)
    for i, about in enumerate(some):
        library.learn_for(about, route)
        chosen: dict[str, str | tuple[str, ...]] = {"library": "*", "named": library.name(about.place), "none": ()}
        for name in in_turn(list(BASELINES), i):
            started = time.perf_counter()
            lora, _ = model.lora_for(about.asked.question, chosen[name], route)
            prepare_s = time.perf_counter() - started
            prompt = plain(DocumentSetup(model), about.asked.question)
            said = answer(model.base, prompt, lora, Sampling(max_new_tokens=1))
            if i >= _N_WARM_UP:
                times[name].append((prepare_s, prepare_s + said.first_token_s))
    return times


def _parts(asked: Sequence[Any], about: Callable[[Any], Asked]) -> dict[str, list[Any]]:
    """All questions, and those that name something of their document."""
    return {ALL: list(asked), NAMING: [one for one in asked if about(one).names_something]}


def _by_document(values: Sequence[tuple[Asked, float]]) -> list[list[float]]:
    return [[value for _, value in some] for some in grouped(values, lambda pair: pair[0].place).values()]


def _ranks(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """How often the right document comes first, and among the first three."""
    rows = []
    for part, some in _parts(asked, lambda one: one).items():
        if some:
            hits = [(one, float(one.rank is not None and one.rank <= _N_FIRST)) for one in some]
            three = mean_with_interval(_by_document(hits))
            row = {"questions": part, "label": "search alone", "n": len(some)}
            row |= {"first": mean([one.rank == 1 for one in some]), **named_interval("three", three)}
            rows.append(row)
    return rows


def _scores(one: Answered[LibraryCase]) -> tuple[float, float]:
    """Whether the answer contains a right one, and its F1."""
    answers = one.case.about.asked.answers
    return float(any(has_value(one.text, right) for right in answers)), best(token_f1, one.text, answers)


def _answers(answered: Sequence[Answered[LibraryCase]]) -> list[dict[str, Any]]:
    """How good the answers are, beside those that naming the document gives."""
    rows = []
    for part, some in _parts(answered, lambda one: one.case.about).items():
        by_baseline = grouped(some, lambda one: one.baseline)
        named = [_scores(one) for one in by_baseline.get("named", [])]
        for name, given in by_baseline.items():
            scores = [_scores(one) for one in given]
            places = [one.case.about for one in given]
            row: dict[str, Any] = {"questions": part, "baseline": name, "label": BASELINES[name].label, "n": len(given)}
            row["contained"] = statistics.mean(contained for contained, _ in scores)
            f1 = [(about, f1) for about, (_, f1) in zip(places, scores, strict=True)]
            row |= named_interval("f1", mean_with_interval(_by_document(f1)))
            if name != "named":
                of_contained, of_f1 = map(statistics.mean, zip(*named, strict=True))
                row["of_named"] = row["f1"] / of_f1 if of_f1 else None
                row["contained_of_named"] = row["contained"] / of_contained if of_contained else None
                gains = [(about, x - y) for about, (_, x), (_, y) in zip(places, scores, named, strict=True)]
                row |= named_interval("difference", mean_with_interval(_by_document(gains)))
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


def _line(library: TemporaryLibrary, one: Answered[LibraryCase]) -> dict[str, Any]:
    """One line of answers.jsonl."""
    about, (contained, f1) = one.case.about, _scores(one)
    titles = {adapter.document.sha256: adapter.document.title for adapter, _ in one.case.picked}
    own = one.case.named[0][0].document.sha256
    return {
        "baseline": one.baseline, "doc_id": library.drawn[about.place].doc_id, "question": about.asked.question,
        "answers": about.asked.answers, **one.said, "contained": contained, "f1": round(f1, 4),
        "names_something": about.names_something, "rank": about.rank, "is_picked": own in titles,
        "weights": [list(route.weights) for _, route in one.case.picked],
    }  # fmt: skip
