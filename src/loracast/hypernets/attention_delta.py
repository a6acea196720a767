"""Text-to-LoRA from attention deltas: what a description adds to the base's own attention becomes a LoRA.

The base reads the description, a dummy input and the beginning of a dummy answer, with an encoder LoRA that was trained
with descriptions in its prompts. The attention deltas (attention_delta_encoder.py) are what a base lacks that does not
see the description. They become the B of a LoRA in the attention's output projections:

    attention deltas [n, positions, layers, d] -> mixed over positions, plus a learned correction of low rank
    -> B [n, layers, r, d]
    learned A [layers, r, d_in]: where each column of B is written; at the start, one row fires at each position
    mean attention delta -> gate [n], which scales B and the B of the factors that all descriptions share
    attention deltas, mean over layers -> task bank: stored training tasks (optional; `TaskBank` in descriptions.py)

The base understands the task already, and knows more tasks than a training has, so little is left to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.base.embedded import Say
from loracast.base.load import Base
from loracast.documents.task_spec import TaskSpec
from loracast.errors import EncoderError
from loracast.hypernets.attention_delta_encoder import ATTENTION_DELTA, POSITIONS, AttentionDeltaEncoder
from loracast.hypernets.config import ArchitectureConfig, ModuleRow, failed
from loracast.hypernets.descriptions import EXAMPLES_AT_ONCE, DescriptionHypernetwork, TaskBank, TaskReader, make_gate
from loracast.hypernets.encoders import TextEncoder
from loracast.hypernets.example_fit import FEWEST_EXAMPLES, MLP_KIND, fit_examples, gradient_step, label_bias
from loracast.hypernets.perceiver import StaticLoRAs, per_layer
from loracast.lora.algebra import LoRA, LoRABatch, compress, rows_of
from loracast.lora.factors import Rows, joined_ranks

KEPT_RANK = 12
"""Rank to which an adapter compresses what was cast, before anything is fitted to examples.

