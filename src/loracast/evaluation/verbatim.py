"""Word for word: how much of a document's own continuation is the likeliest, token by token, from its first eight tokens on.

Teacher-forced: each token is predicted after the true ones before it. Beside the adapter: the base alone, another document's adapter, and the
document in the window.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loracast.base.chat import encode_with_offsets
from loracast.data.qa import QuestionedDocument, read_questioned
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import ConfigError
from loracast.evaluation.in_memory import InMemoryAdapter, cast
from loracast.evaluation.intervals import cluster_bootstrap
from loracast.evaluation.report import Column, Progress, Report, environment, interval, number, percent, text
from loracast.lora.algebra import LoRA, stack
from loracast.model import ASK_SYSTEM_TURN, Model
from loracast.scoring.episodes import Episode, Question, pack
from loracast.scoring.likelihood import score_answers
from loracast.training.episode_maker import CONTINUE, PASSAGE_TOKENS, split_passage

_DOCUMENTS_AT_ONCE = 8

COLUMNS: tuple[Column, ...] = (
    text("label", "what answers"),
    number("documents", "documents"),
    number("passages", "passages"),
    number("tokens", "tokens"),
    percent("accuracy", "token accuracy %"),
    interval("low", "high", "95 %"),
    percent("of_way", "of the way to the window %"),
)
SYSTEMS = {
    "none": "no document",
    "adapter": "adapter of the document",
    "other": "another document's adapter",
    "window": "document in the window",
}


@dataclass(frozen=True)
class VerbatimConfig:
    """What `loracast eval verbatim` measures."""

    documents: tuple[str, ...] = ()
    """Files of documents."""
    sources: tuple[str, ...] = ()
    """Of rows with a `source` field, take only these sources."""
    max_documents: int = 100
    """Documents, drawn at random from those that are long enough."""
    passages: int = 4
    """Most passages of each, none in another's place."""
    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Rivals to run."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Longest chunk of an adapter."""
    split: str = "test"
    """Of rows with a `split` field, take only this one."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.systems) - SYSTEMS.keys()):
            raise ConfigError(f"unknown systems: {', '.join(unknown)}; choose from {', '.join(SYSTEMS)}")
        if not self.documents:
            raise ConfigError("no documents: give a file of them (--documents FILE)")
        if min(self.max_documents, self.passages) < 1:
            raise ConfigError("max_documents and passages must be at least 1")


@dataclass(frozen=True, eq=False)
class _Read:
    """A document with the passages that are to be continued: the text of each beginning, and the tokens that follow."""

    adapter: InMemoryAdapter
    passages: tuple[tuple[str, tuple[int, ...]], ...]


def evaluate_verbatim(
    model: Model, config: VerbatimConfig, out: Path, progress: Progress = lambda done, total: None
) -> Report:
    """Run the evaluation; the table is in `out` at the end."""
    about = environment(model.base, model.documents.id)
    documents = _choose(model, config)
    hits: dict[str, list[list[float]]] = {name: [] for name in SYSTEMS if name in config.systems}
    n_passages = 0
    for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        some = [_read(model, config, document) for document in documents[first : first + _DOCUMENTS_AT_ONCE]]
        n_passages += sum(len(one.passages) for one in some)
        for name, of_documents in hits.items():
            of_documents += _SAID[name](model, some)
        for one in some:
            one.adapter.close()
        progress(first + len(some), len(documents))
    report = Report("verbatim", COLUMNS, _rows(hits, n_passages), asdict(config), about)
    report.write(out)
    return report


def _choose(model: Model, config: VerbatimConfig) -> list[QuestionedDocument]:
    known = read_questioned(config.documents, config.sources, config.split)
    random.Random(config.seed).shuffle(known)
    least = 2 * PASSAGE_TOKENS
    long_enough = (d for d in known if len(encode_with_offsets(model.base.tokenizer, d.text)[0]) >= least)
    chosen = [document for document, _ in zip(long_enough, range(config.max_documents), strict=False)]
    if not chosen:
        raise ConfigError(f"no document has {least} tokens or more")
    return chosen


def _read(model: Model, config: VerbatimConfig, document: QuestionedDocument) -> _Read:
    ids, offsets = encode_with_offsets(model.base.tokenizer, document.text)
    places = range(0, len(ids) - PASSAGE_TOKENS + 1, PASSAGE_TOKENS)
    rng = random.Random(f"{config.seed}/{document.doc_id}")
    chosen = sorted(rng.sample(places, min(config.passages, len(places))))
    passages = tuple(split_passage(document.text, ids, offsets, first) for first in chosen)
    return _Read(InMemoryAdapter(model, document.text, "", config.chunk_tokens), passages)


def _predicted(
    model: Model, some: Sequence[_Read], loras: Sequence[LoRA | None], before: Callable[[_Read], str] = lambda one: ""
) -> list[list[float]]:
    """For each document, whether each token of its passages is the likeliest."""
    base = model.base
    found = []
    # Row by row: a document's passages share what stands before them.
    for one, lora in zip(some, loras, strict=True):
        prompts = [
            base.chat.prompt(before(one) + CONTINUE[0].format(start), ASK_SYSTEM_TURN) for start, _ in one.passages
        ]
        questions = [Question(tuple(p), answer) for p, (_, answer) in zip(prompts, one.passages, strict=True)]
        batch = pack([Episode((), tuple(questions))], base.pad_id).to(base.device)
        with torch.no_grad():
            logits = score_answers(base.model, stack([lora]), batch).logits
        found.append((logits.argmax(-1) == batch.answer_ids).float().tolist())
    return found


def _none(model: Model, some: Sequence[_Read]) -> list[list[float]]:
    return _predicted(model, some, [None] * len(some))


def _own(model: Model, some: Sequence[_Read]) -> list[list[float]]:
    return _predicted(model, some, _merged(model, some))


def _others(model: Model, some: Sequence[_Read]) -> list[list[float]]:
    loras = _merged(model, some)
    return _predicted(model, some, [*loras[1:], loras[0]])


def _window(model: Model, some: Sequence[_Read]) -> list[list[float]]:
    return _predicted(model, some, [None] * len(some), lambda one: f"{one.adapter.full_text}\n\n")


def _merged(model: Model, some: Sequence[_Read]) -> list[LoRA]:
    """The LoRA of all chunks of each document."""
    cast(model, [(one.adapter, range(len(one.adapter.chunks))) for one in some])
    return [one.adapter.lora() for one in some]


_SAID: dict[str, Callable[[Model, Sequence[_Read]], list[list[float]]]] = {
    "none": _none,
    "adapter": _own,
    "other": _others,
    "window": _window,
}


def _rows(hits: dict[str, list[list[float]]], n_passages: int) -> list[dict[str, Any]]:
    means = {name: sum(map(sum, some)) / sum(map(len, some)) for name, some in hits.items()}
    rows = []
    for name, some in hits.items():
        low, high = cluster_bootstrap(some)
        row: dict[str, Any] = {
            "system": name,
            "label": SYSTEMS[name],
            "documents": len(some),
            "passages": n_passages,
            "tokens": sum(map(len, some)),
            "accuracy": means[name],
            "low": low,
            "high": high,
        }
        if {"none", "window"} <= means.keys() and means["window"] > means["none"]:
            row["of_way"] = (means[name] - means["none"]) / (means["window"] - means["none"])
        rows.append(row)
    return rows
