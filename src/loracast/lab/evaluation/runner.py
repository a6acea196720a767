"""Run the baselines of an evaluation: what each gives the base to answer a question, asked in batches, some timed.

Documents learned in memory, without a disk, the chunks of many documents cast in one batch.

Chunks, index and factors are made by the code of `loracast learn`, in the same precision; a test compares them.

The contract for whatever an evaluation compares with: what the base is given to answer one question.

A baseline gives a prompt and a LoRA or none; it computes nothing but a look-up. The runner answers.

The runner knows nothing of what a question is about: baselines turn cases into requests.
"""

from __future__ import annotations

import ctypes
import resource
import sqlite3
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from loracast.answering.answers import NOT_SAID
from loracast.answering.model import Model
from loracast.base.copying import copying
from loracast.base.generate import Answer, Sampling, answer, answers
from loracast.base.load import Base
from loracast.cast.document import cast_chunks, split_document, static_of
from loracast.documents import Document
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.lab.evaluation.report import mean, mean_if_any
from loracast.library.adapter import SENTENCE, SentenceWeights, join_chunks
from loracast.library.index import IndexInMemory, write_index
from loracast.lora.algebra import LoRA
from loracast.lora.quantize import DEFAULT_STORAGE, Storage, as_stored, static_storage, storage_of
from loracast.reading.matching import Candidate
from loracast.reading.relevance import THRESHOLD
from loracast.reading.routing import Route, route_question
from loracast.reading.search import best_passages


class InMemoryAdapter:
    """A document's chunks with their index; the factors of a chunk come with `cast`."""

    def __init__(
        self,
        model: Model,
        document: Document | str,
        title: str = "",
        max_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        storage: Storage = DEFAULT_STORAGE,
    ):
        self.document = Document.from_text(document, title) if isinstance(document, str) else document
        self.chunks = split_document(model.base, self.document, max_chunk_tokens)
        self._index = sqlite3.connect(":memory:", factory=IndexInMemory)
        write_index(self._index, self.chunks)
        hypernetwork = model.documents.hypernetwork
        self._target, self._merging = hypernetwork.config.target, hypernetwork.merging
        of_static = static_storage(storage)
        self._shared = {name: as_stored(value, of_static) for name, value in static_of(hypernetwork).items()}
        self._factors: dict[str, Tensor] = {}  # "down_proj.a" [chunks, layers, r, in], rows filled by `put`
        self._storage = storage
        self._is_cast = [False] * len(self.chunks)

    @property
    def full_text(self) -> str:
        """The document as a reader gets it."""
        title, text = self.document.title, self.document.text
        return f"{title}\n\n{text}" if title else text

    @property
    def n_tokens(self) -> int:
        return sum(chunk.n_tokens for chunk in self.chunks)

    def chunk_of(self, statement: str, value_at: int) -> int | None:
        """The number of the chunk that holds a character of a statement; None where it is not there word for word."""
        at = self.document.text.find(statement)
        return None if at < 0 else max(0, bisect_right(self.chunks, at + value_at, key=lambda chunk: chunk.start) - 1)

    def route(self, question: str, k: int | None, threshold: float = THRESHOLD, name: str = "") -> Route:
        """What a question gets of the document, as `Adapter.route` says it."""
        return route_question(self._index, len(self.chunks), question, k, threshold, name)

    def best_passages(self, question: str, k: int) -> list[int]:
        """The k chunks that BM25 finds best, in order; all where none matches."""
        return best_passages(self._index, question, len(self.chunks), k)

    def needs(self, chunk: int) -> bool:
        """Whether a chunk's factors have yet to be cast."""
        return not self._is_cast[chunk]

    def put(self, chunk: int, factors: dict[str, tuple[Tensor, Tensor]], sentences: Mapping[str, Tensor]) -> None:
        """Keep one chunk's factors, by kind A [layers, r, in] and B [layers, r, out], and its rows' sentences [r]."""
        for kind, numbers in sentences.items():
            name = f"{kind}{SENTENCE}"
            if name not in self._factors:
                self._factors[name] = torch.full((len(self.chunks), *numbers.shape), -1, dtype=numbers.dtype)
            self._factors[name][chunk] = numbers
        for kind, pair in factors.items():
            for side, rows in zip(("a", "b"), pair, strict=True):
                name = f"{kind}.{side}"
                if name not in self._factors:
                    shape = (len(self.chunks), *rows.shape)
                    self._factors[name] = torch.empty(shape, dtype=torch.bfloat16, device=rows.device)
                storage = storage_of(self._storage, kind in sentences)
                self._factors[name][chunk].copy_(as_stored(rows, storage))
        self._is_cast[chunk] = True

    def lora(
        self,
        chunks: Sequence[int] | Mapping[int, float] | None = None,
        sentences: SentenceWeights | None = None,
        *,
        static: bool = True,
    ) -> LoRA:
        """The LoRA of some chunks, or of all (None), as `Adapter.lora` has it."""
        common = self._shared if static else {}
        wanted = sorted(set(range(len(self.chunks)) if chunks is None else chunks))
        weights = [chunks[i] for i in wanted] if isinstance(chunks, Mapping) else None
        of_chunks = None if sentences is None else [sentences[i] for i in wanted]
        if len(wanted) == len(self.chunks):
            return join_chunks(self._target, self._factors, common, self._merging, weights, of_chunks)
        picked = torch.tensor(wanted)
        rows = {name: value.index_select(0, picked.to(value.device)) for name, value in self._factors.items()}
        return join_chunks(self._target, rows, common, self._merging, weights, of_chunks)

    def close(self) -> None:
        """Free the index and the factors; chunks and text stay."""
        self._index.close()
        self._factors.clear()
        self._shared.clear()


