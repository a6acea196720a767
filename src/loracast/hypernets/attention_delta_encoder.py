"""Attention deltas: what a task description adds to the base's own attention, layer by layer, read in one forward pass.

The base reads a system turn, the description, a dummy input and the beginning of a dummy answer. At a token after the
description, an attention head's output is a weighted mean of values; with the description masked out it is a mean of
the other values alone. The difference, through the layer's output projection, is the attention delta at that token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from loracast.base.chat import ChatFormat
from loracast.base.forward import attention_of, capture_inputs, pad_right
from loracast.base.load import Base
from loracast.documents.task_spec import Example, TaskSpec, with_description
from loracast.errors import EncoderError
from loracast.hypernets.encoders import cut
from loracast.lora.algebra import LoRABatch, inject

T = TypeVar("T")

ATTENTION_DELTA = "base:attention_delta"
"""The name of this encoder in a hypernetwork's config."""
POSITIONS = ("start", "answer", "input", "turn")
"""Positions at which attention deltas are read, and at which the LoRA made from them writes: the token that begins the
answer, the last token of the dummy answer, the input, and what the template has between input and answer."""
MAX_TOKENS = 512
_TEXTS_AT_ONCE = 25
_SHORT_TOKENS, _LONGER = 48, 1.6
"""Texts are read together whose rows are this many times as long as the shortest one's at most, so that little is
padding; rows of fewer tokens count as short, since a pass of its own costs more than their padding."""
_ANSWER_TOKENS = 16
"""Tokens of an example's answer that are read at most."""
_RECORD = "loracast_attention_delta"


@dataclass(frozen=True)
class TokenDeltas:
    """The attention deltas of a text at the tokens of an example."""

    ids: Sequence[int]
    """Token ids of the example without the text, its answer included."""
    deltas: Tensor
    """At the last p of these tokens [layers, p, d_state]."""
    n_input: int
    """How many of the p tokens stand before the one that begins the answer."""


class _Probe(NamedTuple):
    """An input and the beginning of an answer, at which a text that stands before them is read."""

    prompt: Sequence[int]
    """Token ids of the prompt of the input alone."""
    answer: Sequence[int]
    """Token ids of the answer."""


@dataclass
class _Record:
    """Says, in one forward pass, where attention deltas are read, and collects what they are made from."""

    described: Tensor
    """[n, t0 + t] bool, true at a description's tokens; t0 tokens were read before."""
    positions: Tensor
    """[n, positions, t]: weights of the tokens over which each position takes a mean."""
    before: Sequence[tuple[Tensor, Tensor]] = ()
    """Block by block, keys and values [1, heads, t0, d] of the tokens read before."""
    read: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Block by block, keys and values [n, heads, t, d]."""
    deltas: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    """Block by block, the attention module and the delta of its heads' outputs [n, positions, d_in]."""


