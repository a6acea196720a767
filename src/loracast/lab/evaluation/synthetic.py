"""`loracast eval needle`, `facts` and `everyday`: generated documents, in wordings and with entities of no training.

A needle is a sentence hidden in prose. Sheets state facts about invented entities. Everyday documents are e-mails,
contracts, recipes, price lists and others, with questions that a reader has; there an answer is right where it contains
the right one. All baselines answer all questions about a document, which is cast once.

`loracast eval facts`: sheets of facts about invented entities, asked for in wordings that no training has seen.

A sheet is cast once, and all baselines answer all of its questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from loracast.answering.model import Model
from loracast.answering.question_answering import ASK_SYSTEM_TURN
from loracast.base.chat import ChatFormat, encode_with_offsets
from loracast.base.generate import Sampling
from loracast.errors import ConfigError
from loracast.lab.data.answer_metrics import find_value, has_value, is_exact
from loracast.lab.data.everyday import KINDS, EverydayDocument, EverydayFact, load_genres, make_document
from loracast.lab.data.facts import Fact, FactSheet, make_sheet
from loracast.lab.data.needles import Haystack, Needle, Sample, make_needles
from loracast.lab.data.rows import read_content, read_texts
from loracast.lab.evaluation import plots
from loracast.lab.evaluation.documents import (
    MAX_NEW_TOKENS,
    WITHOUT_PARTS,
    DocumentCase,
    DocumentSetup,
    WindowedConfig,
    adapter,
    in_window_lora,
    no_document,
    strictly,
    whole,
    with_text,
)
from loracast.lab.evaluation.report import (
    Progress,
    Report,
    ReportWriter,
    cluster_bootstrap,
    columns,
    mean,
    mean_if_any,
    mean_with_interval,
    named_interval,
    no_progress,
    wilson,
)
from loracast.lab.evaluation.runner import (
    Answered,
    Baseline,
    Deadline,
    InMemoryAdapter,
    Request,
    ask,
    check_names,
    check_positive,
    choose_baselines,
    figures,
    grouped,
    groups,
    warm_up,
)
from loracast.lora.quantize import DEFAULT_STORAGE, Storage

T = TypeVar("T")

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


def _shown(setup: DocumentSetup, case: DocumentCase, k: int | None) -> tuple[str, bool]:
    """The texts of the k best chunks, in the document's order, and whether the one with the answer is among them."""
    chunks = case.document.best_passages(case.question, k or setup.route)
    return "\n\n".join(case.document.chunks[i].prompt for i in chunks), case.chunk in chunks


def _window_lora(k: int | None) -> Callable[[DocumentSetup, DocumentCase], Request]:
    """The k best chunks, or the whole document if None, in the window of the LoRA that was trained to answer so."""

    def request(setup: DocumentSetup, case: DocumentCase) -> Request:
        text, found = (case.document.full_text, None) if k is None else _shown(setup, case, k)
        return replace(in_window_lora(setup, text, case.question), found=found)

    return request


def passages(k: int | None) -> Callable[[DocumentSetup, DocumentCase], Request]:
    """The texts of the k best chunks in the prompt, in the document's order; as many as a question is given if None."""

    def request(setup: DocumentSetup, case: DocumentCase) -> Request:
        shown, found = _shown(setup, case, k)
        return Request(with_text(setup, window_prompt, shown, case.question), found=found)

    return request


BASELINES: dict[str, Baseline[DocumentSetup, DocumentCase]] = {
    "merged": Baseline("adapter, one LoRA of all chunks (merged)", adapter("document", is_routed=False)),
    "routed": Baseline("adapter, routed {route}", adapter("document")),
    "strict": Baseline("adapter, routed {route}, strict", strictly),
    "none": Baseline("no document", no_document),
    "other": Baseline("another document's adapter", adapter("other")),
    "window": Baseline("in the window", whole(window_prompt)),
    "bm25": Baseline("BM25 passage in the window", passages(1)),
    **{name: one for name, one in WITHOUT_PARTS.items() if name != "merged"},
    "window_lora": Baseline(
        "window LoRA, the text in its window", _window_lora(None), needs=("window LoRA",), is_optional=True
    ),
    "bm25_lora": Baseline("window LoRA, the BM25 passage", _window_lora(1), needs=("window LoRA",), is_optional=True),
    "bm25k": Baseline("BM25 {route} passages in the window", passages(None)),
}


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(WindowedConfig):
    """Settings that the needle and the facts experiment share."""

    storage: Storage = DEFAULT_STORAGE
    """Storage of the factors."""
    baselines: tuple[str, ...] = tuple(name for name, one in BASELINES.items() if not one.is_optional)
    """Baselines to run."""
    split: Literal["dev", "test"] = "test"
    """Split of wordings and entities: `dev` to choose between settings, `test` for figures that are reported."""
    budget_s: float | None = None
    """Stop drawing documents after this many seconds, shared among the sizes; `n` shows how far it came."""

    def __post_init__(self) -> None:
        choose_baselines(BASELINES, self.baselines, self.missing)
        check_positive(self, "route")

    def adapter(self, model: Model, text: str, title: str = "") -> InMemoryAdapter:
        """Learn a document as these settings say."""
        return InMemoryAdapter(model, text, title, self.chunk_tokens, self.storage)