def cast(model: Model, wanted: Iterable[tuple[InMemoryAdapter, Sequence[int]]]) -> None:
    """Cast chunks of several documents, full batches across documents; those that were cast before are left alone."""
    todo = [(document, i) for document, chunks in wanted for i in chunks if document.needs(i)]
    todo = list(dict.fromkeys(todo))
    places = iter(todo)
    chunks = [document.chunks[i] for document, i in todo]
    units = [chunk.units for chunk in chunks]
    for expanded, sentences in cast_chunks(model.documents, model.base, [chunk.prompt for chunk in chunks], units):
        n = next(iter(expanded.values()))[0].shape[0]
        for row, (document, i) in enumerate(islice(places, n)):
            factors = {kind: (a[row], b[row]) for kind, (a, b) in expanded.items()}
            document.put(i, factors, {kind: numbers[row] for kind, numbers in sentences.items()})


AnySetup = TypeVar("AnySetup")
"""What all baselines of a run share: the base, and where their LoRAs come from."""
Case = TypeVar("Case")
"""One question, with the document or the task that it is about."""


@dataclass(frozen=True)
class LoRASource:
    """A LoRA that is made when it is needed. Sources with equal keys make equal LoRAs."""

    key: Hashable
    make: Callable[[], LoRA] = field(compare=False)
    n_bytes: int = field(default=0, compare=False)
    """Size of the LoRA, which bounds how many are held at once."""
    chunks: tuple[tuple[InMemoryAdapter, tuple[int, ...]], ...] = field(default=(), compare=False)
    """Chunks of documents that must be cast before."""


def fixed(lora: LoRA) -> LoRASource:
    """A source that holds its LoRA already."""
    return LoRASource(id(lora), lambda: lora)


@dataclass(frozen=True)
class Request:
    """A prompt of token ids and a LoRA or none, with which the base answers one question."""

    prompt: tuple[int, ...]
    lora: LoRASource | None = None
    found: bool | None = field(default=None, compare=False)
    """Whether the chunk with the answer was among those picked; None where nothing is picked."""
    answer: str | None = None
    """The answer, where no model is asked."""
    likely: tuple[Candidate, ...] = ()
    """What the answer may begin with, by the words of the documents."""
    least_confidence: float = field(default=0.0, compare=False)
    """An answer of a lower confidence becomes `NOT_SAID`, as with `loracast ask --strict`."""

    def text(self, said: Answer) -> str:
        """What a user gets to read of the base's answer."""
        return NOT_SAID if said.confidence < self.least_confidence else said.text

    def answered_by(self, said: Answer) -> str:
        """What gave that text, as in `SourcedAnswer`; "text" where it is the document's, without a model."""
        if self.answer is not None and self.answer != NOT_SAID:
            return "text"
        if self.answer is not None or said.confidence < self.least_confidence:
            return "refusal"
        return "base" if self.lora is None else "adapter"


