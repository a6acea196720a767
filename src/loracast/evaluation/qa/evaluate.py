"""The run of `loracast eval qa`: documents of a file with people's questions, every rival, one table by source and one by length."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from loracast.base.generate import Sampling, answer, answer_batch
from loracast.data.answer_metrics import best, exact_match, rouge_l, token_f1
from loracast.data.qa import DocumentQuestion, QuestionedDocument, read_questioned
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.intervals import cluster_bootstrap
from loracast.evaluation.peak import peak_memory
from loracast.evaluation.qa import adapter, distilled, passages, window
from loracast.evaluation.qa.baseline import MAX_NEW_TOKENS, Baseline, Given, Request, Setup, check_baselines
from loracast.evaluation.report import Column, Progress, Report, change, environment, interval, number, percent, text
from loracast.evaluation.run import warm_up

BASELINES: dict[str, Baseline] = adapter.BASELINES | window.BASELINES | passages.BASELINES | distilled.BASELINES
LENGTHS = (128, 256, 512, 1024)
"""Where the table by length cuts, in tokens."""
_DOCUMENTS_PER_GROUP = 16
_MAX_ROWS = 32
_MAX_PROMPT_TOKENS = 10_000
_N_TIMED = 3
_GREEDY = Sampling(max_new_tokens=MAX_NEW_TOKENS)

COLUMNS: tuple[Column, ...] = (
    text("part", "documents"),
    text("label", "what answers"),
    number("documents", "n"),
    number("n", "questions"),
    percent("exact", "exact %"),
    percent("f1", "F1 %"),
    interval("f1_low", "f1_high", "95 %"),
    percent("rouge_l", "ROUGE-L %"),
    percent("of_window", "% of window"),
    percent("of_ceiling", "% of ceiling"),
    change("difference", "adapter minus it (95 %)"),
    number("prompt_tokens", "prompt tokens"),
    number("update_s", "update s", 2),
    number("answer_s", "answer s", 2),
    number("update_mib", "update MiB"),
    number("answer_mib", "answer MiB"),
)


@dataclass(frozen=True)
class QaConfig:
    """What `loracast eval qa` measures."""

    documents: tuple[str, ...] = ()
    """Files of documents with questions."""
    sources: tuple[str, ...] = ()
    """Of rows with a `source` field, take only these sources, all if empty."""
    max_documents: int = 200
    """Most documents of each source, drawn at random."""
    max_questions: int | None = None
    """Most questions about one document; all if None."""
    spans_only: bool = False
    """Only questions whose answer stands in the document."""
    systems: tuple[str, ...] = ()
    """Rivals to run; if empty, all but those that are not run unless asked for."""
    route: int = 2
    """Chunks that a question is given."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk of an adapter."""
    split: str = "test"
    """Of rows with a `split` field, take only this one."""
    seed: int = 0
    """Seed of the draw of documents and questions."""
    budget_s: float | None = None
    """Begin no further documents after this many seconds; the table shows how many there were."""

    def __post_init__(self) -> None:
        if not self.documents:
            raise ConfigError("no documents: give a file of documents with questions (--documents FILE)")
        if min(self.max_documents, self.max_questions or 1, self.route) < 1:
            raise ConfigError("max_documents, max_questions and route must be at least 1")


@dataclass(frozen=True)
class Answered:
    """One rival's answer to one question."""

    system: str
    document: QuestionedDocument
    question: DocumentQuestion
    text: str
    n_document_tokens: int
    n_prompt_tokens: int
    answer_s: float | None = None
    """Of questions that were asked one at a time, with all that goes before the base begins."""
    answer_mib: float | None = None
    """Of these, the most memory above what was held before."""

    @property
    def exact(self) -> float:
        return best(exact_match, self.text, self.question.answers)

    @property
    def f1(self) -> float:
        return best(token_f1, self.text, self.question.answers)

    @property
    def rouge_l(self) -> float:
        return best(rouge_l, self.text, self.question.answers)