@dataclass(frozen=True)
class Series(Generic[T]):
    """The documents of one size."""

    size: int
    n: int
    per_group: int
    """Documents that are in memory at once."""
    make: Callable[[int], tuple[T, InMemoryAdapter]]
    """Draws the i-th document and splits it."""
    cases: Callable[[T, InMemoryAdapter, InMemoryAdapter], list[DocumentCase]]
    """The questions about a document, which is given with another one."""
    n_window: int | None = None
    """How many documents are also put into the window, which is slow where they are long; by default all."""


def evaluate_sizes(
    model: Model,
    config: SyntheticConfig,
    writer: ReportWriter,
    size_key: str,
    series: Sequence[Series[T]],
    rows_of: Callable[[Sequence[Answered[DocumentCase]]], dict[str, Any]],
    progress: Progress,
    line_of: Callable[[Answered[DocumentCase]], dict[str, Any]] | None = None,
) -> Report:
    """Ask every baseline every question, size by size; tables and answers are written after every size.

    Args:
        size_key: what a size is called in the rows.
        rows_of: the figures of one baseline at one size, besides those of `answer_row`.
        line_of: what a line of answers.jsonl says, besides what `answer_line` does.
    """
    setup = config.setup(model, MAX_NEW_TOKENS)
    deadline, rows = Deadline(config.budget_s), list[dict[str, Any]]()
    total, n_before, is_complete = sum(one.n for one in series), 0, True
    warm_up(setup.base)
    for place, one in enumerate(series):
        answered: list[Answered[DocumentCase]] = []
        n_done = 0
        for n_done, some in _ask(setup, config.baselines, one, deadline.share(len(series) - place)):
            answered += some
            progress(n_before + n_done, total)
        n_before += one.n
        is_complete &= n_done == one.n
        progress(n_before, total)
        for mine in grouped(answered, lambda a: a.baseline).values():
            rows.append({size_key: one.size, **answer_row(setup, mine), **rows_of(mine)})
        lines = ({size_key: one.size, **answer_line(a), **(line_of(a) if line_of else {})} for a in answered)
        writer.add_answers(lines)
        writer.write(rows, is_complete=False)
    return writer.write(rows, is_complete=is_complete)


def _ask(
    setup: DocumentSetup, names: Sequence[str], series: Series[T], deadline: Deadline
) -> Iterator[tuple[int, list[Answered[DocumentCase]]]]:
    """Documents done so far, and the answers about the last few."""
    n_done = n_asked = 0
    for group in groups(series.n, series.per_group, series.make, deadline):
        of_documents = [series.cases(*one) for one in group]
        cases = {name: [case for some in of_documents for case in some] for name in check_names(names, BASELINES)}
        if "window" in cases and series.n_window is not None:
            n_shown = max(0, series.n_window - n_done)
            cases["window"] = [case for some in of_documents[:n_shown] for case in some]
        n_done += len(group)
        n_left, n_asked = max(0, N_TIMED - n_asked), n_asked + sum(map(len, of_documents))
        yield n_done, ask(setup, BASELINES, cases, Sampling(max_new_tokens=setup.max_new_tokens), n_left)


def answer_row(setup: DocumentSetup, answered: Sequence[Answered[DocumentCase]]) -> dict[str, Any]:
    """The figures of one baseline over its answers, and the mean size of their documents."""
    hits = [answers_exactly(a) for a in answered]
    documents = {a.case.document: None for a in answered}
    return {
        "baseline": answered[0].baseline,
        "label": BASELINES[answered[0].baseline].label.format(route=setup.route),
        **figures(answered),
        **named_interval("exact", (mean(hits), *wilson(sum(hits), len(hits)))),
        "has_value": mean([has_value(a.text, a.case.answers[0]) for a in answered]),
        "recall": mean_if_any([a.found for a in answered if a.found is not None]),
        "document_tokens": mean([document.n_tokens for document in documents]),
        "chunks": mean([len(document.chunks) for document in documents]),
    }


