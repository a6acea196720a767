"""What only published checkpoints need: of Doc-to-LoRA latents that read first, a gated projection, MLPs in each layer
and chat markers around each chunk; of Text-to-LoRA the variant S.

Sources: Charakorn et al., arXiv 2602.15902, appendix on the architecture; arXiv 2506.06105.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.base.load import Base
from loracast.base.packages import Say
from loracast.encoders.features import Features
from loracast.encoders.hidden_states import HiddenStatesEncoder
from loracast.hypernets.doc_config import MOST_BLOCKS, DocToLoRAConfig
from loracast.hypernets.doc_to_lora import DocToLoRA, RankCodes
from loracast.hypernets.heads import per_layer
from loracast.hypernets.perceiver import GatedMLP, Perceiver, Queries
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig


@dataclass(frozen=True)
class PublishedDocToLoRAConfig(DocToLoRAConfig):
    """The config of a published checkpoint."""

    n_encoder_blocks: int = 0
    """Blocks in which `n_latents` latents read the features; 0 lets the decoder read the features themselves."""
    n_latents: int = 0
    """Latents of the encoder."""
    n_latent_mlps: int = 0
    """Residual MLPs with weights for each layer, between the decoder and the heads."""
    chat_prefix: tuple[int, ...] = ()
    """Token ids in front of each chunk that are read like the chunk's own: the chat template's turn of the user."""
    chat_suffix: tuple[int, ...] = ()
    """Token ids behind each chunk that are read like the chunk's own: where the assistant's turn begins."""
    with_final_norm: bool = False
    """Whether the states after the last of `reader_layers` pass the base's final norm."""
    chunk_tokens: int = 512
    """Longest chunk by default: as long as in the published training."""

    def _problems(self) -> list[str]:
        problems = [problem for problem in super()._problems() if not problem.startswith("reader_layers")]
        if len(self.reader_layers) not in (1, len(self.layers)):
            problems.append(f"reader_layers must be one, or one for each of the {len(self.layers)} targeted layers")
        if (self.n_encoder_blocks > 0) != (self.n_latents > 0):
            problems.append("n_encoder_blocks and n_latents must both be zero or both be positive")
        if max(self.n_encoder_blocks, self.n_latent_mlps) > MOST_BLOCKS:
            problems.append(f"more than {MOST_BLOCKS} blocks or MLPs")
        if self.d_values or self.memory_modules:
            problems.append("published checkpoints copy no values and have no memory")
        return problems

    @property
    def reads_each_layer(self) -> bool:
        """Whether each targeted layer reads hidden states of its own."""
        return len(self.reader_layers) > 1


class PublishedDocToLoRA(DocToLoRA):
    """Doc-to-LoRA with the reader of the published checkpoints."""

    config_class: ClassVar[Any] = PublishedDocToLoRAConfig

    def _build_reader(self, c: PublishedDocToLoRAConfig) -> None:
        block = (c.width, c.n_heads, c.n_kv_heads, c.head_dim, c.norm_eps)
        self.project = GatedMLP(c.d_features, 4 * c.d_features, c.width)
        if c.n_encoder_blocks:
            self.encoder_latents = Queries(1, c.n_latents, c.width, factorised=False)
            self.encoder = Perceiver(c.n_encoder_blocks, *block)
        groups = 1 if c.reads_each_layer else len(c.layers)  # else the layers are rows of the batch
        self.rank_latents = Queries(groups, len(c.kinds) * c.rank, c.width, factorised=False)
        self.decoder = Perceiver(c.n_decoder_blocks, *block)
        self.latent_mlps = nn.ModuleList(LatentMLP(len(c.layers), c.width) for _ in range(c.n_latent_mlps))

    @property
    def chunk_tokens(self) -> int:
        return self.config.chunk_tokens

    def hidden_states_encoder(self, base: Base) -> HiddenStatesEncoder:
        c = self.config
        return HiddenStatesEncoder(
            base.model, c.reader_layers, fingerprint=base.fingerprint.matrices, with_final_norm=c.with_final_norm
        )

    def encoder_for(self, base: Base | None, encoder: str | None, say: Say) -> Callable[[Any], Features]:
        encode, c = super().encoder_for(base, encoder, say), self.config
        return lambda rows: encode([[*c.chat_prefix, *row, *c.chat_suffix] for row in rows])

    def latents(self, features: Tensor, mask: Tensor | None = None) -> RankCodes:
        """The rank codes of chunks.

        Args:
            features: states [n, t, d], or [n, layers, t, d] when each layer reads features of its own.
            mask: [n, t], true where a token is real.
        """
        c = self.config
        n, n_layers = features.shape[0], len(c.layers)
        if c.reads_each_layer:
            features = features.flatten(0, 1)  # [n * layers, t, d]
            mask = None if mask is None else mask.repeat_interleave(n_layers, dim=0)
        context = self.project(self.standard(features))
        mask = None if mask is None else mask.bool()
        if c.n_encoder_blocks:
            context, mask = self.encoder(self.encoder_latents(), context, mask), None
        latents = self.decoder(self.rank_latents(), context, mask)
        latents = latents.view(n, n_layers, len(c.kinds) * c.rank, c.width)
        for mlp in self.latent_mlps:
            latents = mlp(latents)
        return RankCodes(functional.normalize(latents.float(), dim=-1), {})


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


@dataclass(frozen=True)
class PublishedTextToLoRAConfig(TextToLoRAConfig):
    """The config of a published checkpoint of Text-to-LoRA in its variant S."""

    def _problems(self) -> list[str]:
        return [*super()._problems(), *(["L and M are a TextToLoRA as they are"] if self.variant != "S" else [])]


class PublishedTextToLoRA(TextToLoRA):
    """Text-to-LoRA S as published: the row of a factor is asked for after the second block, by its position."""

    config_class: ClassVar[Any] = PublishedTextToLoRAConfig

    def __init__(self, config: PublishedTextToLoRAConfig):
        super().__init__(config)
        self.asked = nn.Parameter(torch.randn(len(config.target.kinds), 2, 1, config.width))
        self.position = nn.Sequential(nn.Embedding(config.rank, config.width), nn.LayerNorm(config.width))

    def latents(self, embeddings: Tensor) -> Tensor:
        """The heads' input [n, layers, kinds, sides, rows, head_width]."""
        second = self.blocks[1]
        x = self.module_conditions(embeddings)[..., None, None, :] + self.asked_norm(self.asked)
        row = self.position(torch.arange(self.config.rank, device=x.device))  # [rows, w]
        return self.last(x + second(x) + row + second(row))
