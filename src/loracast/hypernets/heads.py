"""From rank latents to the two factors of each target module. One head for each module kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.lora.algebra import Factors


def per_layer(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, layers, q, w] times each layer's own weight [layers, w, d] -> [n, layers, q, d], as one matmul a layer.

    Left to broadcasting, the weights are copied for each of the n chunks: five times slower, backward included.
    """
    n, _, q, _ = x.shape
    y = x.transpose(0, 1).flatten(1, 2) @ weight  # [layers, n * q, d]
    return y.unflatten(1, (n, q)).transpose(0, 1)


class LatentMLP(nn.Module):
    """A residual MLP on the rank latents with weights of its own in each layer: x + LN(W2 silu(W1 LN(x)))."""

    def __init__(self, n_layers: int, width: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.w1 = nn.Parameter(torch.randn(n_layers, width, 4 * width) / width**0.5)
        self.b1 = nn.Parameter(torch.zeros(n_layers, 1, 4 * width))
        self.w2 = nn.Parameter(torch.randn(n_layers, 4 * width, width) / (4 * width) ** 0.5)
        self.b2 = nn.Parameter(torch.zeros(n_layers, 1, width))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, latents: Tensor) -> Tensor:  # [n, layers, q, w] -> [n, layers, q, w]
        inner = functional.silu(per_layer(self.norm_in(latents), self.w1) + self.b1)
        return latents + self.norm_out(per_layer(inner, self.w2) + self.b2)


class FactorHead(nn.Module):
    """Unit rank latents [n, layers, r, w] -> A rows [n, layers, r, in] and B rows [n, layers, r, out].

    Every layer has a linear map of its own, since the layers' activations live in different spaces. With `shared_rank` k all
    layers share one map and each adds a correction of rank k: a large base stays affordable.
    """

    in_scale: Tensor
    out_scale: Tensor

    def __init__(
        self, n_layers: int, width: int, rank: int, d_in: int, d_out: int, shared_rank: int | None, whitened: bool
    ):
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        d = d_in + d_out
        # Published initialisation (arXiv 2602.15902); with whitening, unit latents give factors of unit response instead.
        std = 0.5 / (width + d * rank) ** 0.5
        columns = torch.cat([torch.full((d_in,), d_in**-0.5), torch.full((d_out,), d_out**-0.5)]) if whitened else std
        if shared_rank is None:
            self.weight = nn.Parameter(torch.randn(n_layers, width, d) * columns)
        else:
            self.shared = nn.Parameter(torch.randn(width, d) * columns)
            self.down = nn.Parameter(torch.randn(n_layers, width, shared_rank) / shared_rank**0.5)
            self.up = nn.Parameter(torch.randn(n_layers, shared_rank, d) * columns)
        self.scaler_a = nn.Parameter(torch.ones(n_layers, rank, 1))
        self.scaler_b = nn.Parameter(torch.zeros(n_layers, rank, 1))  # zero: the start is an exact no-op
        self.register_buffer("in_scale", torch.ones(n_layers, 1, d_in))
        self.register_buffer("out_scale", torch.ones(n_layers, 1, d_out))

    def forward(self, latents: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The factors; `scale` multiplies B."""
        if hasattr(self, "weight"):
            rows = per_layer(latents, self.weight)  # [n, layers, r, in + out]
        else:
            rows = latents @ self.shared + per_layer(per_layer(latents, self.down), self.up)
        a, b = rows.split([self.d_in, self.d_out], dim=-1)
        return a * (self.scaler_a * self.in_scale), b * (self.scaler_b * self.out_scale * scale)

    @torch.no_grad()
    def take_low_rank(self, other: FactorHead) -> None:
        """Take over a head that has a map of its own in each layer: the layers' mean, and the best correction of this rank to each."""
        mean = other.weight.mean(0)
        left, values, right = torch.linalg.svd(other.weight - mean, full_matrices=False)
        n = self.down.shape[-1]
        root = values[:, :n].sqrt()
        self.shared.copy_(mean)
        self.down.copy_(left[:, :, :n] * root[:, None])
        self.up.copy_(root[..., None] * right[:, :n])
        for name in ("scaler_a", "scaler_b", "in_scale", "out_scale"):
            getattr(self, name).copy_(getattr(other, name))

    @torch.no_grad()
    def set_units(self, in_rms: Tensor, out_rms: Tensor) -> None:
        """Express A in units of the modules' inputs [layers, d_in] and B in units of their outputs [layers, d_out].

        Inputs that hardly ever move are not blown up without bound; outputs are scaled by layer, not by element.
        """
        self.in_scale.copy_(1 / in_rms.clamp_min(in_rms.mean() * 0.05)[:, None])
        self.out_scale.copy_(out_rms.mean(-1)[:, None, None].expand_as(self.out_scale))


class ValuePointer(nn.Module):
    """Where in a chunk each rank latent points, so that its B row can copy what the base must be told to say that token.

    Without it, a head has to learn each token of the vocabulary by itself, through the narrow latents. The copy starts at zero.
    """

    def __init__(self, n_layers: int, d_features: int, width: int, rank: int):
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(d_features, width, bias=False)
        self.scaler = nn.Parameter(torch.zeros(n_layers, rank, 1))

    def weights(self, latents: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        """latents [n, q, w], standardised features [n, t, d], mask [n, t] -> a distribution over the tokens [n, q, t]."""
        scores = self.query(latents) @ self.key(features).transpose(1, 2) / latents.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        return scores.float().softmax(-1)


class StaticLoRA(nn.Module):
    """The document-independent LoRA of one module kind, appended once to every document's factors. B starts at zero."""

    def __init__(self, n_layers: int, rank: int, d_in: int, d_out: int):
        super().__init__()
        self.a = nn.Parameter(torch.randn(n_layers, rank, d_in) * 0.2 / (d_in * rank) ** 0.5)
        self.b = nn.Parameter(torch.zeros(n_layers, rank, d_out))

    def factors(self) -> list[Factors]:
        """Of each module A [r, in] and B [out, r], views."""
        return [Factors(a, b.T) for a, b in zip(self.a.unbind(0), self.b.unbind(0), strict=True)]
