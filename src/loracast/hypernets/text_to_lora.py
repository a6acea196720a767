"""Text-to-LoRA: the embedding of a task's description becomes a LoRA in one forward pass (arXiv 2506.06105).

    embedding [n, d] + layer embedding + module-kind embedding -> condition [n, modules, w] -> residual MLPs
    -> [n, modules, head] -> one linear head for each module kind -> A [n, modules, r, in], B [n, modules, r, out]

What a head makes depends on the variant: `L` both factors at once; `M` one factor at a time, selected by an embedding;
`S` one row of a factor at a time, selected by another embedding. This module knows shapes, never a base's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from loracast.base.embedded import Say
from loracast.base.load import Base
from loracast.hypernets.config import ArchitectureConfig, ModuleRow, failed
from loracast.hypernets.descriptions import DescriptionHypernetwork
from loracast.hypernets.encoders import TextEncoder, load_text_encoder
from loracast.hypernets.perceiver import shapes_by_kind
from loracast.lora.factors import Rows

Variant = Literal["L", "M", "S"]


@dataclass(frozen=True)
class TextToLoRAConfig(ArchitectureConfig):
    """Everything that fixes the architecture; the shapes of the base are in `modules`."""

    d_text: int
    """Width of the text encoder's embeddings."""
    modules: tuple[ModuleRow, ...]
    """The target modules, in the target's order."""
    encoder: str = ""
    """The text encoder that the embeddings come from."""
    variant: Variant = "L"
    """What a head makes at a time: "L", "M" or "S" (see the module's docstring)."""
    rank: int = 8
    """Rank of a task's LoRA."""
    width: int = 128
    """Width of the condition: half of it the task's, a quarter the layer's, a quarter the module kind's."""
    head_width: int = 512
    """Width of the heads' input."""
    dropout: float = 0.05
    """Dropout in the MLPs, in training."""
    scale: float = 5.66
    """Factor on every delta, folded into B (published: 16 / sqrt(8))."""
    n_seen: int = 0
    """Number of seen descriptions: those of the training, kept for the OOD threshold."""

    def _problems(self) -> list[str]:
        sizes, variants = (self.d_text, self.rank, self.width, self.head_width), get_args(Variant)
        return super()._problems() + failed(
            (self.variant not in variants, f"unknown variant {self.variant!r}; one of {', '.join(variants)}"),
            (min(sizes) < 1, "d_text, rank, width and head_width must be positive"),
            (self.width % 4, "width must be a multiple of 4"),
        )

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of a task's LoRA, by module kind."""
        return dict.fromkeys(self.target.kinds, self.rank)


