"""The objective of Doc-to-LoRA: the base, with a document's LoRA and without the document, answers the document's questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loracast.encoders.context import ContextEncoder
from loracast.hypernets.memory import Writes
from loracast.inject import inject
from loracast.lora import LoRABatch
from loracast.training.episodes import Batch


@dataclass(frozen=True)
class Outcome:
    """What one batch gave."""

    loss: Tensor  # mean over questions of the mean cross-entropy of their answer tokens
    exact: float  # share of questions whose answer tokens are all the likeliest, given the true ones before them
    token_accuracy: float  # share of answer tokens that are the likeliest


@dataclass(frozen=True)
class WritingOutcome:
    """How well a memory chose what to write, against the marks of a batch."""

    loss: Tensor | None = None  # gates, places and owners; None without a memory or marks
    figures: dict[str, float] = field(default_factory=dict)


def answer_questions(
    model: Any,
    encoder: ContextEncoder,
    hypernet: Callable[..., tuple[LoRABatch, Writes | None]],
    batch: Batch,
) -> tuple[Outcome, WritingOutcome]:
    """Documents -> features -> LoRAs -> the loss on their questions' answers, and on what the memory wrote."""
    loras, writes = hypernet(encoder(batch.chunk_ids), batch.chunk_mask, batch.chunks_per_document)
    decoder = model.get_decoder()
    with inject(model, loras), _attention_for_training(decoder.config, model.device):
        mask = batch.attention_mask
        if decoder.config._attn_implementation == "eager":  # which adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        hidden = decoder(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state  # [d, t, hidden]
    # Contiguous before the head: a strided slice made the product seconds slower on a CPU.
    at_answers = hidden[batch.answer_rows, batch.answer_positions].contiguous()  # [n, hidden]
    logits = model.get_output_embeddings()(at_answers).float()  # [n, vocabulary]
    if cap := getattr(decoder.config, "final_logit_softcapping", None):  # Gemma 2, after its head
        logits = cap * torch.tanh(logits / cap)
    return outcome(logits, batch), WritingOutcome() if writes is None else writing_outcome(writes, batch)


@contextmanager
def _attention_for_training(config: Any, device: torch.device) -> Iterator[None]:
    """On a CPU, attention spelled out: the fused kernel's backward takes four times as long on rows as short as these."""
    usual = config._attn_implementation
    config._attn_implementation = "eager" if device.type == "cpu" else usual
    try:
        yield
    finally:
        config._attn_implementation = usual


def outcome(logits: Tensor, batch: Batch) -> Outcome:
    """Loss and accuracies of the logits [n, vocabulary] at a batch's answer positions."""
    losses = functional.cross_entropy(logits, batch.answer_ids, reduction="none")  # [n]
    right = (logits.argmax(-1) == batch.answer_ids).float()
    lengths = torch.bincount(batch.answer_question, minlength=batch.n_questions)
    per_question = (
        torch.zeros(batch.n_questions, device=losses.device).index_add(0, batch.answer_question, losses) / lengths
    )
    hits = torch.zeros_like(per_question).index_add(0, batch.answer_question, right)
    return Outcome(per_question.mean(), (hits == lengths).float().mean().item(), right.mean().item())


def writing_outcome(writes: Writes, batch: Batch) -> WritingOutcome:
    """Cross-entropy of a memory's gates over all tokens, and of its places and its first head's owners, against the marks."""
    if not len(batch.marks):
        return WritingOutcome()
    rows, tokens, gates, owners, places = batch.marks.unbind(1)
    wanted = torch.zeros_like(writes.gate_logits)
    wanted[rows, tokens, gates] = 1
    real = batch.chunk_mask.bool()
    logits, wanted = writes.gate_logits[real], wanted[real]  # [tokens, gates]
    loss = functional.binary_cross_entropy_with_logits(logits, wanted)
    opened = logits > 0
    hits = (opened & (wanted > 0)).sum().item()
    at_places = writes.place_logits[rows, tokens]  # [m, places]
    loss = loss + functional.cross_entropy(at_places, places.clamp_max(at_places.shape[1] - 1))
    figures = {
        "gate_recall": hits / max(1, int(wanted.sum())),
        "gate_precision": hits / max(1, int(opened.sum())),
    }
    owned = owners >= 0
    if owned.any():
        scores = writes.owner_scores[rows[owned], 0, tokens[owned]]  # [m, t]
        loss = loss + functional.cross_entropy(scores, owners[owned])
        figures["owner_accuracy"] = (scores.argmax(-1) == owners[owned]).float().mean().item()
    return WritingOutcome(loss, figures)
