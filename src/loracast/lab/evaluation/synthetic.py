"""`loracast eval needle`, `facts`, `everyday`, `tables`, `corrections` and `near-misses`: generated documents.

Their wordings and entities are of no training. A needle is a sentence hidden in prose. Sheets state facts about
invented entities. Everyday documents are e-mails, contracts, recipes, price lists and others, with questions that a
reader has; tables are asked for cells, and texts that correct themselves for what is newest. In these an answer is
right where it contains the right one. All baselines answer all questions about a document, which is cast once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from loracast.answering.model import ASK_SYSTEM_TURN, Model
from loracast.base.chat import ChatFormat, encode_with_offsets
from loracast.errors import ConfigError
from loracast.lab.data.answer_metrics import find_value, has_value, is_exact
from loracast.lab.data.chats import Asks, make_chat
from loracast.lab.data.corrections import CHANGED, make_correction
from loracast.lab.data.everyday import KINDS, EverydayDocument, EverydayFact, load_genres, make_document
from loracast.lab.data.facts import Fact, make_sheet
from loracast.lab.data.near_misses import Why, make_near_misses
from loracast.lab.data.needles import Haystack, Needle, make_needles
from loracast.lab.data.rows import read_content, read_texts
from loracast.lab.data.tables import Missing, make_table
from loracast.lab.evaluation import documents, report, runner
from loracast.lab.evaluation.documents import MAX_NEW_TOKENS, Answers, DocumentBaseline, DocumentCase, DocumentSetup
from loracast.lab.evaluation.report import Column, Progress, Report, columns, no_progress
from loracast.lab.evaluation.runner import Answered, Baseline, Request
from loracast.lora.quantize import DEFAULT_STORAGE, Storage

N_TIMED = 5
"""Questions that a baseline is asked one at a time, for the time that an answer takes; the others come in batches."""

_WINDOW_PROMPT = "Question: {question}\n\n{document}\n\nQuestion: {question}\nShort answer:"
# The question comes first too, so that the base knows what to read for.
_WINDOW_EXAMPLE = (
    "The museum opens at nine. For the record, the door code of the north wing is 9158. It closes at five.",
    "What is the door code of the north wing?",
    "9158",
)
# A worked example of document, question and answer: without one the base never answers with the bare value.
# Of some fifteen prompts tried on SmolLM2-135M none had more exact matches (docs/evaluation.md).

ANSWER_COLUMNS = columns(
    label="method", n=("n", 0), exact=("exact %", "%"), exact_low=("95 %", "interval"),
    has_value=("in answer %", "%"), recall=("picked %", "%"), prompt_tokens=("prompt tokens", 0),
    first_token_s=("first token s", 3), answer_s=("answer s", 3),
)  # fmt: skip


def window_prompt(chat: ChatFormat, document: str, question: str) -> list[int]:
    """A prompt that shows a document after one worked example."""
    example, example_question, example_answer = _WINDOW_EXAMPLE
    return chat.conversation(
        [
            {"role": "system", "content": ASK_SYSTEM_TURN},
            {"role": "user", "content": _WINDOW_PROMPT.format(document=example, question=example_question)},
            {"role": "assistant", "content": example_answer},
            {"role": "user", "content": _WINDOW_PROMPT.format(document=document, question=question)},
        ]
    )


def _passages(setup: DocumentSetup, case: DocumentCase, k: int | None) -> tuple[str, bool]:
    """The texts of the k best chunks, in the document's order, and whether the one with the answer is among them."""
    document = case.document
    found = documents.best_passages(
        document.adapter.open_index, case.question, len(document.chunks), k or setup.config.route
    )
    return "\n\n".join(document.chunks[i].prompt for i in found), case.chunk in found


def passages(k: int | None) -> documents.Asks:
    """The texts of the k best chunks in the prompt; as many as a question is given if None."""

    def request(setup: DocumentSetup, case: DocumentCase) -> Request:
        text, found = _passages(setup, case, k)
        return runner.shown(documents.with_text(setup, window_prompt, text, case.question), found=found)

    return request