On the tasks of benchmarks/unseen_tasks.py and on training tasks nothing is lost (docs/notebook/2026-12-01.md).
"""


@dataclass(frozen=True)
class AttentionDeltaToLoRAConfig(ArchitectureConfig):
    """Everything that fixes the architecture; the shapes of the base are in `modules`."""

    d_state: int
    """Width of the base's states."""
    modules: tuple[ModuleRow, ...]
    """The target modules, in the target's order."""
    kind: str = "o_proj"
    """Kind of the attention's output projections: attention deltas are read there and become LoRAs of these modules."""
    rank: int = 6
    """Rank of the factors made from a description."""
    shared_rank: int = 16
    """Rank of the factors that all descriptions share, and of the encoder LoRA."""
    map_rank: int = 32
    """Rank of the learned correction to a layer's attention deltas."""
    dummy_input: str = "rice, lizard, cook"
    """Input that stands in for the user's while a description is read."""
    dummy_answer: str = "lizard"
    """Beginning of an answer that stands in for the real one while a description is read."""
    depth: int | None = None
    """Blocks of the base in which attention deltas are read and written; all up to the target's last if None."""
    task_bank_rank: int = 0
    """Rank of the task bank's factors; 0 for no task bank."""
    task_bank_width: int = 128
    """Width of the coordinates in which the task bank compares descriptions."""
    bank_sizes: tuple[int, ...] = ()
    """Number of descriptions of each task in the task bank, in order."""
    examples_at_once: int = EXAMPLES_AT_ONCE
    """Most examples that are read in one text, as many as in training; more are read in groups."""
    n_seen: int = 0
    """Number of seen descriptions: those of the training, kept for the OOD threshold."""

    def _problems(self) -> list[str]:
        widths = {d_out for _, _, kind, _, d_out in self.modules if kind == self.kind}
        return super()._problems() + failed(
            (widths != {self.d_state}, f"there must be modules of the kind {self.kind}, with {self.d_state} outputs"),
            (self.rank < len(POSITIONS), f"rank must be at least {len(POSITIONS)}"),
            (min(self.shared_rank, self.map_rank) < 1, "shared_rank and map_rank must be at least 1"),
            (not (self.dummy_input and self.dummy_answer), "dummy_input and dummy_answer must not be empty"),
            (self.examples_at_once < 1, "examples_at_once must be at least 1"),
            (self.task_bank_rank < 0 or self.task_bank_width < 1, "task_bank_rank or task_bank_width is too small"),
            (self.bank_sizes and not self.task_bank_rank, "bank_sizes need a task_bank_rank"),
            (not self.layers, f"no module of the kind {self.kind} lies within a depth of {self.depth}"),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose attention gets a LoRA made from the description."""
        every = (layer for _, layer, kind, _, _ in self.modules if kind == self.kind)
        return tuple(layer for layer in every if self.depth is None or layer < self.depth)

    @property
    def encoder(self) -> str:
        """Name of the encoder: the base with the encoder LoRA."""
        return ATTENTION_DELTA

    @property
    def d_text(self) -> int:
        """Width of a condition: attention deltas [positions, layers, d_state], flat."""
        return len(POSITIONS) * len(self.layers) * self.d_state

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of a task's LoRA by module kind, modules beyond `depth` padded with zeros."""
        bank = self.task_bank_rank if self.bank_sizes else 0
        return {kind: self.shared_rank + bank + (self.rank if kind == self.kind else 0) for kind in self.target.kinds}


def new_task_bank(c: AttentionDeltaToLoRAConfig) -> TaskBank:
    return TaskBank(c.target, len(POSITIONS) * c.d_state, c.task_bank_rank, c.task_bank_width, c.bank_sizes)


class AttentionDeltaToLoRA(DescriptionHypernetwork):
    """The hypernetwork that turns the attention deltas of a description into a LoRA."""

    config_class: ClassVar[Any] = AttentionDeltaToLoRAConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: AttentionDeltaToLoRAConfig):
        super().__init__()
        self.config = c = config
        n_layers, n_positions, d_in = len(c.layers), len(POSITIONS), c.target.of_kind(c.kind)[0].d_in
        self.where = nn.Parameter(torch.randn(n_layers, c.rank, d_in) * 0.1 / d_in**0.5)  # A
        self.mix = nn.Parameter(torch.zeros(n_layers, c.rank, n_positions))
        with torch.no_grad():
            self.mix[:, :n_positions] = torch.eye(n_positions)
        d_read = n_positions * c.d_state
        self.down = nn.Parameter(torch.randn(n_layers, d_read, c.map_rank) / d_read**0.5)
        self.up = nn.Parameter(torch.zeros(n_layers, c.map_rank, c.rank * c.d_state))
        self.shared = StaticLoRAs(c.modules, c.shared_rank)
        self.encoder_lora = StaticLoRAs(c.modules, c.shared_rank)
        self.encoder_lora.requires_grad_(False)  # fixed: the rest is trained on the features that it gives
        self.task_bank: TaskBank | None = new_task_bank(c) if c.bank_sizes else None
        self.gate = make_gate(c.d_state)
        self.register_buffer("mean", torch.zeros(c.d_text))
        self.register_buffer("std", torch.ones(c.d_text))
        self.register_buffer("seen", torch.zeros(c.n_seen, c.d_state))

    def text_encoder(self, base: Base | None, encoder: str | None = None, say: Say = lambda text: None) -> TextEncoder:
        if base is None or encoder is not None:
            raise EncoderError("this hypernetwork reads descriptions with its base: give it, and no other text encoder")
        c = self.config
        lora, is_training = self.encoder_lora_batch, lambda: self.training
        return AttentionDeltaEncoder(base, c.layers, c.kind, c.dummy_input, c.dummy_answer, lora, is_training)

    def kept_rows(self, reader: TaskReader, task: TaskSpec, rows: Rows) -> Rows:
        cast_lora = self.loras(rows).row(0)
        if cast_lora.rank > KEPT_RANK:
            rows = rows_of(compress(cast_lora, KEPT_RANK)[0], self.config.target)
        if not task.examples:
            return rows
        c, encoder = self.config, cast(AttentionDeltaEncoder, reader.encoder)
        base = encoder.base
        projections = [self.in_layers(kind) for kind in (c.kind, MLP_KIND) if kind in c.target.kinds]
        if len(task.examples) >= FEWEST_EXAMPLES:
            rows = self._with(rows, fit_examples(encoder, reader.groups(task), projections, self.loras(rows)))
        names = [name for kind in projections for name in kind]
        rows = self._with(rows, gradient_step(base, task.examples, names, self.loras(rows)))
        last = c.target.modules[-1]
        if last.kind != MLP_KIND or last.layer + 1 != base.model.config.get_text_config().num_hidden_layers:
            return rows  # nothing of the target is next to the logits
        return self._with(rows, label_bias(base, task.examples, last.name, self.loras(rows)))

    def _with(self, rows: Rows, more: LoRA) -> Rows:
        """The rows of a LoRA with those of another one behind them."""
        return joined_ranks(rows, rows_of(more, self.config.target))

    def encoder_lora_batch(self) -> LoRABatch:
        """The LoRA that the base carries while it reads a description."""
        return self.encoder_lora.lora(self.config.modules)

    def in_layers(self, kind: str) -> tuple[str, ...]:
        """Target modules of a kind in the layers that are read."""
        c = self.config
        return tuple(name for name, layer, other, *_ in c.modules if other == kind and layer in c.layers)

    def pooled(self, conditions: Tensor) -> Tensor:
        """The attention delta where the answer begins, standardised, mean over layers [n, d_state]."""
        standard = (conditions - self.mean) / self.std
        return self.by_position(standard)[:, POSITIONS.index("start")].mean(1)

    def task_bank_input(self, conditions: Tensor) -> Tensor:
        """The task bank's input: attention deltas, standardised, mean over layers [n, positions * d_state]."""
        return self.by_position((conditions - self.mean) / self.std).mean(2).flatten(1)

    def by_position(self, conditions: Tensor) -> Tensor:
        """[n, d_text] -> [n, positions, layers, d_state]."""
        return conditions.unflatten(1, (len(POSITIONS), len(self.config.layers), self.config.d_state))

    def _columns(self, conditions: Tensor) -> Tensor:
        """Conditions [n, d_text] -> the columns of B that are made from the description [n, layers, r, d_state]."""
        deltas = self.by_position(conditions)
        mixed = torch.einsum("npld,lrp->nlrd", deltas, self.mix)
        flat = deltas.transpose(1, 2).flatten(2)[:, :, None]  # [n, layers, 1, positions * d]
        corrected = per_layer(per_layer(flat, self.down), self.up)
        return mixed + corrected.squeeze(2).unflatten(-1, (self.config.rank, -1))

    def rows(self, conditions: Tensor) -> Rows:
        """Conditions of n descriptions [n, d_text] -> the rows of their n LoRAs, differentiable.

        In bf16 under autocast to bf16 without gradients, else in fp32. A is the same for all descriptions and held
        once.
        """
        c, n = self.config, len(conditions)
        in_bf16 = not torch.is_grad_enabled() and torch.is_autocast_enabled(conditions.device.type)
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        gate = self.gate(self.pooled(conditions)).sigmoid()[..., None, None].to(dtype)  # [n, 1, 1, 1]
        cores = None if self.task_bank is None else self.task_bank(self.task_bank_input(conditions)).to(dtype) * gate
        own = self._columns(conditions).to(dtype) * gate
        rows: Rows = {}
        for kind in c.target.kinds:
            a = self.shared[kind].a.to(dtype)  # [modules, r, in]
            b = self.shared[kind].b.to(dtype) * gate  # [n, modules, r, out]
            if self.task_bank is not None and cores is not None:
                bank = self.task_bank.factors[kind]
                at = [i for i, module in enumerate(c.modules) if module[2] == kind]
                retrieved = per_layer(cores[:, at].transpose(2, 3), bank.b.to(dtype))
                a, b = torch.cat([a, bank.a.to(dtype)], dim=1), torch.cat([b, retrieved], dim=2)
            if kind == c.kind:  # modules beyond `depth` have rows of zero in place of their own
                k, padding = len(c.layers), (0, 0, 0, c.rank)
                a = torch.cat([torch.cat([self.where.to(dtype), a[:k]], dim=1), functional.pad(a[k:], padding)])
                b = torch.cat([torch.cat([own, b[:, :k]], dim=2), functional.pad(b[:, k:], padding)], dim=1)
            rows[kind] = (a.expand(n, -1, -1, -1), b)
        return rows
