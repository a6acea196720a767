"""Losses of document training beside the answers' own: the memory's, routed gates, and a teacher's distributions."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loracast.documents import Chunk
from loracast.hypernets.associative_memory import END, OWNER, MemoryWrites
from loracast.lab.training.scoring import Batch, Episode, Question, SoftTargets, pack, score_answers, soften
from loracast.library.index import Index, write_index
from loracast.lora.algebra import LoRA, LoRABatch, stack
from loracast.reading.search import sentence_scores

_SHARPNESS = 10.0  # inverse temperature of retrieval: a key's response is about 1 in each module


@dataclass(frozen=True)
class MemoryLosses:
    """Write loss and retrieval loss against the token labels of a batch."""

    loss: Tensor | None = None  # their sum; None without a memory or labels
    figures: dict[str, float] = field(default_factory=dict)  # to log


def write_loss(writes: MemoryWrites, batch: Batch) -> MemoryLosses:
    """Cross-entropy of the write gates at all tokens, and of places and both pointer heads at labelled tokens."""
    if not len(batch.token_labels):
        return MemoryLosses()
    rows, tokens, gates, owners, places, ends, _ = batch.token_labels.unbind(1)
    wanted = torch.zeros_like(writes.gate_logits)
    wanted[rows, tokens, gates] = 1
    real = batch.chunk_mask.bool()
    logits, wanted = writes.gate_logits[real], wanted[real]  # [tokens, gates]
    loss = functional.binary_cross_entropy_with_logits(logits, wanted)
    is_open = logits > 0
    hits = (is_open & (wanted > 0)).sum().item()
    at_places = writes.place_logits[rows, tokens]  # [m, places]
    loss = loss + functional.cross_entropy(at_places, places.clamp_max(at_places.shape[1] - 1))
    figures = {"gate_recall": hits / max(1, int(wanted.sum())), "gate_precision": hits / max(1, int(is_open.sum()))}
    for name, head, pointed_at in (("owner", OWNER, owners), ("end", END, ends)):
        known = pointed_at >= 0
        if known.any():
            scores = writes.pointer_scores[rows[known], head, tokens[known]]  # [m, t]
            loss = loss + functional.cross_entropy(scores, pointed_at[known])
            figures[f"{name}_accuracy"] = (scores.argmax(-1) == pointed_at[known]).float().mean().item()
    return MemoryLosses(loss, figures)


def retrieval_loss(
    keys: Mapping[str, tuple[Tensor, Tensor]], writes: MemoryWrites, batch: Batch, gate: Tensor | None = None
) -> tuple[Tensor, float] | None:
    """Cross-entropy of retrieving, among all written tokens, the one that each answer token repeats.

    The answers' own loss asks for the same through all later layers of the base; this loss asks the keys alone. First
    tokens, which decide whose answer it is, have half of the weight. `keys` has by module the written keys A
    [d, k * r, in], and its inputs where answer tokens are predicted [n, in]. `gate` has the weights of the rows'
    sentences at every token of the input rows [d, t, k * r], where the answers are weighed by them. Returns the loss
    and the share of tokens that are retrieved; None where no label says what an answer repeats.
    """
    assert writes.tokens is not None and writes.weights is not None
    k, rank = batch.chunks_per_document, next(iter(keys.values()))[0].shape[1] // batch.chunks_per_document
    n_padding = rank - writes.tokens.shape[1]  # chunks shorter than the rank write zeros
    tokens = functional.pad(writes.tokens, (0, n_padding), value=-1).view(-1, k * rank)  # [d, k * r]
    chunk = torch.arange(k, device=tokens.device).repeat_interleave(rank)  # [k * r]
    is_first = torch.ones_like(batch.answer_question, dtype=torch.bool)
    is_first[1:] = batch.answer_question[1:] != batch.answer_question[:-1]
    starts = is_first.nonzero().squeeze(1)  # [questions] the first answer token of each
    first_question = torch.searchsorted(batch.answer_rows[starts], torch.arange(len(tokens), device=tokens.device))
    lengths = torch.bincount(batch.answer_question)
    asked = batch.token_labels[batch.token_labels[:, -1] >= 0]
    rows, labelled, _, _, places, _, statements = asked.unbind(1)
    documents = rows // k
    questions = first_question[documents] + statements
    answers = starts[questions] + places  # [m] the answer token that repeats the labelled one
    written = (tokens[documents] == labelled[:, None]) & (chunk == (rows % k)[:, None])  # [m, k * r]
    is_asked = written.any(1) & (places < lengths[questions])
    if not is_asked.any():
        return None
    documents, answers, written = documents[is_asked], answers[is_asked], written[is_asked]
    scores = torch.zeros(written.shape, device=tokens.device)
    for weight, (a, x) in zip(writes.weights, keys.values(), strict=True):
        of_all = (x[answers] @ a.to(x.dtype).flatten(0, 1).T).unflatten(1, (-1, k * rank))  # [m, d, k * r]
        scores = scores + weight * of_all[torch.arange(len(answers), device=tokens.device), documents].float()
    if gate is not None:
        scores = scores * gate[documents, batch.answer_positions[answers]]
    # Retrieving another token with the same id is no mistake.
    row = documents[:, None] * k + chunk
    ids = batch.chunk_ids[row, tokens[documents].clamp_min(0)]  # [m, k * r] of the written tokens
    wanted = written.int().argmax(1)
    same = (ids == ids.gather(1, wanted[:, None])) & ~written
    lowest = torch.finfo(scores.dtype).min
    scores = (_SHARPNESS * len(keys) * scores).masked_fill(same | (tokens[documents] < 0), lowest)
    losses = functional.cross_entropy(scores, wanted, reduction="none")
    is_start = places[is_asked] == 0
    weights = torch.where(is_start, 1 / is_start.sum().clamp_min(1), 1 / (~is_start).sum().clamp_min(1))
    return (weights * losses).sum() / weights.sum(), (scores.argmax(1) == wanted).float().mean().item()


def sentence_weights(index: Index, question: str) -> list[float] | None:
    """The weight of each sentence of a document for a question, 1 for the best; None where none matches."""
    scores = sentence_scores(index, question)
    return None if scores is None else [score / max(scores) for score in scores]


def weights_of(prompts: Sequence[str], questions: Sequence[str]) -> list[tuple[float, ...]]:
    """For each question the weights of a document's sentences; empty where no word of the question matches."""
    with closing(sqlite3.connect(":memory:")) as index:
        write_index(index, [Chunk(prompt, 0, len(prompt), heading="", n_tokens=0) for prompt in prompts])
        return [tuple(sentence_weights(index, question) or ()) for question in questions]


