"""Teacher-forced accuracy: which answer tokens are the likeliest after the true ones before them, by kind of episode.

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

from loracast.errors import ConfigError
from loracast.evaluation.intervals import mean_with_interval
from loracast.evaluation.report import Progress, Report, ReportWriter, columns, no_progress
from loracast.lora.algebra import LoRABatch
from loracast.model import Model
from loracast.scoring.episodes import Batch, pack
from loracast.scoring.likelihood import score_answers
from loracast.training.sentence_gates import sentence_gates
from loracast.training.sources import KINDS, DataConfig, EpisodeKind, EpisodeSource

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
    """What is measured."""

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
    writer = ReportWriter(out, "teacher-forced", COLUMNS, config, base, model.documents.id)
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
        loras = documents.hypernetwork.merge(rows, batch.chunks_per_document)
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
    for key, low, high, clusters in (("exact", "exact_low", "exact_high", exact), ("accuracy", "low", "high", tokens)):
        row[key], row[low], row[high] = mean_with_interval(clusters) if any(clusters) else (0.0, 0.0, 1.0)
    return {**row, "questions": sum(map(len, exact))}