def _bm25_lora(setup: DocumentSetup, case: DocumentCase) -> Request:
    """The best chunk in the window of the LoRA that was trained to answer so."""
    text, found = _passages(setup, case, 1)
    return replace(documents.in_window_lora(setup, text, case.question), found=found)


BASELINES: dict[str, DocumentBaseline] = {
    "merged": Baseline("adapter, one LoRA of all chunks (merged)", documents.merged),
    "routed": Baseline("adapter, routed {route}", documents.adapter("document")),
    "none": Baseline("no document", documents.no_document),
    "other": Baseline("another document's adapter", documents.adapter("other")),
    "window": Baseline("in the window", documents.whole(window_prompt)),
    "bm25": Baseline("BM25 passage in the window", passages(1)),
    **{name: one for name, one in documents.WITHOUT_PARTS.items() if name != "merged"},
    "window_lora": documents.WINDOW_LORA,
    "bm25_lora": Baseline("window LoRA, the BM25 passage", _bm25_lora, needs=("window LoRA",)),
    "bm25k": Baseline("BM25 {route} passages in the window", passages(None)),
}


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(documents.WindowedConfig):
    """Settings that the needle and the facts experiment share."""

    storage: Storage = DEFAULT_STORAGE
    """Storage of the factors."""
    baselines: tuple[str, ...] = tuple(name for name, one in BASELINES.items() if not (one.is_optional or one.needs))
    """Baselines to run."""
    split: Literal["dev", "test"] = "test"
    """Split of wordings and entities: `dev` to choose between settings, `test` for figures that are reported."""
    budget_s: float | None = None
    """Stop drawing documents after this many seconds, shared among the sizes; `n` shows how far it came."""

    def __post_init__(self) -> None:
        runner.choose_baselines(BASELINES, self.baselines, self.missing)
        super().__post_init__()

    def started(self, model: Model, out: Path, title: str, columns: Sequence[Column]) -> tuple[DocumentSetup, Report]:
        """What the baselines of a run share, and its report."""
        setup = self.setup(model, MAX_NEW_TOKENS, self.storage)
        return setup, Report(out, title, columns, self, model.base, model.documents.id)


def _evaluate(
    setup: DocumentSetup,
    config: SyntheticConfig,
    writer: Report,
    size_key: str,
    parts: Sequence[documents.Part],
    rows_of: Callable[[Answers], dict[str, Any]],
    progress: Progress,
    score: Callable[[Answered[DocumentCase]], dict[str, Any]] = lambda a: {"exact": answers_exactly(a)},
) -> Report:
    """Ask every baseline every question, size by size; tables and answers are written after every few documents.

    Args:
        size_key: what a size is called in the rows.
        rows_of: the figures of one baseline at one size, besides those of `answer_row`.
    """
    baselines = runner.choose_baselines(BASELINES, config.baselines, config.missing)

    def tables(answered: Mapping[Any, Answers]) -> list[dict[str, Any]]:
        return [
            {size_key: size, **answer_row(setup, mine), **rows_of(mine)}
            for size, some in answered.items()
            for mine in runner.grouped(some, lambda a: a.baseline).values()
        ]

    def line(size: int, a: Answered[DocumentCase]) -> dict[str, Any]:
        about = {"depth": a.case.depth, "question": a.case.question, "value": a.case.answers[0], "picked": a.found}
        return {size_key: size, "baseline": a.baseline, **about}

    return documents.evaluate_documents(
        setup, writer, baselines, parts, score, tables, line, N_TIMED, config.budget_s, progress
    )


