"""Keep a teacher's distributions compactly, and measure a student's divergence from them.

Of each distribution the k likeliest tokens are kept (arXiv 2602.15902 keeps 16): about 100 bytes a token instead of 200
kB.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

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
