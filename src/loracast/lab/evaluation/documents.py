"""Documents in evaluations: learned into a temporary library, asked by baselines, which one runner goes through.

Only a document's text is learned. Its chunks are cast when questions need them, full batches across documents, and
rounded as those of a stored adapter are; a test compares them.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import count, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import torch

from loracast.answering.answers import NOT_SAID, without_model
from loracast.answering.model import Model
from loracast.answering.options import Chosen
from loracast.base.chat import ChatFormat, without_middle
from loracast.base.generate import Sampling
from loracast.cast.document import CachedRecast, Place, learn_document, split_document
from loracast.documents import Chunk, Document
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.lab.data.rows import QuestionedDocument, read_questioned
from loracast.lab.evaluation import runner
from loracast.lab.evaluation.report import Progress, Report
from loracast.lab.evaluation.runner import Answered, Baseline, LoRASource, Request
from loracast.lab.training.document_source import reading_prompt
from loracast.library.adapter import Adapter
from loracast.library.index import Index
from loracast.lora.algebra import LoRA
from loracast.lora.factors import Factors
from loracast.lora.quantize import DEFAULT_STORAGE, Storage
from loracast.reading.matching import Route
from loracast.reading.routing import DEFAULT_ROUTE, routing_key
from loracast.reading.search import search

Prompt = Callable[[ChatFormat, str, str], list[int]]
"""(chat, text, question) -> token ids of a prompt that shows the text."""
Whose = Literal["document", "other"]
"""Which of a case's documents."""
MAX_NEW_TOKENS = 24
"""Longest answer: a made-up value has at most about ten tokens, and a sentence around it fits too."""
_JOINTS = 8  # tokens to spare: where text and prompt meet they may be encoded otherwise than each alone


@dataclass(frozen=True, kw_only=True)
class DocumentConfig(runner.Settings):
    """Settings of every experiment on documents."""

    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk, in tokens."""
    seed: int = 0
    """Seed of all that is drawn."""


@dataclass(frozen=True, kw_only=True)
class RoutedConfig(DocumentConfig):
    """Settings of an experiment that gives a question some chunks only."""

    POSITIVE: ClassVar[tuple[str, ...]] = ("route",)
    route: int = DEFAULT_ROUTE
    """Chunks of a document that a question is given when routed."""


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(RoutedConfig):
    """Settings of an experiment that compares adapters with texts in the prompt."""

    window_lora: str = ""
    """Folder of a LoRA of `loracast train window`, which answers with the text in its prompt."""

    def setup(self, model: Model, max_new_tokens: int, storage: Storage = DEFAULT_STORAGE) -> DocumentSetup:
        """What all baselines share. Raises AdapterError for a window LoRA that is none, or of another base."""
        from loracast.lab.training.loras import read_window_lora

        lora = None
        if self.window_lora:
            lora = read_window_lora(Path(self.window_lora), model.base.fingerprint).to(model.base.device)
        return DocumentSetup(model, self, max_new_tokens, lora, storage)

    @property
    def missing(self) -> dict[str, str]:
        """What baselines may need and a run was not given, as `choose_baselines` takes it."""
        return {} if self.window_lora else {"window LoRA": "a LoRA of `loracast train window` (--window-lora FOLDER)"}


@dataclass(frozen=True)
class QuestionedConfig(DocumentConfig):
    """Settings of the experiments on files of documents."""

    documents: tuple[str, ...] = ()
    """Files of documents with questions."""
    sources: tuple[str, ...] = ()
    """Sources to take of documents with a `source` field; all if empty."""
    split: str = "test"
    """Split to take of documents with a `split` field."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.documents:
            raise ConfigError("no documents: give a file of documents (--documents FILE)")

    def read(self) -> list[QuestionedDocument]:
        """Read the documents. Raises ConfigError where there is none."""
        return read_questioned(self.documents, self.sources, self.split)


_MOST_CHUNKS = 100_000  # in memory: a run frees those that it needs no longer


@dataclass(frozen=True, eq=False)
class LearnedDocument:
    """A document with its adapter in a temporary library."""

    document: Document
    chunks: list[Chunk]
    adapter: Adapter
    trained: dict[str, LoRA] = field(default_factory=dict)
    """LoRAs that baselines trained for this document, by the baseline's name."""

    @property
    def full_text(self) -> str:
        """The document as a reader gets it."""
        title, text = self.document.title, self.document.text
        return f"{title}\n\n{text}" if title else text

    @property
    def n_tokens(self) -> int:
        return self.adapter.manifest.n_tokens

    def chunk_of(self, statement: str, value_at: int) -> int | None:
        """The number of the chunk that holds a character of a statement; None where it is not there word for word."""
        at = self.document.text.find(statement)
        return None if at < 0 else max(0, bisect_right(self.chunks, at + value_at, key=lambda chunk: chunk.start) - 1)

    @property
    def places(self) -> list[Place]:
        return [(chunk.prompt, tuple(chunk.units)) for chunk in self.chunks]