class TextToLoRA(DescriptionHypernetwork):
    """The hypernetwork. Its start is an exact no-op in every variant, because every B scaler starts at zero."""

    config_class: ClassVar[Any] = TextToLoRAConfig

    def __init__(self, config: TextToLoRAConfig):
        super().__init__()
        self.config = c = config
        target = c.target
        half, quarter = c.width // 2, c.width // 4
        self.task = nn.Sequential(nn.Linear(c.d_text, half), nn.LayerNorm(half))
        self.layer = nn.Sequential(nn.Embedding(len(target.layers), quarter), nn.LayerNorm(quarter))
        self.kind = nn.Sequential(nn.Embedding(len(target.kinds), quarter), nn.LayerNorm(quarter))
        self.mixer = _mlp(c.width, c.width, c.dropout)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(c.width), _mlp(c.width, c.width, c.dropout)) for _ in range(2)
        )
        self.last = nn.Sequential(nn.LayerNorm(c.width), _mlp(c.width, c.head_width, c.dropout))
        self.heads = nn.ModuleDict({kind: Head(c, *shape) for kind, shape in shapes_by_kind(c.modules).items()})
        if c.variant in ("M", "S"):  # embeddings that select the factor of each kind, and in S its row
            n_rows = c.rank if c.variant == "S" else 1
            self.asked = nn.Parameter(torch.randn(len(target.kinds), 2, n_rows, c.width))
            self.asked_norm = nn.LayerNorm(c.width)
        self.register_buffer("seen", torch.zeros(c.n_seen, c.d_text))

    def computes_in_bf16(self, base: Base | None) -> bool:
        return False

    def text_encoder(self, base: Base | None, encoder: str | None = None, say: Say = lambda text: None) -> TextEncoder:
        return load_text_encoder(encoder or self.config.encoder, base, say)

    def pooled(self, conditions: Tensor) -> Tensor:
        """The embeddings themselves [n, d_text]."""
        return conditions

    def rows(self, embeddings: Tensor) -> Rows:
        """Embeddings of n descriptions [n, d_text] -> the rows of their n LoRAs, differentiable."""
        latents = self.latents(embeddings)  # [n, layers, kinds, sides, rows, head_width]
        made = {kind: self.heads[kind](latents[:, :, i]) for i, kind in enumerate(self.config.target.kinds)}
        return {kind: (a, b * self.config.scale) for kind, (a, b) in made.items()}

    def latents(self, embeddings: Tensor) -> Tensor:
        """The heads' input [n, layers, kinds, sides, rows, head_width]; sides and rows are 1 if made at once."""
        x = self.module_conditions(embeddings)[..., None, None, :]
        if self.config.variant in ("M", "S"):
            x = x + self.asked_norm(self.asked)
        return self.last(x + self.blocks[1](x))

    def module_conditions(self, embeddings: Tensor) -> Tensor:
        """What each module sees of each description [n, layers, kinds, width], after the first block."""
        task = self.task(embeddings)[:, None, None]  # [n, 1, 1, w / 2]
        layer = self.layer(torch.arange(len(self.config.target.layers), device=task.device))[None, :, None]
        kind = self.kind(torch.arange(len(self.config.target.kinds), device=task.device))[None, None]
        shape = (task.shape[0], layer.shape[1], kind.shape[2], -1)
        x = self.mixer(torch.cat([side.expand(shape) for side in (task, layer, kind)], dim=-1))
        return x + self.blocks[0](x)


class Head(nn.Module):
    """Condition -> factors of one module kind, plus factors shared by all tasks; B is scaled, at first to zero."""

    def __init__(self, c: TextToLoRAConfig, n_layers: int, d_in: int, d_out: int):
        super().__init__()
        self.variant, self.rank, self.d_in, self.d_out = c.variant, c.rank, d_in, d_out
        longest = max(d_in, d_out)
        n_numbers = {"L": c.rank * (d_in + d_out), "M": c.rank * longest, "S": longest}[c.variant]
        self.linear = nn.Linear(c.head_width, n_numbers)
        nn.init.normal_(self.linear.weight, std=(3 * d_in * c.head_width) ** -0.5)
        nn.init.zeros_(self.linear.bias)
        self.shared_a = nn.Parameter(torch.randn(n_layers, c.rank, d_in) / (3 * d_in) ** 0.5)  # as in a usual LoRA
        self.shared_b = nn.Parameter(torch.zeros(n_layers, c.rank, d_out))
        self.scaler_b = nn.Parameter(torch.zeros(n_layers, c.rank, 1))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [n, layers, sides, rows, head_width] -> A [n, modules, r, in] and B rows [n, modules, r, out]."""
        made = self.linear(latents)
        if self.variant == "L":  # one latent becomes A and B
            a, b = made[:, :, 0, 0].split([self.rank * self.d_in, self.rank * self.d_out], dim=-1)
            a, b = a.unflatten(-1, (self.rank, -1)), b.unflatten(-1, (self.rank, -1))
        else:  # M: a latent becomes A or B; S: one row of either. The map is as wide as the wider of them
            rows = made[:, :, :, 0].unflatten(-1, (self.rank, -1)) if self.variant == "M" else made
            a, b = (side[..., :d] for side, d in zip(rows.unbind(2), (self.d_in, self.d_out), strict=True))
        return a + self.shared_a, b * self.scaler_b + self.shared_b


def _mlp(d: int, d_out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, 4 * d), nn.SiLU(), nn.Dropout(dropout), nn.Linear(4 * d, d_out), nn.SiLU())