class AttentionDeltaEncoder:
    """Descriptions -> their attention deltas at each position in each layer. It shares the base's weights.

    Outside of training, the encoder LoRA and keys and values of the tokens that begin every prompt are computed once.
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
            layers: those of the base in which attention deltas are read.
            kind: kind of the attention's output projections (`o_proj`).
            dummy_input, dummy_answer: input and beginning of an answer that stand in for real ones.
            lora: gives the encoder LoRA, which the base carries while it reads.
            is_training: whether the encoder LoRA may have changed since the last call.
        """
        self.name = ATTENTION_DELTA
        self.base, self._layers, self._kind = base, tuple(layers), kind
        self._lora, self._is_training = lora, is_training
        self._d_state = int(base.model.config.get_text_config().hidden_size)
        self.d_text = len(POSITIONS) * len(self._layers) * self._d_state
        self._dummy_input = dummy_input
        self._dummy = _Probe(base.chat.prompt(dummy_input, ""), base.chat.reply(dummy_answer)[:-1])
        self._n_before, self._n_after = tokens_around_input(base.chat)
        self._shared = self._dummy.prompt[: self._n_before]
        """The tokens that begin every prompt."""
        self._decoder = cut(base.model.get_decoder(), max(self._layers) + 1)
        self._kept: dict[str, Any] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """n texts -> their attention deltas at each position in each layer [n, d_text], fp32.

        They are differentiable in the encoder LoRA. Raises EncoderError for a text that is too long.
        """
        rows = [self._described(text) for text in texts]
        if (longest := max(end for _, end, _ in rows) - self._n_before) > MAX_TOKENS:
            raise EncoderError(
                f"a description has {longest} tokens and {MAX_TOKENS} are read: shorten it, or give it as a document"
            )
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        conditions = torch.zeros(len(rows), self.d_text, device=self.base.device)
        while order:
            most = _LONGER * max(_SHORT_TOKENS, len(rows[order[0]][0]))
            n = sum(len(rows[i][0]) <= most for i in order[:_TEXTS_AT_ONCE])
            some, order = order[:n], order[n:]
            conditions[some] = self._read([rows[i] for i in some])
        return conditions

    def fits(self, text: str) -> bool:
        """Whether the text is short enough to be read."""
        return self._described(text)[1] - self._n_before <= MAX_TOKENS

    def at_example(self, text: str, example: Example) -> TokenDeltas:
        """The attention deltas of a text at each token of an example that stands behind it, with its answer."""
        probe = self._probe_of(example)
        with inject(self.base.model, self._once("lora", lambda: self._lora().to(self.base.model.dtype))):
            return self._at_each_token(self.base.chat.prompt(with_description(text.strip(), example.input), ""), probe)

    def after_turns(self, spec: TaskSpec, example: Example) -> TokenDeltas:
        """As `at_example`, of a conversation whose earlier turns are examples, in the base without a LoRA."""
        prompt = self.base.chat.conversation(spec.conversation(example.input))
        return self._at_each_token(prompt, self._probe_of(example))

    def _probe_of(self, example: Example) -> _Probe:
        chat = self.base.chat
        return _Probe(chat.prompt(example.input, ""), chat.reply(example.outputs[0])[:-1][:_ANSWER_TOKENS])

    def _at_each_token(self, prompt: list[int], probe: _Probe) -> TokenDeltas:
        """The attention deltas, at each token of a probe, of what a prompt has before it."""
        row, end, n_prompt = self._row(prompt, probe)
        is_read = torch.zeros(1, len(row), dtype=torch.bool)
        is_read[0, self._n_before : end] = True
        record = self._run(torch.tensor([row]), _Record(is_read, torch.eye(len(row))[None, end:]))
        deltas = self._projected(record.deltas)
        return TokenDeltas([*probe.prompt, *probe.answer], deltas[0].transpose(0, 1), n_prompt - 1 - end)

    def module_inputs(self, names: Sequence[str], ids: Sequence[int], lora: LoRABatch) -> dict[str, Tensor]:
        """Inputs of modules, by name [t, d_in], where the base carries a LoRA and reads t tokens, fp32."""
        base = self.base
        with inject(base.model, lora.to(base.device).to(base.model.dtype)), capture_inputs(base.model, names) as found:
            self._decoder(input_ids=torch.tensor([[*ids]], device=base.device), use_cache=False)
        return {name: found[name][0].to(base.device).float() for name in names}

    def _described(self, text: str) -> tuple[list[int], int, int]:
        """The row of a text before the dummy input."""
        prompt = self.base.chat.prompt(with_description(text.strip(), self._dummy_input), "")
        return self._row(prompt, self._dummy)

    def _row(self, prompt: list[int], probe: _Probe) -> tuple[list[int], int, int]:
        """Token ids of prompt and answer, the end of what stands before the input, and the length of the prompt."""
        # The end that both prompts share; the input's first token may change after a text.
        end = len(prompt) - min(_common(prompt[::-1], probe.prompt[::-1]), len(probe.prompt) - self._n_before)
        return [*prompt, *probe.answer], end, len(prompt)

    def _read(self, rows: Sequence[tuple[list[int], int, int]]) -> Tensor:
        """Rows of `_described` -> attention deltas [n, d_text]."""
        n_shared = self._n_before if all(row[: self._n_before] == self._shared for row, _, _ in rows) else 0
        ids, _ = pad_right([row[n_shared:] for row, _, _ in rows], self.base.pad_id)
        n, t = ids.shape
        described = torch.zeros(n, n_shared + t, dtype=torch.bool)
        positions = torch.zeros(n, len(POSITIONS), n_shared + t)
        for i, (row, end, n_prompt) in enumerate(rows):
            described[i, self._n_before : end] = True
            turn = n_prompt - self._n_after
            spans = ((n_prompt - 1, n_prompt), (len(row) - 1, len(row)), (end, turn), (turn, n_prompt - 1))
            for k, (first, last) in enumerate(spans):  # in the order of POSITIONS
                positions[i, k, first:last] = 1 / max(1, last - first)
        with inject(self.base.model, self._once("lora", lambda: self._lora().to(self.base.model.dtype))):
            before = self._once("before", self._read_before) if n_shared else ()
            record = _Record(described, positions[:, :, n_shared:], before)
            return self._projected(self._run(ids, record).deltas).flatten(1)

    def _once(self, key: str, make: Callable[[], T]) -> T:
        """The result of `make`, computed once while the hypernetwork is not in training."""
        if self._is_training():
            self._kept.clear()
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _read_before(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Keys and values of the tokens that begin every prompt, block by block."""
        n = self._n_before
        nothing = _Record(torch.zeros(1, n, dtype=torch.bool), torch.zeros(1, len(POSITIONS), n))
        return self._run(torch.tensor([self._shared]), nothing).read

    def _run(self, ids: Tensor, record: _Record) -> _Record:
        """Let the base read ids [n, t] after the tokens that the record has from before, and fill the record."""
        from transformers import AttentionInterface

        AttentionInterface.register(_RECORD, _recording_attention)
        base, n_before = self.base, record.described.shape[1] - ids.shape[1]
        record.described, record.positions = record.described.to(base.device), record.positions.to(base.device)
        at = torch.arange(n_before, record.described.shape[1], device=base.device)[None]
        with attention_of(base.model.get_decoder().config, _RECORD):
            self._decoder(input_ids=ids.to(base.device), position_ids=at, use_cache=False, **{_RECORD: record})
        return record

    def _projected(self, deltas: Sequence[tuple[nn.Module, Tensor]]) -> Tensor:
        """Deltas of the heads' outputs, by block -> attention deltas [n, positions, layers, d_state].

        The delta of a block that is not in `layers` is added to that of the next block that is.
        """
        layers = set(self._layers)
        attention_deltas: list[Tensor] = []
        waiting: Tensor | float = 0.0
        for layer, (attention, x) in enumerate(deltas):
            projection = getattr(attention, self._kind)
            projected: Tensor = projection(x.to(self.base.model.dtype))  # its weight may be quantized
            if getattr(projection, "bias", None) is not None:
                projected = projected - projection.bias
            waiting = projected.float() + waiting
            if layer in layers:
                attention_deltas.append(waiting)
                waiting = 0.0
        return torch.stack(attention_deltas, dim=2)


def tokens_around_input(chat: ChatFormat) -> tuple[int, int]:
    """Number of tokens in a prompt before the user's input and after it, the template's last token included."""
    one, other = chat.prompt("a", ""), chat.prompt("0", "")
    return _common(one, other), _common(one[::-1], other[::-1])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _recording_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention [n, heads, t, d] -> [n, t, heads, d], which fills the `_Record` among its options.

    Rows are padded on the right, so no mask is needed.
    """
    record: _Record = options[_RECORD]
    record.read.append((key, value))
    if record.before:
        n, block = len(key), len(record.deltas)
        earlier = (side.expand(n, -1, -1, -1) for side in record.before[block])
        key, value = (torch.cat(pair, dim=2) for pair in zip(earlier, (key, value), strict=True))
    (n, n_heads, t, _), (_, n_shared, t_all, _) = query.shape, key.shape
    key, value = key.float(), value.float()

    def of_each_head(rows: Tensor, shared: Tensor) -> Tensor:
        """[n, heads, r, x] @ [n, key-value heads, x, y], each shared by a group of heads -> [n, heads, r, y]."""
        return (rows.reshape(n, n_shared, -1, rows.shape[-1]) @ shared).view(n, n_heads, rows.shape[2], -1)

    scores = of_each_head(query.float() * options["scaling"], key.transpose(2, 3))
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    later = torch.full((t, t_all), float("-inf"), device=scores.device).triu(1 + t_all - t)
    weights = (scores + later).softmax(-1)  # [n, heads, t, t_all]
    # With the description masked out, the weights of the other tokens are rescaled to sum to 1.
    others = (~record.described).float()[:, None, :, None]  # [n, 1, t_all, 1]
    on_others = (weights @ others).clamp_min(torch.finfo(weights.dtype).tiny).transpose(2, 3)  # [n, heads, 1, t]
    positions = record.positions[:, None]
    change = positions @ weights - ((positions / on_others) @ weights) * others.transpose(2, 3)  # [n, heads, p, t_all]
    record.deltas.append((module, of_each_head(change, value).transpose(1, 2).flatten(2)))
    return of_each_head(weights, value).transpose(1, 2).to(query.dtype), None
