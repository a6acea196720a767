"""Generation: the base answers prompts, each with a LoRA of its own or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from queue import SimpleQueue
from threading import Event
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from loracast.base.copying import CopyBias
from loracast.base.load import Base
from loracast.errors import LoracastError, PromptTooLong
from loracast.lora.algebra import LoRA, inject

_LEAST_TEMPERATURE = 1e-5
OnText = Callable[[str], None]
"""Receives each piece of an answer's text as it is generated."""
T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, under the names of transformers' `generate`; the default is greedy."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0  # 0 takes the likeliest token; above 0, tokens are sampled
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    seed: int | None = None  # of the sampling; None for another answer each time
    top_k: int = 0  # sample from so many likeliest tokens; 0 for all
    repetition_penalty: float | None = None  # above 1, tokens that occurred become less likely; None: the base's own
    no_repeat_ngram_size: int | None = None  # no sequence of so many tokens occurs twice; None: the base's own rule

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken: also at a temperature by which logits cannot be divided any more."""
        return self.temperature < _LEAST_TEMPERATURE

    @property
    def options(self) -> dict[str, Any]:
        """How tokens are chosen, as transformers' `generate` takes it."""
        options: dict[str, Any] = {"do_sample": not self.is_greedy}
        if not self.is_greedy:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        rules = {"repetition_penalty": self.repetition_penalty, "no_repeat_ngram_size": self.no_repeat_ngram_size}
        return options | {name: value for name, value in rules.items() if value is not None}


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost."""

    text: str
    n_prompt_tokens: int
    n_tokens: int
    first_token_s: float
    """Of a batch, the time in which all of its answers had their first token."""
    total_s: float
    finished: bool
    """False where the answer was cut at max_new_tokens."""


class AnswerText:
    """The text of one answer, as its tokens come in.

    Held back are bytes of an incomplete character, what may be the beginning of a stop string, and whitespace that may
    be the answer's last. All pieces together are the whole text, cut before the first stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), strips: bool = True):
        """
        Args:
            strips: leave out whitespace before and after the answer.
        """
        self._tokenizer, self._stop, self._strips = tokenizer, stop, strips
        self._ids: list[int] = []
        self._n_decoded = 0  # ids whose text is in `_waiting` or was given
        self._n_context = 0  # ids before these no longer change what follows them
        self._waiting = ""
        self._has_begun = False

    def add(self, token: int) -> tuple[str, bool]:
        """The text that may be shown after one more token, and whether a stop string has ended the answer."""
        self._ids.append(token)
        new = self._new()
        if new.endswith("\ufffd"):
            return "", False
        self._n_context, self._n_decoded = self._n_decoded, len(self._ids)
        return self._show(new)

    def rest(self) -> str:
        """The text that is still held back when the answer ends."""
        piece, _ = self._show(self._new())
        return piece + (self._waiting.rstrip() if self._strips else self._waiting)

    def _new(self) -> str:
        """The text of the tokens after those that were decoded."""
        decode = partial(self._tokenizer.decode, skip_special_tokens=True)
        context = decode(self._ids[self._n_context : self._n_decoded])
        return decode(self._ids[self._n_context :])[len(context) :]

    def _show(self, new: str) -> tuple[str, bool]:
        self._waiting += new
        if self._strips and not self._has_begun:
            self._waiting = self._waiting.lstrip()
        self._has_begun = self._has_begun or bool(self._waiting)
        found = [at for text in self._stop if (at := self._waiting.find(text)) >= 0]
        if found:
            piece, self._waiting = self._waiting[: min(found)], ""
            return piece.rstrip() if self._strips else piece, True
        n_held = max((_overlap(self._waiting, text) for text in self._stop), default=0)
        shown = self._waiting[: len(self._waiting) - n_held]
        if self._strips:
            shown = shown.rstrip()
        self._waiting = self._waiting[len(shown) :]
        return shown, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _Streamer:
    """Receives token ids from transformers' generate: the prompt first, then each new token."""

    def __init__(self, base: Base, on_text: OnText):
        self.base, self.on_text = base, on_text
        self._text = AnswerText(base.tokenizer)
        self._is_prompt = True

    def put(self, ids: torch.Tensor) -> None:
        for id in [] if self._is_prompt else ids.flatten().tolist():
            if id not in self.base.end_ids:
                self.on_text(self._text.add(id)[0])
        self._is_prompt = False

    def end(self) -> None:
        self.on_text(self._text.rest())


