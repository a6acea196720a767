"""The heads of Doc-to-LoRA: rank latents become the factors of the target modules, one head for each module kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from loracast.hypernets.doc_config import ModuleRow
from loracast.lora.algebra import Factors, LoRABatch


def per_layer(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, layers, q, w] times each layer's own weight [layers, w, d] -> [n, layers, q, d], as one matmul a layer.

    Left to broadcasting, the weights are copied for each of the n chunks: five times slower, backward included.
    """
    n, _, q, _ = x.shape
    y = x.transpose(0, 1).flatten(1, 2) @ weight  # [layers, n * q, d]
    return y.unflatten(1, (n, q)).transpose(0, 1)


class FactorHead(nn.Module):
    """Unit rank latents [n, layers, r, w] -> A [n, modules, r, in] and B rows [n, modules, r, out], a module a layer.

    Every layer has a linear map of its own, since the layers' activations live in different spaces. With `shared_rank`
    k all layers share one map and each adds a correction of rank k: a large base stays affordable.
    """

    def __init__(self, n_layers: int, width: int, rank: int, d_in: int, d_out: int, shared_rank: int | None):
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        d = d_in + d_out
        std = 0.5 / (width + d * rank) ** 0.5  # published initialisation (arXiv 2602.15902)
        if shared_rank is None:
            self.weight = nn.Parameter(torch.randn(n_layers, width, d) * std)
        else:
            self.shared = nn.Parameter(torch.randn(width, d) * std)
            self.down = nn.Parameter(torch.randn(n_layers, width, shared_rank) / shared_rank**0.5)
            self.up = nn.Parameter(torch.randn(n_layers, shared_rank, d) * std)
        self.scaler_a = nn.Parameter(torch.ones(n_layers, rank, 1))
        self.scaler_b = nn.Parameter(torch.zeros(n_layers, rank, 1))  # zero: the start is an exact no-op

    def forward(self, latents: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The factors; `scale` multiplies B."""
        if hasattr(self, "weight"):
            rows = per_layer(latents, self.weight)  # [n, modules, r, in + out]
        else:
            rows = latents @ self.shared + per_layer(per_layer(latents, self.down), self.up)
        a, b = rows.split([self.d_in, self.d_out], dim=-1)
        return a * self.scaler_a, b * (self.scaler_b * scale)

    @torch.no_grad()
    def take_low_rank(self, other: FactorHead) -> None:
        """Initialise this low-rank head from a full one: the mean of its maps, and corrections by truncated SVD."""
        mean = other.weight.mean(0)
        left, values, right = torch.linalg.svd(other.weight - mean, full_matrices=False)
        n = self.down.shape[-1]
        root = values[:, :n].sqrt()
        self.shared.copy_(mean)
        self.down.copy_(left[:, :, :n] * root[:, None])
        self.up.copy_(root[..., None] * right[:, :n])
        self.scaler_a.copy_(other.scaler_a)
        self.scaler_b.copy_(other.scaler_b)


class ValuePointer(nn.Module):
    """Points from each rank latent to tokens of the chunk, whose values its B row then copies.

    Without it, a head would have to learn the value of every token of the vocabulary through the narrow latents. The
    copy starts at zero.
    """

    def __init__(self, n_layers: int, d_features: int, width: int, rank: int):
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(d_features, width, bias=False)
        self.scaler = nn.Parameter(torch.zeros(n_layers, rank, 1))

    def weights(self, latents: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        """Latents [n, q, w], standardised features [n, t, d], mask [n, t] -> distributions over tokens [n, q, t]."""
        scores = self.query(latents) @ self.key(features).transpose(1, 2) / latents.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        return scores.float().softmax(-1)


class StaticLoRA(nn.Module):
    """The static LoRA of one module kind, appended once to every document's factors. B starts at zero."""

    def __init__(self, n_layers: int, rank: int, d_in: int, d_out: int):
        super().__init__()
        self.a = nn.Parameter(torch.randn(n_layers, rank, d_in) * 0.2 / (d_in * rank) ** 0.5)
        self.b = nn.Parameter(torch.zeros(n_layers, rank, d_out))


def static_loras(modules: Sequence[ModuleRow], rank: int) -> nn.ModuleDict:
    """A `StaticLoRA` for each kind of the modules."""
    return nn.ModuleDict({kind: StaticLoRA(n, rank, *shape) for kind, (n, *shape) in shapes_by_kind(modules).items()})


def lora_of(parts: nn.ModuleDict, modules: Sequence[ModuleRow]) -> LoRABatch | None:
    """`StaticLoRA`s by kind -> one LoRA for the modules of these kinds; None without parts."""
    factors: dict[str, Factors] = {}
    for kind, part in parts.items():
        names = [name for name, _, of_kind, _, _ in modules if of_kind == kind]
        part = cast(StaticLoRA, part)
        for name, a, b in zip(names, part.a.unbind(0), part.b.unbind(0), strict=True):
            factors[name] = Factors(a[None], b.T[None])
    return LoRABatch(1, factors, {}) if factors else None


def shapes_by_kind(modules: Sequence[ModuleRow]) -> dict[str, tuple[int, int, int]]:
    """By kind, the number of modules and their shape (d_in, d_out)."""
    counts: dict[str, tuple[int, int, int]] = {}
    for _, _, kind, d_in, d_out in modules:
        counts[kind] = (counts.get(kind, (0, 0, 0))[0] + 1, d_in, d_out)
    return counts
