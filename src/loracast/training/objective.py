"""The objectives: the base answers with a generated LoRA, without the document or the description that the LoRA was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.encoders.hidden_states import ContextEncoder
from loracast.hypernets.doc_to_lora import Cast
from loracast.lora.algebra import LoRABatch
from loracast.lora.inject import inject
from loracast.scoring.episodes import Batch
from loracast.scoring.soft_targets import divergence
from loracast.training.memory_losses import MemoryLosses, retrieval_loss, write_loss


@dataclass(frozen=True)
class Outcome:
    """What one batch gave."""

    by_question: Tensor  # [questions] mean cross-entropy of the answer tokens of each
    divergence: Tensor  # [questions] mean divergence from the teacher; 0 where there is none
    is_unrelated: Tensor  # [questions] bool
    exact: float  # share of questions about the document whose answer tokens are all the likeliest, given the true ones before them
    token_accuracy: float  # share of their answer tokens that are the likeliest
    logits: Tensor  # [n, vocabulary] at the answer positions

    @property
    def loss(self) -> Tensor:
        """The mean over questions about the documents, long answers and short ones alike."""
        return self.by_question[~self.is_unrelated].mean()

    @property
    def taught(self) -> Tensor:
        """The mean divergence over the same questions: context distillation."""
        return self.divergence[~self.is_unrelated].mean()

    @property
    def harm(self) -> Tensor | None:
        """The mean divergence from the plain base over questions that have nothing to do with the documents; None without any."""
        return self.divergence[self.is_unrelated].mean() if self.is_unrelated.any() else None


def answer_questions(
    model: Any,
    encoder: ContextEncoder,
    hypernet: Callable[..., Cast],
    batch: Batch,
    right_weight: float = 1.0,
) -> tuple[Outcome, MemoryLosses, Cast]:
    """Documents -> features -> LoRAs -> the loss on their questions' answers, on what the memory wrote, and what was cast."""
    cast = hypernet(encoder(batch.chunk_ids, batch.chunk_mask), batch.chunks_per_document)
    seen, entering = answer_with(model, cast.loras, batch, encoder.key_modules, right_weight)
    if cast.writes is None:
        return seen, MemoryLosses(), cast
    keys = {name: (cast.loras.factors[name].a, x) for name, x in entering.items()}  # A [d, k * r, in], x [n, in]
    written, found = write_loss(cast.writes, batch), retrieval_loss(keys, cast.writes, batch)
    if written.loss is None or found is None:
        return seen, written, cast
    told = MemoryLosses(written.loss + found[0], {**written.figures, "finding_accuracy": found[1]})
    return seen, told, cast


def answer_with(
    model: Any, loras: LoRABatch, batch: Batch, watched: Sequence[str] = (), right_weight: float = 1.0
) -> tuple[Outcome, dict[str, Tensor]]:
    """The base answers a batch's questions, each row with a LoRA of its own.

    Returns:
        the outcome, and by name what entered the watched modules where the answers are predicted [n, in].
    """
    decoder = model.get_decoder()
    with (
        inject(model, loras),
        _attention_for_training(decoder.config, model.device),
        _entering(model, watched) as entering,
    ):
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
    at = batch.answer_rows, batch.answer_positions
    logits = model.get_output_embeddings()(hidden[at].contiguous()).float()  # [n, vocabulary]
    if cap := getattr(decoder.config, "final_logit_softcapping", None):  # Gemma 2, after its head
        logits = cap * torch.tanh(logits / cap)
    return outcome(logits, batch, right_weight), {name: x[at] for name, x in entering.items()}


@contextmanager
def _entering(model: Any, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What enters some modules in the next forward, by their names."""
    entering: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: entering.update({name: inputs[0]})

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield entering
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _attention_for_training(config: Any, device: torch.device) -> Iterator[None]:
    """On a CPU, attention spelled out: the fused kernel's backward takes four times as long on rows as short as these."""
    usual = config._attn_implementation
    config._attn_implementation = "eager" if device.type == "cpu" else usual
    try:
        yield
    finally:
        config._attn_implementation = usual


def outcome(logits: Tensor, batch: Batch, right_weight: float = 1.0) -> Outcome:
    """Losses and accuracies of the logits [n, vocabulary] at a batch's answer positions.

    Args:
        right_weight: what the cross-entropy of a token counts that is the likeliest already.
    """
    losses = functional.cross_entropy(logits, batch.answer_ids, reduction="none")  # [n]
    right = (logits.argmax(-1) == batch.answer_ids).float()
    if right_weight != 1:
        losses = losses * torch.where(right > 0, right_weight, 1.0)
    lengths = torch.bincount(batch.answer_question, minlength=batch.n_questions)

    def by_question(values: Tensor) -> Tensor:
        return torch.zeros(batch.n_questions, device=values.device).index_add(0, batch.answer_question, values)

    apart = torch.zeros_like(losses)
    if batch.is_soft.any():
        apart = apart.masked_scatter(
            batch.is_soft, divergence(logits[batch.is_soft], batch.soft_ids, batch.soft_log_probs)
        )
    about = ~batch.is_unrelated  # [questions]
    counted = about[batch.answer_question]  # [n]
    exact = (by_question(right) == lengths)[about].float().mean().item()
    return Outcome(
        by_question(losses) / lengths,
        by_question(apart) / lengths,
        batch.is_unrelated,
        exact,
        right[counted].mean().item(),
        logits,
    )
