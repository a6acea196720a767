"""A time-series encoder without weights: patches of a signal, each normalised, with its level and spread beside it.

As PatchTST reads signals (Nie et al., arXiv 2211.14730): the second proof that any sense can come in through the door.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loracast.encoders.features import Features
from loracast.errors import EncoderError

_EPS = 1e-5


class SignalEncoder:
    """Cuts signals into patches: the `Encoder` of time series."""

    def __init__(self, patch: int = 16, stride: int = 8, channels: int = 1):
        """
        Args:
            patch: steps of one patch.
            stride: steps from one patch to the next.
            channels: values at each step; a patch holds those of all channels.
        """
        if min(patch, stride, channels) < 1:
            raise EncoderError("patch, stride and channels of a signal must be at least 1")
        self.patch, self.stride, self.channels = patch, stride, channels
        self.name = self.fingerprint = f"patches-{patch}-{stride}-{channels}"
        self.device = torch.device("cpu")
        self.d_features = channels * (patch + 2 * (patch // 2 + 1) + 2)

    def __call__(self, signals: Tensor, /) -> Features:
        """Signals [n, channels, steps] -> for each patch its shape, its spectrum (cosine and sine parts), its level and its spread [n, t, d].

        Level and spread are in units of the whole signal's, so that what is loud or far from zero reads like what is not.
        """
        if signals.ndim != 3 or signals.shape[1] != self.channels or signals.shape[2] < self.patch:
            raise EncoderError(
                f"signals of the shape {tuple(signals.shape)}: [n, {self.channels}, {self.patch} or more] is read"
            )
        if not signals.isfinite().all():
            raise EncoderError("a signal holds numbers that are not finite; leave them out or fill them in")
        signals = signals.float()
        whole = (signals - signals.mean(2, keepdim=True)) / (signals.std(2, keepdim=True) + _EPS)
        patches = whole.unfold(2, self.patch, self.stride)  # [n, channels, t, patch]
        level, spread = patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True)
        shape = (patches - level) / (spread + _EPS)
        spectrum = torch.view_as_real(torch.fft.rfft(shape, norm="ortho")).flatten(-2)
        described = torch.cat([shape, spectrum, level, spread], dim=-1)  # [n, channels, t, ...]
        return Features(described.transpose(1, 2).flatten(2))
