"""Score the answers of a batch under LoRAs: log-likelihood and accuracy of the answer tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.base.capture import capture_inputs
from loracast.base.checkpointing import checkpointed_blocks, names_within
from loracast.batching import length_groups
from loracast.lora.algebra import LoRABatch
from loracast.lora.inject import inject
from loracast.scoring.episodes import Batch
from loracast.scoring.soft_targets import divergence


@dataclass(frozen=True)
class AnswerScores:
    """Losses and accuracies of a batch's answers; n answer tokens in all."""

    by_question: Tensor  # [questions] mean cross-entropy of each answer's tokens
    divergence: Tensor  # [questions] mean divergence from the teacher; 0 where a question has none
    is_unrelated: Tensor  # [questions] bool
    exact: float  # share of related questions whose answer tokens are all the likeliest, given the true ones before
    token_accuracy: float  # share of their answer tokens that are the likeliest
    logits: Tensor  # [n, vocabulary] where the answer tokens are predicted
    module_inputs: Mapping[str, Tensor] = field(default_factory=dict)  # by watched module [n, in], at the same places

    @property
    def loss(self) -> Tensor:
        """Mean cross-entropy over related questions; long answers count as much as short ones."""
        return self.by_question[~self.is_unrelated].mean()

    @property
    def distillation_loss(self) -> Tensor:
        """Mean divergence from the teacher over the same questions (context distillation)."""
        return self.divergence[~self.is_unrelated].mean()

    @property
    def kl_to_base(self) -> Tensor | None:
        """Mean divergence from the plain base over questions that are unrelated to the document; None without any."""
        return self.divergence[self.is_unrelated].mean() if self.is_unrelated.any() else None


@dataclass(frozen=True)
class Passes:
    """How the base runs on a batch: what costs less memory or time and changes no result."""

    checkpoint_activations: bool = False
    """Whether the backward pass computes each block of the base again, in place of keeping its activations."""
    length_groups: int = 1
    """Groups of rows of similar length, each padded to its own longest."""


def score_answers(
    model: Any,
    loras: LoRABatch,
    batch: Batch,
    watched: Sequence[str] = (),
    gates: Mapping[str, Tensor] = MappingProxyType({}),
    passes: Passes = Passes(),
) -> AnswerScores:
    """Run the base on a batch, each row with its own LoRA, and score the answers.

    The inputs of the `watched` modules are kept where answers are predicted; `gates` as in `inject`.
    """
    decoder = model.get_decoder()
    if passes.length_groups == 1:
        hidden, inputs = _at_answers(model, loras, batch, watched, gates, passes)
    else:
        parts = [
            (at, *_at_answers(model, loras.take(rows) if loras.n > 1 else loras, part, watched, some, passes))
            for rows, at, part, some in _grouped(batch, gates, passes.length_groups)
        ]
        order = torch.cat([at for at, *_ in parts]).argsort()
        hidden = torch.cat([states for _, states, _ in parts])[order]
        inputs = {name: torch.cat([found[name] for *_, found in parts])[order] for name in watched}
    # Contiguous before the head: a strided slice made the product seconds slower on a CPU.
    logits = model.get_output_embeddings()(hidden.contiguous()).float()  # [n, vocabulary]
    if cap := getattr(decoder.config, "final_logit_softcapping", None):  # Gemma 2, after its head
        logits = cap * torch.tanh(logits / cap)
    return score_logits(logits, batch, inputs)


def _grouped(
    batch: Batch, gates: Mapping[str, Tensor], n: int
) -> Iterator[tuple[list[int], Tensor, Batch, dict[str, Tensor]]]:
    """By group of rows of similar length: their numbers, those of their answer tokens, their batch, their gates."""
    lengths = batch.row_lengths
    for rows in length_groups(lengths, n):
        t = lengths[rows[0]]
        place = torch.full((len(lengths),), -1, device=batch.answer_rows.device)
        place[rows] = torch.arange(len(rows), device=place.device)
        at = (place[batch.answer_rows] >= 0).nonzero()[:, 0]
        part = replace(
            batch,
            input_ids=batch.input_ids[rows, :t],
            position_ids=batch.position_ids[rows, :t],
            attention_mask=batch.attention_mask[rows, :, :t, :t],
            answer_rows=place[batch.answer_rows[at]],
            answer_positions=batch.answer_positions[at],
        )
        yield rows, at, part, {name: gate[rows, :t] for name, gate in gates.items()}


@contextmanager
def under_loras(
    model: Any, loras: LoRABatch, gates: Mapping[str, Tensor], device: torch.device, block: nn.Module | None = None
) -> Iterator[None]:
    """Inject LoRAs into a base and set its attention for training; where a block is given, inject its LoRAs alone."""
    some = loras if block is None else loras.only(names_within(model, block))
    with inject(model, some, gates), attention_for_training(model.get_decoder().config, device):
        yield


def _at_answers(
    model: Any, loras: LoRABatch, batch: Batch, watched: Sequence[str], gates: Mapping[str, Tensor], passes: Passes
) -> tuple[Tensor, dict[str, Tensor]]:
    """Last hidden states [n, hidden] and the watched modules' inputs [n, in], where a batch's answers are predicted."""
    decoder = model.get_decoder()
    prepared = partial(under_loras, model, loras, gates, model.device)
    recomputed = checkpointed_blocks(decoder, prepared) if passes.checkpoint_activations else nullcontext()
    with prepared(), recomputed, capture_inputs(model, watched) as inputs:
        mask = batch.attention_mask
        if decoder.config._attn_implementation == "eager":  # which adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        hidden = decoder(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state  # [d, t, hidden]
    at = batch.answer_rows, batch.answer_positions
    return hidden[at], {name: x[at] for name, x in inputs.items()}


def score_logits(logits: Tensor, batch: Batch, module_inputs: Mapping[str, Tensor] | None = None) -> AnswerScores:
    """Score the logits [n, vocabulary] at a batch's answer positions."""
    losses = functional.cross_entropy(logits, batch.answer_ids, reduction="none")  # [n]
    right = (logits.argmax(-1) == batch.answer_ids).float()
    lengths = torch.bincount(batch.answer_question, minlength=batch.n_questions)

    def by_question(values: Tensor) -> Tensor:
        return torch.zeros(batch.n_questions, device=values.device).index_add(0, batch.answer_question, values)

    apart = torch.zeros_like(losses)
    if batch.is_soft.any():
        soft = divergence(logits[batch.is_soft], batch.soft_ids, batch.soft_log_probs)
        apart = apart.masked_scatter(batch.is_soft, soft)
    related = ~batch.is_unrelated  # [questions]
    return AnswerScores(
        by_question=by_question(losses) / lengths,
        divergence=by_question(apart) / lengths,
        is_unrelated=batch.is_unrelated,
        exact=(by_question(right) == lengths)[related].float().mean().item(),
        token_accuracy=right[related[batch.answer_question]].mean().item(),
        logits=logits,
        module_inputs=module_inputs or {},
    )


@contextmanager
def attention_for_training(config: Any, device: torch.device) -> Iterator[None]:
    """On a CPU, use eager attention: the fused kernel's backward takes four times as long on rows as short as these."""
    usual = config._attn_implementation
    config._attn_implementation = "eager" if device.type == "cpu" else usual
    try:
        yield
    finally:
        config._attn_implementation = usual
