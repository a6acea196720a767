"""The contract of every hypernetwork: bound to a base once, it encodes inputs and casts their features into LoRA rows.

    hypernetwork.bind(base) -> caster;  caster.encode(inputs) -> Features;  caster.cast(features) -> Cast

A hypernetwork owns its encoder, its config and its id; code that uses a caster does not depend on the architecture or
the encoder. To add an architecture, subclass `Hypernetwork` and import it in `loracast.hypernets`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loracast.base.embedded import Say
from loracast.base.fingerprint import Fingerprint, check
from loracast.base.load import Base
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.errors import HypernetworkError
from loracast.hypernets.encoders import OF_THE_BASE, Features
from loracast.hypernets.reader import Reader
from loracast.hypernets.store import Pretrained
from loracast.lora.algebra import LoRABatch
from loracast.lora.factors import Factors, Rows
from loracast.lora.merge import Merging
from loracast.lora.target import Target


class Cast(NamedTuple):
    """LoRA rows of n chunks or descriptions."""

    rows: Rows
    tokens: dict[str, Tensor] | None = None
    """By kind of a memory's modules, the token of the chunk that each row belongs to [n, r]; None without a memory.

    B rows of such a kind are the same in all modules: [n, 1, r, out]."""


class Hypernetwork(Pretrained):
    """A network that casts features into LoRA rows for one base: `DocToLoRA`, `TextToLoRA`, `AttentionDeltaToLoRA`."""

    @property
    def needs_base(self) -> bool:
        """Whether its encoder is the base itself, as `config.encoder` says."""
        return self.config.encoder.partition(":")[0] == OF_THE_BASE

    @cached_property
    def reader(self) -> Reader | None:
        """The reader beside it, which finds the units that answer a question. Raises HypernetworkError if damaged."""
        return None if self.reader_file is None else Reader.read(self.reader_file)

    @property
    def chunk_tokens(self) -> int:
        """Longest chunk of a document where nobody says otherwise."""
        return getattr(self.config, "chunk_tokens", DEFAULT_CHUNK_TOKENS)

    def encoder_for(self, base: Base | None, encoder: str | None, say: Say) -> Callable[[Any], Features]:
        """The encoder that it was trained with.

        Args:
            base: checked already; None where `needs_base` says that none is needed.
            encoder: where the encoder lies now, if not where it lay in training.

        Raises:
            EncoderError, HypernetworkError: the encoder cannot be loaded, or is another one.
        """
        raise NotImplementedError

    def cast(self, features: Features) -> Cast:
        """Features of n chunks or descriptions -> their rows; differentiable. Padding gets rows of zero."""
        raise NotImplementedError

    def static_rows(self) -> Rows:
        """Rows of the static LoRA by module kind: A [modules, r, in], B rows [modules, r, out]; empty without one."""
        return {}

    @property
    def memory_kinds(self) -> tuple[str, ...]:
        """The kinds whose rows belong to tokens, as `Cast.tokens` says; empty without a memory."""
        return ()

    @property
    def merging(self) -> Merging:
        """How the rows of a document's chunks are combined: joined along the rank if the config does not say it."""
        return getattr(self.config, "merging", Merging())

    def loras(self, rows: Rows) -> LoRABatch:
        """Rows of n chunks or descriptions -> one LoRA for each, the static LoRA included; differentiable.

        Kinds with a static LoRA alone have the same one for all. The modules are unbound once: slicing a stacked tensor
        inside each hook would build a full zero gradient for each.
        """
        target: Target = self.config.target
        static, factors = self.static_rows(), {}
        for kind, (a, b) in rows.items():
            b = b.expand(-1, a.shape[1], -1, -1)  # B rows may be the same in all modules
            sides = [side.transpose(0, 1) for side in (a, b)]  # [modules, n, r, d]
            if kind in static:
                alone = [of_all[:, None] for of_all in static[kind]]
                both = zip(sides, alone, strict=True)
                joined = [torch.cat([x, y.expand(-1, len(a), -1, -1).to(x.dtype)], dim=2) for x, y in both]
                sides = joined if a.shape[2] else alone
            for module, a_rows, b_rows in zip(target.of_kind(kind), *(side.unbind(0) for side in sides), strict=True):
                factors[module.name] = Factors(a_rows, b_rows.transpose(1, 2))
        n = next(iter(rows.values()))[0].shape[0]
        return LoRABatch(n, {name: factors[name] for name in target.names}, {})

    def computes_in_bf16(self, base: Base | None) -> bool:
        """Whether casting for this base runs its matmuls in bf16, as in training."""
        return self.needs_base and base is not None and base.model.dtype == torch.bfloat16

    def bind(self, base: Base | None = None, *, encoder: str | None = None, say: Say = lambda text: None) -> Caster:
        """Bind the hypernetwork to a base and load its encoder.

        Args:
            base: may be None where `needs_base` is false.
            encoder: where the encoder lies now, if not where it lay in training.

        Raises:
            BaseModelError: it was made for another base.
            EncoderError, HypernetworkError: as in `encoder_for`.
        """
        if base is not None and self.made_for is not None:
            check(self.made_for, base.fingerprint, f"the hypernetwork for {self.modality}s")
        lock = None if base is None else base.lock
        return Caster(self, self.encoder_for(base, encoder, say), self.computes_in_bf16(base), lock)