@dataclass
class Tally:
    """What has been answered so far, and what the updates of documents took, by system."""

    answered: list[Answered] = field(default_factory=list)
    update_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    update_mib: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The most memory that any of them took above what was held before."""


def evaluate_qa(setup: Setup, config: QaConfig, out: Path, progress: Progress = lambda done, total: None) -> Report:
    """Run the evaluation; tables, answers and pictures are in `out`, the tables after every few documents."""
    rivals = check_baselines(config.systems, BASELINES, setup.reader is not None)
    chosen = choose(config)
    out.mkdir(parents=True, exist_ok=True)
    (out / "answers.jsonl").unlink(missing_ok=True)
    about = environment(setup.model.base, setup.model.documents.id)
    tally, ends_s = Tally(), None if config.budget_s is None else time.monotonic() + config.budget_s
    warm_up(setup.model.base)
    n_done, is_complete = 0, True
    for _, some in _by_source(chosen):
        for i, given in enumerate(_groups(setup, some)):
            if n_done and ends_s is not None and time.monotonic() > ends_s:
                is_complete = False
                break
            for name, rival in rivals.items():
                new = _answer(setup, name, rival, given, tally, n_timed=0 if i else _N_TIMED)
                _write_answers(out, new)
                tally.answered += new
            n_done += len(given)
            progress(n_done, len(chosen))
            report(config, tally, about, is_complete=False).write(out)
    final = report(config, tally, about, is_complete)
    final.write(out)
    return final


def draw(report: Report, out: Path) -> None:
    """The pictures: F1 by length, and F1 by what an answer costs."""
    from loracast.evaluation import plots

    by_length = [row for row in report.rows if row["kind"] == "length"]
    if by_length:
        plots.f1_by_length(out / "by_length.png", by_length)
    last = [row for row in report.rows if row["kind"] == "source"][-1]["part"]  # all, or the only source
    plots.f1_by_cost(out / "by_cost.png", [row for row in report.rows if row["part"] == last])


def choose(config: QaConfig) -> list[QuestionedDocument]:
    """The documents that are asked about, source by source.

    Raises:
        ConfigError: none is left.
    """
    documents = read_questioned(config.documents, config.sources, config.split)
    chosen: list[QuestionedDocument] = []
    for source, of_source in _by_source(sorted(documents, key=lambda document: document.source)):
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


def _by_source(documents: Sequence[QuestionedDocument]) -> Iterator[tuple[str, list[QuestionedDocument]]]:
    return ((source, list(some)) for source, some in groupby(documents, key=lambda document: document.source))


def _groups(setup: Setup, documents: Sequence[QuestionedDocument]) -> Iterator[list[Given]]:
    """A few documents at a time, each with the next one as its other document; what they cast is freed afterwards."""

    def learn(document: QuestionedDocument) -> InMemoryAdapter:
        return InMemoryAdapter(setup.model, document.text, document.title, setup.chunk_tokens)

    for first in range(0, len(documents), _DOCUMENTS_PER_GROUP):
        some = documents[first : first + _DOCUMENTS_PER_GROUP]
        following = documents[(first + len(some)) % len(documents)]  # of a single document, itself
        adapters = [learn(document) for document in [*some, following]]
        yield [Given(d, adapters[i], adapters[i + 1]) for i, d in enumerate(some)]
        for one in adapters:
            one.close()


def _answer(
    setup: Setup, name: str, rival: Baseline, given: Sequence[Given], tally: Tally, n_timed: int
) -> list[Answered]:
    """One rival's answers to all questions about some documents."""
    for one in given:  # one by one, as a user would learn them
        with peak_memory() as peak:
            started = time.perf_counter()
            rival.learn(setup, [one])
            tally.update_s[name].append(time.perf_counter() - started)
        tally.update_mib[name] = max(tally.update_mib[name], peak.above_mib)
    cases = [(one, question) for one in given for question in one.document.questions]
    done: dict[int, Answered] = {}
    requests: dict[int, Request] = {}
    for i, (one, question) in enumerate(cases):
        if i >= n_timed:
            requests[i] = rival.ask(setup, one, question)
            continue
        with peak_memory() as peak:
            started = time.perf_counter()
            requests[i] = rival.ask(setup, one, question)
            said = answer(setup.model.base, requests[i].prompt, requests[i].lora, _GREEDY)
            answer_s = time.perf_counter() - started
        asked = _answered(name, one, question, said.text, requests[i])
        done[i] = replace(asked, answer_s=answer_s, answer_mib=peak.above_mib)
    rest = sorted((i for i in requests if i not in done), key=lambda i: len(requests[i].prompt))
    for batch in _batches(rest, requests):
        texts = answer_batch(
            setup.model.base, [requests[i].prompt for i in batch], [requests[i].lora for i in batch], _GREEDY
        )
        for i, said_text in zip(batch, texts, strict=True):
            done[i] = _answered(name, *cases[i], said_text, requests[i])
    return [done[i] for i in range(len(cases))]