@dataclass(frozen=True)
class Baseline(Generic[AnySetup, Case]):
    """One way to answer questions, which stands in one row of a table."""

    label: str
    """Its name in tables; `{route}` stands for the number of chunks that a question is given."""
    request: Callable[[AnySetup, Case], Request]
    """What the base is given for one question."""
    learn: Callable[[AnySetup, Case], None] | None = None
    """The one-off work for a document or a task, given any of its questions; its time is reported as update time."""
    needs: tuple[str, ...] = ()
    """What a run must have been given for this baseline: keys of the `missing` of `choose_baselines`."""
    is_optional: bool = False
    """Run this baseline only where it is asked for by name."""
    is_drawn: bool = True
    """Whether its requests depend on what a seed draws; one that does not is asked with the first seed only."""


def check_positive(config: Any, *fields: str) -> None:
    """Raises ConfigError where one of these settings is below 1 or holds such a number; None is no number."""
    given = {name: getattr(config, name) for name in fields}
    if bad := [
        n for n, v in given.items() if v is not None and min(v if isinstance(v, tuple) else (v,), default=0) < 1
    ]:
        raise ConfigError(f"{' and '.join(bad)} must be at least 1")


def check_names(names: Sequence[str], known: Mapping[str, Any]) -> tuple[str, ...]:
    """The names without repeats, in the table's order. Raises ConfigError for a name that is not known."""
    if unknown := sorted(set(names) - known.keys()):
        raise ConfigError(f"unknown baselines: {', '.join(unknown)}; choose from {', '.join(known)}")
    return tuple(name for name in known if name in names)


def choose_baselines(
    known: Mapping[str, Baseline[AnySetup, Case]], names: Sequence[str], missing: Mapping[str, str]
) -> dict[str, Baseline[AnySetup, Case]]:
    """The baselines of these names, in the table's order; without names all that are not optional and lack nothing.

    Args:
        missing: what this run was not given, with how a user gives it.

    Raises:
        ConfigError: a name is not known, or a baseline that was asked for lacks what it needs.
    """
    lacking = {
        name: " and ".join(how) for name, b in known.items() if (how := [missing[n] for n in b.needs if n in missing])
    }
    if not names:
        return {name: b for name, b in known.items() if name not in lacking and not b.is_optional}
    chosen = check_names(names, known)
    if problems := [f"{name!r} needs {lacking[name]}" for name in chosen if name in lacking]:
        raise ConfigError(f"{'; '.join(problems)}: give it, or leave these baselines out")
    return {name: known[name] for name in chosen}


_MIB = 2**20


@dataclass
class Peak:
    """Figures that are there when the work has ended."""

    before_mib: float = 0.0
    """Resident memory when the work began."""
    above_mib: float = 0.0
    """The most memory that came on top of it."""


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the resident memory of this process while the context lasts.

    On Linux freed memory is handed back first, so that it cannot hide what is allocated in its place, and the kernel's
    high-water mark starts anew. Elsewhere only what exceeds all that the process ever held shows.
    """
    before = _start()
    peak = Peak(before / _MIB)
    yield peak
    peak.above_mib = max(0, _most() - before) / _MIB


def _start() -> int:
    try:
        if sys.platform == "linux":
            getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)  # glibc has it, musl has nothing to trim
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except OSError:
        return _most()


def _most() -> int:
    """The most bytes that were resident: since the reset, or of the whole process where there is none."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

MAX_ROWS = 32
MAX_PROMPT_TOKENS = 8192
MAX_LORA_BYTES = 512 * 2**20
"""Bounds of one batch: prompts, their tokens with padding, and the LoRAs that it holds."""


