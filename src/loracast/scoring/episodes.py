"""Pack documents with questions into batches: a document is encoded once and answers all questions in one row.

A row is a small tree: the prompts' common prefix once (a system turn, say), then every question with its answer as a
branch. A branch attends to the prefix and itself, and its positions continue from the prefix. So each branch computes
exactly what a row of its own would, at a fraction of the tokens, and the LoRA of a document meets all its questions in
one matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from loracast.batching import pad_right
from loracast.data.spans import TokenLabel
from loracast.scoring.soft_targets import SoftTargets


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
    rows: list[list[int]] = []
    positions: list[list[int]] = []
    branches: list[list[int]] = []  # of each token: 0 for the prefix, then the batch's questions from 1 on
    answers: list[tuple[int, int, int, int]] = []  # row, position, token, question
    n_questions = 0
    for row, episode in enumerate(episodes):
        shared = common_prefix([question.prompt for question in episode.questions])
        ids = list(episode.questions[0].prompt[:shared])
        position = list(range(shared))
        branch = [0] * shared
        for question in episode.questions:
            tail = [*question.prompt[shared:], *question.answer[:-1]]  # the last answer token is predicted, never read
            first = len(ids) + len(question.prompt) - shared - 1
            answers += [(row, first + i, token, n_questions) for i, token in enumerate(question.answer)]
            n_questions += 1
            ids += tail
            position += range(shared, shared + len(tail))
            branch += [n_questions] * len(tail)
        rows.append(ids)
        positions.append(position)
        branches.append(branch)
    input_ids, _ = pad_right(rows, pad_id)
    position_ids, _ = pad_right(positions, 0)
    branch_ids, _ = pad_right(branches, -1)  # padding attends to padding only, and no token attends to it
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
