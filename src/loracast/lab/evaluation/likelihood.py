"""Multiple choice by log-likelihood, and teacher-forced accuracy: which answer tokens are likeliest after true ones.

Teacher-forced accuracy: which answer tokens are the likeliest after the true ones before them, by kind of episode.

It takes minutes where writing answers takes hours, so it serves to choose between settings. Baselines are another
document's LoRA and none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracast.answering.model import Model
from loracast.base.load import Base
from loracast.errors import ConfigError
from loracast.lab.evaluation.report import Progress, Report, columns, mean_with_interval, named_interval, no_progress
from loracast.lab.training.doc import merged
from loracast.lab.training.document_source import KINDS, DataConfig, EpisodeKind, EpisodeSource
from loracast.lab.training.losses import sentence_gates
from loracast.lab.training.scoring import Batch, Episode, Question, pack, score_answers
from loracast.lora.algebra import LoRA, LoRABatch, stack

_MAX_TOKENS = 4000
"""Tokens of one batch."""


@dataclass(frozen=True)
class Choice:
    """The likeliest of some answers, by their place."""

    by_sum: int
    """By the log-probability of all of its tokens, the end of the turn included."""
    by_byte: int
    """By the same for each byte of it, which is fair to long answers."""


def likeliest(
    base: Base, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[str]], loras: Sequence[LoRA | None]
) -> list[Choice]:
    """For each prompt, the likeliest of its answers; arguments as in `negative_log_likelihood`."""
    chosen = []
    for texts, of_prompt in zip(answers, negative_log_likelihood(base, prompts, answers, loras), strict=True):
        lengths = torch.tensor([max(1, len(text.encode())) for text in texts], device=of_prompt.device)
        chosen.append(Choice(int(of_prompt.argmin()), int((of_prompt / lengths).argmin())))
    return chosen


@torch.no_grad()
def negative_log_likelihood(
    base: Base, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[str]], loras: Sequence[LoRA | None]
) -> list[Tensor]:
    """The negative log-likelihood of each answer of each prompt, summed over the answer's tokens [answers].

    The answers of a prompt are branches of one row, so that the prompt is read once. An answer may begin with a space,
    as LoRAs of documents are trained to write it, or without one, as LoRAs of tasks are: the likelier form counts.

    Args:
        prompts: token ids.
        answers: for each prompt the texts to choose from.
        loras: one or none for each prompt.
    """
    episodes = [
        Episode((), tuple(Question(tuple(prompt), form) for text in texts for form in _forms(base, text)))
        for prompt, texts in zip(prompts, answers, strict=True)
    ]
    sizes = [len(e.questions[0].prompt) + sum(len(q.answer) for q in e.questions) for e in episodes]
    batches: list[list[int]] = []  # of the rows' places, the longest first
    for i in sorted(range(len(episodes)), key=lambda i: -sizes[i]):
        if batches and (len(batches[-1]) + 1) * sizes[batches[-1][0]] <= _MAX_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    found: dict[int, Tensor] = {}
    for rows in batches:
        batch = pack([episodes[i] for i in rows], base.pad_id).to(base.device)
        of_rows = [loras[i] for i in rows]
        if all(lora is of_rows[0] for lora in of_rows):  # one LoRA serves all rows
            of_rows = of_rows[:1]
        losses = score_answers(base.model, stack(of_rows), batch).by_question  # mean over each answer's tokens
        sums = losses * torch.bincount(batch.answer_question)
        for i, of_forms in zip(rows, sums.split([2 * len(answers[i]) for i in rows]), strict=True):
            found[i] = of_forms.view(-1, 2).amin(1)
    return [found[i] for i in range(len(episodes))]


def _forms(base: Base, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """An answer as it stands inside a sentence, and as it begins a turn; the end of the turn is included."""
    return tuple(base.chat.answer(text)), tuple(base.chat.reply(text))


LABELS = {
    "adapter": "its own LoRA, by sentence",
    "merged": "its own LoRA, merged",
    "other": "another document's LoRA",
    "none": "no LoRA",
}
COLUMNS = columns(
    kind="kind", label="method", documents=("documents", 0), questions=("questions", 0),
    exact=("all tokens right %", "%"), exact_low=("95 %", "interval"), accuracy=("tokens right %", "%"),
    low=("95 %", "interval"),
)  # fmt: skip


@dataclass(frozen=True)
class TeacherForcedConfig:
    """Settings of `loracast eval teacher-forced`."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data of the episodes, as in a training recipe; the shares of the kinds do not matter."""
    kinds: tuple[EpisodeKind, ...] = ("facts", "needle", "questions", "cloze", "reading")
    """Kinds of episodes."""
    steps: int = 8
    """Steps of each kind."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or self.steps < 1:
            raise ConfigError(f"kinds must be some of {', '.join(KINDS)}, and steps at least 1")


def evaluate_teacher_forced(
    model: Model, config: TeacherForcedConfig, out: Path, progress: Progress = no_progress
) -> Report:
    """Run the evaluation on the dev split's sheets and needles; the table is in `out` at the end."""
    base = model.base
    writer = Report(out, "teacher-forced", COLUMNS, config, base, model.documents.id)
    source = EpisodeSource(config.data, base.tokenizer, base.chat, split="dev")
    total = len(config.kinds) * config.steps
    rows: list[dict[str, Any]] = []
    for kind in config.kinds:
        seen: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in LABELS}
        for step in range(config.steps):
            batch = pack(source.of_kind(kind, step), base.pad_id).to(base.device)
            for name, of_documents in _answered(model, batch).items():
                seen[name] += of_documents
            progress(config.kinds.index(kind) * config.steps + step + 1, total)
        rows += [_row(kind, name, of_documents) for name, of_documents in seen.items()]
    return writer.write(rows)


