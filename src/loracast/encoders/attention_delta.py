"""What a description adds to the base's own attention, layer by layer: read in one forward pass, with the description in the window.

    system turn, [description], an input that stands for any, the beginning of an answer that stands for any

At a token after the description, an attention head's output is a mean of values; with the description hidden it is another mean, of the rest. The
difference, through the layer's output projection, is the description's attention delta there. What all texts begin with is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from loracast.batching import pad_right
from loracast.data.tasks import with_description
from loracast.encoders.hidden_states import cut
from loracast.errors import EncoderError
from loracast.lora.algebra import LoRABatch
from loracast.lora.inject import inject

if TYPE_CHECKING:
    from loracast.base.chat import ChatFormat
    from loracast.base.load import Base

T = TypeVar("T")

ATTENTION_DELTA = "base:attention_delta"
"""The name of this encoder in a hypernetwork's config."""
POSITIONS = ("start", "answer", "input", "turn")
"""Positions at which attention deltas are read, and at which the LoRA made from them writes: where the answer begins, after its
beginning, in the input, and in what the template has between the input and the answer."""
MAX_TOKENS = 512
_TEXTS_AT_ONCE = 25  # of about the same length, so that little is padding
_WATCHED = "loracast_watched"


@dataclass
class _Watch:
    """What is looked at in one forward pass, and what is seen."""

    described: Tensor
    """[n, t0 + t] bool, true at a description's tokens; t0 tokens were read before."""
    places: Tensor
    """[n, places, t]: the tokens that a place is the mean of, as weights."""
    before: Sequence[tuple[Tensor, Tensor]] = ()
    """Block by block, keys and values [1, heads, t0, d] of what was read before."""
    read: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Block by block, keys and values [n, heads, t, d]."""
    seen: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    """The attention of each block, and what less would enter its output projection without the description [n, places, d_in]."""


class AttentionDeltaEncoder:
    """Descriptions -> their attention deltas at each position in each layer. Shares the base's weights.

    Outside of training, the encoder LoRA and the keys and values of what all prompts begin with are computed once.
    """

    def __init__(
        self,
        base: Base,
        layers: Sequence[int],
        kind: str,
        dummy_input: str,
        dummy_answer: str,
        lora: Callable[[], LoRABatch],
        is_training: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
            layers: of the base, in which attention deltas are read.
            kind: the modules through which attention writes (`o_proj`).
            dummy_input, dummy_answer: input and beginning of an answer that stand in for real ones while a description is read.
            lora: gives the encoder LoRA, which the base carries while it reads.
            is_training: whether the encoder LoRA may have changed since the last call.
        """
        self.name = ATTENTION_DELTA
        self._base, self._layers, self._kind = base, tuple(layers), kind
        self._lora, self._is_training = lora, is_training
        self._d_state = int(base.model.config.get_text_config().hidden_size)
        self.d_text = len(POSITIONS) * len(self._layers) * self._d_state
        self._dummy_input = dummy_input
        self._plain = base.chat.prompt(dummy_input, "")
        """The dummy input as it is asked without a description."""
        self._answer = base.chat.reply(dummy_answer)[:-1]
        self._n_before, self._n_after = tokens_around_input(base.chat)
        self._decoder = cut(base.model.get_decoder(), max(self._layers) + 1)
        self._kept: dict[str, Any] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """n texts -> their attention deltas at each place in each layer, [n, d_text], fp32; differentiable in the LoRA with which the base reads.

        Raises:
            EncoderError: a text is too long.
        """
        rows = [self._row(text.strip()) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        conditions = torch.zeros(len(rows), self.d_text, device=self._base.device)
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            some = order[start : start + _TEXTS_AT_ONCE]
            conditions[some] = self._read([rows[i] for i in some])
        return conditions

    def _row(self, description: str) -> tuple[list[int], int, int]:
        """Token ids, where the description ends in them, and how many of them the prompt has."""
        prompt = self._base.chat.prompt(with_description(description, self._dummy_input), "")
        # The dummy input and what follows it, but that after a description its first token may be another one.
        n_told = len(self._plain) - self._n_before
        end = len(prompt) - min(_common(prompt[::-1], self._plain[::-1]), n_told)
        if end - self._n_before > MAX_TOKENS:
            raise EncoderError(
                f"a description has {end - self._n_before} tokens and {MAX_TOKENS} are read: say it shorter, or give it as a document"
            )
        return [*prompt, *self._answer], end, len(prompt)

    def _read(self, rows: Sequence[tuple[list[int], int, int]]) -> Tensor:
        n_shared = self._n_before if all(row[: self._n_before] == self._shared for row, _, _ in rows) else 0
        ids, _ = pad_right([row[n_shared:] for row, _, _ in rows], self._base.pad_id)
        n, t = ids.shape
        described, places = torch.zeros(n, n_shared + t, dtype=torch.bool), torch.zeros(n, len(POSITIONS), n_shared + t)
        for i, (row, end, n_prompt) in enumerate(rows):
            described[i, self._n_before : end] = True
            places[i, POSITIONS.index("start"), n_prompt - 1] = 1
            places[i, POSITIONS.index("answer"), len(row) - 1] = 1
            for place, first, last in (
                ("input", end, n_prompt - self._n_after),
                ("turn", n_prompt - self._n_after, n_prompt - 1),
            ):
                places[i, POSITIONS.index(place), first:last] = 1 / max(1, last - first)
        with inject(self._base.model, self._once("reading", self._reads_with)):
            before = self._once("beginning", self._read_before) if n_shared else ()
            watch = _Watch(described, places[:, :, n_shared:], before)
            return self._written(self._watched(ids, watch).seen).flatten(1)

    def _once(self, what: str, make: Callable[[], T]) -> T:
        """What is made, and is made once while the hypernetwork is not in training."""
        if self._is_training():
            self._kept.clear()
            return make()
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]

    def _reads_with(self) -> LoRABatch:
        """The LoRA that the base carries while it reads, in the base's type."""
        return self._lora().to(self._base.model.dtype)

    @property
    def _shared(self) -> list[int]:
        """The tokens that prompts have before what the user says."""
        return self._plain[: self._n_before]

    def _read_before(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Keys and values of these tokens, block by block."""
        n = self._n_before
        nothing = _Watch(torch.zeros(1, n, dtype=torch.bool), torch.zeros(1, len(POSITIONS), n))
        return self._watched(torch.tensor([self._shared]), nothing).read

    def _watched(self, ids: Tensor, watch: _Watch) -> _Watch:
        """Let the base read ids [n, t] after what was read before; the watch has seen it then."""
        base, n_before = self._base, watch.described.shape[1] - ids.shape[1]
        watch.described, watch.places = watch.described.to(base.device), watch.places.to(base.device)
        positions = torch.arange(n_before, watch.described.shape[1], device=base.device)[None]
        with _watching(base.model.get_decoder()):
            self._decoder(input_ids=ids.to(base.device), position_ids=positions, use_cache=False, **{_WATCHED: watch})
        return watch

    def _written(self, seen: Sequence[tuple[nn.Module, Tensor]]) -> Tensor:
        """What would enter output projections -> attention deltas [n, places, layers, d_state]; of a block that is no target, to the next that is one."""
        layers = set(self._layers)
        attention_deltas: list[Tensor] = []
        waiting: Tensor | float = 0.0
        for layer, (attention, x) in enumerate(seen):
            projection = getattr(attention, self._kind)
            waiting = _linear_part(projection, x.to(projection.weight.dtype)).float() + waiting
            if layer in layers:
                attention_deltas.append(waiting)
                waiting = 0.0
        return torch.stack(attention_deltas, dim=2)


def tokens_around_input(chat: ChatFormat) -> tuple[int, int]:
    """How many tokens a prompt has before what the user says, and after it, the one included from which the answer begins."""
    one, other = chat.prompt("a", ""), chat.prompt("0", "")
    return _common(one, other), _common(one[::-1], other[::-1])


def _linear_part(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of x, without its bias."""
    bias = getattr(module, "bias", None)
    return module(x) if bias is None else module(x) - bias


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@contextmanager
def _watching(decoder: Any) -> Iterator[None]:
    """Attention that tells a `_Watch` in its arguments what the described tokens contribute."""
    from transformers import AttentionInterface

    AttentionInterface.register(_WATCHED, _watched_attention)
    usual = decoder.config._attn_implementation
    decoder.config._attn_implementation = _WATCHED
    try:
        yield
    finally:
        decoder.config._attn_implementation = usual


def _watched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention [n, heads, t, d] -> [n, t, heads, d]; rows are padded on the right, where nobody looks."""
    watch: _Watch = options[_WATCHED]
    watch.read.append((key, value))
    if watch.before:
        n, block = len(key), len(watch.seen)
        earlier = (side.expand(n, -1, -1, -1) for side in watch.before[block])
        key, value = (torch.cat(pair, dim=2) for pair in zip(earlier, (key, value), strict=True))
    (n, n_heads, t, _), (_, n_shared, t_all, _) = query.shape, key.shape
    key, value = key.float(), value.float()

    def of_each_head(rows: Tensor, shared: Tensor) -> Tensor:
        """[n, heads, r, x] @ what several heads share [n, shared heads, x, y] -> [n, heads, r, y]."""
        return (rows.reshape(n, n_shared, -1, rows.shape[-1]) @ shared).view(n, n_heads, rows.shape[2], -1)

    scores = of_each_head(query.float() * options["scaling"], key.transpose(2, 3))
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    later = torch.full((t, t_all), float("-inf"), device=scores.device).triu(1 + t_all - t)
    weights = (scores + later).softmax(-1)  # [n, heads, t, t_all]
    # Without the description, a token's weights are those of the others, over their sum.
    others = (~watch.described).float()[:, None, :, None]  # [n, 1, t_all, 1]
    on_others = (weights @ others).clamp_min(torch.finfo(weights.dtype).tiny).transpose(2, 3)  # [n, heads, 1, t]
    places = watch.places[:, None]
    less = places @ weights - ((places / on_others) @ weights) * others.transpose(2, 3)  # [n, heads, places, t_all]
    watch.seen.append((module, of_each_head(less, value).transpose(1, 2).flatten(2)))
    return of_each_head(weights, value).transpose(1, 2).to(query.dtype), None
