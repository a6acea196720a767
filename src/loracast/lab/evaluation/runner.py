"""Run the baselines of an evaluation: what each gives a model to answer a question with, asked in batches, some timed.

A baseline prepares a question as `loracast ask` does (`Model.prepare`), or shows a text in the prompt, and may put
another LoRA in place of the adapters'. The runner knows nothing of what a question is about.
"""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from loracast.answering.answers import Prepared, SourcedAnswer
from loracast.answering.model import Model
from loracast.base.generate import Sampling, answers
from loracast.base.load import Base
from loracast.errors import ConfigError
from loracast.lab.evaluation.report import mean, mean_if_any
from loracast.lora.algebra import LoRA


class EvaluatedModel(Model):
    """The model that the baselines of a run ask, with what they share."""

    def cast_ahead(self, requests: Sequence[Request]) -> None:
        """Do the work for many requests that is quicker done at once, such as casting chunks."""


AnySetup = TypeVar("AnySetup", bound=EvaluatedModel)
Case = TypeVar("Case")
"""One question, with the document or the task that it is about."""


@dataclass(frozen=True)
class LoRASource:
    """A LoRA that is made when it is needed. Sources with equal keys make equal LoRAs."""

    key: Hashable
    make: Callable[[], LoRA] = field(compare=False)
    n_bytes: int = field(default=0, compare=False)
    """Size of the LoRA, which bounds how many are held at once."""


def fixed(lora: LoRA) -> LoRASource:
    """A source that holds its LoRA already."""
    return LoRASource(id(lora), lambda: lora)


@dataclass(frozen=True)
class Request:
    """A question as the model gets it, and the LoRA that it answers with, or none."""

    prepared: Prepared
    lora: LoRASource | None = None
    found: bool | None = None
    """Whether the chunk with the answer was among those picked; None where nothing is picked."""

    @property
    def key(self) -> Hashable:
        """Requests with equal keys get equal answers."""
        one = self.prepared
        return tuple(one.prompt), self.lora, one.candidates, one.answer and one.answer.text


def shown(prompt: Sequence[int], lora: LoRASource | None = None, found: bool | None = None) -> Request:
    """The request of a prompt that holds all that is to be known."""
    return Request(Prepared([*prompt], [], ()), lora, found)


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


@dataclass(frozen=True)
class Settings:
    """The settings of an experiment."""

    POSITIVE: ClassVar[tuple[str, ...]] = ()
    """Those that are refused where they are below 1 or hold such a number; None is no number."""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in self.POSITIVE}
        numbers = {name: v if isinstance(v, tuple) else (v,) for name, v in given.items() if v is not None}
        if bad := [name for name, some in numbers.items() if min(some, default=0) < 1]:
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
    key = "VmHWM"
    with suppress(OSError):
        if sys.platform == "linux":
            getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)  # glibc has it, musl has nothing to trim
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        key = "VmRSS"
    before = _resident_bytes(key)
    peak = Peak(before / _MIB)
    yield peak
    peak.above_mib = max(0, _resident_bytes("VmHWM") - before) / _MIB