class RunSetup(Protocol):
    """What the runner needs of a setup."""

    @property
    def base(self) -> Base: ...

    def prepare(self, requests: Sequence[Request]) -> None:
        """Do the work for many requests that is quicker done at once, such as casting chunks."""


Setup = TypeVar("Setup", bound=RunSetup)


@dataclass(frozen=True)
class Answered(Generic[Case]):
    """One baseline's answer to one question."""

    baseline: str
    case: Case
    text: str
    n_prompt_tokens: int
    answered_by: str
    found: bool | None = None
    """Whether the chunk with the answer was picked; None where nothing is picked."""
    first_token_s: float | None = None
    """From the question to the first token, routing and building the LoRA included; timed questions only."""
    answer_s: float | None = None
    """From the question to the end of the answer; timed questions only."""
    answer_mib: float | None = None
    """The most memory above what was held before; timed questions only."""

    @property
    def said(self) -> dict[str, str]:
        """What a line of answers.jsonl says of it."""
        return {"answer": self.text, "answered_by": self.answered_by}


def ask(
    setup: Setup,
    baselines: Mapping[str, Baseline[Setup, Case]],
    cases: Mapping[str, Sequence[Case]],
    sampling: Sampling,
    n_timed: int = 0,
    known: dict[Request, Answer] | None = None,
) -> list[Answered[Case]]:
    """Each baseline's answers to its cases.

    Args:
        cases: by the baseline's name.
        n_timed: how many of each baseline's cases, the first ones, are asked one at a time and timed.
        known: answers of requests from before; those of this call are added.
    """
    known = {} if known is None else known
    requests = {name: [baselines[name].request(setup, case) for case in asked] for name, asked in cases.items()}
    setup.prepare([request for some in requests.values() for request in some])
    answered: list[Answered[Case]] = []
    for name, asked in cases.items():
        for case, request in zip(asked[:n_timed], requests[name], strict=False):
            with peak_memory() as peak:
                timed, known[request] = _ask_one(setup, name, baselines[name], case, sampling)
            answered.append(replace(timed, answer_mib=peak.above_mib))
        rest = list(zip(asked, requests[name], strict=True))[n_timed:]
        _answer_new(setup.base, [request for _, request in rest], sampling, known)
        answered += [
            Answered(name, case, r.text(known[r]), len(r.prompt), r.answered_by(known[r]), r.found) for case, r in rest
        ]
    return answered


def ask_one(setup: Setup, name: str, baseline: Baseline[Setup, Case], case: Case, sampling: Sampling) -> Answered[Case]:
    """Ask one question as a user would, and time it."""
    return _ask_one(setup, name, baseline, case, sampling)[0]


def _ask_one(
    setup: Setup, name: str, baseline: Baseline[Setup, Case], case: Case, sampling: Sampling
) -> tuple[Answered[Case], Answer]:
    started = time.perf_counter()
    request = baseline.request(setup, case)
    (lora,) = made(setup.base, [request])
    prepared_s = time.perf_counter() - started
    if request.answer is not None:
        said = _said(request.answer)
        by = request.answered_by(said)
        return Answered(name, case, request.answer, 0, by, request.found, prepared_s, prepared_s), said
    said = answer(setup.base, request.prompt, lora, sampling, copying=copying(setup.base, request.likely))
    first_s, total_s = prepared_s + said.first_token_s, prepared_s + said.total_s
    if request.least_confidence:  # which is shown at its end
        first_s = total_s
    told = (request.text(said), len(request.prompt), request.answered_by(said), request.found)
    return Answered(name, case, *told, first_s, total_s), said


def _said(text: str) -> Answer:
    """An answer that took no model."""
    return Answer(text, 0, 0, 0.0, 0.0, True)


