"""Episodes of a training as batches, and the losses of their answers.

A document is encoded once and answers all its questions in one row (base/forward.py), so that the LoRA of a document
meets all its questions in one matmul.

A teacher's distributions are kept by their k likeliest tokens (arXiv 2602.15902 keeps 16): about 100 bytes a token
instead of 200 kB.

Gradient checkpointing of a base's blocks (arXiv 1604.06174): activations are computed twice and kept once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from loracast.base.forward import (
    PackedRows,
    answer_logits,
    capture_inputs,
    hidden_at_answers,
    pack_rows,
    pad_right,
    under_loras,
)
from loracast.hypernets.encoders import Features, HiddenStatesEncoder
from loracast.lab.data.facts import TokenLabel
from loracast.lora.algebra import LoRABatch

TOP_K = 16


class SoftTargets(NamedTuple):
    """A teacher's likeliest tokens at each of t positions."""

    ids: Tensor  # [t, k] int32
    log_probs: Tensor  # [t, k] float16


def soften(logits: Tensor, k: int = TOP_K) -> SoftTargets:
    """Keep the k likeliest tokens of distributions given by logits [n, vocabulary]."""
    log_probs, ids = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return SoftTargets(ids.int().cpu(), log_probs.half().cpu())


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Divergence of a student from its teacher [n]: sum of p (log p - log q) over the teacher's likeliest tokens.

    It lacks the terms of all other tokens to be the Kullback-Leibler divergence. The student's logits [n, vocabulary]
    are normalised here over the whole vocabulary; the teacher's likeliest tokens are `ids` and `log_probs` [n, k].
    """
    student = logits.float().log_softmax(-1).gather(1, ids.long())  # [n, k]
    teacher = log_probs.float()
    return (teacher.exp() * (teacher - student)).sum(-1)


@dataclass(frozen=True)
class Question:
    """A prompt and its answer, both as token ids; the answer ends with the end of its turn."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    is_unrelated: bool = False  # to the document, so that the base shall answer as it does without a LoRA
    window_prompt: tuple[int, ...] = ()  # the question after the document, for a teacher that sees it, if there is one
    sentence_weights: tuple[float, ...] = ()  # of the document's sentences for this question; empty: 1 for all
    soft: SoftTargets | None = field(default=None, compare=False)  # a teacher's distributions at the answer's tokens


@dataclass(frozen=True)
class Episode:
    """One document, in chunks of token ids, with questions about it; or questions of one task, without a document."""

    chunks: tuple[tuple[int, ...], ...]
    questions: tuple[Question, ...]
    task: str = ""  # the kind of the episode, such as "needle": accuracies are logged by it
    token_labels: tuple[TokenLabel, ...] = ()  # span supervision of the chunks, where it is known
    token_sentences: tuple[tuple[int, ...], ...] = ()  # of each chunk's tokens, the document's sentence they stand in

    def merged(self) -> Episode:
        """The episode with the whole memory for each question, as in a merged LoRA."""
        return replace(self, questions=tuple(replace(question, sentence_weights=()) for question in self.questions))


