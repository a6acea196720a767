"""Run the baselines of an evaluation: a few documents at a time, equal requests once, answers in batches, some timed.

Knows nothing of what a question is about: baselines turn cases into requests (baseline.py).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

from loracast.base.copying import copying
from loracast.base.generate import Answer, Sampling, answer, answers
from loracast.base.load import Base
from loracast.evaluation.baseline import Baseline, Case, LoRASource, Request
from loracast.evaluation.in_memory import InMemoryAdapter
from loracast.evaluation.intervals import mean, mean_if_any
from loracast.evaluation.peak import peak_memory
from loracast.lora.algebra import LoRA

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