class DocumentSetup(runner.EvaluatedModel):
    """A model with a temporary library, and what all baselines of a run on documents share."""

    def __init__(
        self,
        model: Model,
        config: RoutedConfig | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        window_lora: LoRA | None = None,
        storage: Storage = DEFAULT_STORAGE,
    ):
        """
        Args:
            max_new_tokens: longest answer.
            window_lora: a LoRA trained to answer with the text in its prompt (`loracast train window`), if there is
                one.
            storage: how factors are rounded.
        """
        self._folder = TemporaryDirectory(prefix="loracast-eval-")
        super().__init__(model.base, self._folder.name)
        self.documents, self.reader = model.documents, model.reader
        self.config = config or RoutedConfig()
        self.max_new_tokens, self.window_lora, self.storage = max_new_tokens, window_lora, storage
        self.learned: dict[str, LearnedDocument] = {}  # by version
        self._names = map("d{}".format, count())

    @cached_property
    def _recast(self) -> CachedRecast:
        return CachedRecast(self.documents, self.base, _MOST_CHUNKS, self.storage)

    @cached_property
    def static(self) -> LoRASource:
        """The LoRA that the hypernetwork gives every document alike."""
        return runner.fixed(static_lora(self))

    @cached_property
    def chunk_bytes(self) -> int:
        """Size of one chunk's LoRA, two bytes a number."""
        config = self.documents.hypernetwork.config
        return 2 * sum(config.ranks[m.kind] * (m.d_in + m.d_out) for m in config.target.modules)

    def overview(self, question: str, adapter: Chosen) -> None:
        """No outline answers in an evaluation: every question is the model's."""

    def keep(self, document: Document | str, title: str = "") -> LearnedDocument:
        """Learn the text of a document; its chunks are cast when they are needed."""
        document = Document.from_text(document, title) if isinstance(document, str) else document
        longest, name = self.config.chunk_tokens, next(self._names)
        chunks = split_document(self.base, document, longest)
        learn_document(
            self.documents, self.base, document, self.library, name, chunks=chunks, max_chunk_tokens=longest,
            storage="text",
        )  # fmt: skip
        kept = LearnedDocument(document, chunks, self.adapter(name))
        self.learned[kept.adapter.manifest.version] = kept
        return kept

    def cast_all(self, document: LearnedDocument) -> None:
        """Cast all chunks of a document."""
        self._recast.cast(document.places)

    def free(self, documents: Iterable[LearnedDocument]) -> None:
        """Free what was cast, trained and opened for documents."""
        for document in documents:
            self._recast.forget(document.places)
            document.trained.clear()
            vars(document.adapter).pop("open_index", None)

    def request(self, question: str, chosen: Chosen = (), chunk: int | None = None, **options: Any) -> Request:
        """A question as `loracast ask` prepares it, with the LoRA of what it gets of the chosen adapters.

        Args:
            chunk: the chunk of the first adapter that holds the answer, if it is to be said whether it was picked.
            options: as in `prepare`.
        """
        prepared = self.prepare(question, chosen, **{"route": self.config.route, **options})
        routed = prepared.routed
        picked = [_chunks(*one) for one in routed]
        key, n_bytes = routing_key(routed), self.chunk_bytes * sum(map(len, picked))
        lora = None if key is None else LoRASource(key, partial(_made, self, routed), n_bytes)
        return Request(prepared, lora, None if chunk is None else chunk in picked[0])

    def cast_ahead(self, requests: Sequence[Request]) -> None:
        """Cast the chunks that requests need, full batches across documents."""
        self._recast.cast(
            [
                self.learned[adapter.manifest.version].places[i]
                for request in requests
                if request.lora is not None
                for adapter, route in request.prepared.routed
                for i in _chunks(adapter, route)
            ]
        )


def _made(model: Model, routed: list[tuple[Adapter, Route]]) -> LoRA:
    lora = model.lora_of(routed)
    assert lora is not None
    return lora


def _chunks(adapter: Adapter, route: Route) -> Sequence[int]:
    """The chunks that a question gets of an adapter, in order."""
    return range(adapter.manifest.n_chunks) if route.chunks is None else sorted(route.chunks)


@dataclass(frozen=True, eq=False)
class DocumentCase:
    """One question about one document."""

    document: LearnedDocument
    question: str
    answers: tuple[str, ...] = ()
    """All answers that count as right."""
    chunk: int | None = None
    """The document's chunk that holds the answer, if that is known."""
    depth: float | None = None
    """Where in the document the answer was put, from 0 to 1, if it was."""
    doc_id: str = ""
    about: Any = None
    """What the question was made from, if it was generated."""
    other: LearnedDocument | None = None
    """Another document of the same kind, which does not hold the answer."""


