"""What an encoder hands to a hypernetwork: the door through which any modality comes in (docs/encoders.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


OF_THE_BASE = "base"
"""The name of the encoder that is the base itself."""


@dataclass(frozen=True)
class Features:
    """The features of n chunks (or images, or signals) of t tokens, padding included."""

    states: Tensor
    """[n, t, d], or [n, layers, t, d] when each layer reads features of its own; the last columns may be values to copy."""
    starts: Tensor | None = None
    """[n, t, d_values]: like the values, but what makes the base begin an answer with the token; for an associative memory."""
    keys: Tensor | None = None
    """[n, modules, t, d_in]: what enters the modules in which an associative memory lies."""
    mask: Tensor | None = None
    """[n, t] bool, true where a token is real; None where all are. A chunk without a real token gets a LoRA of zero."""

    def to(self, device: torch.device) -> Features:
        """The same on a device."""
        moved: dict[str, Any] = {key: None if value is None else value.to(device) for key, value in vars(self).items()}
        return Features(**moved)

    @property
    def n_chunks(self) -> int:
        return self.states.shape[0]

    @property
    def n_real(self) -> int:
        """Chunks that hold a real token."""
        return self.n_chunks if self.mask is None else int(self.mask.any(-1).sum())


class Encoder(Protocol):
    """What a document hypernetwork needs of an encoder, whatever its sense. A hypernetwork's config names the one it was trained with."""

    @property
    def name(self) -> str:
        """As a user gives it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides its features: weights and preparation. Features of another one are never fed to a hypernetwork."""
        ...

    @property
    def d_features(self) -> int:
        """Width of its states."""
        ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, inputs: Any, /) -> Features:
        """What it reads (token ids, images, signals), n of them -> their features, without a gradient."""
        ...