def answer_line(a: Answered[DocumentCase]) -> dict[str, Any]:
    """One line of answers.jsonl."""
    return {
        "baseline": a.baseline, "depth": a.case.depth, "question": a.case.question, "value": a.case.answers[0],
        **a.said, "exact": answers_exactly(a), "picked": a.found,
    }  # fmt: skip


def by_document(
    answered: Sequence[Answered[DocumentCase]], is_right: Callable[[Answered[DocumentCase]], bool]
) -> list[list[float]]:
    """For each document, which of its questions were answered right: the clusters of an interval over documents."""
    of_documents = grouped(answered, lambda a: a.case.document).values()
    return [[float(is_right(a)) for a in some] for some in of_documents]


def answers_exactly(a: Answered[DocumentCase]) -> bool:
    """Whether the answer is the value and nothing else."""
    return is_exact(a.text, a.case.answers[0])


def _case(
    document: InMemoryAdapter, other: InMemoryAdapter, fact: Needle | Fact, depth: float | None = None
) -> DocumentCase:
    """The question for the value that a statement of the document gives."""
    chunk = document.chunk_of(fact.statement, fact.statement.index(fact.answer))
    return DocumentCase(document, other, fact.question, (fact.answer,), chunk, depth)


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
        check_positive(self, "samples", "samples_long", "samples_window", "lengths")
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
    """Run the evaluation; tables and answers are in `out` after every length, pictures at the end."""
    plots.require_matplotlib()
    haystack = Haystack(read_texts(config.texts), lambda text: encode_with_offsets(model.base.tokenizer, text))
    writer = ReportWriter(out, "needle", NEEDLE_COLUMNS, config, model.base, model.documents.id)
    series = [_needle_series(model, config, haystack, length) for length in config.lengths]
    report = evaluate_sizes(model, config, writer, "length", series, _by_depth, progress)
    if adapters := [name for name in ("routed", "merged") if name in config.baselines]:
        plots.heat_map(out / "heatmap.png", report.rows, adapters)
    plots.by_length(out / "exact-match.png", report.rows)
    return report


def make_sample(config: NeedleConfig, haystack: Haystack, length: int, i: int) -> Sample:
    """The i-th document of a length, by seed, length and i alone: a longer run begins with those of a shorter one."""
    rng = random.Random(f"{config.seed}/{length}/{i}")
    kind = None if config.kind == "any" else config.kind
    return haystack.sample(rng, length, make_needles(rng, 1, split=config.split, kind=kind), [config.depth(i)])


