"""Text-to-LoRA by what a description adds to the base's own attention, had it stood in the window.

The base reads the description, an input that stands for any, and the beginning of an answer, with a LoRA that was trained to be told its task.
At each layer, what attention writes there is one thing with the description and another with the description hidden; the difference, the
description's attention delta, is what a base without the description lacks (`encoders/attention_delta.py`). It becomes the B of a LoRA in the
attention's output:

    attention deltas [n, places, layers, d] -> mixed over places, plus a learned correction of low rank -> B [n, layers, r, d]
    learned A [layers, r, d_in]: where each column of B is written; at the start, one fires at each place
    attention deltas where the answer begins -> weights [n, modules, shared_rank] of the factors that all descriptions share (optional)
    mean attention delta -> gate [n] -> how much of it all, and of the factors that all descriptions share, there is
    attention deltas, the mean over layers -> what was learned of the training's own tasks (optional; `task_bank.py`)

What a task is about is understood by the base, which knows more tasks than a training has; little is left to be learned (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.errors import ConfigError
from loracast.hypernets.heads import StaticLoRA, per_layer
from loracast.hypernets.seen import SeenDescriptions, make_gate, shared_factors
from loracast.hypernets.task_bank import TaskBank
from loracast.lora.algebra import Factors, LoRA, LoRABatch
from loracast.lora.target import Target, TargetModule, problems_of

PLACES = ("start", "answer", "input", "turn")
"""Where attention deltas are read, and where what they become is written: where the answer begins, after its beginning, in the input, and in what
the template has between the input and the answer."""


@dataclass(frozen=True)
class AttentionDeltaToLoRAConfig:
    """Everything that fixes the architecture; the shapes of the base are in `modules`."""

    d_state: int
    """Width of the base's states."""
    modules: tuple[tuple[str, int, str, int, int], ...]
    """The target, one (name, layer, kind, d_in, d_out) for each module, in the target's order."""
    kind: str = "o_proj"
    """Kind of the modules in which attention writes: attention deltas are read there, and become LoRAs of these."""
    rank: int = 6
    """Rank of what is made from a description."""
    shared_rank: int = 16
    """Rank of the factors that all descriptions share, and of those with which the base reads."""
    map_rank: int = 32
    """Rank of the learned correction to a layer's attention deltas."""
    weighting_width: int = 0
    """Width of the MLP that weights each direction of the shared factors for a description; 0: all directions count alike."""
    weighting_dropout: float = 0.3
    """Share of the descriptions in training whose directions all count alike, so that what is made from them can do without."""
    reading_strength: float = 1.0
    """Factor on the LoRA with which the base reads. Below 1, between the base and what was trained on, which helped on tasks of a dev split (the same
    interpolation as in Wortsman et al., arXiv 2109.01903, section 3)."""
    dummy_input: str = "rice, lizard, cook"
    """Input that stands in for the user's while a description is read."""
    dummy_answer: str = "lizard"
    """Beginning of an answer that stands in for the real one while a description is read."""
    depth: int | None = None
    """Blocks of the base in which attention deltas are read and written; all up to the target's last if None."""
    task_bank_rank: int = 0
    """Rank of the factors of the task bank; 0 for no task bank."""
    task_bank_width: int = 128
    """Width of the coordinates in which descriptions are compared for that."""
    bank_sizes: tuple[int, ...] = ()
    """How many descriptions each task of the task bank has, in order."""
    n_seen: int = 0
    """Descriptions seen in training, whose attention deltas are kept to tell how far a new one is from all of them."""

    def __post_init__(self) -> None:
        problems = problems_of(self.modules)
        widths = {d_out for _, _, kind, _, d_out in self.modules if kind == self.kind}
        if widths != {self.d_state}:
            problems.append(
                f"attention deltas need {self.kind} among the target's modules, writing {self.d_state} numbers"
            )
        if (
            self.rank < len(PLACES)
            or min(self.shared_rank, self.map_rank) < 1
            or not (self.dummy_input and self.dummy_answer)
        ):
            problems.append(
                f"rank must be at least {len(PLACES)}, shared_rank and map_rank at least 1, and the dummy input and answer not empty"
            )
        if self.reading_strength <= 0:
            problems.append("reading_strength must be above 0")
        if self.weighting_width < 0 or not 0 <= self.weighting_dropout <= 1:
            problems.append("weighting_width must not be negative, and weighting_dropout is a share: from 0 to 1")
        if self.task_bank_rank < 0 or self.task_bank_width < 1 or (self.bank_sizes and not self.task_bank_rank):
            problems.append(
                "task_bank_rank must not be negative, task_bank_width at least 1, and bank_sizes need a task_bank_rank"
            )
        if not self.layers:
            problems.append(f"no module of the kind {self.kind} lies within a depth of {self.depth}")
        if problems:
            raise ConfigError("bad AttentionDeltaToLoRAConfig: " + "; ".join(problems))

    @property
    def target(self) -> Target:
        return Target(tuple(TargetModule(*module) for module in self.modules))

    @property
    def layers(self) -> tuple[int, ...]:
        """Those whose attention gets a LoRA made from the description."""
        every = (layer for _, layer, kind, _, _ in self.modules if kind == self.kind)
        return tuple(layer for layer in every if self.depth is None or layer < self.depth)

    @property
    def encoder(self) -> str:
        """The text encoder: the base, with the LoRA with which it reads."""
        return "base:attention_delta"

    @property
    def d_text(self) -> int:
        """Width of a condition: attention deltas [places, layers, d_state], flat."""
        return len(PLACES) * len(self.layers) * self.d_state

    @property
    def lora_rank(self) -> int:
        """Largest rank of a task's LoRA."""
        return self.rank + self.shared_rank + self.task_bank_rank


