"""What an encoder hands to a hypernetwork: the door through which any modality comes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Features:
    """The features of n chunks of t tokens, padding included."""

    states: Tensor
    """[n, t, d], or [n, layers, t, d] when each layer reads features of its own; the last columns may be values to copy."""
    starts: Tensor | None = None
    """[n, t, d_values]: like the values, but what makes the base begin an answer with the token; for an associative memory."""
    keys: Tensor | None = None
    """[n, modules, t, d_in]: what enters the modules in which an associative memory lies."""

    @property
    def n_chunks(self) -> int:
        return self.states.shape[0]
