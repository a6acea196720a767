"""A teacher's distributions, kept compactly, and how far a student is from them.

Of each distribution the k likeliest tokens are kept (arXiv 2602.15902 keeps 16): some 100 bytes a token in place of the vocabulary's 200 kB.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

TOP_K = 16


class SoftTargets(NamedTuple):
    """What a teacher finds likeliest at each of t tokens."""

    ids: Tensor  # [t, k] int32
    log_probs: Tensor  # [t, k] float16


def soften(logits: Tensor, k: int = TOP_K) -> SoftTargets:
    """The k likeliest tokens of distributions over a vocabulary, from their logits [n, vocabulary]."""
    log_probs, ids = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return SoftTargets(ids.int().cpu(), log_probs.half().cpu())


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """How far a student is from its teacher on the tokens that the teacher finds likely: sum of p (log p - log q) over them [n].

    It is the Kullback-Leibler divergence but for what the teacher gives to all other tokens, and never below minus that.

    Args:
        logits: the student's [n, vocabulary]; it is normalised over the whole vocabulary.
        ids, log_probs: the teacher's likeliest tokens [n, k].
    """
    student = logits.float().log_softmax(-1).gather(1, ids.long())  # [n, k]
    teacher = log_probs.float()
    return (teacher.exp() * (teacher - student)).sum(-1)
