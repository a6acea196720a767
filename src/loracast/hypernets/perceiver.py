"""The Perceiver of Doc-to-LoRA, which turns a chunk's features into rank latents, and the heads that make factors.

Learned latents attend to the features in the cross-attention blocks of Doc-to-LoRA (arXiv 2602.15902, appendix on the
architecture): grouped-query attention without positions, a SiLU-gated MLP, and RMSNorm on the latents, on the context,
after the attention, and before and after the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.hypernets.config import ModuleRow
from loracast.lora.algebra import LoRABatch
from loracast.lora.factors import Factors


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose sum of squares is in fp32 whatever the input's type; the result is of the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dtype == self.weight.dtype else super().forward(x.float()).to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, d_in: int, d_inner: int, d_out: int):
        super().__init__()
        self.gate = nn.Linear(d_in, d_inner, bias=False)
        self.up = nn.Linear(d_in, d_inner, bias=False)
        self.down = nn.Linear(d_inner, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out]
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class CrossAttention(nn.Module):
    """Latents attend to a context; `n_kv_heads` may be fewer than `n_heads` (grouped queries)."""

    def __init__(self, width: int, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.q = nn.Linear(width, n_heads * head_dim, bias=False)
        self.k = nn.Linear(width, n_kv_heads * head_dim, bias=False)
        self.v = nn.Linear(width, n_kv_heads * head_dim, bias=False)
        self.o = nn.Linear(n_heads * head_dim, width, bias=False)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Latents [n or 1, q, w], context [n, t, w], mask [n, t] true where real (None: all are) -> [n, q, w]."""
        n, n_latents = context.shape[0], latents.shape[1]
        q = self.q(latents).view(-1, n_latents, self.n_heads, self.head_dim).transpose(1, 2).expand(n, -1, -1, -1)
        k = self.k(context).view(n, -1, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(context).view(n, -1, self.n_kv_heads, self.head_dim).transpose(1, 2)
        attn_mask = None if mask is None else mask[:, None, None, :]
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, enable_gqa=self.n_kv_heads != self.n_heads
        )  # [n, heads, q, head_dim]
        return self.o(out.transpose(1, 2).reshape(n, n_latents, -1))


