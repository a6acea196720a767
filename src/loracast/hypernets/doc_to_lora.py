"""Doc-to-LoRA: a chunk's features become the factors of a LoRA in one forward pass (arXiv 2602.15902).

    states [n, t, d] -> projection -> Perceiver encoder (optional) -> Perceiver decoder -> rank latents [n, layers, r, w]
    features -> where each rank latent points -> values that its B row copies (optional)
    rank latents -> residual MLPs (optional) -> unit length -> a head for each module kind -> A [n, layers, r, in], B [n, layers, r, out]
    features -> an associative memory in modules of another kind (optional; memory.py) -> A, B of these modules

The chunks of a document are merged by joining their factors along the rank. Knows shapes, never a base's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.encoders.features import OF_THE_BASE, Features
from loracast.errors import ConfigError
from loracast.hypernets.heads import FactorHead, LatentMLP, StaticLoRA, ValuePointer
from loracast.hypernets.memory import AssociativeMemory, MemoryWrites
from loracast.hypernets.perceiver import GatedMLP, Perceiver, Queries
from loracast.lora.algebra import Factors, LoRABatch
from loracast.lora.merge import Merging
from loracast.lora.target import KINDS, Target, TargetModule, problems_of


@dataclass(frozen=True)
class DocToLoRAConfig:
    """Everything that fixes the architecture; the shapes of the base are in `modules`."""

    d_features: int
    """Width of the encoder's features, values included."""
    modules: tuple[tuple[str, int, str, int, int], ...]
    """The target, one (name, layer, kind, d_in, d_out) for each module, in the target's order."""
    encoder: str = OF_THE_BASE
    """What the features come from: the base itself, or an encoder of another sense by its name."""
    encoder_fingerprint: str = ""
    """Of that encoder; the base has fingerprints of its own."""
    reader_layers: tuple[int, ...] = (8,)
    """After which blocks of the base its hidden states are read; one for all layers, or one for each targeted layer."""
    prefix: tuple[int, ...] = ()
    """Token ids read before each chunk and then dropped: the first token of a text is an attention sink and says nothing of itself."""
    encoder_modules: tuple[tuple[str, int, str, int, int], ...] = ()
    """Modules of the base that carry a trained LoRA while it reads a document, and only then; with none, the base reads as it is."""
    encoder_rank: int = 8
    """Rank of that LoRA."""
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
    among_latents: bool = False
    """In each of the decoder's blocks, let the rank latents attend to each other too."""
    gated_projection: bool = False
    """Project the features by a gated MLP of four times their width (as published) in place of one linear map."""
    factorised_queries: bool = True
    """Start the rank latents from the sum of a layer and a rank embedding in place of free vectors."""
    n_latent_mlps: int = 0
    """Residual MLPs with weights for each layer, between the decoder and the heads (published: 1)."""
    head_shared_rank: int | None = None
    """Share one head among the layers and correct it by this rank in each; None gives each layer a head of its own."""
    static_rank: int = 0
    """Rank of the learned LoRA that is the same for every document; 0 for none."""
    static_modules: tuple[tuple[str, int, str, int, int], ...] = ()
    """Further modules, of kinds that `modules` and the memory leave alone, that receive nothing but a LoRA that is the same for every document.

    With it the base learns to bring a question to where its answer begins, which is where a memory is asked."""
    static_modules_rank: int = 16
    """Rank of the LoRA in `static_modules`."""
    scale: float = 45.25
    """Factor on every delta, folded into B (published: 2 * rank ** 1.5, not divided by the rank)."""
    whitened: bool = False
    """Express factors in units of the base's own activations, measured by `calibrate`."""
    d_values: int = 0
    """The last columns of the features are values that B rows may copy: what the base must be told to say a token. 0 for none."""
    memory_modules: tuple[tuple[str, int, str, int, int], ...] = ()
    """Modules in which an associative memory lies: all of one kind, none of `modules`. Empty for none."""
    memory_rank: int = 64
    """Most tokens of a chunk that the memory stores."""
    memory_heads: int = 3
    """Ways in which a token looks at others for its keys, beside the token before it: at its owner, at its sentence's end, and freely."""
    memory_question_rank: int = 96
    """Rank of the map from the end of a sentence to its question."""
    memory_blocks: int = 2
    """Blocks of self-attention among a chunk's tokens, in which the memory reads them."""
    max_unscaled_chunks: int | None = None
    """Chunks of one document up to which the Perceiver's factors add up; those of K more count this / K each. None for no limit.

    What all of them have in common would grow with the document and drown what the memory, which is never scaled, has found."""
    key_decorrelation: float | None = None
    """Ridge with which the memory's keys are told apart where chunks are merged (merging.py); None: they are not."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        problems = problems_of(self.modules)
        if len(self.reader_layers) not in (1, len(self.layers)):
            problems.append(f"reader_layers must be one, or one for each of the {len(self.layers)} targeted layers")
        if (self.n_encoder_blocks > 0) != (self.n_latents > 0):
            problems.append("n_encoder_blocks and n_latents must both be zero or both be positive")
        if min(self.n_decoder_blocks, self.rank, self.n_kv_heads) < 1 or self.n_heads % self.n_kv_heads:
            problems.append(
                "n_decoder_blocks, rank and n_kv_heads must be at least 1 and n_heads a multiple of n_kv_heads"
            )
        if self.d_values and self.d_values not in {d_out for _, _, _, _, d_out in self.modules}:
            problems.append(
                f"no target module writes outputs of {self.d_values} numbers for the values to be copied to"
            )
        if self.memory_modules:
            memory_kinds = {kind for _, _, kind, _, _ in self.memory_modules}
            if len({module[2:] for module in self.memory_modules}) != 1 or not memory_kinds <= set(KINDS):
                problems.append("the memory's modules must be of one kind and one shape")
            if memory_kinds & {kind for _, _, kind, _, _ in self.modules}:
                problems.append("the memory's modules must be of a kind that `modules` leaves alone")
            if self.d_values != self.memory_modules[0][4] or self.reads_each_layer:
                problems.append("a memory needs values as wide as its modules' outputs, and one layer that is read")
            if list(self.memory_modules) != sorted(self.memory_modules, key=lambda module: module[1]):
                problems.append("the memory's modules are not in the order of their layers")
            if min(self.memory_rank, self.memory_question_rank, self.memory_heads - 1) < 1:
                problems.append("memory_rank and memory_question_rank must be at least 1, memory_heads at least 2")
        if self.static_modules:
            problems += problems_of(self.static_modules)
            static_kinds = {kind for _, _, kind, _, _ in self.static_modules}
            if static_kinds & {kind for _, _, kind, _, _ in (*self.modules, *self.memory_modules)}:
                problems.append("the static modules must be of kinds that `modules` and the memory leave alone")
            if self.static_modules_rank < 1:
                problems.append("static_modules_rank must be at least 1")
        if self.encoder_modules:
            problems += problems_of(self.encoder_modules)
            if self.encoder_rank < 1 or self.encoder != OF_THE_BASE:
                problems.append("encoder_modules need an encoder_rank of at least 1, and the base as the encoder")
        if self.max_unscaled_chunks is not None and self.max_unscaled_chunks < 1:
            problems.append("max_unscaled_chunks must be at least 1")
        if self.key_decorrelation is not None and not (self.memory_modules and self.key_decorrelation > 0):
            problems.append("key_decorrelation must be above 0, and there must be a memory")
        if problems:
            raise ConfigError("bad DocToLoRAConfig: " + "; ".join(problems))

    @classmethod
    def for_target(cls, target: Target, d_features: int, **options) -> DocToLoRAConfig:
        return cls(d_features=d_features, modules=target.rows, **options)

    @property
    def target(self) -> Target:
        """All modules that receive factors, the memory's and the static ones included."""
        of_all = (*self.modules, *self.memory_modules, *self.static_modules)
        ordered = sorted(of_all, key=lambda module: (module[1], KINDS.index(module[2])))
        return Target(tuple(TargetModule(*module) for module in ordered))

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of one chunk's LoRA, by kind; 0 for kinds that all documents share."""
        others = {kind: self.memory_rank for _, _, kind, _, _ in self.memory_modules}
        others |= {kind: 0 for _, _, kind, _, _ in self.static_modules}
        return {kind: others.get(kind, self.rank) for kind in self.target.kinds}

    @property
    def merging(self) -> Merging:
        """How the chunks of a document become one LoRA."""
        most, ridge = self.max_unscaled_chunks, self.key_decorrelation
        return Merging(
            {} if most is None else dict.fromkeys(self.kinds, most),
            {} if ridge is None else {self.memory_modules[0][2]: ridge},
        )

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