DocumentBaseline = Baseline[DocumentSetup, DocumentCase]
Asks = Callable[[DocumentSetup, DocumentCase], Request]
"""What a baseline gives the model to answer a question with."""


def no_document(setup: DocumentSetup, case: DocumentCase) -> Request:
    """The plain base: what it knows or guesses."""
    return setup.request(case.question)


def adapter(*whose: Whose, **options: Any) -> Asks:
    """The question alone, with the LoRAs of these documents of a case, as `loracast ask -a one -a two` adds them up.

    Args:
        options: as in `Model.prepare`.
    """

    def request(setup: DocumentSetup, case: DocumentCase) -> Request:
        chunk = case.chunk if whose == ("document",) and options.get("route", 1) else None
        return setup.request(case.question, [getattr(case, name).adapter for name in whose], chunk, **options)

    return request


merged = adapter("document", route=None, always=True)
"""With the LoRA of all chunks."""


def likeliest_place(setup: DocumentSetup, case: DocumentCase) -> Request:
    """No model: the text from the place on at which the answer most likely begins, as far as copying may follow it."""
    candidates = setup.request(case.question, case.document.adapter).prepared.candidates
    given = without_model(candidates[0].text, "text") if candidates else without_model(NOT_SAID, "refusal")  # type: ignore[arg-type]
    return Request(given)


def copying_alone(with_static: bool) -> Asks:
    """The question alone with the bias for copying, and in place of the document's LoRA the static one, or none."""

    def request(setup: DocumentSetup, case: DocumentCase) -> Request:
        asked = setup.request(case.question, case.document.adapter)
        return replace(asked, lora=setup.static if with_static and asked.lora is not None else None)

    return request


def in_window_lora(setup: DocumentSetup, text: str, question: str) -> Request:
    """A text in the prompt, and the LoRA that was trained to answer so."""
    assert setup.window_lora is not None
    return runner.shown(with_text(setup, reading_prompt, text, question), runner.fixed(setup.window_lora))


def static_lora(model: Model) -> LoRA:
    """The LoRA that a hypernetwork gives every document alike; empty where it has no such part."""
    hypernetwork = model.documents.hypernetwork
    factors: dict[str, Factors] = {}
    for kind, sides in hypernetwork.static_rows().items():
        for module, a, b in zip(hypernetwork.config.target.of_kind(kind), *sides, strict=True):
            factors[module.name] = Factors(a.to(torch.bfloat16), b.T.to(torch.bfloat16))
    return LoRA(factors)


def learn(*whose: Whose) -> Callable[[DocumentSetup, DocumentCase], None]:
    """Cast all chunks of these documents of a case."""

    def work(setup: DocumentSetup, case: DocumentCase) -> None:
        for name in whose:
            setup.cast_all(getattr(case, name))

    return work


def with_text(
    setup: DocumentSetup, prompt: Prompt, text: str, question: str, max_tokens: int | None = None
) -> list[int]:
    """A prompt that shows a text, whose middle gives way where the window, or `max_tokens`, is too small."""
    chat = setup.base.chat
    room = setup.base.window - setup.max_new_tokens - len(prompt(chat, "", question)) - _JOINTS
    return prompt(chat, without_middle(setup.base.tokenizer, text, max(1, min(room, max_tokens or room))), question)


def whole(prompt: Prompt, max_tokens: int | None = None) -> Asks:
    """The whole document in the prompt, or its beginning and end where it has more than `max_tokens` tokens."""
    return lambda setup, case: runner.shown(
        with_text(setup, prompt, case.document.full_text, case.question, max_tokens)
    )


WINDOW_LORA: DocumentBaseline = Baseline(
    "window LoRA, the text in its window",
    lambda setup, case: in_window_lora(setup, case.document.full_text, case.question),
    needs=("window LoRA",),
)
_learned = learn("document")
WITHOUT_PARTS: dict[str, DocumentBaseline] = {
    "place": Baseline("likeliest place of the text, no model", likeliest_place, is_optional=True),
    "copying": Baseline("no LoRA, copying", copying_alone(with_static=False), is_optional=True),
    "static": Baseline("static LoRA, copying", copying_alone(with_static=True), is_optional=True),
    "lora": Baseline("LoRA, routed, without copying", adapter("document", outlines=False), _learned, is_optional=True),
    "merged": Baseline("LoRA of all chunks, merged", merged, _learned, is_optional=True),
}
"""The adapter with parts of it taken away."""