def _answered(name: str, one: Given, question: DocumentQuestion, said: str, request: Request) -> Answered:
    return Answered(name, one.document, question, said, one.adapter.n_tokens, len(request.prompt))


def _batches(order: Sequence[int], requests: Mapping[int, Request]) -> Iterator[list[int]]:
    """Runs of requests, which come sorted by the lengths of their prompts, within the bounds of a batch."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == _MAX_ROWS or len(requests[i].prompt) * (len(batch) + 1) > _MAX_PROMPT_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def report(config: QaConfig, tally: Tally, about: Mapping[str, Any], is_complete: bool) -> Report:
    """The tables: every source by itself and all of them, and every length."""
    parts: dict[str, list[Answered]] = {}
    for a in tally.answered:
        parts.setdefault(a.document.source or "documents", []).append(a)
    if len(parts) > 1:
        parts["all"] = tally.answered
    by_length: dict[int, list[Answered]] = defaultdict(list)
    for a in tally.answered:
        by_length[sum(a.n_document_tokens >= limit for limit in LENGTHS)].append(a)
    rows = [row for part, some in parts.items() for row in _rows(part, some, tally, "source")]
    if len(by_length) > 1:
        rows += [row for i, some in sorted(by_length.items()) for row in _rows(_length_name(i), some, tally, "length")]
    return Report("qa", COLUMNS, rows, asdict(config), about, is_complete)


def _length_name(i: int) -> str:
    low, high = (0, *LENGTHS)[i], (*LENGTHS, None)[i]
    return f"{low} to {high - 1} tokens" if high else f"{low} tokens or more"


def _rows(part: str, answered: Sequence[Answered], tally: Tally, kind: str) -> list[dict[str, Any]]:
    """One row a system, over some documents."""
    by_system: dict[str, list[Answered]] = {}
    for a in answered:
        by_system.setdefault(a.system, []).append(a)
    f1 = {name: _mean([a.f1 for a in some]) for name, some in by_system.items()}
    rows = []
    for name, some in by_system.items():
        by_document = _by_document(some)
        low, high = cluster_bootstrap(list(by_document.values()))
        timed = [a.answer_s for a in some if a.answer_s is not None]
        peaks = [a.answer_mib for a in some if a.answer_mib is not None]
        row: dict[str, Any] = {
            "kind": kind,
            "part": part,
            "system": name,
            "label": BASELINES[name].label,
            "documents": len(by_document),
            "n": len(some),
            "exact": _mean([a.exact for a in some]),
            "f1": f1[name],
            "f1_low": low,
            "f1_high": high,
            "rouge_l": _mean([a.rouge_l for a in some]),
            "of_window": f1[name] / f1["window"] if f1.get("window") else None,
            "of_ceiling": f1[name] / f1["ceiling"] if f1.get("ceiling") else None,
            "document_tokens": _mean([float(a.n_document_tokens) for a in some]),
            "prompt_tokens": _mean([float(a.n_prompt_tokens) for a in some]),
            "update_s": _mean(tally.update_s[name]) if tally.update_s.get(name) else None,
            "answer_s": _mean(timed) if timed else None,
            "update_mib": tally.update_mib.get(name),
            "answer_mib": max(peaks) if peaks else None,
        }
        if "adapter" in by_system and name != "adapter":
            mine = _by_document(by_system["adapter"])
            gains = [[x - y for x, y in zip(mine[key], by_document[key], strict=True)] for key in mine]
            row["difference"] = f1["adapter"] - f1[name]
            row["difference_low"], row["difference_high"] = cluster_bootstrap(gains)
        rows.append(row)
    return rows


def _by_document(answered: Sequence[Answered]) -> dict[str, list[float]]:
    """The F1 of each document's questions."""
    scores: dict[str, list[float]] = defaultdict(list)
    for a in answered:
        scores[a.document.doc_id].append(a.f1)
    return scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _write_answers(out: Path, answered: Sequence[Answered]) -> None:
    with open(out / "answers.jsonl", "a", encoding="utf-8") as file:
        for a in answered:
            line = {
                "system": a.system, "source": a.document.source, "doc_id": a.document.doc_id, "question": a.question.question,
                "answers": a.question.answers, "answer": a.text, "exact": a.exact, "f1": round(a.f1, 4), "rouge_l": round(a.rouge_l, 4),
                "document_tokens": a.n_document_tokens,
            }  # fmt: skip
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
