"""The base as a reader of descriptions: the states of their tokens after one of its blocks, and what would make it say each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loracast.batching import pad_right
from loracast.chat import encode_text
from loracast.encoders.context import ContextEncoder, start_ids
from loracast.errors import EncoderError

if TYPE_CHECKING:
    from loracast.base import Base
    from loracast.hypernets.reading import ReadingToLoRAConfig

MAX_TOKENS = 512
_TEXTS_AT_ONCE = 25  # of about the same length, so that little is padding


class DescriptionReader:
    """Texts -> conditions of a `ReadingToLoRA`. Shares the base's weights: building one costs nothing."""

    def __init__(self, base: Base, config: ReadingToLoRAConfig):
        self.name, self.d_text = config.encoder, config.d_text
        self._base = base
        self._encoder = ContextEncoder(
            base.model,
            (config.reader_layer,),
            with_values=True,
            lead_in=config.lead_in,
            key_modules=[name for name, *_ in config.memory_modules],
            tokenizer=base.tokenizer,
        )
        self._d_state = config.d_state
        self._starts: dict[int, int] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """n texts -> for each of t tokens [n, t, d_text], fp32: its state, what makes the base begin an answer with it, for a memory what makes the base
        say it and what enters the memory's modules there, and 1 where it is real.

        Raises:
            EncoderError: a text is too long.
        """
        rows = [encode_text(self._base.tokenizer, text.strip()) for text in texts]
        if max(map(len, rows)) > MAX_TOKENS:
            raise EncoderError(
                f"a description has {max(map(len, rows))} tokens and {MAX_TOKENS} are read: say it shorter, or give it as a document"
            )
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        conditions = torch.zeros(len(rows), max(map(len, rows)), self.d_text, device=self._base.device)
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            some = order[start : start + _TEXTS_AT_ONCE]
            ids, real = pad_right([rows[i] for i in some], self._base.pad_id)
            features = self._encoder(ids.to(self._base.device))
            states, own = features.states.float().split(self._d_state, dim=-1)
            starts = start_ids(self._base.tokenizer, ids, encode_text, self._starts)  # as an answer is written
            columns = [states, self._encoder.values(starts.to(self._base.device))]
            if features.keys is not None:
                columns += [own, features.keys.float().transpose(1, 2).flatten(2)]
            conditions[some, : ids.shape[1]] = torch.cat([*columns, real[..., None].to(states)], dim=-1)
        return conditions