class AttentionDeltaToLoRA(SeenDescriptions, nn.Module):
    """The hypernetwork."""

    config_class: ClassVar = AttentionDeltaToLoRAConfig
    seen: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: AttentionDeltaToLoRAConfig):
        super().__init__()
        self.config = c = config
        n_layers, n_places, d_in = len(c.layers), len(PLACES), self._shape(c.kind)[0]
        self.where = nn.Parameter(torch.randn(n_layers, c.rank, d_in) * 0.1 / d_in**0.5)  # A
        self.mix = nn.Parameter(torch.zeros(n_layers, c.rank, n_places))
        with torch.no_grad():
            self.mix[:, :n_places] = torch.eye(n_places)
        self.down = nn.Parameter(
            torch.randn(n_layers, n_places * c.d_state, c.map_rank) / (n_places * c.d_state) ** 0.5
        )
        self.up = nn.Parameter(torch.zeros(n_layers, c.map_rank, c.rank * c.d_state))
        kinds = {kind: len(c.target.of_kind(kind)) for kind in c.target.kinds}
        self.shared = nn.ModuleDict({k: StaticLoRA(n, c.shared_rank, *self._shape(k)) for k, n in kinds.items()})
        self.encoder_lora = nn.ModuleDict({k: StaticLoRA(n, c.shared_rank, *self._shape(k)) for k, n in kinds.items()})
        self.encoder_lora.requires_grad_(False)  # what is read stays what the rest was trained on
        self.weighting: nn.Sequential | None = None
        if c.weighting_width:
            self.weighting = nn.Sequential(
                nn.Linear(n_layers * c.d_state, c.weighting_width),
                nn.SiLU(),
                nn.Linear(c.weighting_width, len(c.modules) * c.shared_rank),
            )
            nn.init.zeros_(cast(nn.Linear, self.weighting[-1]).weight)
            nn.init.zeros_(cast(nn.Linear, self.weighting[-1]).bias)
        self.task_bank: TaskBank | None = self._new_task_bank() if c.bank_sizes else None
        self.gate = make_gate(c.d_state)
        self.register_buffer("mean", torch.zeros(c.d_text))
        self.register_buffer("std", torch.ones(c.d_text))
        self.register_buffer("seen", torch.zeros(c.n_seen, c.d_state))

    def _new_task_bank(self) -> TaskBank:
        c = self.config
        return TaskBank(c.target, len(PLACES) * c.d_state, c.task_bank_rank, c.task_bank_width, c.bank_sizes)

    def _shape(self, kind: str) -> tuple[int, int]:
        module = self.config.target.of_kind(kind)[0]
        return module.d_in, module.d_out

    def start_shared_from(self, lora: LoRA) -> None:
        """Let the base read with a LoRA that was trained on all tasks, and the factors that all share start as it. Raises ConfigError where it does not fit."""
        target = self.config.target
        for kind in target.kinds:
            a, b = shared_factors(lora, target.of_kind(kind), self.config.shared_rank)
            for part in (self.shared[kind], self.encoder_lora[kind]):
                cast(StaticLoRA, part).a.data.copy_(a)
                cast(StaticLoRA, part).b.data.copy_(b)

    def encoder_lora_batch(self) -> LoRABatch:
        """What the base carries while it reads a description."""
        strength = self.config.reading_strength
        factors = self._factors_of(self.encoder_lora)
        return LoRABatch(1, {name: Factors(a[None], b[None] * strength) for name, (a, b) in factors}, {})

    def _factors_of(self, part: nn.ModuleDict) -> Iterator[tuple[str, Factors]]:
        """Module by module in the target's order, A [r, in] and B [out, r]."""
        by_kind = {kind: iter(cast(StaticLoRA, part[kind]).factors()) for kind in self.config.target.kinds}
        for name, _, kind, *_ in self.config.modules:
            yield name, next(by_kind[kind])

    def set_units(self, conditions: Tensor) -> None:
        """Take the units in which the gate sees conditions from those of real descriptions [m, d_text]: their mean and deviation."""
        self.mean.copy_(conditions.mean(0))
        self.std.copy_(conditions.std(0).clamp_min(1e-6))

    def remember_seen(self, conditions: Tensor) -> None:
        """Keep what tells the descriptions seen in training apart. [m, d_text]"""
        self.config = replace(self.config, n_seen=len(conditions))
        self.seen = self.pooled(conditions)

    def start_task_bank(self, conditions: Tensor, n_descriptions: Sequence[int]) -> None:
        """Start an empty task bank from all tasks' descriptions [m, d_text], ordered by task, and how many each task has."""
        self.config = replace(self.config, bank_sizes=tuple(n_descriptions))
        self.task_bank = self._new_task_bank().to(conditions.device)
        self.task_bank.take_directions(self.shared)
        self.task_bank.fit_keys(self._compared(conditions))

    def refresh_task_bank(self, conditions: Tensor) -> None:
        """Recompute the task bank's keys from its descriptions [m, d_text]. Raises ConfigError for another number of them."""
        if self.task_bank is not None:
            self.task_bank.set_keys(self._compared(conditions))

    def weights_within(self, layers: Sequence[int]) -> dict[str, Tensor]:
        """The weights of a hypernetwork that is the same but less deep: with the attention deltas of some of its layers only.

        Raises:
            ConfigError: it would be deeper.
        """
        if missing := set(layers) - set(self.config.layers):
            raise ConfigError(f"the layers {sorted(missing)} were not trained; depth can only be made smaller")
        kept = [i for i, layer in enumerate(self.config.layers) if layer in layers]
        weights = self.state_dict()
        for name in ("where", "mix", "down", "up"):
            weights[name] = weights[name][kept]
        for name in ("mean", "std"):
            weights[name] = self._by_place(weights[name][None])[0, :, kept].flatten()
        return weights

    def pooled(self, conditions: Tensor) -> Tensor:
        """What each description contributes where the answer begins, the mean over layers in units of their deviation [n, d_state]."""
        standard = (conditions - self.mean) / self.std
        return self._by_place(standard)[:, PLACES.index("start")].mean(1)

    def _compared(self, conditions: Tensor) -> Tensor:
        """By what descriptions of tasks are told apart: the mean over layers at each place, in units of their deviation [n, places * d_state]."""
        return self._by_place((conditions - self.mean) / self.std).mean(2).flatten(1)

    def _by_place(self, conditions: Tensor) -> Tensor:
        """[n, d_text] -> [n, places, layers, d_state]."""
        return conditions.unflatten(1, (len(PLACES), len(self.config.layers), self.config.d_state))

    def constant(self) -> Tensor:
        """A condition that describes nothing: one deviation above the mean in all that it has [1, d_text]."""
        return (self.mean + self.std)[None]

    def meaningless(self, n: int, generator: torch.Generator) -> Tensor:
        """Conditions [n, d_text] that no text has: random ones with the mean and deviation of real ones."""
        return torch.randn(n, len(self.mean), generator=generator).to(self.mean) * self.std + self.mean

    def gate_logit(self, conditions: Tensor) -> Tensor:
        """How far the gate opens for each description, as a logit [n]."""
        return self.gate(self.pooled(conditions)).squeeze(-1)

    def _weights(self, conditions: Tensor) -> Tensor:
        """How much each direction of the shared factors counts [n, modules, shared_rank]; [n, 1, 1] where all count alike."""
        if self.weighting is None:
            return torch.ones(len(conditions), 1, 1, device=conditions.device)
        at_start = self._by_place((conditions - self.mean) / self.std)[:, PLACES.index("start")].flatten(1)
        more = self.weighting(functional.rms_norm(at_start, at_start.shape[1:]))
        if self.training:
            more = more * (torch.rand(len(more), 1, device=more.device) >= self.config.weighting_dropout)
        return 1 + more.unflatten(1, (len(self.config.modules), -1))

    def _written(self, conditions: Tensor) -> Tensor:
        """The columns of B [n, layers, r, d_state]."""
        read = self._by_place(conditions)
        mixed = torch.einsum("npld,lrp->nlrd", read, self.mix)
        flat = read.transpose(1, 2).flatten(2)[:, :, None]  # [n, layers, 1, places * d]
        corrected = per_layer(per_layer(flat, self.down), self.up)
        return mixed + corrected.squeeze(2).unflatten(-1, (self.config.rank, -1))

    def forward(self, conditions: Tensor) -> LoRABatch:
        """What a `AttentionDeltaEncoder` reads of n descriptions [n, d_text] -> their n LoRAs, differentiable.

        In fp32; in bf16, as they are kept, where that is the autocast type and no gradient is wanted.
        """
        c, n = self.config, len(conditions)
        in_bf16 = not torch.is_grad_enabled() and torch.is_autocast_enabled(conditions.device.type)
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        gate = self.gate_logit(conditions).sigmoid()[:, None, None, None].to(dtype)
        weights = self._weights(conditions).to(dtype)[..., None].expand(-1, len(c.modules), -1, -1) * gate
        cores = None if self.task_bank is None else self.task_bank(self._compared(conditions)).to(dtype) * gate
        kinds, layers = [kind for _, _, kind, _, _ in c.modules], set(c.layers)
        factors: dict[str, Factors] = {}
        for kind in c.target.kinds:
            at = [i for i, other in enumerate(kinds) if other == kind]
            part = cast(StaticLoRA, self.shared[kind])
            a: Tensor = part.a.to(dtype)  # [layers, r, in]
            rows = part.b.to(dtype) * weights[:, at]  # [n, layers, r, out]
            if self.task_bank is not None and cores is not None:
                bank = cast(StaticLoRA, self.task_bank.factors[kind])
                retrieved = per_layer(cores[:, at].transpose(2, 3), bank.b.to(dtype))
                a, rows = torch.cat([a, bank.a.to(dtype)], dim=1), torch.cat([rows, retrieved], dim=2)
            made = dict(zip(at, zip(a.unbind(0), rows.unbind(1), strict=True), strict=True))
            if kind == c.kind:
                own = [k for k, i in enumerate(at) if c.modules[i][1] in layers]
                a = torch.cat([self.where.to(dtype), a[own]], dim=1)
                rows = torch.cat([self._written(conditions).to(dtype) * gate, rows[:, own]], dim=2)
                made.update(zip([at[k] for k in own], zip(a.unbind(0), rows.unbind(1), strict=True), strict=True))
            for i, (one, row) in made.items():  # A is the same for all: held once
                factors[c.modules[i][0]] = Factors(one.expand(n, -1, -1), row.transpose(1, 2))
        return LoRABatch(n, {name: factors[name] for name in c.target.names}, {})