def answers(
    base: Base,
    prompts: Sequence[Sequence[int]],
    loras: Sequence[LoRA | None],
    sampling: Sampling = Sampling(),
    copy_biases: Sequence[CopyBias | None] | None = None,
    on_text: OnText | None = None,
) -> list[Answer]:
    """Answer several prompts in one batch, each with a LoRA of its own or none, and what it may copy or nothing.

    Args:
        on_text: receives each piece of text as it is generated; for one prompt alone.
    """
    if not prompts:
        return []
    started = time.perf_counter()
    streamer = None if on_text is None else _Streamer(base, on_text)
    rows, began = _generate(base, prompts, loras, sampling, copy_biases or [None] * len(prompts), streamer)
    total_s = time.perf_counter() - started
    given = []
    for prompt, ids in zip(prompts, rows, strict=True):
        said = list(takewhile(lambda i: i not in base.end_ids, ids))
        text = base.tokenizer.decode(said, skip_special_tokens=True).strip()
        figures = (len(prompt), len(said), began - started, total_s)
        given.append(Answer(text, *figures, len(said) < len(ids)))
    return given


def pieces(base: Base, run: Callable[[OnText], T]) -> Generator[str, None, T]:
    """Yield the pieces of an answer as another thread generates them; the generator's value is what `run` returns.

    Closing the generator stops the generation.

    Args:
        run: generates with the base and hands on each piece of text.
    """
    if base.lock.is_owned():  # the generating thread would wait for ever
        raise LoracastError("this thread applies a LoRA to the base: stream outside of that block, or call answer")
    generated: SimpleQueue[str | None] = SimpleQueue()
    is_closed = Event()

    def keep(piece: str) -> None:
        if is_closed.is_set():
            raise GeneratorExit
        if piece:
            generated.put(piece)

    with ThreadPoolExecutor(1) as pool:
        given = pool.submit(run, keep)
        given.add_done_callback(lambda done: generated.put(None))
        try:
            yield from iter(generated.get, None)
        finally:
            is_closed.set()
    return given.result()


@torch.no_grad()
def _generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    loras: Sequence[LoRA | None],
    sampling: Sampling,
    copy_biases: Sequence[CopyBias | None],
    streamer: _Streamer | None,
) -> tuple[list[list[int]], float]:
    """New token ids for each prompt, and the time at which all prompts had their first token."""
    longest = max(len(prompt) for prompt in prompts)
    if longest + sampling.max_new_tokens > base.window:
        raise PromptTooLong(
            f"the prompt has {longest} tokens, and the base's window {base.window}: learn the long text as a document, "
            "or ask for a shorter answer (--max-tokens)"
        )
    left = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = left([torch.tensor(prompt, dtype=torch.long) for prompt in prompts], padding_value=base.pad_id).to(
        base.device
    )
    mask = left([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts]).to(base.device)
    last_logits: list[torch.Tensor] = []
    times: list[float] = []

    def keep(model: object, args: object, output: Any) -> None:
        last_logits[:] = [output.logits[:, -1].float()]  # [n, vocabulary], before any rule of the sampling

    def copy(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, copy_bias in enumerate(copy_biases):
            if copy_bias and (bias := copy_bias.bias(ids[row, longest:].tolist(), last_logits[0][row])) is not None:
                scores[row] += bias.to(scores)
        return scores

    def count(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    from transformers import LogitsProcessorList, StoppingCriteriaList

    with inject(base.model, list(loras)), base.model.register_forward_hook(keep):
        if not sampling.is_greedy and sampling.seed is not None:
            torch.manual_seed(sampling.seed)  # while no other thread generates
        out = base.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens or None,
            eos_token_id=list(base.end_ids),
            pad_token_id=base.pad_id,
            streamer=streamer,
            logits_processor=LogitsProcessorList([copy] if any(copy_biases) else []),
            stopping_criteria=StoppingCriteriaList([count]),
            **sampling.options,
        )
    return out[:, longest:].tolist(), times[0]