@dataclass(frozen=True)
class Batch(PackedRows):
    """Episodes as tensors: d documents of k chunks of at most c tokens, with the questions of each in a row."""

    chunk_ids: Tensor  # [d * k, c]
    chunk_mask: Tensor  # [d * k, c] bool, true where real
    chunks_per_document: int
    is_unrelated: Tensor  # [questions] bool
    is_soft: Tensor  # [n] bool, whether a teacher's distribution is known there
    soft_ids: Tensor  # [soft, k] the teacher's likeliest tokens
    soft_log_probs: Tensor  # [soft, k]
    token_labels: Tensor  # [m, 7] a TokenLabel in each row, with the row of chunk_ids as its chunk
    token_sentences: Tensor  # [d * k, c] the sentence of each token of a chunk, -1 for padding
    sentence_weights: Tensor  # [questions, s] by the sentence's number in the document
    is_routed: Tensor  # [questions] bool, whether its sentences have weights; where not, all count

    @property
    def n_tokens(self) -> int:
        """Tokens that the base processes with a backward pass, padding included."""
        return self.input_ids.numel()

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row of `input_ids`, without padding: a row ends where its last answer token is predicted."""
        lengths = torch.zeros(len(self.input_ids), dtype=torch.long, device=self.answer_rows.device)
        return lengths.scatter_reduce(0, self.answer_rows, self.answer_positions + 1, "amax").tolist()


def pack(episodes: Sequence[Episode], pad_id: int) -> Batch:
    """Pack episodes into one Batch. Documents with fewer chunks than the others are filled up with empty chunks."""
    k = max(1, *(len(episode.chunks) for episode in episodes))
    empty: tuple[tuple[int, ...], ...] = ((),)
    filled = [chunk for episode in episodes for chunk in episode.chunks + empty * (k - len(episode.chunks))]
    chunk_ids, chunk_mask = pad_right(filled, pad_id)
    questions = [question for episode in episodes for question in episode.questions]
    soft = [question.soft for question in questions if question.soft is not None]
    is_soft = [question.soft is not None for question in questions for _ in question.answer]
    sentences = [
        s for e in episodes for s in (e.token_sentences or empty * len(e.chunks)) + empty * (k - len(e.chunks))
    ]
    padded = pad_right(sentences, -1)[0]
    weights = [torch.tensor(question.sentence_weights) for question in questions]
    labels = [(row * k + chunk, *rest) for row, episode in enumerate(episodes) for chunk, *rest in episode.token_labels]
    rows = [[(question.prompt, question.answer) for question in episode.questions] for episode in episodes]
    return Batch(
        **vars(pack_rows(rows, pad_id)),
        chunk_ids=chunk_ids,
        chunk_mask=chunk_mask,
        chunks_per_document=k,
        is_unrelated=torch.tensor([question.is_unrelated for question in questions]),
        is_soft=torch.tensor(is_soft),
        soft_ids=torch.cat([targets.ids for targets in soft]).long() if soft else torch.zeros(0, 1, dtype=torch.long),
        soft_log_probs=torch.cat([targets.log_probs for targets in soft]).float() if soft else torch.zeros(0, 1),
        token_labels=torch.tensor(labels, dtype=torch.long).view(-1, len(TokenLabel._fields)),
        token_sentences=functional.pad(padded, (0, chunk_ids.shape[1] - padded.shape[1]), value=-1),
        sentence_weights=pad_sequence(weights, batch_first=True),
        is_routed=torch.tensor([bool(question.sentence_weights) for question in questions]),
    )


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
    logits = answer_logits(model, hidden)
    losses = functional.cross_entropy(logits, batch.answer_ids, reduction="none")  # [n]
    right = (logits.argmax(-1) == batch.answer_ids).float()
    apart = torch.zeros_like(losses)
    if batch.is_soft.any():
        soft = divergence(logits[batch.is_soft], batch.soft_ids, batch.soft_log_probs)
        apart = apart.masked_scatter(batch.is_soft, soft)
    related = ~batch.is_unrelated  # [questions]
    return AnswerScores(
        by_question=batch.mean_by_question(losses),
        divergence=batch.mean_by_question(apart),
        is_unrelated=batch.is_unrelated,
        exact=(batch.mean_by_question(right) == 1)[related].float().mean().item(),
        token_accuracy=right[related[batch.answer_question]].mean().item(),
        logits=logits,
        module_inputs=inputs,
    )


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
def checkpointed_blocks(
    model: Any, loras: LoRABatch, device: torch.device, gates: Mapping[str, Tensor]
) -> Iterator[None]:
    """Keep only what enters each block of a base during forward passes inside; the backward pass computes it again.

    The LoRAs of a block are injected anew when it is computed again, since by then the forward pass is over.

    Args:
        model: a causal language model, frozen and in evaluation mode; other arguments as in `under_loras`.
    """
    blocks = model.get_decoder().layers

    def contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), under_loras(model, loras.only(names_within(model, block)), device, gates)

    own = [vars(block).get("forward") for block in blocks]  # accelerate gives blocks one of their own
    for block in blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
            context_fn=partial(contexts, block),
        )  # fmt: skip
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def names_within(model: nn.Module, block: nn.Module) -> set[str]:
    """The names that the modules of a block, itself included, have in the whole model."""
    own = set(block.modules())
    return {name for name, module in model.named_modules() if module in own}


def _at_answers(
    model: Any, loras: LoRABatch, batch: Batch, watched: Sequence[str], gates: Mapping[str, Tensor], passes: Passes
) -> tuple[Tensor, dict[str, Tensor]]:
    """Last hidden states [n, hidden] and the watched modules' inputs [n, in], where a batch's answers are predicted."""
    context = (model, loras, model.device, gates)
    recomputed = checkpointed_blocks(*context) if passes.checkpoint_activations else nullcontext()
    with under_loras(*context), recomputed, capture_inputs(model, watched) as inputs:
        hidden = hidden_at_answers(model, batch)
    return hidden, {name: x[batch.answer_rows, batch.answer_positions] for name, x in inputs.items()}


def length_groups(lengths: Sequence[int], n: int) -> list[list[int]]:
    """Split sequences into at most `n` groups with the least padding, each padded to its longest: indices by group."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest = np.array([lengths[i] for i in order])
    ends = np.arange(1, len(order) + 1)
    cost = ends * longest[0]  # of the first 1, 2, ... sequences as one group
    cuts = []
    for _ in range(n - 1):  # dynamic programming: the last group begins at the best place for each end
        before = np.concatenate([[0], cost[:-1]])
        of_start = before + np.where(
            ends[:, None] > np.arange(len(order)), (ends[:, None] - ends + 1) * longest, np.inf
        )
        cuts.append(of_start.argmin(1))
        cost = of_start.min(1)
    groups, end = [], len(order)
    for cut in reversed(cuts):
        start = int(cut[end - 1])
        groups.append(order[start:end])
        end = start
        if end == 0:
            return groups
    return [*groups, order[:end]]


def read_in_groups(encoder: HiddenStatesEncoder, input_ids: Tensor, mask: Tensor, n: int) -> Features:
    """The features of rows [c, t], read in at most `n` groups of similar length; those of padding mean nothing.

    Args:
        mask: [c, t], true where a token is real.
    """
    if n == 1:
        return encoder(input_ids, mask)
    lengths = mask.sum(1).clamp_min(1).tolist()
    groups = length_groups(lengths, n)
    read = [encoder(input_ids[rows, : lengths[rows[0]]]) for rows in groups]
    order = torch.tensor([row for rows in groups for row in rows], device=input_ids.device).argsort()

    def joined(name: str) -> Tensor | None:
        parts = [getattr(one, name) for one in read]
        if parts[0] is None:
            return None
        padded = [functional.pad(part, (0, 0, 0, input_ids.shape[1] - part.shape[-2])) for part in parts]
        return torch.cat(padded)[order]

    states = joined("states")
    assert states is not None
    return Features(states, joined("starts"), joined("keys"), mask)