ChunkFactors = dict[str, tuple[Tensor, Tensor]]
"""By module kind, A [n, modules, r, in] and B rows [n, modules, r, out] of n chunks."""


class RankCodes(NamedTuple):
    """With the heads, all that a chunk's LoRA needs, but for the memory."""

    latents: Tensor
    """[n, layers, kinds * r, w], of length 1."""
    pointed: dict[str, Tensor]
    """By kind that copies values, those that its latents point to [n, layers, r, d_values]."""


class Cast(NamedTuple):
    """What a training step gets of some documents."""

    loras: LoRABatch
    """One for each document, differentiable."""
    writes: MemoryWrites | None
    """What the memory wrote."""
    factors: ChunkFactors
    """Of the chunks, before merging."""
    n_real: int
    """Chunks that are not padding; the factors of the others are zero."""

    def mean_size(self) -> Tensor:
        """[]: the mean absolute value of the chunks' own factors, chunks of padding left out."""
        sides = [side for pair in self.factors.values() for side in pair]
        total = torch.stack([side.abs().sum(dtype=torch.float32) for side in sides]).sum()
        return total / (self.n_real * sum(side[0].numel() for side in sides))


class DocToLoRA(nn.Module):
    """The hypernetwork. Its start is an exact no-op, because every B scaler starts at zero."""

    config_class: ClassVar = DocToLoRAConfig
    feature_mean: Tensor
    feature_std: Tensor

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
        self.decoder = Perceiver(c.n_decoder_blocks, *block, c.among_latents)
        self.latent_mlps = nn.ModuleList(LatentMLP(n_layers, c.width) for _ in range(c.n_latent_mlps))
        shapes = {kind: (d_in, d_out) for _, _, kind, d_in, d_out in c.modules}
        self.heads = nn.ModuleDict(
            {k: FactorHead(n_layers, c.width, c.rank, *shapes[k], c.head_shared_rank, c.whitened) for k in c.kinds}
        )
        copying = [k for k in c.kinds if c.d_values and shapes[k][1] == c.d_values]
        self.pointers = nn.ModuleDict({k: ValuePointer(n_layers, c.d_features, c.width, c.rank) for k in copying})
        self.static = nn.ModuleDict()
        for modules, rank in ((c.modules, c.static_rank), (c.static_modules, c.static_modules_rank)):
            for kind, (n_modules, d_in, d_out) in _by_kind(modules).items() if rank else ():
                self.static[kind] = StaticLoRA(n_modules, rank, d_in, d_out)
        self.encoder_lora = nn.ModuleDict(
            {
                kind: StaticLoRA(n, c.encoder_rank, d_in, d_out)
                for kind, (n, d_in, d_out) in _by_kind(c.encoder_modules).items()
            }
        )
        self.memory = AssociativeMemory(c) if c.memory_modules else None
        self.register_buffer("feature_mean", torch.zeros(c.d_features))
        self.register_buffer("feature_std", torch.ones(c.d_features))

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Take the units of the reader's input from real tokens' features [tokens, d_features]: their mean and deviation."""
        self.feature_mean.copy_(features.mean(0))
        self.feature_std.copy_(features.std(0).clamp_min(1e-3))

    def _standard(self, states: Tensor) -> Tensor:
        return (states - self.feature_mean) / self.feature_std

    def head(self, kind: str) -> FactorHead:
        """The head of a module kind."""
        return cast(FactorHead, self.heads[kind])

    def pointer(self, kind: str) -> ValuePointer:
        """The pointer to values of a module kind."""
        return cast(ValuePointer, self.pointers[kind])

    def static_of(self, kind: str) -> StaticLoRA | None:
        """The document-independent LoRA of a module kind, if there is one."""
        return cast(StaticLoRA, self.static[kind]) if kind in self.static else None

    def encoder_lora_batch(self) -> LoRABatch | None:
        """What the base carries while it reads a document, differentiable; None where it reads as it is."""
        return _lora_of(self.encoder_lora, self.config.encoder_modules)

    def static_lora(self) -> LoRABatch | None:
        """What every document's LoRA has in common, differentiable; None where that is nothing."""
        return _lora_of(self.static, (*self.config.modules, *self.config.static_modules))

    def latents(self, features: Tensor, mask: Tensor | None = None) -> RankCodes:
        """The rank codes of chunks.

        Args:
            features: the states [n, t, d], or [n, layers, t, d] when each layer reads features of its own.
            mask: [n, t], true where a token is real.
        """
        c = self.config
        n, n_layers = features.shape[0], len(c.layers)
        if c.reads_each_layer:
            features = features.flatten(0, 1)  # [n * layers, t, d]
            mask = None if mask is None else mask.repeat_interleave(n_layers, dim=0)
        standard = self._standard(features)
        context = self.project(standard)
        mask = token_mask = None if mask is None else mask.bool()
        if c.n_encoder_blocks:
            context, mask = self.encoder(self.encoder_latents(), context, mask), None
        latents = self.decoder(self.rank_latents(), context, mask)
        pointed = self._pointed(latents, standard, features, token_mask)
        latents = latents.view(n, n_layers, len(c.kinds) * c.rank, c.width)
        for mlp in self.latent_mlps:
            latents = mlp(latents)
        return RankCodes(functional.normalize(latents.float(), dim=-1), pointed)

    def _pointed(self, latents: Tensor, standard: Tensor, features: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """By kind that copies values, those that its rank latents (of all kinds [n, q, w]) point to."""
        c = self.config
        if not self.pointers:
            return {}
        by_kind = latents.unflatten(1, (-1, len(c.kinds), c.rank)).unbind(2)  # [n, layers, r, w] each
        values = features[..., -c.d_values :].float()  # [n, t, d_values]
        pooled = {}
        for kind, part in zip(c.kinds, by_kind, strict=True):
            if kind in self.pointers:
                weights = self.pointer(kind).weights(part.flatten(1, 2), standard, mask)  # [n, layers * r, t]
                pooled[kind] = (weights @ values).view(-1, len(c.layers), c.rank, c.d_values)
        return pooled

    def expand(self, codes: RankCodes) -> ChunkFactors:
        """Rank codes -> by kind, A [n, layers, r, in] and B [n, layers, r, out] (B's rows are the columns of the factor).

        In fp32; in bf16, as they are kept, where that is the autocast type and no gradient is wanted.
        """
        c = self.config
        in_bf16 = not torch.is_grad_enabled() and torch.is_autocast_enabled(codes.latents.device.type)
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        by_kind = codes.latents.unflatten(2, (len(c.kinds), c.rank)).unbind(2)
        pairs: ChunkFactors = {}
        for kind, part in zip(c.kinds, by_kind, strict=True):
            a, b = self.head(kind)(part, c.scale)
            if kind in codes.pointed:
                b = torch.addcmul(b, codes.pointed[kind], self.pointer(kind).scaler, value=c.scale)
            pairs[kind] = (a.to(dtype), b.to(dtype))
        return pairs

    def cast(self, features: Features) -> tuple[ChunkFactors, MemoryWrites | None]:
        """n chunks -> by kind their factors A [n, modules, r, in] and B rows [n, modules, r, out], and what the memory wrote."""
        n, t = features.n_chunks, features.states.shape[-2]
        mask = features.mask
        mask = torch.ones(n, t, dtype=torch.bool, device=features.states.device) if mask is None else mask.bool()
        is_real = mask.any(-1)  # [n]
        mask = mask | ~is_real[:, None]  # nothing to look at would be NaN
        states = features.states.float()
        factors, writes = self.expand(self.latents(states, mask)), None
        if self.memory is not None:
            a, b, writes = self.memory(self._standard(states), features, mask)
            factors[self.config.memory_modules[0][2]] = (a, b)
        for kind, (n_modules, d_in, d_out) in _by_kind(self.config.static_modules).items():
            factors[kind] = (states.new_zeros(n, n_modules, 0, d_in), states.new_zeros(n, n_modules, 0, d_out))
        if not is_real.all():
            factors = {kind: (a, b * is_real[:, None, None, None]) for kind, (a, b) in factors.items()}
        return factors, writes

    def forward(self, features: Features, chunks_per_document: int = 1) -> Cast:
        """Chunks -> one LoRA for each document, what the memory wrote, and the chunks' own factors.

        Args:
            features: the chunks of a document are neighbours.
            chunks_per_document: K; the factors of K neighbours are joined along the rank.
        """
        factors, writes = self.cast(features)
        return Cast(self.merge(factors, chunks_per_document), writes, factors, features.n_real)

    def merge(self, factors: ChunkFactors, chunks_per_document: int) -> LoRABatch:
        """Factors of chunks -> one LoRA of rank K * r (+ the document-independent one) each."""
        merged: dict[str, Factors] = {}
        n_documents = next(iter(factors.values()))[0].shape[0] // chunks_per_document
        for kind, (a, b) in factors.items():
            sides = self._joined(kind, a, b, chunks_per_document)
            for module, a_rows, b_rows in zip(self.config.target.of_kind(kind), *sides, strict=True):
                merged[module.name] = Factors(a_rows, b_rows.transpose(1, 2))
        return LoRABatch(n_documents, {name: merged[name] for name in self.config.target.names}, {})

    def _joined(self, kind: str, a: Tensor, b: Tensor, k: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """By module, A [documents, K*r (+ static), in] and B rows [documents, K*r (+ static), out]; [1, static, ...] of kinds that chunks leave alone.

        The modules are unbound once: slicing a stacked tensor inside each hook would build a full zero gradient for each.
        """
        static = self.static_of(kind)
        if static and not a.shape[2]:
            return static.a[:, None].unbind(0), static.b[:, None].unbind(0)

        def by_document(rows: Tensor) -> Tensor:  # [n, layers, r, d] -> [layers, documents, K, r, d]
            return rows.unflatten(0, (-1, k)).permute(2, 0, 1, 3, 4)

        joined_a, joined_b = self.config.merging.join(kind, by_document(a), by_document(b))
        if static:
            joined_a, joined_b = (
                torch.cat([joined, of_all[:, None].expand(-1, joined.shape[1], -1, -1).to(joined.dtype)], dim=2)
                for joined, of_all in ((joined_a, static.a), (joined_b, static.b))
            )
        return joined_a.unbind(0), joined_b.unbind(0)


def _lora_of(parts: nn.ModuleDict, modules: Sequence[tuple[str, int, str, int, int]]) -> LoRABatch | None:
    """One LoRA of the parts of each kind, for those of the modules that are of these kinds."""
    factors: dict[str, Factors] = {}
    for kind, part in parts.items():
        names = [name for name, _, of_kind, _, _ in modules if of_kind == kind]
        for name, (a, b) in zip(names, cast(StaticLoRA, part).factors(), strict=True):
            factors[name] = Factors(a[None], b[None])
    return LoRABatch(1, factors, {}) if factors else None


def _by_kind(modules: Sequence[tuple[str, int, str, int, int]]) -> dict[str, tuple[int, int, int]]:
    """By kind, how many modules there are and their shape (d_in, d_out)."""
    counts: dict[str, tuple[int, int, int]] = {}
    for _, _, kind, d_in, d_out in modules:
        counts[kind] = (counts.get(kind, (0, 0, 0))[0] + 1, d_in, d_out)
    return counts
