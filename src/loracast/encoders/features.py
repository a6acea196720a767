"""Features, which an encoder hands to a hypernetwork, and the contract that encoders of any modality fulfil."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from loracast.errors import HypernetworkError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


OF_THE_BASE = "base"
"""The encoder name that means the base itself."""


@dataclass(frozen=True)
class Features:
    """Features of n chunks, images or descriptions of t tokens each, padding included."""

    states: (
        Tensor  # [n, t, d], or [n, layers, t, d] where each layer reads its own; the last columns may be values to copy
    )
    starts: Tensor | None = None  # [n, t, d_values], values that begin an answer with the token; for a memory
    keys: Tensor | None = None  # [n, modules, t, d_in], inputs of the modules that hold a memory
    mask: Tensor | None = (
        None  # [n, t] bool, true where a token is real, None: all are; `cast` gives padding rows of zero
    )

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Features:
        """The same on a device, their numbers in another type if one is given."""
        moved: dict[str, Any] = {}
        for key, value in vars(self).items():
            to = dtype if value is not None and value.is_floating_point() else None
            moved[key] = None if value is None else value.to(device, to)
        return Features(**moved)

    @property
    def n_chunks(self) -> int:
        return self.states.shape[0]

    @property
    def n_real(self) -> int:
        """Chunks that hold a real token."""
        return self.n_chunks if self.mask is None else int(self.mask.any(-1).sum())


class Encoder(Protocol):
    """An encoder of any modality. A hypernetwork's config names the one it was trained with."""

    name: str
    """The name that a user gives."""
    fingerprint: str
    """Hash of all that decides its features: weights and preparation; a hypernetwork refuses any other."""
    d_features: int
    """Width of its states."""
    device: torch.device

    def __call__(self, inputs: Any, /) -> Features:
        """n inputs (token ids, images) -> their features, without a gradient."""
        ...


def check_encoder(name: str, fingerprint: str, d_features: int, encoder: Encoder) -> None:
    """Raise HypernetworkError if a hypernetwork was trained with another encoder than this one."""
    if (fingerprint, d_features) != (encoder.fingerprint, encoder.d_features):
        raise HypernetworkError(
            f"the hypernetwork was trained with the encoder {name!r} (fingerprint {fingerprint}), and {encoder.name!r} "
            f"has the fingerprint {encoder.fingerprint}: give the encoder that it was trained with"
        )