class Caster:
    """A hypernetwork bound to a base: encodes inputs and casts their features, without gradients."""

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        encoder: Callable[[Any], Features],
        in_bf16: bool = False,
        lock: AbstractContextManager[Any] | None = None,
    ):
        """
        Args:
            lock: held while the encoder runs, and by whoever else runs the base: the base's, so that it reads without
                another thread's LoRA; one of its own if None.
        """
        self.hypernetwork = hypernetwork.eval()
        self.lock = RLock() if lock is None else lock
        self.encoder: Any = encoder
        self.id = hypernetwork.id
        self._dtype = torch.bfloat16 if in_bf16 else None

    @property
    def made_for(self) -> Fingerprint:
        """The base that the hypernetwork was made for."""
        if self.hypernetwork.made_for is None:
            raise HypernetworkError("this hypernetwork names no base that it was made for")
        return self.hypernetwork.made_for

    @torch.inference_mode()
    def encode(self, inputs: Any) -> Features:
        """Rows of token ids, or descriptions, n of them -> their features."""
        with self.lock:
            return self.encoder(inputs)

    @torch.inference_mode()
    def cast(self, features: Features) -> Cast:
        """Features of n inputs -> their LoRA rows, on the hypernetwork's device, which may not be the base's."""
        weight = next(self.hypernetwork.parameters())
        features = features.to(weight.device, None if self._dtype else weight.dtype)
        with torch.autocast(weight.device.type, self._dtype) if self._dtype else nullcontext():
            cast = self.hypernetwork.cast(features)
        self._check(cast, features.n_chunks)
        return cast

    def _check(self, cast: Cast, n: int) -> None:
        """Refuse rows of other kinds or shapes than the config says, which would be kept wrongly."""
        config = self.hypernetwork.config
        target: Target = config.target
        wanted = {}
        for kind in target.kinds:
            modules = target.of_kind(kind)
            shape = (n, len(modules), config.ranks[kind])
            of_b = (n, 1, config.ranks[kind]) if kind in (cast.tokens or {}) else shape
            wanted[kind] = ((*shape, modules[0].d_in), (*of_b, modules[0].d_out))
        found = {kind: (tuple(a.shape), tuple(b.shape)) for kind, (a, b) in cast.rows.items()}
        if found != wanted:
            raise HypernetworkError(
                f"{type(self.hypernetwork).__name__} cast rows of the shapes {found}, and its config's target and "
                f"ranks ask for {wanted}: A is [n, modules, r, in], B rows are [n, modules, r, out]"
            )

    @torch.inference_mode()
    def loras_of(self, features: Features) -> LoRABatch:
        """Features of n inputs -> their n LoRAs, the static LoRA included."""
        return self.hypernetwork.loras(self.cast(features).rows)