def answer_row(setup: DocumentSetup, answered: Answers) -> dict[str, Any]:
    """The figures of one baseline over its answers, and the mean size of their documents."""
    hits = [a.scores["exact"] for a in answered]
    learned = {a.case.document: None for a in answered}
    return {
        "baseline": answered[0].baseline,
        "label": BASELINES[answered[0].baseline].label.format(route=setup.config.route),
        **runner.figures(answered),
        **report.named_interval("exact", (report.mean(hits), *report.wilson(sum(hits), len(hits)))),
        "has_value": report.mean([has_value(a.text, a.case.answers[0]) for a in answered]),
        "recall": report.mean_if_any([a.found for a in answered if a.found is not None]),
        "document_tokens": report.mean([document.n_tokens for document in learned]),
        "chunks": report.mean([len(document.chunks) for document in learned]),
    }


def by_document(answered: Answers, score: str) -> list[list[float]]:
    """For each document, which of its questions were answered right: the clusters of an interval over documents."""
    return [[a.scores[score] for a in some] for some in runner.grouped(answered, lambda a: a.case.document).values()]


def answers_exactly(a: Answered[DocumentCase]) -> bool:
    """Whether the answer is the value and nothing else."""
    return is_exact(a.text, a.case.answers[0])


def _case(document: documents.LearnedDocument, fact: Needle | Fact, depth: float | None = None) -> DocumentCase:
    """The question for the value that a statement of the document gives."""
    chunk = document.chunk_of(fact.statement, fact.statement.index(fact.answer))
    return DocumentCase(document, fact.question, (fact.answer,), chunk, depth)


LONG = 8192
"""From more tokens than this on there are `samples_long` documents."""
SLOW_WINDOW = 4096
"""From this many tokens on, the document in the window is asked `samples_window` times only."""
N_DEPTH_BINS = 5
_TOKENS_PER_GROUP = 65_536  # documents that are in memory at once
_GOLDEN = 0.6180339887498949

NEEDLE_COLUMNS = (*columns(length=("tokens", 0), chunks=("chunks", 1)), *ANSWER_COLUMNS)


@dataclass(frozen=True)
class NeedleConfig(SyntheticConfig):
    """Settings of `loracast eval needle`."""

    POSITIVE = ("samples", "samples_long", "samples_window", "lengths", "route")
    texts: tuple[str, ...]
    """Files with the prose of the haystacks, which no training may have seen."""
    lengths: tuple[int, ...] = (256, 1024, 4096, 8192, 32768)
    """Tokens of a document, the needle included."""
    samples: int = 400
    """Documents of each length."""
    samples_long: int = 100
    """Documents of each length past 8,192 tokens."""
    samples_window: int = 50
    """Documents of each length from 4,096 tokens on that are also put into the window."""
    depths: tuple[float, ...] = ()
    """Where needles go, in turn (0 is the beginning, 1 the end); uniform over the document if empty."""
    kind: str = "number4"
    """Kind of the value (number4, word, person ... in content/needles.toml); any draws one for each needle."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = sorted(read_content("needles")["kinds"])
        problems = [f"a length of {n} tokens is too short for a needle" for n in self.lengths if n < 64]
        problems += [f"a depth of {d} is outside 0..1" for d in self.depths if not 0 <= d <= 1]
        if self.kind not in ("any", *kinds):
            problems.append(f"unknown kind of value {self.kind!r} (one of {', '.join(kinds)})")
        if problems:
            raise ConfigError("cannot evaluate needles: " + "; ".join(problems))

    def n_samples(self, length: int) -> int:
        return self.samples_long if length > LONG else self.samples

    def depth(self, i: int) -> float:
        """The depth of the i-th document: the given ones in turn, or spread evenly by the golden ratio."""
        return self.depths[i % len(self.depths)] if self.depths else (0.5 + i * _GOLDEN) % 1


def evaluate_needle(model: Model, config: NeedleConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every few documents."""
    haystack = Haystack(read_texts(config.texts), lambda text: encode_with_offsets(model.base.tokenizer, text))
    setup, writer = config.started(model, out, "needle", NEEDLE_COLUMNS)
    parts = [_needles(setup, config, haystack, length) for length in config.lengths]
    return _evaluate(setup, config, writer, "length", parts, _by_depth, progress)