@torch.no_grad()
def _answered(model: Model, batch: Batch) -> dict[str, list[tuple[list[float], list[float]]]]:
    """By baseline, for each document: whether each answer token is right, and whether each whole answer is."""
    base, documents = model.base, model.documents
    autocast = torch.autocast(base.device.type, torch.bfloat16) if base.model.dtype == torch.bfloat16 else nullcontext()
    with autocast:
        chunks = [ids[real].tolist() for ids, real in zip(batch.chunk_ids, batch.chunk_mask.bool(), strict=True)]
        rows, tokens = documents.cast(documents.encode(chunks))
        loras = merged(documents.hypernetwork, rows, batch.chunks_per_document)
        n = loras.n
        loras_of = {
            "adapter": loras, "merged": loras, "other": loras.take([*range(1, n), 0]), "none": LoRABatch(1, {}, {})
        }  # fmt: skip
        gates = {
            module.name: sentence_gates(tokens[module.kind], batch, loras.factors[module.name].rank)
            for module in documents.hypernetwork.config.target.modules
            if tokens and module.kind in tokens
        }
        if n == 1:  # a step of one document has no other
            del loras_of["other"]
        return {
            name: _right(score_answers(base.model, some, batch, gates=gates if name == "adapter" else {}).logits, batch)
            for name, some in loras_of.items()
        }


def _right(logits: torch.Tensor, batch: Batch) -> list[tuple[list[float], list[float]]]:
    right = logits.argmax(-1) == batch.answer_ids  # [n]
    about = ~batch.is_unrelated[batch.answer_question]
    found = []
    for row in range(len(batch.input_ids)):
        mine = (batch.answer_rows == row) & about
        questions = batch.answer_question[mine].unique()
        exact = [float(right[batch.answer_question == question].all()) for question in questions]
        found.append((right[mine].float().tolist(), exact))
    return found


def _row(kind: str, name: str, of_documents: Sequence[tuple[list[float], list[float]]]) -> dict[str, Any]:
    tokens, exact = ([document[i] for document in of_documents] for i in (0, 1))
    row: dict[str, Any] = {"kind": kind, "baseline": name, "label": LABELS[name], "documents": len(of_documents)}
    of_exact, of_tokens = (mean_with_interval(some) if any(some) else (0.0, 0.0, 1.0) for some in (exact, tokens))
    row |= named_interval("exact", of_exact) | dict(zip(("accuracy", "low", "high"), of_tokens, strict=True))
    return {**row, "questions": sum(map(len, exact))}
