"""Forward passes of a base: padded batches, captured inputs, a second tree of modules, and the loss of answers.

Questions of one row are a small tree: the prompts' common prefix once (a system turn, say), then every question with
its answer as a branch. A branch attends to the prefix and itself, and its positions continue from the prefix. So each
branch computes exactly what a row of its own would, at a fraction of the tokens, and a LoRA meets all its questions in
one matmul.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from loracast.base.chat import encode_text
from loracast.lora.algebra import LoRABatch, inject

if TYPE_CHECKING:
    from loracast.base.load import Base

Schedule = Literal["cosine", "constant"]
TokenIds = Sequence[int]
Module = TypeVar("Module", bound=nn.Module)

TOKENS_PER_BATCH = 1024
"""Tokens encoded at once on a CPU: as quick as 4,096 there, and whoever generates meanwhile waits for less. Other
devices take four times as many.
"""


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids [n, longest] and a bool mask [n, longest] that is true where they are real."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return ids, pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)


def token_batches(base: Base, texts: Sequence[str]) -> Iterator[list[list[int]]]:
    """Token ids of texts, in order, in batches of at most TOKENS_PER_BATCH, padding included."""
    most = TOKENS_PER_BATCH * (1 if base.device.type == "cpu" else 4)
    batch: list[list[int]] = []
    for i, text in enumerate(texts):
        batch.append(encode_text(base.tokenizer, text))
        is_full = max(len(ids) for ids in batch) * (len(batch) + 1) > most
        if is_full or i == len(texts) - 1:
            yield batch
            batch = []


@contextmanager
def capture_inputs(model: Any, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that each forward pass inside the block fills: module name -> first input of that module."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda module, given: inputs.update({name: given[0]})

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(keep(name)))
        yield inputs


@contextmanager
def attention_of(config: Any, implementation: str) -> Iterator[None]:
    """Have a base with this config use another implementation of attention, by its name in transformers."""
    usual = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = usual


def twin(module: Module) -> Module:
    """The same module with the same parameters and buffers, and without any hook.

    A module that accelerate spreads over devices is given back itself: its `forward` belongs to its own tree.
    """
    return module if any(hasattr(part, "_hf_hook") for part in module.modules()) else _twin(module)


def _twin(module: Module) -> Module:
    made = copy.copy(module)
    for name, value in vars(made).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, OrderedDict):
            setattr(made, name, OrderedDict())
    made._modules = {name: None if part is None else _twin(part) for name, part in module._modules.items()}
    return made


@dataclass(frozen=True)
class PackedRows:
    """Rows of questions with their answers as tensors: d rows of at most t tokens, n answer tokens."""

    input_ids: Tensor  # [d, t]
    position_ids: Tensor  # [d, t]
    attention_mask: Tensor  # [d, 1, t, t] bool, true where a token may attend
    answer_rows: Tensor  # [n] the row where each answer token is predicted
    answer_positions: Tensor  # [n] its position in the row
    answer_ids: Tensor  # [n] the token to predict there
    answer_question: Tensor  # [n] index of its question among those of all rows
    token_question: Tensor  # [d, t] the question that a token belongs to; -1 for the prefix and padding

    @property
    def n_questions(self) -> int:
        return int(self.answer_question[-1]) + 1

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def mean_by_question(self, values: Tensor) -> Tensor:
        """The mean of the values [n] of each question's answer tokens [questions]."""
        sums = torch.zeros(self.n_questions, device=values.device).index_add(0, self.answer_question, values)
        return sums / torch.bincount(self.answer_question, minlength=self.n_questions)


def common_prefix(sequences: Sequence[TokenIds]) -> int:
    """Length of the longest prefix that all sequences share, without the last token of the shortest."""
    length = min(len(sequence) for sequence in sequences) - 1
    differing = (i for i in range(length) if any(sequence[i] != sequences[0][i] for sequence in sequences))
    return next(differing, length)


