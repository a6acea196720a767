"""Routing by sentence in training: each question's tokens see the memory's rows weighed as they are when one asks."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from loracast.documents import Chunk
from loracast.library.index import write_index
from loracast.library.routing import sentence_weights
from loracast.scoring.episodes import Batch


def weights_of(prompts: Sequence[str], questions: Sequence[str]) -> list[tuple[float, ...]]:
    """For each question the weights of a document's sentences; empty where no word of the question matches."""
    index = sqlite3.connect(":memory:")
    try:
        write_index(index, [Chunk(prompt, 0, len(prompt), heading="", n_tokens=0) for prompt in prompts])
        return [tuple(sentence_weights(index, question) or ()) for question in questions]
    finally:
        index.close()


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
