"""Doc-to-LoRA: a chunk's features become the factors of a LoRA in one forward pass (arXiv 2602.15902).

    features [n, t, d] -> projection -> Perceiver encoder (optional) -> Perceiver decoder -> rank latents [n, layers, r, w]
    rank latents -> residual MLPs (optional) -> unit length -> a head for each module kind -> A [n, layers, r, in], B [n, layers, r, out]

The chunks of a document are merged by joining their factors along the rank. Knows shapes, never a base's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.errors import ConfigError
from loracast.hypernets.heads import FactorHead, LatentMLP, SharedLoRA
from loracast.hypernets.perceiver import GatedMLP, Perceiver, Queries
from loracast.lora import Factors, LoRA, LoRABatch
from loracast.target import KINDS, Target, TargetModule


@dataclass(frozen=True)
class DocToLoRAConfig:
    """Everything that fixes the architecture; the shapes of the base are in `modules`."""

    d_features: int
    """Width of the encoder's features."""
    modules: tuple[tuple[str, int, str, int, int], ...]
    """The target, one (name, layer, kind, d_in, d_out) for each module, in the target's order."""
    reader_layers: tuple[int, ...] = (8,)
    """After which blocks of the base its hidden states are read; one for all layers, or one for each targeted layer."""
    rank: int = 8
    """Rank of one chunk's LoRA."""
    width: int = 256
    """Width of the latents."""
    n_heads: int = 8
    """Query heads of a cross-attention."""
    n_kv_heads: int = 8
    """Key and value heads; fewer than `n_heads` means grouped queries."""
    head_dim: int = 32
    """Width of one attention head."""
    n_encoder_blocks: int = 0
    """Blocks in which `n_latents` latents read the features; 0 lets the decoder read the features themselves."""
    n_latents: int = 0
    """Latents of the encoder."""
    n_decoder_blocks: int = 3
    """Blocks in which the rank latents read the encoder's latents (or the features)."""
    gated_projection: bool = False
    """Project the features by a gated MLP of four times their width (as published) in place of one linear map."""
    factorised_queries: bool = True
    """Start the rank latents from the sum of a layer and a rank embedding in place of free vectors."""
    n_latent_mlps: int = 0
    """Residual MLPs with weights for each layer, between the decoder and the heads (published: 1)."""
    head_shared_rank: int | None = None
    """Share one head among the layers and correct it by this rank in each; None gives each layer a head of its own."""
    document_independent_rank: int = 0
    """Rank of the learned LoRA that is the same for every document; 0 for none."""
    scale: float = 45.25
    """Factor on every delta, folded into B (published: 2 * rank ** 1.5, not divided by the rank)."""
    whitened: bool = False
    """Express factors in units of the base's own activations, measured by `calibrate`."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        problems = []
        if not self.modules:
            problems.append("no target modules")
        if len({kind for _, _, kind, _, _ in self.modules}) * len(self.layers) != len(self.modules):
            problems.append("every targeted layer must target the same kinds")
        if len(self.reader_layers) not in (1, len(self.layers)):
            problems.append(f"reader_layers must be one, or one for each of the {len(self.layers)} targeted layers")
        if (self.n_encoder_blocks > 0) != (self.n_latents > 0):
            problems.append("n_encoder_blocks and n_latents must both be zero or both be positive")
        if self.n_decoder_blocks < 1 or self.rank < 1 or self.n_heads % self.n_kv_heads:
            problems.append("n_decoder_blocks and rank must be at least 1 and n_heads a multiple of n_kv_heads")
        if problems:
            raise ConfigError("bad DocToLoRAConfig: " + "; ".join(problems))

    @classmethod
    def for_target(cls, target: Target, d_features: int, **options) -> DocToLoRAConfig:
        modules = tuple((m.name, m.layer, m.kind, m.d_in, m.d_out) for m in target.modules)
        return cls(d_features=d_features, modules=modules, **options)

    @property
    def target(self) -> Target:
        return Target(tuple(TargetModule(*module) for module in self.modules))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for _, layer, _, _, _ in self.modules}))

    @property
    def kinds(self) -> tuple[str, ...]:
        present = {kind for _, _, kind, _, _ in self.modules}
        return tuple(kind for kind in KINDS if kind in present)

    @property
    def reads_each_layer(self) -> bool:
        return len(self.reader_layers) > 1


class DocToLoRA(nn.Module):
    """The hypernetwork. Its start is an exact no-op, because every B scaler starts at zero."""

    def __init__(self, config: DocToLoRAConfig):
        super().__init__()
        self.config = c = config
        n_layers, n_kinds = len(c.layers), len(c.kinds)
        self.project: nn.Module = (
            GatedMLP(c.d_features, 4 * c.d_features, c.width)
            if c.gated_projection
            else nn.Linear(c.d_features, c.width, bias=False)
        )
        block = (c.width, c.n_heads, c.n_kv_heads, c.head_dim, c.norm_eps)
        if c.n_encoder_blocks:
            self.encoder_latents = Queries(1, c.n_latents, c.width, factorised=False)
            self.encoder = Perceiver(c.n_encoder_blocks, *block)
        groups = 1 if c.reads_each_layer else n_layers  # reading layer by layer, the layers ride in the batch
        self.rank_latents = Queries(groups, n_kinds * c.rank, c.width, c.factorised_queries and groups > 1)
        self.decoder = Perceiver(c.n_decoder_blocks, *block)
        self.latent_mlps = nn.ModuleList(LatentMLP(n_layers, c.width) for _ in range(c.n_latent_mlps))
        shapes = {m.kind: (m.d_in, m.d_out) for m in c.target.modules}
        self.heads = nn.ModuleDict(
            {k: FactorHead(n_layers, c.width, c.rank, *shapes[k], c.head_shared_rank, c.whitened) for k in c.kinds}
        )
        self.document_independent = nn.ModuleDict(
            {k: SharedLoRA(n_layers, c.document_independent_rank, *shapes[k]) for k in c.kinds}
            if c.document_independent_rank
            else {}
        )
        self.register_buffer("feature_mean", torch.zeros(c.d_features))
        self.register_buffer("feature_std", torch.ones(c.d_features))

    @torch.no_grad()
    def calibrate(
        self, features: Tensor, in_rms: dict[str, Tensor] | None = None, out_rms: dict[str, Tensor] | None = None
    ) -> None:
        """Measure once, before training, the units of the base's activations.

        Args:
            features: real tokens' features [tokens, d_features]; their mean and deviation standardise the reader's input.
            in_rms: by kind, the root mean square of each module's input [layers, d_in], out_rms of its output [layers, d_out].
                Only for a whitened head.
        """
        self.feature_mean.copy_(features.mean(0))
        self.feature_std.copy_(features.std(0).clamp_min(1e-3))
        for kind, head in self.heads.items():
            if in_rms is not None:
                head.in_scale.copy_(1 / in_rms[kind].clamp_min(in_rms[kind].mean() * 0.05)[:, None])
            if out_rms is not None:
                head.out_scale.copy_(out_rms[kind].mean(-1)[:, None, None].expand_as(head.out_scale))

    def latents(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Unit rank latents of chunks.

        Args:
            features: [n, t, d], or [n, layers, t, d] when each layer reads features of its own.
            mask: [n, t], true where a token is real.

        Returns:
            [n, layers, kinds * rank, width], each of length 1. With the heads they are all that a chunk's LoRA needs.
        """
        c = self.config
        n, n_layers = features.shape[0], len(c.layers)
        if c.reads_each_layer:
            features = features.flatten(0, 1)  # [n * layers, t, d]
            mask = None if mask is None else mask.repeat_interleave(n_layers, dim=0)
        context = self.project((features - self.feature_mean) / self.feature_std)
        mask = None if mask is None else mask.bool()
        if c.n_encoder_blocks:
            start = self.encoder_latents().expand(context.shape[0], -1, -1)
            context, mask = self.encoder(start, context, mask), None
        latents = self.decoder(self.rank_latents().expand(context.shape[0], -1, -1), context, mask)
        latents = latents.view(n, n_layers, len(c.kinds) * c.rank, c.width)
        for mlp in self.latent_mlps:
            latents = mlp(latents)
        return functional.normalize(latents.float(), dim=-1)

    def expand(self, latents: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Rank latents -> by kind, A [n, layers, r, in] and B [n, layers, r, out] (B's rows are the columns of the factor)."""
        c = self.config
        by_kind = latents.unflatten(2, (len(c.kinds), c.rank)).unbind(2)
        pairs = {kind: self.heads[kind](part) for kind, part in zip(c.kinds, by_kind, strict=True)}
        return {kind: (a, b * c.scale) for kind, (a, b) in pairs.items()}

    def forward(self, features: Tensor, mask: Tensor | None = None, chunks_per_document: int = 1) -> LoRABatch:
        """Chunks -> one LoRA for each document, differentiable.

        Args:
            features, mask: as in `latents`; the chunks of a document are neighbours.
            chunks_per_document: K; the factors of K neighbours are joined along the rank.
        """
        return self.merge(self.expand(self.latents(features, mask)), chunks_per_document)

    def merge(self, expanded: dict[str, tuple[Tensor, Tensor]], chunks_per_document: int) -> LoRABatch:
        """Factors of chunks, as `expand` gives them -> one LoRA of rank K * r (+ the document-independent one) each."""
        c = self.config
        factors: dict[str, Factors] = {}
        n_documents = 0
        by_kind = {kind: self._joined(kind, a, b, chunks_per_document) for kind, (a, b) in expanded.items()}
        for module in c.target.modules:
            a, b = by_kind[module.kind]
            layer = c.layers.index(module.layer)
            n_documents = a[layer].shape[0]
            factors[module.name] = Factors(a[layer], b[layer].transpose(1, 2))
        return LoRABatch(n_documents, factors, {})

    def _joined(self, kind: str, a: Tensor, b: Tensor, k: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """By layer, A [documents, K*r (+ shared), in] and B rows [documents, K*r (+ shared), out].

        The layers are unbound once: slicing a stacked tensor inside each hook would build a full zero gradient for each layer.
        """
        sides = []
        for name, rows in (("a", a), ("b", b)):
            n, n_layers, rank, d = rows.shape
            joined = (
                rows.view(n // k, k, n_layers, rank, d).permute(2, 0, 1, 3, 4).reshape(n_layers, n // k, k * rank, d)
            )
            if kind in self.document_independent:
                shared = getattr(self.document_independent[kind], name)  # [layers, shared rank, d]
                joined = torch.cat([joined, shared[:, None].expand(-1, n // k, -1, -1).to(joined.dtype)], dim=2)
            sides.append(joined.unbind(0))
        return sides[0], sides[1]

    def document_independent_lora(self) -> LoRA | None:
        """The learned LoRA that every document shares, or None."""
        c = self.config
        if not self.document_independent:
            return None
        return LoRA(
            {
                m.name: Factors(
                    self.document_independent[m.kind].a[c.layers.index(m.layer)].detach(),
                    self.document_independent[m.kind].b[c.layers.index(m.layer)].detach().T,
                )
                for m in c.target.modules
            }
        )