def pack_rows(rows: Sequence[Sequence[tuple[TokenIds, TokenIds]]], pad_id: int) -> PackedRows:
    """Pack rows of questions, each a prompt and its answer as token ids."""
    tokens_of_rows: list[list[tuple[int, int, int]]] = []  # id, position, 0 for the prefix or the question from 1 on
    answers: list[tuple[int, int, int, int]] = []  # row, position, token, question
    n_questions = 0
    for row, questions in enumerate(rows):
        shared = common_prefix([prompt for prompt, _ in questions])
        tokens = [(token, i, 0) for i, token in enumerate(questions[0][0][:shared])]
        for prompt, answer in questions:
            first = len(tokens) + len(prompt) - shared - 1
            answers += [(row, first + i, token, n_questions) for i, token in enumerate(answer)]
            n_questions += 1
            tail = [*prompt[shared:], *answer[:-1]]  # the last answer token is predicted, never read
            tokens += [(token, shared + i, n_questions) for i, token in enumerate(tail)]
        tokens_of_rows.append(tokens)
    # Padding attends to padding only, and no token attends to it.
    input_ids, position_ids, branch_ids = (
        pad_right([[token[i] for token in tokens] for tokens in tokens_of_rows], pad)[0]
        for i, pad in enumerate((pad_id, 0, -1))
    )
    same = branch_ids[:, :, None] == branch_ids[:, None, :]
    to_prefix = (branch_ids == 0)[:, None, :] & (branch_ids >= 0)[:, :, None]
    t = input_ids.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    attention_mask = ((same | to_prefix) & causal)[:, None]
    answer_rows, answer_positions, answer_ids, answer_question = torch.tensor(answers).unbind(1)
    return PackedRows(
        input_ids, position_ids, attention_mask, answer_rows, answer_positions, answer_ids, answer_question,
        token_question=branch_ids.clamp_min(0) - 1,
    )  # fmt: skip


@contextmanager
def under_loras(
    model: Any, loras: LoRABatch, device: torch.device, gates: Mapping[str, Tensor] = MappingProxyType({})
) -> Iterator[None]:
    """Inject LoRAs into a base, with `gates` as in `inject`, and set its attention for training."""
    config = model.get_decoder().config
    # On a CPU the fused kernel's backward takes four times as long on rows as short as these.
    attention = "eager" if device.type == "cpu" else config._attn_implementation
    with inject(model, loras, gates), attention_of(config, attention):
        yield


def hidden_at_answers(model: Any, rows: PackedRows) -> Tensor:
    """The last hidden states where answer tokens are predicted [n, hidden]."""
    decoder, mask = model.get_decoder(), rows.attention_mask
    if decoder.config._attn_implementation == "eager":  # which adds its mask to the scores
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    hidden = decoder(
        input_ids=rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False
    ).last_hidden_state  # [d, t, hidden]
    return hidden[rows.answer_rows, rows.answer_positions]


def answer_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [n, vocabulary] of last hidden states [n, hidden]."""
    # Contiguous before the head: a strided slice made the product seconds slower on a CPU.
    logits = model.get_output_embeddings()(hidden.contiguous()).float()
    if cap := getattr(model.get_decoder().config, "final_logit_softcapping", None):  # Gemma 2, after its head
        logits = cap * torch.tanh(logits / cap)
    return logits


def answer_loss(model: Any, loras: LoRABatch, rows: PackedRows) -> Tensor:
    """Mean cross-entropy of the answers' tokens, each row under its own LoRA; long answers count as short ones do."""
    with under_loras(model, loras, model.device):
        hidden = hidden_at_answers(model, rows)
    losses = functional.cross_entropy(answer_logits(model, hidden), rows.answer_ids, reduction="none")  # [n]
    return rows.mean_by_question(losses).mean()


def lr_factor(step: int, n_steps: int, n_warmup: int, schedule: Schedule) -> float:
    """The learning rate of a training step (counted from 0), as a share of its peak.

    It rises evenly over the first `n_warmup` steps; then it stays, or falls to a tenth along a cosine until `n_steps`.
    """
    if step < n_warmup:
        return (step + 1) / n_warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - n_warmup) / max(1, n_steps - n_warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
