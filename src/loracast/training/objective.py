"""The loss of a batch of documents: the base answers questions with a cast LoRA, without seeing the document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loracast.encoders.hidden_states import HiddenStatesEncoder
from loracast.hypernets.doc_to_lora import MergedCast
from loracast.scoring.episodes import Batch
from loracast.scoring.likelihood import AnswerScores, score_answers
from loracast.training.memory_losses import MemoryLosses, retrieval_loss, write_loss


def answer_questions(
    model: Any, encoder: HiddenStatesEncoder, hypernet: Callable[..., MergedCast], batch: Batch
) -> tuple[AnswerScores, MemoryLosses, MergedCast]:
    """Documents -> features -> LoRAs -> scores of their questions' answers, losses of the memory, and what was cast."""
    cast = hypernet(encoder(batch.chunk_ids, batch.chunk_mask), batch.chunks_per_document)
    scores = score_answers(model, cast.loras, batch, encoder.key_modules)
    if cast.writes is None:
        return scores, MemoryLosses(), cast
    # By module A [d, k * r, in], x [n, in].
    keys = {name: (cast.loras.factors[name].a, x) for name, x in scores.module_inputs.items()}
    written, retrieved = write_loss(cast.writes, batch), retrieval_loss(keys, cast.writes, batch)
    if written.loss is None or retrieved is None:
        return scores, written, cast
    loss, accuracy = retrieved
    return scores, MemoryLosses(written.loss + loss, {**written.figures, "retrieval_accuracy": accuracy}), cast