def sentence_gates(tokens: Tensor, batch: Batch, rank: int) -> Tensor:
    """Weights of a memory's rows at each token of the batch's input rows [d, t, rank].

    Args:
        tokens: the token that each row of a chunk's memory belongs to [d * k, r].
        rank: of the merged LoRA: k times that of a chunk, which is r or more.

    A question's tokens get the weights of its sentences; the prefix that a document's questions share gets their mean.
    """
    k = batch.chunks_per_document
    sentences = batch.token_sentences.gather(1, tokens)  # [d * k, r]
    sentences = functional.pad(sentences, (0, rank // k - tokens.shape[1]), value=-1).view(-1, rank)  # [d, rank]
    n_documents, n_questions = len(sentences), len(batch.is_routed)
    home = torch.zeros(n_questions, dtype=torch.long, device=tokens.device)
    home[batch.answer_question] = batch.answer_rows  # [questions] the document of each
    of_rows = sentences[home]  # [questions, rank]
    n_weighed = batch.sentence_weights.shape[1]  # another document may have more sentences, if it weighs none
    at_weight = torch.where((of_rows >= 0) & (of_rows < n_weighed), of_rows, n_weighed)
    weights = functional.pad(batch.sentence_weights, (0, 1)).gather(1, at_weight)
    weights = torch.where(batch.is_routed[:, None], weights, 1.0)
    of_document = functional.one_hot(home, n_documents).float().T  # [d, questions]
    mean = of_document @ weights / of_document.sum(1, keepdim=True)
    at = batch.token_question  # [d, t]
    return torch.where((at >= 0)[..., None], weights[at.clamp_min(0)], mean[:, None])


@dataclass(frozen=True)
class Teacher:
    """A frozen base, perhaps with a LoRA, whose answer distributions a student learns."""

    model: Any
    pad_id: int
    lora: LoRA | None = None

    @torch.no_grad()
    def soft_targets(self, *rows: Sequence[Question]) -> list[SoftTargets]:
        """The likeliest tokens at each token of each answer. The questions of one row share their common prefix."""
        device = self.model.device
        questions = [question for row in rows for question in row]
        batch = pack([Episode((), tuple(row)) for row in rows], self.pad_id).to(device)
        loras = LoRABatch(1, {}, {}) if self.lora is None else stack([self.lora])
        autocast = torch.autocast(device.type, torch.bfloat16) if self.model.dtype == torch.bfloat16 else nullcontext()
        with autocast:
            scores = score_answers(self.model, loras, batch)
        soft = soften(scores.logits)
        lengths = [len(question.answer) for question in questions]
        return list(map(SoftTargets, soft.ids.split(lengths), soft.log_probs.split(lengths)))


class Distillation:
    """Adds soft targets to the questions of episodes.

    The plain base is the teacher of unrelated questions, and is asked once for each; a teacher that sees the document,
    if there is one, is the teacher of the others.
    """

    def __init__(self, plain: Teacher, seeing: Teacher | None):
        self.plain, self.seeing = plain, seeing
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], SoftTargets] = {}  # by prompt and answer

    def with_soft_targets(self, episodes: Sequence[Episode]) -> list[Episode]:
        """The same episodes with soft targets."""
        unrelated = {(q.prompt, q.answer): q for episode in episodes for q in episode.questions if q.is_unrelated}
        if new := [key for key in unrelated if key not in self._known]:
            self._known |= zip(new, self.plain.soft_targets(*([unrelated[key]] for key in new)), strict=True)
        return [replace(episode, questions=tuple(self._questions(episode))) for episode in episodes]

    def _questions(self, episode: Episode) -> list[Question]:
        seen: dict[Question, SoftTargets] = {}
        if self.seeing is not None and (shown := [q for q in episode.questions if q.window_prompt]):
            in_window = [replace(q, prompt=q.window_prompt) for q in shown]
            seen = dict(zip(shown, self.seeing.soft_targets(in_window), strict=True))
        return [
            replace(q, soft=self._known[q.prompt, q.answer] if q.is_unrelated else seen.get(q))
            for q in episode.questions
        ]
