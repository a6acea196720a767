"""Generation: the base answers prompts, each with a LoRA of its own or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from loracast.base.load import Base
from loracast.errors import BaseModelError
from loracast.lora.algebra import LoRA
from loracast.lora.inject import inject


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0  # 0 takes the likeliest token; above 0, tokens are sampled
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    seed: int | None = None  # of the sampling; None for another answer each time


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost."""

    text: str
    n_prompt_tokens: int
    n_tokens: int
    first_token_s: float
    total_s: float
    finished: bool
    """False where the answer was cut at max_new_tokens."""


class _Streamer:
    """Receives token ids from transformers' generate: the prompt first, then each new token."""

    def __init__(self, base: Base, on_text: Callable[[str], None]):
        self.base, self.on_text = base, on_text
        self.ids: list[int] = []
        self.shown = ""
        self.first_token_at: float | None = None
        self._is_prompt = True

    def put(self, ids: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.first_token_at = self.first_token_at or time.perf_counter()
        self.ids += [i for i in ids.flatten().tolist() if i not in self.base.end_ids]
        text = self.base.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        if not text.endswith("\ufffd"):  # a character whose bytes are still incomplete waits for the next token
            self.on_text(text[len(self.shown) :])
            self.shown = text

    def end(self) -> None:
        pass


def answer(
    base: Base,
    prompt: Sequence[int],
    lora: LoRA | None = None,
    sampling: Sampling = Sampling(),
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Answer one prompt of token ids; `on_text` receives each piece of text as it is generated."""
    streamer = _Streamer(base, on_text)
    started = time.perf_counter()
    ids = _generate(base, [prompt], [lora], sampling, streamer)[0]
    ended = time.perf_counter()
    finished = any(i in base.end_ids for i in ids)
    ids = _until(ids, base.end_ids)
    text = base.tokenizer.decode(ids, skip_special_tokens=True)
    first_token_s = (streamer.first_token_at or ended) - started
    return Answer(text.strip(), len(prompt), len(ids), first_token_s, ended - started, finished)


def answer_batch(
    base: Base, prompts: Sequence[Sequence[int]], loras: Sequence[LoRA | None], sampling: Sampling = Sampling()
) -> list[str]:
    """Answer several prompts in one batch, each with a LoRA of its own or none."""
    rows = _generate(base, prompts, loras, sampling, None)
    return [base.tokenizer.decode(_until(row, base.end_ids), skip_special_tokens=True).strip() for row in rows]


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first one that ends an answer."""
    return list(takewhile(lambda i: i not in ends, ids))


@torch.no_grad()
def _generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    loras: Sequence[LoRA | None],
    sampling: Sampling,
    streamer: _Streamer | None,
) -> list[list[int]]:
    """New token ids for each prompt. Prompts are padded on the left, where the mask hides the padding."""
    longest = max(len(prompt) for prompt in prompts)
    if longest + sampling.max_new_tokens > base.window:
        raise BaseModelError(
            f"the prompt has {longest} tokens and the base's window holds {base.window}; learn the long text as a "
            "document, or ask for a shorter answer (--max-tokens)"
        )
    ids = torch.full((len(prompts), longest), base.pad_id, device=base.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=base.device)
        mask[row, longest - len(prompt) :] = 1
    options: dict[str, object] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
    with inject(base.model, list(loras)):
        out = base.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens or None,
            eos_token_id=list(base.end_ids),
            pad_token_id=base.pad_id,
            streamer=streamer,
            **options,
        )
    return out[:, longest:].tolist()
