"""Log-likelihood of answers under LoRAs, of questions that are packed into batches.

A document is encoded once and answers all its questions in one row, which is a small tree: the prompts' common prefix
once (a system turn, say), then every question with its answer as a branch. A branch attends to the prefix and itself,
and its positions continue from the prefix. So each branch computes exactly what a row of its own would, at a fraction
of the tokens, and the LoRA of a document meets all its questions in one matmul.

A teacher's distributions are kept by their k likeliest tokens (arXiv 2602.15902 keeps 16): about 100 bytes a token
instead of 200 kB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from loracast.base.forward import (
    attention_of,
    capture_inputs,
    checkpointed_blocks,
    length_groups,
    names_within,
    pad_right,
)
from loracast.lora.algebra import LoRABatch, inject

TOP_K = 16
Schedule = Literal["cosine", "constant"]


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


class TokenLabel(NamedTuple):
    """A labelled token of a chunk."""

    chunk: int
    token: int
    gate: int  # INSIDE, BEGIN or AFTER
    owner: int  # the last token of the owner's name; -1 if there is none
    place: int  # index of the token in the answer
    end: int  # the last token of the statement; -1 if unknown
    statement: int  # index of the statement in the document, which is its question's; -1 if no question asks for it


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
class Batch:
    """Episodes as tensors: d documents of k chunks of at most c tokens, rows of at most t tokens, n answer tokens."""

    chunk_ids: Tensor  # [d * k, c]
    chunk_mask: Tensor  # [d * k, c] bool, true where real
    chunks_per_document: int
    input_ids: Tensor  # [d, t]
    position_ids: Tensor  # [d, t]
    attention_mask: Tensor  # [d, 1, t, t] bool, true where a token may attend
    answer_rows: Tensor  # [n] the row where each answer token is predicted
    answer_positions: Tensor  # [n] its position in the row
    answer_ids: Tensor  # [n] the token to predict there
    answer_question: Tensor  # [n] index of its question in the batch
    is_unrelated: Tensor  # [questions] bool
    is_soft: Tensor  # [n] bool, whether a teacher's distribution is known there
    soft_ids: Tensor  # [soft, k] the teacher's likeliest tokens
    soft_log_probs: Tensor  # [soft, k]
    token_labels: Tensor  # [m, 7] a TokenLabel in each row, with the row of chunk_ids as its chunk
    token_sentences: Tensor  # [d * k, c] the sentence of each token of a chunk, -1 for padding
    sentence_weights: Tensor  # [questions, s] by the sentence's number in the document
    is_routed: Tensor  # [questions] bool, whether its sentences have weights; where not, all count
    token_question: Tensor  # [d, t] the question that a token belongs to; -1 for the prefix and padding

    @property
    def n_questions(self) -> int:
        return int(self.answer_question[-1]) + 1

    @property
    def n_tokens(self) -> int:
        """Tokens that the base processes with a backward pass, padding included."""
        return self.input_ids.numel()

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row of `input_ids`, without padding: a row ends where its last answer token is predicted."""
        lengths = torch.zeros(len(self.input_ids), dtype=torch.long, device=self.answer_rows.device)
        return lengths.scatter_reduce(0, self.answer_rows, self.answer_positions + 1, "amax").tolist()

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return Batch(**moved)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share, without the last token of the shortest."""
    length = min(len(sequence) for sequence in sequences) - 1
    differing = (i for i in range(length) if any(sequence[i] != sequences[0][i] for sequence in sequences))
    return next(differing, length)


def pack(episodes: Sequence[Episode], pad_id: int) -> Batch:
    """Pack episodes into one Batch. Documents with fewer chunks than the others are filled up with empty chunks."""
    k = max(1, *(len(episode.chunks) for episode in episodes))
    empty: tuple[tuple[int, ...], ...] = ((),)
    filled = [chunk for episode in episodes for chunk in episode.chunks + empty * (k - len(episode.chunks))]
    chunk_ids, chunk_mask = pad_right(filled, pad_id)
    rows: list[list[tuple[int, int, int]]] = []  # of tokens: id, position, 0 for the prefix or the question from 1 on
    answers: list[tuple[int, int, int, int]] = []  # row, position, token, question
    n_questions = 0
    for row, episode in enumerate(episodes):
        shared = common_prefix([question.prompt for question in episode.questions])
        tokens = [(token, i, 0) for i, token in enumerate(episode.questions[0].prompt[:shared])]
        for question in episode.questions:
            first = len(tokens) + len(question.prompt) - shared - 1
            answers += [(row, first + i, token, n_questions) for i, token in enumerate(question.answer)]
            n_questions += 1
            tail = [*question.prompt[shared:], *question.answer[:-1]]  # the last answer token is predicted, never read
            tokens += [(token, shared + i, n_questions) for i, token in enumerate(tail)]
        rows.append(tokens)
    # Padding attends to padding only, and no token attends to it.
    input_ids, position_ids, branch_ids = (
        pad_right([[token[i] for token in row] for row in rows], pad)[0] for i, pad in enumerate((pad_id, 0, -1))
    )
    same = branch_ids[:, :, None] == branch_ids[:, None, :]
    to_prefix = (branch_ids == 0)[:, None, :] & (branch_ids >= 0)[:, :, None]
    t = input_ids.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    attention_mask = ((same | to_prefix) & causal)[:, None]
    answer_rows, answer_positions, answer_ids, answer_question = torch.tensor(answers).unbind(1)
    questions = [question for episode in episodes for question in episode.questions]
    soft = [question.soft for question in questions if question.soft is not None]
    is_soft = [question.soft is not None for question in questions for _ in question.answer]
    sentences = [
        s for e in episodes for s in (e.token_sentences or empty * len(e.chunks)) + empty * (k - len(e.chunks))
    ]
    weights = [torch.tensor(question.sentence_weights) for question in questions]
    labels = [(row * k + chunk, *rest) for row, episode in enumerate(episodes) for chunk, *rest in episode.token_labels]
    return Batch(
        chunk_ids, chunk_mask, k, input_ids, position_ids, attention_mask,
        answer_rows, answer_positions, answer_ids, answer_question,
        torch.tensor([question.is_unrelated for question in questions]),
        torch.tensor(is_soft),
        torch.cat([targets.ids for targets in soft]).long() if soft else torch.zeros(0, 1, dtype=torch.long),
        torch.cat([targets.log_probs for targets in soft]).float() if soft else torch.zeros(0, 1),
        torch.tensor(labels, dtype=torch.long).view(-1, len(TokenLabel._fields)),
        functional.pad(padded := pad_right(sentences, -1)[0], (0, chunk_ids.shape[1] - padded.shape[1]), value=-1),
        pad_sequence(weights, batch_first=True),
        torch.tensor([bool(question.sentence_weights) for question in questions]),
        branch_ids.clamp_min(0) - 1,
    )  # fmt: skip


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
def under_loras(
    model: Any, loras: LoRABatch, gates: Mapping[str, Tensor], device: torch.device, block: nn.Module | None = None
) -> Iterator[None]:
    """Inject LoRAs into a base and set its attention for training; where a block is given, inject its LoRAs alone."""
    some, config = loras if block is None else loras.only(names_within(model, block)), model.get_decoder().config
    # On a CPU the fused kernel's backward takes four times as long on rows as short as these.
    attention = "eager" if device.type == "cpu" else config._attn_implementation
    with inject(model, some, gates), attention_of(config, attention):
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


def lr_factor(step: int, n_steps: int, n_warmup: int, schedule: Schedule) -> float:
    """The learning rate of a training step (counted from 0), as a share of its peak.

    It rises evenly over the first `n_warmup` steps; then it stays, or falls to a tenth along a cosine until `n_steps`.
    """
    if step < n_warmup:
        return (step + 1) / n_warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - n_warmup) / max(1, n_steps - n_warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
