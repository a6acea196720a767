"""The adapter of the document, and its controls: none, another document's, and what all documents have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loracast.data.qa import DocumentQuestion
from loracast.evaluation.in_memory import InMemoryAdapter, cast
from loracast.evaluation.qa.baseline import Baseline, Given, Request, Setup, plain
from loracast.lora.algebra import Factors, LoRA, concat


def cast_all(setup: Setup, given: Sequence[Given]) -> None:
    """Cast all chunks of some documents."""
    cast(setup.model, [(one.adapter, range(len(one.adapter.chunks))) for one in given])


def _cast_others(setup: Setup, given: Sequence[Given]) -> None:
    cast(setup.model, [(one.other, range(len(one.other.chunks))) for one in given])


def _routed(setup: Setup, adapter: InMemoryAdapter, question: str) -> Request:
    picked = adapter.route(question, setup.route).picked
    return Request(plain(setup, question), adapter.lora(picked))


def _own(setup: Setup, given: Given, question: DocumentQuestion) -> Request:
    return _routed(setup, given.adapter, question.question)


def _others(setup: Setup, given: Given, question: DocumentQuestion) -> Request:
    return _routed(setup, given.other, question.question)


def _beside(setup: Setup, given: Given, question: DocumentQuestion) -> Request:
    """Both documents learned, as `loracast ask -a one -a two` adds them up."""
    own, other = (document.route(question.question, setup.route).picked for document in (given.adapter, given.other))
    loras = [given.adapter.lora(own), given.other.lora(other, static=False)]
    return Request(plain(setup, question.question), concat(loras))


def _cast_both(setup: Setup, given: Sequence[Given]) -> None:
    cast_all(setup, given)
    _cast_others(setup, given)


def _nothing(setup: Setup, given: Given, question: DocumentQuestion) -> Request:
    return Request(plain(setup, question.question))


def _shared(setup: Setup, given: Given, question: DocumentQuestion) -> Request:
    return Request(plain(setup, question.question), static(setup))


def static(setup: Setup) -> LoRA:
    """What a hypernetwork gives every document alike; nothing where it has no such part."""
    hypernetwork = setup.model.documents.hypernetwork
    factors: dict[str, Factors] = {}
    for kind, sides in hypernetwork.static_rows().items():
        for module, a, b in zip(hypernetwork.config.target.of_kind(kind), *sides, strict=True):
            factors[module.name] = Factors(a.to(torch.bfloat16), b.T.to(torch.bfloat16))
    return LoRA(factors)


BASELINES = {
    "adapter": Baseline("adapter", _own, cast_all),
    "none": Baseline("no document", _nothing),
    "other": Baseline("another's adapter", _others, _cast_others),
    "beside": Baseline("adapter beside another's", _beside, _cast_both, is_optional=True),
    "shared": Baseline("shared part alone", _shared),
}
