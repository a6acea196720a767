"""The contract of every hypernetwork: bound to a base once, it encodes inputs and casts their features into LoRA rows.

    hypernetwork.bind(base) -> caster;  caster.encode(inputs) -> Features;  caster.cast(features) -> Cast

A hypernetwork owns its encoder, its config and its id; code that uses a caster does not depend on the architecture or
the encoder. To add an architecture, subclass `Hypernetwork` and list it in `store.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from loracast.base.fingerprint import Fingerprint, check
from loracast.encoders.features import Features
from loracast.errors import HypernetworkError
from loracast.lora.algebra import Factors, LoRABatch
from loracast.lora.target import Target

if TYPE_CHECKING:
    from loracast.base.load import Base

Modality = Literal["document", "task", "image"]
"""What a hypernetwork casts."""
Rows = dict[str, tuple[Tensor, Tensor]]
"""By module kind, A [n, modules, r, in] and B rows [n, modules, r, out]; B's rows are the columns of the factor B."""
Say = Callable[[str], None]
"""Receives progress messages, a line at a time."""


class Cast(NamedTuple):
    """LoRA rows of n chunks, descriptions or images."""

    rows: Rows
    tokens: dict[str, Tensor] | None = None
    """By kind of a memory's modules, the token of the chunk that each row belongs to [n, r]; None without a memory."""


class Hypernetwork(nn.Module):
    """A network that casts features into LoRA rows for one base: `DocToLoRA`, `TextToLoRA`, `AttentionDeltaToLoRA`."""

    config_class: ClassVar[Any]
    config: Any
    made_for: Fingerprint | None = None
    """The base that it was trained for; None until it is trained or loaded."""
    former_ids: tuple[str, ...] = ()
    """Ids under which earlier releases knew the same hypernetwork: adapters that name one of them belong to it."""

    @property
    def id(self) -> str:
        """Short sha256 of config and weights together, by which an adapter names the hypernetwork that made it."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.config), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def modality(self) -> Modality:
        """Which modality it casts."""
        raise NotImplementedError

    @property
    def needs_base(self) -> bool:
        """Whether its encoder is the base itself."""
        raise NotImplementedError

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
        """Features of n chunks, descriptions or images -> their rows; differentiable."""
        raise NotImplementedError

    def static_rows(self) -> Rows:
        """Rows of the static LoRA by module kind: A [modules, r, in], B rows [modules, r, out]; empty without one."""
        return {}

    def loras(self, rows: Rows) -> LoRABatch:
        """Rows of n chunks, descriptions or images -> one LoRA for each, the static LoRA included."""
        target: Target = self.config.target
        factors: dict[str, Factors] = {}
        for kind, (a, b) in rows.items():
            for module, a_rows, b_rows in zip(target.of_kind(kind), a.unbind(1), b.unbind(1), strict=True):
                factors[module.name] = Factors(a_rows, b_rows.transpose(1, 2))
        n = next(iter(rows.values()))[0].shape[0]
        return LoRABatch(n, {name: factors[name] for name in target.names}, {})

    def weights_for(self, config: Any) -> dict[str, Tensor]:
        """The weights for another config of the same hypernetwork. Raises ConfigError where they cannot be derived."""
        return self.state_dict()

    def computes_in_bf16(self, base: Base | None) -> bool:
        """Whether casting for this base runs its matmuls in bf16, as in training."""
        return base is not None and base.model.dtype == torch.bfloat16

    def bind(self, base: Base | None = None, *, encoder: str | None = None, say: Say = lambda text: None) -> Caster:
        """Bind the hypernetwork to a base and load its encoder.

        Args:
            base: may be None where `needs_base` is false.
            encoder: where the encoder lies now, if not where it lay in training.
            say: receives messages where the encoder has to be fetched first.

        Raises:
            BaseModelError: it was made for another base.
            EncoderError, HypernetworkError: as in `encoder_for`.
        """
        if base is not None and self.made_for is not None:
            check(self.made_for, base.fingerprint, f"the hypernetwork for {self.modality}s")
        return Caster(self, self.encoder_for(base, encoder, say), self.computes_in_bf16(base))


class Caster:
    """A hypernetwork bound to a base: encodes inputs and casts their features, without gradients."""

    def __init__(self, hypernetwork: Hypernetwork, encoder: Callable[[Any], Features], in_bf16: bool = False):
        self.hypernetwork = hypernetwork.eval()
        self.encoder: Any = encoder
        self.id = hypernetwork.id
        self._dtype = torch.bfloat16 if in_bf16 else None

    @property
    def made_for(self) -> Fingerprint:
        """The base that the hypernetwork was made for."""
        if self.hypernetwork.made_for is None:
            raise HypernetworkError("this hypernetwork names no base that it was made for")
        return self.hypernetwork.made_for

    @property
    def device(self) -> torch.device:
        return next(self.hypernetwork.parameters()).device

    @torch.inference_mode()
    def encode(self, inputs: Any) -> Features:
        """Rows of token ids, descriptions or images in RGB, n of them -> their features."""
        return self.encoder(inputs)

    @torch.inference_mode()
    def cast(self, features: Features) -> Cast:
        """Features of n inputs -> their LoRA rows."""
        with torch.autocast(self.device.type, self._dtype) if self._dtype else nullcontext():
            return self.hypernetwork.cast(features.to(self.device))

    def loras(self, inputs: Any) -> LoRABatch:
        """Encode and cast at once: n inputs -> their n LoRAs."""
        return self.loras_of(self.encode(inputs))

    @torch.inference_mode()
    def loras_of(self, features: Features) -> LoRABatch:
        """Features of n inputs -> their n LoRAs, the static LoRA included."""
        return self.hypernetwork.loras(self.cast(features).rows)
