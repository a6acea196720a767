"""The objective of Doc-to-LoRA: the base, with a document's LoRA and without the document, answers the document's questions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.encoders.context import ContextEncoder
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.inject import inject
from loracast.training.episodes import Batch


@dataclass(frozen=True)
class Outcome:
    """What one batch gave."""

    loss: Tensor  # mean over questions of the mean cross-entropy of their answer tokens
    exact: float  # share of questions whose answer tokens are all the likeliest, given the true ones before them
    token_accuracy: float  # share of answer tokens that are the likeliest


def answer_questions(model: nn.Module, encoder: ContextEncoder, hypernet: DocToLoRA, batch: Batch) -> Outcome:
    """Documents -> features -> LoRAs -> the loss on their questions' answers."""
    features = encoder(batch.chunk_ids)
    loras = hypernet(features.float(), batch.chunk_mask, batch.chunks_per_document)
    with inject(model, loras):
        hidden = model.get_decoder()(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state  # [d, t, hidden]
    # Contiguous before the head: a strided slice made the product seconds slower on a CPU.
    at_answers = hidden[batch.answer_rows, batch.answer_positions].contiguous()  # [n, hidden]
    logits = model.get_output_embeddings()(at_answers).float()  # [n, vocabulary]
    return outcome(logits, batch)


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
