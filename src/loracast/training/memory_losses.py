"""What an associative memory is told beside the answers' own loss: which tokens to write, where to look for their keys, and whether the
keys find them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from loracast.hypernets.memory import END, OWNER, MemoryWrites
from loracast.scoring.episodes import Batch

_SHARPNESS = 10.0  # of finding: what a key's response, of about 1 a module, is worth in nats


@dataclass(frozen=True)
class MemoryLosses:
    """How well a memory chose what to write, and its keys find it, against the marks of a batch."""

    loss: Tensor | None = None  # gates, places, looks and finding; None without a memory or marks
    figures: dict[str, float] = field(default_factory=dict)


def write_loss(writes: MemoryWrites, batch: Batch) -> MemoryLosses:
    """Cross-entropy of a memory's gates over all tokens, and of its places and of where two heads look, against the marks."""
    if not len(batch.marks):
        return MemoryLosses()
    rows, tokens, gates, owners, places, ends, _ = batch.marks.unbind(1)
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
    for name, head, looked_for in (("owner", OWNER, owners), ("end", END, ends)):
        known = looked_for >= 0
        if known.any():
            scores = writes.pointer_scores[rows[known], head, tokens[known]]  # [m, t]
            loss = loss + functional.cross_entropy(scores, looked_for[known])
            figures[f"{name}_accuracy"] = (scores.argmax(-1) == looked_for[known]).float().mean().item()
    return MemoryLosses(loss, figures)


def retrieval_loss(
    keys: Mapping[str, tuple[Tensor, Tensor]], writes: MemoryWrites, batch: Batch
) -> tuple[Tensor, float] | None:
    """Cross-entropy of finding, at each token of an answer, the token of the document that it repeats among all that were written.

    The answers' own loss asks for the same by way of all that the base does with what it finds; this asks the keys alone. The
    first tokens, which decide whose answer it is, have half of the weight.

    Args:
        keys: by module the keys that were written, A [d, k * r, in], and what enters where the answers are predicted [n, in].

    Returns:
        the loss, and the share of tokens that are found; None where no mark says what an answer repeats.
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
    rows, marked, _, _, places, _, statements = batch.marks.unbind(1)
    documents = rows // k
    questions = first_question[documents] + statements
    answers = starts[questions] + places  # [marks] the answer token that repeats the mark's
    written = (tokens[documents] == marked[:, None]) & (chunk == (rows % k)[:, None])  # [marks, k * r]
    is_asked = written.any(1) & (places < lengths[questions])
    if not is_asked.any():
        return None
    documents, answers, written = documents[is_asked], answers[is_asked], written[is_asked]
    scores = torch.zeros(written.shape, device=tokens.device)
    for weight, (a, x) in zip(writes.weights, keys.values(), strict=True):
        of_all = (x[answers] @ a.to(x.dtype).flatten(0, 1).T).unflatten(1, (-1, k * rank))  # [marks, d, k * r]
        scores = scores + weight * of_all[torch.arange(len(answers), device=tokens.device), documents].float()
    # What says the same is no mistake.
    row = documents[:, None] * k + chunk
    said = batch.chunk_ids[row, tokens[documents].clamp_min(0)]  # [marks, k * r] the ids of the tokens written
    wanted = written.int().argmax(1)
    same = (said == said.gather(1, wanted[:, None])) & ~written
    scores = (_SHARPNESS * len(keys) * scores).masked_fill(
        same | (tokens[documents] < 0), torch.finfo(scores.dtype).min
    )
    losses = functional.cross_entropy(scores, wanted, reduction="none")
    is_first_token = places[is_asked] == 0
    weights = torch.where(
        is_first_token, 1 / is_first_token.sum().clamp_min(1), 1 / (~is_first_token).sum().clamp_min(1)
    )
    return (weights * losses).sum() / weights.sum(), (scores.argmax(1) == wanted).float().mean().item()