def _resident_bytes(key: str) -> int:
    """The bytes that Linux notes under a key for this process; elsewhere the most that were ever resident."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

MAX_ROWS = 32
MAX_PROMPT_TOKENS = 8192
MAX_LORA_BYTES = 512 * 2**20
"""Bounds of one batch: prompts, their tokens with padding, and the LoRAs that it holds."""


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
    prepare_s: float | None = None
    """From the question until its prompt and its LoRA are there; timed questions only."""
    first_token_s: float | None = None
    """From the question to the first token, routing and building the LoRA included; timed questions only."""
    answer_s: float | None = None
    """From the question to the end of the answer; timed questions only."""
    scores: Mapping[str, Any] = field(default_factory=dict)
    """What the answer is worth, by the names of the measures."""

    @property
    def said(self) -> dict[str, str]:
        """What a line of answers.jsonl says of it."""
        return {"answer": self.text, "answered_by": self.answered_by}


def ask(
    setup: AnySetup,
    baselines: Mapping[str, Baseline[AnySetup, Case]],
    cases: Mapping[str, Sequence[Case]],
    sampling: Sampling,
    n_timed: int = 0,
) -> list[Answered[Case]]:
    """Each baseline's answers to its cases; equal requests are answered once.

    Args:
        cases: by the baseline's name.
        n_timed: how many of each baseline's cases, the first ones, are asked one at a time and timed.
    """
    known: dict[Hashable, SourcedAnswer] = {}
    requests = {name: [baselines[name].request(setup, case) for case in asked] for name, asked in cases.items()}
    setup.cast_ahead([request for some in requests.values() for request in some])
    answered: list[Answered[Case]] = []
    for name, asked in cases.items():
        for case, request in zip(asked[:n_timed], requests[name], strict=False):
            timed, known[request.key] = ask_one(setup, name, baselines[name], case, sampling)
            answered.append(timed)
        _answer_new(setup, requests[name][n_timed:], sampling, known)
        answered += [
            _answered(name, case, request, known[request.key])
            for case, request in zip(asked[n_timed:], requests[name][n_timed:], strict=True)
        ]
    return answered


def ask_one(
    setup: AnySetup, name: str, baseline: Baseline[AnySetup, Case], case: Case, sampling: Sampling
) -> tuple[Answered[Case], SourcedAnswer]:
    """Ask one question as a user would, and time it."""
    started = time.perf_counter()
    request = baseline.request(setup, case)
    loras = made(setup.base, [request])
    prepare_s = time.perf_counter() - started
    (given,) = _generate(setup, [request], loras, sampling)
    answered = _answered(name, case, request, given)
    first_token_s, answer_s = prepare_s + given.first_token_s, prepare_s + given.total_s
    return replace(answered, prepare_s=prepare_s, first_token_s=first_token_s, answer_s=answer_s), given


def _answered(name: str, case: Case, request: Request, given: SourcedAnswer) -> Answered[Case]:
    return Answered(name, case, given.text, len(request.prepared.prompt), given.answered_by, request.found)


def _generate(
    setup: EvaluatedModel, requests: Sequence[Request], loras: Sequence[LoRA | None], sampling: Sampling
) -> list[SourcedAnswer]:
    """Answer requests in one batch; a LoRA's answer counts as an adapter's, wherever the LoRA comes from."""
    prepared = [replace(one.prepared, routed=[], has_lora=one.lora is not None) for one in requests]
    return setup.generate(list(zip(prepared, loras, strict=True)), sampling)


def _answer_new(
    setup: EvaluatedModel, requests: Sequence[Request], sampling: Sampling, known: dict[Hashable, SourcedAnswer]
) -> None:
    """Answer, in batches, the requests that have no answer yet."""
    known |= {one.key: one.prepared.answer for one in requests if one.prepared.answer is not None}
    todo = {request.key: request for request in requests if request.key not in known}
    held: dict[LoRASource | None, LoRA | None] = {}
    for batch in batches([*todo.values()]):
        loras = made(setup.base, batch, held)
        held = dict(zip([r.lora for r in batch], loras, strict=True))  # the next batch may need them again
        answers = _generate(setup, batch, loras, sampling)
        known.update(zip([request.key for request in batch], answers, strict=True))


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
    for request in sorted(requests, key=lambda r: len(r.prepared.prompt)):
        n_tokens = len(request.prepared.prompt) * (len(batch) + 1)
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
    timed = [a for a in answered if a.answer_s is not None]
    return {
        "n": len(answered),
        "answered_by": {by: n / len(answered) for by, n in Counter(a.answered_by for a in answered).items()},
        "prompt_tokens": mean([a.n_prompt_tokens for a in answered]),
        "n_timed": len(timed),
        "first_token_s": mean_if_any([a.first_token_s for a in answered if a.first_token_s is not None]),
        "answer_s": mean_if_any([a.answer_s for a in answered if a.answer_s is not None]),
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


def in_turn(names: Sequence[T], i: int) -> list[T]:
    """The names in turn from the i-th on: the first finds the caches cold, and each is so once."""
    return [*names[i % len(names) :], *names[: i % len(names)]]


def warm_up(base: Base) -> None:
    """Answer once, so that what a process does only once is not timed."""
    answers(base, [base.chat.prompt("Hello", "")], [None], Sampling(max_new_tokens=2))
