"""Chooses the next token of one row from its logits, by the rules of `Sampling`, with a random state of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loracast.base.generate import Sampling
from loracast.base.load import Base


class Sampler:
    """The rules of one request, applied in the order of transformers' `generate`."""

    def __init__(self, base: Base, sampling: Sampling, prompt: Sequence[int]):
        from transformers import (
            LogitsProcessorList,
            MinNewTokensLengthLogitsProcessor,
            NoRepeatNGramLogitsProcessor,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        defaults, device = base.model.generation_config, str(base.device)
        penalty = _first(sampling.repetition_penalty, defaults.repetition_penalty, 1.0)
        n_gram = int(_first(sampling.no_repeat_ngram_size, defaults.no_repeat_ngram_size, 0))
        rules = LogitsProcessorList()
        if penalty != 1.0:
            rules.append(RepetitionPenaltyLogitsProcessor(penalty))
        if n_gram:
            rules.append(NoRepeatNGramLogitsProcessor(n_gram))
        if sampling.min_new_tokens:
            ends = list(base.end_ids)
            rules.append(MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_new_tokens, ends, device))
        drawing = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if not sampling.is_greedy:
            if sampling.temperature != 1:
                drawing.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                drawing.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                drawing.append(TopPLogitsWarper(sampling.top_p))
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
        self._rules, self._drawing = rules, drawing
        self.takes_likeliest = not rules and self._generator is None
        """Whether the token is that of the highest logit: no rule changes the logits, and nothing is drawn."""

    def choose(self, logits: Tensor, ids: Sequence[int], bonus: Tensor | None = None) -> int:
        """The next token from logits [vocabulary], after the token ids of the prompt and of the answer so far.

        Args:
            bonus: what is added to the logits of the likeliest answers [vocabulary] (base/copying.py).
        """
        so_far = torch.tensor([ids], device=logits.device) if self._rules or self._drawing else None
        if self._rules:
            logits = self._rules(so_far, logits[None].float().clone())[0]  # type: ignore[arg-type]
        if bonus is not None:
            logits = logits + bonus.to(logits)
        if self._drawing:
            logits = self._drawing(so_far, logits[None].float().clone())[0]  # type: ignore[arg-type]
        if self._generator is None:
            return int(logits.argmax())
        return int(torch.multinomial(logits.float().softmax(-1), 1, generator=self._generator))


def _first(*values: float | int | None) -> float | int:
    return next(value for value in values if value is not None)


def top_logprobs(logits: Tensor, chosen: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The logprob of the chosen token and the n likeliest tokens with theirs, from logits [vocabulary]."""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(n, len(logprobs)))
    return logprobs[chosen].item(), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