def _answer_new(base: Base, requests: Sequence[Request], sampling: Sampling, known: dict[Request, Answer]) -> None:
    """Answer, in batches, the requests that have no answer yet."""
    known |= {request: _said(request.answer) for request in requests if request.answer is not None}
    todo = [request for request in dict.fromkeys(requests) if request not in known]
    held: dict[LoRASource | None, LoRA | None] = {}
    for batch in batches(todo):
        loras = made(base, batch, held)
        held = dict(zip([r.lora for r in batch], loras, strict=True))  # the next batch may need them again
        hints = [copying(base, request.likely) for request in batch]
        known.update(zip(batch, answers(base, [r.prompt for r in batch], loras, sampling, hints), strict=True))


def made(
    base: Base, requests: Sequence[Request], held: Mapping[LoRASource | None, LoRA | None] | None = None
) -> list[LoRA | None]:
    """The LoRA of each request, on the base's device; equal sources are made once, those that are held not again."""
    loras = dict(held or {})
    for request in requests:
        if request.lora not in loras:
            loras[request.lora] = None if request.lora is None else request.lora.make().to(base.device)
    return [loras[request.lora] for request in requests]


def batches(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Runs of requests, the shortest prompts first, within the bounds of a batch."""
    batch: list[Request] = []
    for request in sorted(requests, key=lambda r: len(r.prompt)):
        n_tokens = len(request.prompt) * (len(batch) + 1)
        n_bytes = sum(r.lora.n_bytes for r in [*batch, request] if r.lora is not None)
        if batch and (len(batch) == MAX_ROWS or n_tokens > MAX_PROMPT_TOKENS or n_bytes > MAX_LORA_BYTES):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by their keys, in the order in which the keys first come."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def figures(answered: Sequence[Answered[Case]]) -> dict[str, Any]:
    """What gave the answers of one baseline, as shares, and what they took: means, of seconds over those timed."""
    peaks = [a.answer_mib for a in answered if a.answer_mib is not None]
    return {
        "n": len(answered),
        "answered_by": {by: n / len(answered) for by, n in Counter(a.answered_by for a in answered).items()},
        "prompt_tokens": mean([a.n_prompt_tokens for a in answered]),
        "n_timed": len(peaks),
        "first_token_s": mean_if_any([a.first_token_s for a in answered if a.first_token_s is not None]),
        "answer_s": mean_if_any([a.answer_s for a in answered if a.answer_s is not None]),
        "answer_mib": max(peaks, default=None),
    }


class Deadline:
    """A budget of time that runs from now on; without one it never ends."""

    def __init__(self, budget_s: float | None):
        self._ends_s = None if budget_s is None else time.monotonic() + budget_s

    @property
    def is_over(self) -> bool:
        return self._ends_s is not None and time.monotonic() > self._ends_s

    def share(self, n: int) -> Deadline:
        """A deadline after the n-th part of what is left."""
        return Deadline(None if self._ends_s is None else (self._ends_s - time.monotonic()) / n)


def groups(
    n: int, size: int, make: Callable[[int], tuple[T, InMemoryAdapter]], deadline: Deadline
) -> Iterator[list[tuple[T, InMemoryAdapter, InMemoryAdapter]]]:
    """Documents 0 to n - 1, `size` at a time to bound the memory, each with the next one as its other document.

    Args:
        make: draws the i-th document and splits it; i goes up to n, the other document of the last.
        deadline: no further group is begun once it is over; the first always is.

    Yields:
        what `make` gave, with the other document. What a group has cast is freed when the next one is asked for.
    """
    ahead = make(0)
    for first in range(0, n, size):
        if first and deadline.is_over:
            break
        made = [ahead, *map(make, range(first + 1, min(n, first + size) + 1))]
        ahead = made[-1]
        yield [(what, document, other) for (what, document), (_, other) in pairwise(made)]
        for _, document in made[:-1]:
            document.close()
    ahead[1].close()


def in_turn(names: Sequence[T], i: int) -> list[T]:
    """The names in turn from the i-th on: the first finds the caches cold, and each is so once."""
    return [*names[i % len(names) :], *names[: i % len(names)]]


def warm_up(base: Base) -> None:
    """Answer once, so that what a process does only once is not timed."""
    answer(base, base.chat.prompt("Hello", ""), None, Sampling(max_new_tokens=2))
