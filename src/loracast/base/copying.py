"""Makes a base copy: a bias on the logits of tokens with which an answer stands in a text, where that is likely.

Several candidate texts with their probabilities raise the logits of the tokens with which they begin. Once an answer
has begun like one of them, it goes on like one of them, or ends; one that begins otherwise is left alone (as the copy
distribution of pointer-generator networks: See et al., arXiv 1704.04368, but added to logits). Whether an answer is a
copy at all, logistic regression says at its first token, from what the model and the candidates give each other's
words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_LEAST = 0.001
"""The probability at which a token gains log 2; chosen on dev (docs/notebook/2026-12-01.md)."""
APPLIES = {"theirs": 0.56, "others": -0.49, "somewhere": 0.1, "likeliest": 0.7, "bias": 1.38}
"""What decides whether copying applies: weights of `signs`, fitted on dev by benchmarks/fit_copying.py."""
_BEFORE = re.compile(r"(?:the|a|an|on|at|in|by|for|from|to)\s+", re.IGNORECASE)
"""What an answer may leave out of the text's beginning."""


class CopyBias:
    """The bias on the logits of one question's answer."""

    def __init__(self, tokenizer: Any, candidates: Iterable[tuple[str, float]], ends: Sequence[int]):
        """
        Args:
            candidates: texts with which the answer may begin, with their probabilities.
            ends: the ids of tokens that end an answer.
        """
        texts, shares = list[str](), list[float]()
        for text, probability in candidates:
            ways = _ways(text)
            texts += ways
            shares += [probability] * len(ways)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        self._paths = list(zip(ids, shares, strict=True))
        self._tokenizer, self._ends = tokenizer, list(ends)
        self._applies = True

    def bias(self, said: Sequence[int], logits: Tensor) -> Tensor | None:
        """What is added to the model's logits of the next token [vocabulary], after these tokens; None for nothing.

        At the first token it is decided whether copying applies to this answer.
        """
        shares = self.shares(said)
        if not said and shares:
            found = signs(shares, logits)
            self._applies = sum(weight * found[name] for name, weight in APPLIES.items()) > 0
        if not shares or not self._applies:
            return None
        of_tokens = {token: math.log((share + _LEAST) / _LEAST) for token, share in shares.items()}
        bias = torch.zeros(len(logits))
        if said:  # it goes on like one of the texts, or ends where a word does
            bias -= math.log((sum(shares.values()) + _LEAST) / _LEAST)
            of_tokens = {token: gain + float(bias[0]) for token, gain in of_tokens.items()}
            if not self._is_within_word(said, shares):
                bias[self._ends] = 0.0
        bias[[*of_tokens]] = torch.tensor([*of_tokens.values()])
        return bias

    def shares(self, said: Sequence[int]) -> dict[int, float]:
        """The probability of each token with which one of the texts goes on after these tokens."""
        n, said, found = len(said), list(said), dict[int, float]()
        for ids, share in self._paths:
            if len(ids) > n and ids[:n] == said:
                found[ids[n]] = found.get(ids[n], 0.0) + share
        return found

    def _is_within_word(self, said: Sequence[int], following: Iterable[int]) -> bool:
        decode = self._tokenizer.decode
        return decode(said)[-1:].isalnum() and all(decode([token])[:1].isalnum() for token in following)


def signs(shares: Mapping[int, float], logits: Tensor) -> dict[str, float]:
    """What tells whether an answer is a copy, natural logarithms of probabilities but for the constant "bias":

    - theirs, others: the model's, of its likeliest token among those of the texts, and among all others;
    - somewhere, likeliest: the candidates', that the answer is a text of the document, and of its likeliest first
      token.

    Args:
        shares: the candidates' probabilities of first tokens.
        logits: the model's, of the first token [vocabulary].
    """
    logprobs, tokens = logits.float().log_softmax(-1), torch.tensor([*shares], device=logits.device)
    theirs = logprobs[tokens].max()
    others = logprobs.index_fill(0, tokens, -math.inf).max()
    # A text may be in several forms, each with its whole probability.
    somewhere, likeliest = (math.log(min(1.0, max(1e-9, p))) for p in (sum(shares.values()), max(shares.values())))
    return {
        "theirs": theirs.item(),
        "others": others.item(),
        "somewhere": somewhere,
        "likeliest": likeliest,
        "bias": 1.0,
    }


def _ways(text: str) -> list[str]:
    """The ways to begin an answer with a text: as it is, without an article, without the first capital letter."""
    begun = _BEFORE.match(text)
    ways = [text, text[begun.end() :]] if begun else [text]
    if text[:1].isupper() and text[1:2].islower():
        ways.append(text[0].lower() + text[1:])
    return [f"{blank}{way}" for way in ways if way for blank in ("", " ")]