# ---- the runner ----


@dataclass(frozen=True)
class Part:
    """Documents that stand together in a table: those of one size or of one source."""

    name: Any
    n: int
    per_group: int
    """Documents that are in memory at once."""
    draw: Callable[[int], list[DocumentCase]]
    """Draws and learns the i-th document, and gives its questions; i goes up to n, the other document of the last."""
    n_window: int | None = None
    """How many documents are also put into the window, which is slow where they are long; by default all."""


Answers = Sequence[Answered[DocumentCase]]
Updates = dict[str, list[float]]
"""By baseline, the seconds that learning each document took."""


def evaluate_documents(
    setup: DocumentSetup,
    writer: Report,
    baselines: Mapping[str, DocumentBaseline],
    parts: Sequence[Part],
    score: Callable[[Answered[DocumentCase]], dict[str, float]],
    rows_of: Callable[[Mapping[Any, Answers]], list[dict[str, Any]]],
    line_of: Callable[[Any, Answered[DocumentCase]], dict[str, Any]],
    n_timed: int,
    budget_s: float | None,
    progress: Progress,
    updates: Updates | None = None,
) -> Report:
    """Ask every baseline every question, part by part; tables and answers are written after every few documents.

    Args:
        score: the figures of one answer.
        rows_of: the rows of the table, from the answers of each part, by its name.
        line_of: what a line of answers.jsonl says, besides answer and scores, given the part's name.
        n_timed: questions of each part that a baseline is asked one at a time, for the time that an answer takes.
        budget_s: begin no further documents after this many seconds, shared among the parts.
        updates: filled with the seconds of learning each document; baselines are then asked one after the other.
    """
    answered: dict[Any, list[Answered[DocumentCase]]] = {}
    deadline, total, n_before, is_complete = runner.Deadline(budget_s), sum(part.n for part in parts), 0, True
    runner.warm_up(setup.base)
    for place, part in enumerate(parts):
        n_done = n_asked = 0
        for of_documents in _groups(setup, part, deadline.share(len(parts) - place)):
            cases = {name: [case for some in of_documents for case in some] for name in baselines}
            if "window" in cases and part.n_window is not None:
                n_shown = max(0, part.n_window - n_done)
                cases["window"] = [case for some in of_documents[:n_shown] for case in some]
            new: list[Answered[DocumentCase]] = []
            for names in [list(baselines)] if updates is None else [[name] for name in baselines]:
                if updates is not None:
                    updates[names[0]] += [_update_s(setup, baselines[names[0]], first) for first, *_ in of_documents]
                sampling = Sampling(max_new_tokens=setup.max_new_tokens)
                of_names = {name: cases[name] for name in names}
                new += runner.ask(setup, baselines, of_names, sampling, max(0, n_timed - n_asked))
            n_asked += sum(map(len, of_documents))
            n_done += len(of_documents)
            scored = [replace(a, scores=score(a)) for a in new]
            answered.setdefault(part.name, []).extend(scored)
            writer.add_answers({**line_of(part.name, a), **a.said, **a.scores} for a in scored)
            writer.write(rows_of(answered), is_complete=False)
            progress(n_before + n_done, total)
        n_before += part.n
        is_complete &= n_done == part.n
        progress(n_before, total)
    return writer.write(rows_of(answered), is_complete=is_complete)


def _update_s(setup: DocumentSetup, baseline: DocumentBaseline, case: DocumentCase) -> float:
    """Learn a document, given any of its questions, and say how long it took."""
    started = time.perf_counter()
    if baseline.learn is not None:
        baseline.learn(setup, case)
    return time.perf_counter() - started


def _groups(setup: DocumentSetup, part: Part, deadline: runner.Deadline) -> Iterator[list[list[DocumentCase]]]:
    """The questions of each document of a part, which has the next one as its other document.

    Some documents come at a time to bound the memory: what they have cast is freed when the next ones are asked for. No
    further ones come once the deadline is over; the first always do.
    """
    ahead = part.draw(0)
    for first in range(0, part.n, part.per_group):
        if first and deadline.is_over:
            break
        drawn = [ahead, *map(part.draw, range(first + 1, min(part.n, first + part.per_group) + 1))]
        ahead = drawn[-1]
        yield [[replace(case, other=after[0].document) for case in cases] for cases, after in pairwise(drawn)]
        setup.free(cases[0].document for cases in drawn[:-1])
    setup.free([ahead[0].document])


def best_passages(index: Index, question: str, n_chunks: int, k: int) -> list[int]:
    """The k of a document's chunks that match a question best, in the document's order; all where none matches."""
    best = search(index, question, k) if n_chunks > k else []
    return sorted(chunk for chunk, _ in best) or list(range(n_chunks))
