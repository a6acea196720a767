"""Baselines for questions about documents: adapters, no document, and a text in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from loracast.answering.answers import NOT_SAID, least_confidence
from loracast.answering.model import Model
from loracast.answering.question_answering import ASK_SYSTEM_TURN
from loracast.base.chat import ChatFormat, without_middle
from loracast.base.load import Base
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.lab.data.rows import QuestionedDocument, read_questioned
from loracast.lab.evaluation.runner import Baseline, InMemoryAdapter, LoRASource, Request, cast, fixed
from loracast.lab.training.document_source import reading_prompt
from loracast.lora.algebra import LoRA, concat
from loracast.lora.factors import Factors
from loracast.reading.matching import candidates_together
from loracast.reading.relevance import THRESHOLD, THRESHOLD_STRICT
from loracast.reading.routing import DEFAULT_ROUTE, Route

Prompt = Callable[[ChatFormat, str, str], list[int]]
"""(chat, text, question) -> token ids of a prompt that shows the text."""
Whose = Literal["document", "other"]
"""Which of a case's documents."""
MAX_NEW_TOKENS = 24
"""Longest answer: a made-up value has at most about ten tokens, and a sentence around it fits too."""
_JOINTS = 8  # tokens to spare: where text and prompt meet they may be encoded otherwise than each alone


@dataclass(frozen=True, kw_only=True)
class DocumentConfig:
    """Settings of every experiment on documents."""

    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk, in tokens."""
    seed: int = 0
    """Seed of all that is drawn."""


@dataclass(frozen=True, kw_only=True)
class RoutedConfig(DocumentConfig):
    """Settings of an experiment that gives a question some chunks only."""

    route: int = DEFAULT_ROUTE
    """Chunks of a document that a question is given when routed."""


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(RoutedConfig):
    """Settings of an experiment that compares adapters with texts in the prompt."""

    window_lora: str = ""
    """Folder of a LoRA of `loracast train window`, which answers with the text in its prompt."""

    def setup(self, model: Model, max_new_tokens: int) -> DocumentSetup:
        """What all baselines share. Raises AdapterError for a window LoRA that is none, or of another base."""
        from loracast.lab.training.window import read_window_lora

        lora = None
        if self.window_lora:
            lora = read_window_lora(Path(self.window_lora), model.base.fingerprint).to(model.base.device)
        return DocumentSetup(model, self.route, max_new_tokens, lora)

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
        if not self.documents:
            raise ConfigError("no documents: give a file of documents (--documents FILE)")

    def read(self) -> list[QuestionedDocument]:
        """Read the documents. Raises ConfigError where there is none."""
        return read_questioned(self.documents, self.sources, self.split)


@dataclass(frozen=True)
class DocumentSetup:
    """What all baselines of a run share."""

    model: Model
    route: int = DEFAULT_ROUTE
    """Chunks that a question is given."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Longest answer."""
    window_lora: LoRA | None = None
    """A LoRA trained to answer with the text in its prompt (`loracast train window`), if there is one."""

    @property
    def base(self) -> Base:
        return self.model.base

    @cached_property
    def static(self) -> LoRASource:
        """The LoRA that the hypernetwork gives every document alike."""
        return fixed(static_lora(self.model))

    @cached_property
    def chunk_bytes(self) -> int:
        """Size of one chunk's LoRA, two bytes a number."""
        config = self.model.documents.hypernetwork.config
        return 2 * sum(config.ranks[m.kind] * (m.d_in + m.d_out) for m in config.target.modules)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Cast the chunks that requests need, full batches across documents."""
        cast(self.model, [part for r in requests if r.lora is not None for part in r.lora.chunks])


@dataclass(frozen=True, eq=False)
class DocumentCase:
    """One question about one document."""

    document: InMemoryAdapter
    other: InMemoryAdapter
    """Another document of the same kind, which does not hold the answer."""
    question: str
    answers: tuple[str, ...] = ()
    """All answers that count as right."""
    chunk: int | None = None
    """The document's chunk that holds the answer, if that is known."""
    depth: float | None = None
    """Where in the document the answer was put, from 0 to 1, if it was."""
    doc_id: str = ""
    source: str = ""
    """The data set that the document is from."""
    learned: dict[str, LoRA] = field(default_factory=dict)
    """LoRAs that baselines trained for this document, by the baseline's name; shared by all questions about it."""


def plain(setup: DocumentSetup, question: str) -> tuple[int, ...]:
    """The question alone, as `loracast ask` puts it."""
    return tuple(setup.base.chat.prompt(question, ASK_SYSTEM_TURN))


def pick(setup: DocumentSetup, document: InMemoryAdapter, question: str, threshold: float = THRESHOLD) -> Route:
    """What of a document a question gets, as in `loracast ask`; with THRESHOLD_STRICT as in `ask --strict`."""
    return document.route(question, setup.route, threshold)