def _needles(setup: DocumentSetup, config: NeedleConfig, haystack: Haystack, length: int) -> documents.Part:
    """The documents of one length, each with a question about its needle."""

    def draw(i: int) -> list[DocumentCase]:
        """By seed, length and i alone: a longer run begins with the documents of a shorter one."""
        rng, depth = random.Random(f"{config.seed}/{length}/{i}"), config.depth(i)
        (needle,) = make_needles(rng, 1, split=config.split, kind=None if config.kind == "any" else config.kind)
        return [_case(setup.keep(haystack.sample(rng, length, [needle], [depth])), needle, depth)]

    n_window = config.samples_window if length >= SLOW_WINDOW else None
    size = max(1, min(32, _TOKENS_PER_GROUP // length))
    return documents.Part(length, config.n_samples(length), size, draw, n_window)


def _by_depth(answered: Answers) -> dict[str, Any]:
    """Exact match in each fifth of the documents."""
    by_bin = runner.grouped(answered, lambda a: min(N_DEPTH_BINS - 1, int((a.case.depth or 0.0) * N_DEPTH_BINS)))
    depths = []
    for i in range(N_DEPTH_BINS):
        hits = [a.scores["exact"] for a in by_bin.get(i, [])]
        share = report.mean_if_any(hits)
        depths.append({"low": i / N_DEPTH_BINS, "high": (i + 1) / N_DEPTH_BINS, "n": len(hits), "exact": share})
    return {"depths": depths}


_DOCUMENTS_PER_GROUP = 8  # whose questions are answered together

FACTS_COLUMNS = (
    *columns(facts=("facts", 0), document_tokens=("tokens", 0), chunks=("chunks", 1)),
    *ANSWER_COLUMNS[:4],
    *columns(cluster_low=("95 % by sheet", "interval")),
    *ANSWER_COLUMNS[4:],
)


@dataclass(frozen=True)
class FactsConfig(SyntheticConfig):
    """Settings of `loracast eval facts`."""

    POSITIVE = ("facts", "sheets", "route")
    facts: tuple[int, ...] = (5, 20)
    """Facts on a sheet, a size each."""
    sheets: int = 50
    """Sheets of each size."""


def evaluate_facts(model: Model, config: FactsConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every few sheets."""
    setup, writer = config.started(model, out, "facts", FACTS_COLUMNS)
    parts = [_sheets(setup, config, n_facts) for n_facts in config.facts]
    return _evaluate(setup, config, writer, "facts", parts, _by_sheet, progress)


def _sheets(setup: DocumentSetup, config: FactsConfig, n_facts: int) -> documents.Part:
    """The sheets of one size, each with a question about every fact."""

    def draw(i: int) -> list[DocumentCase]:
        sheet = make_sheet(random.Random(f"{config.seed}/{n_facts}/{i}"), n_facts, split=config.split)
        document = setup.keep(sheet.text, sheet.title)
        return [_case(document, fact) for fact in sheet.facts]

    return documents.Part(n_facts, config.sheets, _DOCUMENTS_PER_GROUP, draw)


def _by_sheet(answered: Answers) -> dict[str, Any]:
    """The interval of exact match over sheets, whose questions stand or fall together."""
    sheets = by_document(answered, "exact")
    low, high = report.cluster_bootstrap(sheets)
    return {"sheets": len(sheets), "cluster_low": low, "cluster_high": high}


_NOT_SAID = ("not say", "not said", "not mention", "not state", "not specif", "no information", "not give")
_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class EverydayConfig(SyntheticConfig):
    """Settings of `loracast eval everyday`."""

    POSITIVE = ("documents", "questions", "route")
    documents: int = 60
    """Documents, of all kinds alike."""
    questions: int = 8
    """Most questions about one document, drawn from all that were generated."""


def evaluate_everyday(model: Model, config: EverydayConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every few documents."""
    genres = list(load_genres(config.split))

    def draw(rng: random.Random, i: int) -> EverydayDocument:
        return make_document(rng, split=config.split, genre=genres[i % len(genres)])

    return _Kinds("everyday", "documents", KINDS).evaluate(
        model, config, {config.documents: draw}, config.documents, out, progress
    )


@dataclass(frozen=True)
class TablesConfig(SyntheticConfig):
    """Settings of `loracast eval tables`."""

    POSITIVE = ("rows", "tables", "questions", "route")
    rows: tuple[int, ...] = (20, 200)
    """Rows of a table, a size each."""
    tables: int = 30
    """Tables of each size, of all themes and formats."""
    questions: int = 8
    """Most questions about one table."""


def evaluate_tables(model: Model, config: TablesConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every few documents."""

    def of_size(n_rows: int) -> Draw:
        return lambda rng, _: make_table(rng, config.split, n_rows)

    kinds = _Kinds("tables", "rows", ("span", *get_args(Missing)))
    return kinds.evaluate(model, config, {n: of_size(n) for n in config.rows}, config.tables, out, progress)


@dataclass(frozen=True)
class CorrectionsConfig(EverydayConfig):
    """Settings of `loracast eval corrections`."""


def evaluate_corrections(
    model: Model, config: CorrectionsConfig, out: Path, progress: Progress = no_progress
) -> Report:
    """Run the evaluation; tables and answers are in `out` after every few documents."""

    def draw(rng: random.Random, i: int) -> EverydayDocument:
        return make_correction(rng, config.split, is_chat=i % 2 == 1)

    kinds = _Kinds("corrections", "documents", ("span", CHANGED.removesuffix(": "), "not said"))
    return kinds.evaluate(model, config, {config.documents: draw}, config.documents, out, progress)


@dataclass(frozen=True)
class ChatsConfig(EverydayConfig):
    """Settings of `loracast eval chats`."""


def evaluate_chats(model: Model, config: ChatsConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every few documents."""

    def draw(rng: random.Random, _: int) -> EverydayDocument:
        return make_chat(rng, config.split)

    kinds = _Kinds("chats", "documents", get_args(Asks))
    return kinds.evaluate(model, config, {config.documents: draw}, config.documents, out, progress)


_OTHERS = 8  # documents of the same kind from which a near miss takes names
_NEAR_TABLE_ROWS = 20


@dataclass(frozen=True)
class NearMissesConfig(EverydayConfig):
    """Settings of `loracast eval near-misses`."""


def evaluate_near_misses(model: Model, config: NearMissesConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every few documents."""
    genres = list(load_genres(config.split))

    def draw(rng: random.Random, i: int) -> EverydayDocument:
        genre = rng.choice(genres)
        makers: list[Callable[[], EverydayDocument]] = [
            lambda: make_document(rng, split=config.split, genre=genre),
            lambda: make_table(rng, config.split, _NEAR_TABLE_ROWS),
            lambda: make_correction(rng, config.split),
        ]
        while True:
            document, *others = [makers[i % len(makers)]() for _ in range(_OTHERS + 1)]
            if made := make_near_misses(rng, document, others):
                return rng.choice(made)

    kinds = _Kinds("near misses", "documents", ("span", *get_args(Why), "not said"))
    return kinds.evaluate(model, config, {config.documents: draw}, config.documents, out, progress)


Draw = Callable[[random.Random, int], EverydayDocument]
"""Draws the i-th document."""


@dataclass(frozen=True)
class _Kinds:
    """An evaluation on generated documents with several kinds of questions, each of which has a column."""

    name: str
    size: str
    """What a size is called in the rows."""
    kinds: Sequence[str]
    """Kinds of facts, and what attributes begin with before a colon, which goes before the kind."""

    def evaluate(
        self,
        model: Model,
        config: EverydayConfig | TablesConfig,
        draws: Mapping[int, Draw],
        n: int,
        out: Path,
        progress: Progress,
    ) -> Report:
        """Ask about `n` documents of each size."""
        is_sized = len(draws) > 1
        setup, writer = config.started(model, out, self.name, self.columns(is_sized))

        def part(size: int, draw: Draw) -> documents.Part:
            name = f"{self.name}/{size}" if is_sized else self.name

            def cases(i: int) -> list[DocumentCase]:
                """By seed, name and i alone."""
                rng = random.Random(f"{config.seed}/{name}/{i}")
                drawn = draw(rng, i)
                facts = rng.sample(drawn.facts, min(config.questions, len(drawn.facts)))
                document = setup.keep(drawn.as_document())
                chunks = [None if f.value_at is None else document.chunk_of(f.statement, f.value_at) for f in facts]
                return [
                    DocumentCase(document, fact.question, (fact.answer,), chunk, about=fact)
                    for fact, chunk in zip(facts, chunks, strict=True)
                ]

            return documents.Part(size, n, _DOCUMENTS_PER_GROUP, cases)

        parts = [part(size, draw) for size, draw in draws.items()]
        return _evaluate(setup, config, writer, self.size, parts, self.by_kind, progress, self.score)

    def columns(self, is_sized: bool) -> tuple[Column, ...]:
        return (
            *columns(**{self.size: (self.size, 0)} if is_sized else {}),
            *columns(document_tokens=("tokens", 0), chunks=("chunks", 1)),
            *ANSWER_COLUMNS[:2],
            *columns(right=("right %", "%"), cluster_low=("95 % by document", "interval")),
            *columns(**{kind: (f"{kind} %", "%") for kind in self.kinds}),
            *columns(refused=("refused %", "%"), exact=("exact %", "%")),
            *ANSWER_COLUMNS[5:],
        )

    def kind_of(self, fact: EverydayFact) -> str:
        first, colon, _ = fact.attribute.partition(":")
        return first if colon and first in self.kinds else fact.kind

    def score(self, a: Answered[DocumentCase]) -> dict[str, Any]:
        fact = a.case.about
        scores = {"exact": answers_exactly(a), "kind": self.kind_of(fact), "right": is_right(a.text, fact)}
        scores["refused"] = None if fact.kind == "not said" else says_not_said(a.text)
        return scores

    def by_kind(self, answered: Answers) -> dict[str, Any]:
        """The share of right answers with its interval over documents, and by kind of question."""
        clusters = by_document(answered, "right")
        right, low, high = report.mean_with_interval(clusters)
        found: dict[str, Any] = {"documents": len(clusters), "right": right, "cluster_low": low, "cluster_high": high}
        for kind in self.kinds:
            some = [a.scores["right"] for a in answered if a.scores["kind"] == kind]
            found |= {kind: report.mean_if_any(some), f"n {kind}": len(some)}
        found["refused"] = report.mean_if_any(
            [a.scores["refused"] for a in answered if a.scores["refused"] is not None]
        )
        return found


def says_not_said(answer: str) -> bool:
    """Whether an answer says, in any of several ways, that the document does not say it."""
    return any(phrase in answer.lower().replace("n't", " not") for phrase in _NOT_SAID)


def is_right(answer: str, fact: EverydayFact) -> bool:
    """Whether an answer contains the right one.

    Of the options of a question the first one that the answer names counts; a count may be a word; where a question
    asks how many, the number is enough; and that the document does not say can be said in several ways.
    """
    if fact.kind == "not said":
        return says_not_said(answer)
    if fact.kind == "count":
        return has_value(answer, fact.answer) or has_value(answer, _COUNTS[int(fact.answer)])
    if fact.options:
        places = {option: place for option in fact.options if (place := find_value(answer, option)) is not None}
        return bool(places) and min(places, key=lambda option: places[option]) == fact.answer
    if "how many" in fact.question.lower():
        return has_value(answer, fact.answer.split()[0])
    return has_value(answer, fact.answer)