def _needle_series(model: Model, config: NeedleConfig, haystack: Haystack, length: int) -> Series[Sample]:
    """The documents of one length, each with a question about its needle."""

    def make(i: int) -> tuple[Sample, InMemoryAdapter]:
        sample = make_sample(config, haystack, length, i)
        return sample, config.adapter(model, sample.text)

    def cases(sample: Sample, document: InMemoryAdapter, other: InMemoryAdapter) -> list[DocumentCase]:
        return [_case(document, other, sample.needles[0], depth=sample.depths[0])]

    n_window = config.samples_window if length >= SLOW_WINDOW else None
    size = max(1, min(32, _TOKENS_PER_GROUP // length))
    return Series(length, config.n_samples(length), size, make, cases, n_window)


def _by_depth(answered: Sequence[Answered[DocumentCase]]) -> dict[str, Any]:
    """Exact match in each fifth of the documents."""
    by_bin = grouped(answered, lambda a: min(N_DEPTH_BINS - 1, int((a.case.depth or 0.0) * N_DEPTH_BINS)))
    depths = []
    for i in range(N_DEPTH_BINS):
        hits = [answers_exactly(a) for a in by_bin.get(i, [])]
        share = mean_if_any(hits)
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

    facts: tuple[int, ...] = (5, 20)
    """Facts on a sheet, a size each."""
    sheets: int = 50
    """Sheets of each size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "facts", "sheets")


def evaluate_facts(model: Model, config: FactsConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; tables and answers are in `out` after every size of sheet."""
    writer = ReportWriter(out, "facts", FACTS_COLUMNS, config, model.base, model.documents.id)
    series = [_facts_series(model, config, n_facts) for n_facts in config.facts]
    return evaluate_sizes(model, config, writer, "facts", series, _by_sheet, progress)


def _facts_series(model: Model, config: FactsConfig, n_facts: int) -> Series[FactSheet]:
    """The sheets of one size, each with a question about every fact."""

    def make(i: int) -> tuple[FactSheet, InMemoryAdapter]:
        sheet = make_sheet(random.Random(f"{config.seed}/{n_facts}/{i}"), n_facts, split=config.split)
        return sheet, config.adapter(model, sheet.text, sheet.title)

    def cases(sheet: FactSheet, document: InMemoryAdapter, other: InMemoryAdapter) -> list[DocumentCase]:
        return [_case(document, other, fact) for fact in sheet.facts]

    return Series(n_facts, config.sheets, _DOCUMENTS_PER_GROUP, make, cases)


def _by_sheet(answered: Sequence[Answered[DocumentCase]]) -> dict[str, Any]:
    """The interval of exact match over sheets, whose questions stand or fall together."""
    sheets = by_document(answered, answers_exactly)
    low, high = cluster_bootstrap(sheets)
    return {"sheets": len(sheets), "cluster_low": low, "cluster_high": high}


_NOT_SAID = ("not say", "not said", "not mention", "not state", "not specif", "no information", "not give")
_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

EVERYDAY_COLUMNS = (
    *columns(document_tokens=("tokens", 0), chunks=("chunks", 1)),
    *ANSWER_COLUMNS[:2],
    *columns(right=("right %", "%"), cluster_low=("95 % by document", "interval")),
    *columns(**{kind: (f"{kind} %", "%") for kind in KINDS}),
    *columns(exact=("exact %", "%")),
    *ANSWER_COLUMNS[5:],
)


@dataclass(frozen=True)
class EverydayConfig(SyntheticConfig):
    """Settings of `loracast eval everyday`."""

    documents: int = 60
    """Documents, of all genres alike."""
    questions: int = 8
    """Most questions about one document, drawn from all that its genre has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "documents", "questions")


@dataclass(frozen=True, eq=False)
class EverydayCase(DocumentCase):
    """One question about an everyday document."""

    fact: EverydayFact = field(kw_only=True)


def evaluate_everyday(model: Model, config: EverydayConfig, out: Path, progress: Progress = no_progress) -> Report:
    """Run the evaluation; the tables and answers are in `out` at the end."""
    writer = ReportWriter(out, "everyday", EVERYDAY_COLUMNS, config, model.base, model.documents.id)
    series = [_everyday_series(model, config)]
    return evaluate_sizes(model, config, writer, "documents", series, _by_kind, progress, _everyday_line)


def _everyday_series(model: Model, config: EverydayConfig) -> Series[EverydayDocument]:
    """The documents of all genres in turn, each with some of its questions."""
    genres = list(load_genres(config.split))

    def make(i: int) -> tuple[EverydayDocument, InMemoryAdapter]:
        rng = random.Random(f"{config.seed}/everyday/{i}")
        drawn = make_document(rng, split=config.split, genre=genres[i % len(genres)])
        facts = rng.sample(drawn.facts, min(config.questions, len(drawn.facts)))
        return replace(drawn, facts=tuple(facts)), config.adapter(model, drawn.text, drawn.title)

    def cases(drawn: EverydayDocument, document: InMemoryAdapter, other: InMemoryAdapter) -> list[DocumentCase]:
        chunks = [None if f.value_at is None else document.chunk_of(f.statement, f.value_at) for f in drawn.facts]
        return [
            EverydayCase(document, other, fact.question, (fact.answer,), chunk, fact=fact)
            for fact, chunk in zip(drawn.facts, chunks, strict=True)
        ]

    return Series(config.documents, config.documents, _DOCUMENTS_PER_GROUP, make, cases)


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


def _fact(a: Answered[DocumentCase]) -> EverydayFact:
    return cast(EverydayCase, a.case).fact


def _by_kind(answered: Sequence[Answered[DocumentCase]]) -> dict[str, Any]:
    """The share of right answers with its interval over documents, and by kind of question."""
    documents = by_document(answered, lambda a: is_right(a.text, _fact(a)))
    right, low, high = mean_with_interval(documents)
    figures: dict[str, Any] = {"documents": len(documents), "right": right, "cluster_low": low, "cluster_high": high}
    for kind in KINDS:
        some = [is_right(a.text, _fact(a)) for a in answered if _fact(a).kind == kind]
        figures |= {kind: mean_if_any(some), f"n {kind}": len(some)}
    return figures


def _everyday_line(a: Answered[DocumentCase]) -> dict[str, Any]:
    """What a line of answers.jsonl says besides question and answer."""
    return {"kind": _fact(a).kind, "right": is_right(a.text, _fact(a))}