def adapters(setup: DocumentSetup, picked: Sequence[tuple[InMemoryAdapter, Route]]) -> LoRASource | None:
    """The sum of the LoRAs of some documents, as `loracast ask -a one -a two` adds them up; None without a document.

    Args:
        picked: each document with what a question gets of it.
    """
    picked = [(document, route) for document, route in picked if not route.is_empty]
    if not picked:
        return None
    chunks = tuple((d, tuple(range(len(d.chunks)) if r.chunks is None else sorted(r.chunks))) for d, r in picked)
    key = tuple((d, r.chunks, r.weights, r.sentences) for d, r in picked)
    n_bytes = setup.chunk_bytes * sum(len(some) for _, some in chunks)

    # What the hypernetwork gives every document alike counts once.
    def make() -> LoRA:
        return concat([d.lora(r.picked, r.sentence_weights, static=i == 0) for i, (d, r) in enumerate(picked)])

    return LoRASource(key, make, n_bytes, chunks)


def no_document(setup: DocumentSetup, case: DocumentCase) -> Request:
    """The plain base: what it knows or guesses."""
    return Request(plain(setup, case.question))


def adapter(
    *whose: Whose, is_routed: bool = True, copies: bool = True
) -> Callable[[DocumentSetup, DocumentCase], Request]:
    """The question alone, with the LoRAs of these documents of a case, added up where there are two.

    Args:
        is_routed: take the chunks that routing picks for the question, as `loracast ask` does, instead of all.
        copies: raise the logits of answers that stand in the documents (base/copying.py), as `loracast ask` does.
    """

    def request(setup: DocumentSetup, case: DocumentCase) -> Request:
        documents: list[InMemoryAdapter] = [getattr(case, name) for name in whose]
        picked = [(d, pick(setup, d, case.question) if is_routed else Route()) for d in documents]
        asked = _asked(setup, case, picked)
        if not copies:
            asked = replace(asked, likely=())
        return replace(asked, found=_is_found(case, picked[0][1])) if is_routed and whose == ("document",) else asked

    return request


def strictly(setup: DocumentSetup, case: DocumentCase) -> Request:
    """As `loracast ask --strict` answers: by the document's adapter, or that the document does not say."""
    route = pick(setup, case.document, case.question, THRESHOLD_STRICT)
    request = replace(_asked(setup, case, [(case.document, route)]), found=_is_found(case, route))
    if request.lora is None:
        return replace(request, answer=NOT_SAID)
    return replace(request, least_confidence=least_confidence([route]))


def _asked(setup: DocumentSetup, case: DocumentCase, picked: Sequence[tuple[InMemoryAdapter, Route]]) -> Request:
    likely = candidates_together([route.candidates for _, route in picked])
    return Request(plain(setup, case.question), adapters(setup, picked), likely=likely)


def _is_found(case: DocumentCase, route: Route) -> bool | None:
    """Whether the chunk that holds the answer was picked; None where it is not known."""
    return None if case.chunk is None else route.chunks is None or case.chunk in route.chunks


def likeliest_place(setup: DocumentSetup, case: DocumentCase) -> Request:
    """No model: the text from the place on at which the answer most likely begins, as far as copying may follow it."""
    likely = pick(setup, case.document, case.question).candidates
    return Request((), answer=likely[0].text if likely else NOT_SAID)


def copying_alone(with_static: bool) -> Callable[[DocumentSetup, DocumentCase], Request]:
    """The question alone with the bonus for copying, and in place of the document's LoRA the static one, or none."""

    def request(setup: DocumentSetup, case: DocumentCase) -> Request:
        route = pick(setup, case.document, case.question)
        lora = setup.static if with_static and not route.is_empty else None
        return Request(plain(setup, case.question), lora, likely=route.candidates)

    return request


def in_window_lora(setup: DocumentSetup, text: str, question: str) -> Request:
    """A text in the prompt, and the LoRA that was trained to answer so."""
    assert setup.window_lora is not None
    return Request(with_text(setup, reading_prompt, text, question), fixed(setup.window_lora))


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
            document: InMemoryAdapter = getattr(case, name)
            cast(setup.model, [(document, range(len(document.chunks)))])

    return work


def with_text(
    setup: DocumentSetup, prompt: Prompt, text: str, question: str, max_tokens: int | None = None
) -> tuple[int, ...]:
    """A prompt that shows a text, whose middle gives way where the window, or `max_tokens`, is too small."""
    chat = setup.base.chat
    room = setup.base.window - setup.max_new_tokens - len(prompt(chat, "", question)) - _JOINTS
    cut = without_middle(setup.base.tokenizer, text, max(1, min(room, max_tokens or room)))
    return tuple(prompt(chat, cut, question))


def whole(prompt: Prompt, max_tokens: int | None = None) -> Callable[[DocumentSetup, DocumentCase], Request]:
    """The whole document in the prompt, or its beginning and end where it has more than `max_tokens` tokens."""
    return lambda setup, case: Request(with_text(setup, prompt, case.document.full_text, case.question, max_tokens))


WITHOUT_PARTS: dict[str, Baseline[DocumentSetup, DocumentCase]] = {
    "place": Baseline("likeliest place of the text, no model", likeliest_place, is_optional=True),
    "copying": Baseline("no LoRA, copying", copying_alone(with_static=False), is_optional=True),
    "static": Baseline("static LoRA, copying", copying_alone(with_static=True), is_optional=True),
    "lora": Baseline(
        "LoRA, routed, without copying", adapter("document", copies=False), learn("document"), is_optional=True
    ),
    "merged": Baseline(
        "LoRA of all chunks, merged", adapter("document", is_routed=False), learn("document"), is_optional=True
    ),
}
"""The adapter with parts of it taken away."""
