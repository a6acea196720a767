"""Ask every rival every question: cast once, answer in batches, time a few questions one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from loracast.base.generate import Answer, Sampling, answer, answer_batch
from loracast.base.load import Base
from loracast.data.answer_metrics import has_value, is_exact
from loracast.evaluation.in_memory import InMemoryAdapter, cast
from loracast.evaluation.intervals import wilson
from loracast.evaluation.synthetic_baselines import MAX_NEW_TOKENS, SYSTEMS, Case, Request, Setup
from loracast.lora.algebra import LoRA

T = TypeVar("T")

N_TIMED = 5
"""Questions that a rival is asked one at a time, for the time that an answer takes; the others are answered in batches."""
MAX_ROWS = 32
MAX_PROMPT_TOKENS = 8192
MAX_CHUNKS = 512
"""Bounds of one batch: prompts, their tokens with padding, and chunks whose LoRAs (1 MB each) it holds."""

_GREEDY = Sampling(max_new_tokens=MAX_NEW_TOKENS)


@dataclass(frozen=True)
class Outcome:
    """One answer of one rival."""

    system: str
    case: Case
    text: str
    found: bool | None
    """Whether the chunk with the answer was picked; None where nothing is picked."""
    n_prompt_tokens: int
    first_token_s: float | None = None
    """From the question to the first token of the answer, routing and building the LoRA included; timed questions only."""
    total_s: float | None = None
    """To the end of the answer."""

    @property
    def is_exact(self) -> bool:
        return is_exact(self.text, self.case.value)

    @property
    def has_value(self) -> bool:
        return has_value(self.text, self.case.value)


def ask_all(setup: Setup, cases: Mapping[str, Sequence[Case]], n_timed: int = 0) -> list[Outcome]:
    """The outcomes of each rival (by its name) on its cases.

    Args:
        n_timed: of each rival's cases, the first ones, which are asked one at a time.
    """
    requests = {name: [SYSTEMS[name].request(setup, case) for case in asked] for name, asked in cases.items()}
    cast(setup.model, [(r.source, r.chunks) for asked in requests.values() for r in asked if r.source is not None])
    known: dict[Request, str] = {}  # rivals that coincide (a document of one chunk, say) are answered once
    outcomes = []
    for name, asked in cases.items():
        for case, request in zip(asked[:n_timed], requests[name], strict=False):
            text, first_token_s, total_s = _timed(setup, name, case)
            known[_key(request)] = text
            outcomes.append(Outcome(name, case, text, request.found, len(request.prompt), first_token_s, total_s))
        rest = list(zip(asked, requests[name], strict=True))[n_timed:]
        _answer_new(setup, [request for _, request in rest], known)
        outcomes += [Outcome(name, case, known[_key(r)], r.found, len(r.prompt)) for case, r in rest]
    return outcomes


def groups(
    n: int, size: int, make: Callable[[int], tuple[T, InMemoryAdapter]], budget_s: float | None
) -> Iterator[tuple[int, list[tuple[T, InMemoryAdapter, InMemoryAdapter]]]]:
    """Documents 0 to n - 1, `size` at a time, so that memory stays bounded; each with the next one as its other document.

    Args:
        make: draws the i-th document and splits it.
        budget_s: no further group is begun after this many seconds; the first always is.

    Yields:
        the number of the group's first document, and what `make` gave with the other document. What a group cast is freed
        when the next one is asked for.
    """
    started_s = time.monotonic()
    ahead = make(0)
    for first in range(0, n, size):
        if first and budget_s is not None and time.monotonic() - started_s > budget_s:
            break
        made = [ahead, *map(make, range(first + 1, min(n, first + size) + 1))]
        ahead = made[-1]
        yield first, [(what, document, other) for (what, document), (_, other) in pairwise(made)]
        for _, document in made[:-1]:
            document.close()
    ahead[1].close()


def warm_up(base: Base) -> None:
    """Answer once, so that what a process does only once is not timed."""
    answer(base, base.chat.prompt("Hello", ""), None, Sampling(max_new_tokens=2))


def summary(setup: Setup, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """The figures of one rival over its outcomes: a table's row."""
    n = len(outcomes)
    n_exact = sum(outcome.is_exact for outcome in outcomes)
    low, high = wilson(n_exact, n)
    picks = [outcome.found for outcome in outcomes if outcome.found is not None]
    timed = [outcome for outcome in outcomes if outcome.total_s is not None]
    return {
        "system": outcomes[0].system,
        "label": SYSTEMS[outcomes[0].system].label.format(route=setup.route),
        "n": n,
        "exact": n_exact / n,
        "exact_low": low,
        "exact_high": high,
        "has_value": sum(outcome.has_value for outcome in outcomes) / n,
        "recall": sum(picks) / len(picks) if picks else None,
        "prompt_tokens": sum(outcome.n_prompt_tokens for outcome in outcomes) / n,
        "n_timed": len(timed),
        "first_token_s": sum(outcome.first_token_s or 0 for outcome in timed) / len(timed) if timed else None,
        "answer_s": sum(outcome.total_s or 0 for outcome in timed) / len(timed) if timed else None,
    }


def _timed(setup: Setup, name: str, case: Case) -> tuple[str, float, float]:
    """One question as a user would ask it: the text, seconds to the first token, seconds in all."""
    started = time.perf_counter()
    request = SYSTEMS[name].request(setup, case)
    lora = request.lora()
    prepared_s = time.perf_counter() - started
    given: Answer = answer(setup.model.base, request.prompt, lora, _GREEDY)
    return given.text, prepared_s + given.first_token_s, prepared_s + given.total_s


def _answer_new(setup: Setup, requests: Sequence[Request], known: dict[Request, str]) -> None:
    """Answer, in batches, the requests that have no answer yet."""
    todo = [request for request in dict.fromkeys(map(_key, requests)) if request not in known]
    for batch in _batches(sorted(todo, key=lambda request: len(request.prompt))):
        loras: dict[Request, LoRA | None] = {}  # questions with the same pick share one
        for request in batch:
            if (pick := replace(request, prompt=())) not in loras:
                loras[pick] = request.lora()
        rows = [loras[replace(request, prompt=())] for request in batch]
        texts = answer_batch(setup.model.base, [request.prompt for request in batch], rows, _GREEDY)
        known.update(zip(batch, texts, strict=True))


def _batches(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Runs of requests, which come sorted by the lengths of their prompts, within the bounds of a batch."""
    batch: list[Request] = []
    for request in requests:
        n_tokens = len(request.prompt) * (len(batch) + 1)
        n_chunks = sum(len(r.chunks) for r in [*batch, request])
        if batch and (len(batch) == MAX_ROWS or n_tokens > MAX_PROMPT_TOKENS or n_chunks > MAX_CHUNKS):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _key(request: Request) -> Request:
    """What decides the answer: not whether the pick was a good one."""
    return replace(request, found=None)
