"""Doc-to-LoRA: a chunk's features become the factors of a LoRA in one forward pass (arXiv 2602.15902).

    states [n, t, d] -> projection -> Perceiver -> rank latents [n, layers, r, w] -> unit length
    rank latents -> a head for each module kind -> A [n, modules, r, in], B [n, modules, r, out]
    rank latents -> pointers into the chunk -> values that B rows copy (optional)
    features -> an associative memory in modules of another kind -> A, B of these modules (optional; memory.py)

A hypernetwork may have the memory alone, and nothing of the first three lines.

The chunks of a document are merged by joining their factors along the rank.
This module knows shapes, never a base's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.base.embedded import Say
from loracast.base.forward import pad_right
from loracast.base.load import Base
from loracast.errors import EncoderError, HypernetworkError
from loracast.hypernets.associative_memory import AssociativeMemory, MemoryWrites
from loracast.hypernets.config import DocToLoRAConfig
from loracast.hypernets.encoders import Features, HiddenStatesEncoder
from loracast.hypernets.perceiver import FactorHead, Perceiver, Queries, StaticLoRAs, ValuePointer, shapes_by_kind
from loracast.hypernets.protocol import Cast, Hypernetwork
from loracast.hypernets.store import Modality
from loracast.lora.algebra import LoRABatch
from loracast.lora.factors import Rows


class RankCodes(NamedTuple):
    """A latent for each layer and rank, from which the heads make A and B."""

    latents: Tensor
    """[n, layers, kinds * r, w], of length 1."""
    pointed: dict[str, Tensor]
    """By kind that copies values, the values that its latents point to [n, layers, r, d_values]."""


class DocToLoRA(Hypernetwork):
    """The hypernetwork for documents. Initialised as an exact no-op: every B scaler starts at zero."""

    config_class: ClassVar[Any] = DocToLoRAConfig
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: DocToLoRAConfig):
        super().__init__()
        self.config = c = config
        n_layers = len(c.layers)
        if c.modules:
            self._build_reader(config)
        shapes = {kind: (d_in, d_out) for _, _, kind, d_in, d_out in c.modules}
        self.heads = nn.ModuleDict(
            {kind: FactorHead(n_layers, c.width, c.rank, *shapes[kind], c.head_shared_rank) for kind in c.kinds}
        )
        copying = [kind for kind in c.kinds if c.d_values and shapes[kind][1] == c.d_values]
        self.pointers = nn.ModuleDict({k: ValuePointer(n_layers, c.d_features, c.width, c.rank) for k in copying})
        self.static = StaticLoRAs(c.modules, c.static_rank)
        self.static.update(dict(StaticLoRAs(c.static_modules, c.static_modules_rank).items()))
        self.encoder_lora = StaticLoRAs(c.encoder_modules, c.encoder_rank)
        self.memory = AssociativeMemory(c) if c.memory_modules else None
        self.register_buffer("feature_mean", torch.zeros(c.d_features))
        self.register_buffer("feature_std", torch.ones(c.d_features))

    def _build_reader(self, c: Any) -> None:
        """Build what turns features into rank latents."""
        n_layers = len(c.layers)
        self.project: nn.Module = nn.Linear(c.d_features, c.width, bias=False)
        self.rank_latents = Queries(n_layers, len(c.kinds) * c.rank, c.width, factorised=n_layers > 1)
        self.decoder = Perceiver(c.n_decoder_blocks, c.width, c.n_heads, c.n_kv_heads, c.head_dim, c.norm_eps)

    @property
    def modality(self) -> Modality:
        return "document"

    def hidden_states_encoder(self, base: Base, reader_layer: int | None = None) -> HiddenStatesEncoder:
        """The base as the encoder of documents, and for a reader if a layer is given."""
        c = self.config
        return HiddenStatesEncoder(
            base.model,
            c.reader_layers,
            with_values=c.d_values > 0,
            prefix=c.prefix,
            key_modules=[name for name, *_ in c.memory_modules],
            tokenizer=base.tokenizer,
            fingerprint=base.fingerprint.matrices,
            lora=self.encoder_lora_batch,
            with_final_norm=getattr(c, "with_final_norm", False),
            reader_layer=reader_layer,
        )

    def encoder_for(self, base: Base | None, encoder: str | None, say: Say) -> Callable[[Any], Features]:
        if not self.needs_base:
            raise HypernetworkError(
                "this hypernetwork reads images, which become words for that of documents now: give one that `loracast "
                "train doc` made"
            )
        if base is None or encoder is not None:
            raise EncoderError("this hypernetwork reads documents with its base: give it, and no other encoder")
        read = self.hidden_states_encoder(base, None if self.reader is None else self.reader.config.layer)
        pad_id, device = base.pad_id, base.device
        if read.d_features != self.config.d_features:
            raise HypernetworkError(
                f"the hypernetwork reads {self.config.d_features} features a token, and this base gives "
                f"{read.d_features}: give the base that it was made for"
            )

        def encode(token_rows: Sequence[Sequence[int]]) -> Features:
            ids, mask = pad_right(token_rows, pad_id)
            return read(ids.to(device), mask.to(device))

        return encode

    def standard(self, states: Tensor) -> Tensor:
        """States [..., d_features] in the hypernetwork's units."""
        return (states - self.feature_mean) / self.feature_std

    def head(self, kind: str) -> FactorHead:
        """The head of a module kind."""
        return cast(FactorHead, self.heads[kind])

    def pointer(self, kind: str) -> ValuePointer:
        """The pointer to values of a module kind."""
        return cast(ValuePointer, self.pointers[kind])

    def encoder_lora_batch(self) -> LoRABatch | None:
        """The encoder LoRA, which the base carries while it reads a document, differentiable; None without one."""
        return self.encoder_lora.lora(self.config.encoder_modules) if self.encoder_lora else None

    def static_rows(self) -> Rows:
        return {k: (self.static[k].a, self.static[k].b) for k in self.config.target.kinds if k in self.static}

    @property
    def memory_kinds(self) -> tuple[str, ...]:
        return tuple({kind for _, _, kind, *_ in self.config.memory_modules})

    def latents(self, features: Tensor, mask: Tensor) -> RankCodes:
        """The rank codes of chunks: states [n, t, d] or [n, layers, t, d], mask [n, t] true where a token is real."""
        c = self.config
        standard = self.standard(features)
        latents = self.read(standard, mask)
        pointed = {}
        if self.pointers:
            values = features[..., -c.d_values :].float()  # [n, t, d_values]
            by_kind = latents.unflatten(1, (-1, len(c.kinds), c.rank)).unbind(2)  # [n, layers, r, w] each
            for kind, part in zip(c.kinds, by_kind, strict=True):
                if kind in self.pointers:
                    weights = self.pointer(kind).weights(part.flatten(1, 2), standard, mask)  # [n, layers * r, t]
                    pointed[kind] = (weights @ values).view(-1, len(c.layers), c.rank, c.d_values)
        latents = latents.view(-1, len(c.layers), len(c.kinds) * c.rank, c.width)
        return RankCodes(functional.normalize(latents.float(), dim=-1), pointed)

    def read(self, standard: Tensor, mask: Tensor) -> Tensor:
        """Standardised features of chunks -> their rank latents [n, layers * kinds * r, w]."""
        return self.decoder(self.rank_latents(), self.project(standard), mask)

    def expand(self, codes: RankCodes) -> Rows:
        """Rank latents -> rows of `modules`, in bf16 under autocast to bf16 without gradients, else in fp32."""
        c = self.config
        in_bf16 = not torch.is_grad_enabled() and torch.is_autocast_enabled(codes.latents.device.type)
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        by_kind = codes.latents.unflatten(2, (len(c.kinds), c.rank)).unbind(2)
        rows: Rows = {}
        for kind, part in zip(c.kinds, by_kind, strict=True):
            a, b = self.head(kind)(part, c.scale)
            if kind in codes.pointed:
                b = torch.addcmul(b, codes.pointed[kind], self.pointer(kind).scaler, value=c.scale)
            rows[kind] = (a.to(dtype), b.to(dtype))
        return rows

    def cast_and_write(self, features: Features, folds: bool = False) -> tuple[Rows, MemoryWrites | None]:
        """Features of n chunks -> their rows, zero for padding, and what the memory wrote; differentiable.

        Args:
            folds: the factors of the memory's modules go into A, so that B rows [n, 1, r, out] are kept once for all
                modules. Training has them in B, since the memory losses compare keys as they are.
        """
        n, t = features.n_chunks, features.states.shape[-2]
        mask = features.mask
        mask = torch.ones(n, t, dtype=torch.bool, device=features.states.device) if mask is None else mask.bool()
        is_real = mask.any(-1)  # [n]
        mask = mask | ~is_real[:, None]  # a chunk of padding attends to its padding: attention to nothing is NaN
        rows, writes = self.rows_and_writes(features, mask, folds)
        if not is_real.all():
            real = is_real[:, None, None, None]
            rows = {kind: (a * real, b * real) for kind, (a, b) in rows.items()}
        return rows, writes

    def rows_and_writes(
        self, features: Features, mask: Tensor, folds: bool = False
    ) -> tuple[Rows, MemoryWrites | None]:
        """The same for chunks [n, t] that all have real tokens, where the mask is true."""
        n = features.n_chunks
        states = features.states.float()
        rows = self.expand(self.latents(states, mask)) if self.config.modules else {}
        writes = None
        if self.memory is not None:
            a, b, writes = self.memory(self.standard(states), features, mask)
            scales = self.memory.scales
            rows[self.config.memory_modules[0][2]] = (a * scales, b[:, None]) if folds else (a, b[:, None] * scales)
        for kind, (n_modules, d_in, d_out) in shapes_by_kind(self.config.static_modules).items():
            rows[kind] = (states.new_zeros(n, n_modules, 0, d_in), states.new_zeros(n, n_modules, 0, d_out))
        return rows, writes

    def cast(self, features: Features) -> Cast:
        """Features of n chunks -> their rows, and for rows of a memory the token that each belongs to."""
        rows, writes = self.cast_and_write(features, folds=True)
        if writes is None or writes.tokens is None:
            return Cast(rows)
        return Cast(rows, dict.fromkeys(self.memory_kinds, writes.tokens))