class CrossBlock(nn.Module):
    """One cross-attention block with its sandwich of norms."""

    def __init__(self, width: int, n_heads: int, n_kv_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.norm_latents = RMSNorm(width, eps=eps)
        self.norm_context = RMSNorm(width, eps=eps)
        self.attention = CrossAttention(width, n_heads, n_kv_heads, head_dim)
        self.norm_attended = RMSNorm(width, eps=eps)
        self.norm_before_mlp = RMSNorm(width, eps=eps)
        self.mlp = GatedMLP(width, 4 * width, width)
        self.norm_after_mlp = RMSNorm(width, eps=eps)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        attended = self.attention(self.norm_latents(latents), self.norm_context(context), mask)
        latents = latents + self.norm_attended(attended)
        return latents + self.norm_after_mlp(self.mlp(self.norm_before_mlp(latents)))


class ReaderBlock(nn.Module):
    """Bidirectional self-attention with rotary positions, then a gated MLP; an exact no-op at the start.

    It relates a value to the subject of its sentence; the base's causal states hold little of that at the value.
    """

    def __init__(self, width: int, n_heads: int, eps: float):
        super().__init__()
        self.n_heads = n_heads
        self.norm = RMSNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.norm_before_mlp = RMSNorm(width, eps=eps)
        self.mlp = GatedMLP(width, 4 * width, width)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.mlp.down.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [n, t, w], mask [n, t] true where real -> [n, t, w]."""
        n, t, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).view(n, t, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        )  # [n, heads, t, w/heads]
        out = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask[:, None, None, :])
        x = x + self.o(out.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.norm_before_mlp(x))


def rotate(x: Tensor, base: float = 1000.0) -> Tensor:
    """Rotary positions on x [..., t, d]: turns pairs of token i by i times their frequency (arXiv 2104.09864)."""
    t, d = x.shape[-2:]
    frequencies = base ** (-torch.arange(d // 2, device=x.device, dtype=torch.float32) * 2 / d)
    angles = torch.arange(t, device=x.device, dtype=torch.float32)[:, None] * frequencies  # [t, d / 2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Perceiver(nn.Module):
    """A stack of cross-attention blocks: initial latents [q, w] and context [n, t, w] -> latents [n, q, w]."""

    def __init__(self, n_blocks: int, width: int, n_heads: int, n_kv_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(width, n_heads, n_kv_heads, head_dim, eps) for _ in range(n_blocks))
        self.norm = RMSNorm(width, eps=eps)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        latents = latents[None]  # the first block's queries are the same for all and are computed once
        for block in self.blocks:
            latents = block(latents, context, mask)
        return self.norm(latents)


class Queries(nn.Module):
    """Learned latents for `groups` x `per_group` positions: free, or the sum of a group and a position embedding.

    The sum shares parameters among the ranks of a layer, and among the layers of a rank; it learns faster.
    """

    def __init__(self, groups: int, per_group: int, width: int, factorised: bool):
        super().__init__()
        self.factorised = factorised
        if factorised:
            self.group = nn.Parameter(torch.randn(groups, 1, width))
            self.position = nn.Parameter(torch.randn(1, per_group, width))
        else:
            self.free = nn.Parameter(torch.randn(groups * per_group, width))

    def forward(self) -> Tensor:  # [groups * per_group, width]
        return (self.group + self.position).flatten(0, 1) if self.factorised else self.free


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

    def weights(self, latents: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """Latents [n, q, w], standardised features [n, t, d], mask [n, t] -> distributions over tokens [n, q, t]."""
        scores = self.query(latents) @ self.key(features).transpose(1, 2) / latents.shape[-1] ** 0.5
        return scores.masked_fill(~mask[:, None], float("-inf")).float().softmax(-1)


class StaticLoRA(nn.Module):
    """The static LoRA of one module kind, appended once to every document's factors. B starts at zero."""

    def __init__(self, n_layers: int, rank: int, d_in: int, d_out: int):
        super().__init__()
        self.a = nn.Parameter(torch.randn(n_layers, rank, d_in) * 0.2 / (d_in * rank) ** 0.5)
        self.b = nn.Parameter(torch.zeros(n_layers, rank, d_out))


class StaticLoRAs(nn.ModuleDict):
    """By module kind, the `StaticLoRA` of some modules; none at all for a rank of 0."""

    def __init__(self, modules: Sequence[ModuleRow], rank: int):
        shapes = shapes_by_kind(modules) if rank else {}
        super().__init__({kind: StaticLoRA(n, rank, *shape) for kind, (n, *shape) in shapes.items()})

    def __getitem__(self, kind: str) -> StaticLoRA:
        return cast(StaticLoRA, super().__getitem__(kind))

    def lora(self, modules: Sequence[ModuleRow]) -> LoRABatch:
        """One LoRA for those of the modules whose kinds have a static LoRA, differentiable; it may be empty."""
        factors: dict[str, Factors] = {}
        for kind in self:
            names = [name for name, _, of_kind, _, _ in modules if of_kind == kind]
            for name, a, b in zip(names, self[kind].a.unbind(0), self[kind].b.unbind(0), strict=True):
                factors[name] = Factors(a[None], b.T[None])
        return LoRABatch(1, factors, {})


def shapes_by_kind(modules: Sequence[ModuleRow]) -> dict[str, tuple[int, int, int]]:
    """By kind, the number of modules and their shape (d_in, d_out)."""
    counts: dict[str, tuple[int, int, int]] = {}
    for _, _, kind, d_in, d_out in modules:
        counts[kind] = (counts.get(kind, (0, 0, 0))[0] + 1, d_in, d_out)
    return counts
