"""Losses of an associative memory beside the answers' loss: what it writes, and whether its keys retrieve that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from loracast.hypernets.memory import END, OWNER, MemoryWrites
from loracast.scoring.episodes import Batch

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
    figures = {
        "gate_recall": hits / max(1, int(wanted.sum())),
        "gate_precision": hits / max(1, int(is_open.sum())),
    }
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
