"""A small modality for tests: labelled waves, and an encoder without weights that cuts them into patches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loracast.errors import EncoderError
from loracast.hypernets.encoders import Features
from loracast.lab.data.labelled import Labelled

NAMES = ("sine wave", "square wave", "noise", "step")


def make_waves(n_classes: int, per_class: int, seed: int = 0, n_held_out: int = 0) -> Labelled:
    """Waves [1, 64] of a few classes with random phase and noise; the last classes are held out."""
    labels = tuple(i % n_classes for i in range(per_class * n_classes))

    def load(i: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        turn = torch.linspace(0, 4, 64) + torch.rand(1, generator=generator)
        noise = torch.randn(64, generator=generator)
        sine = torch.sin(2 * math.pi * turn)
        shapes = {"sine wave": sine, "square wave": sine.sign(), "noise": 2 * noise, "step": (turn > 2.5) * 2.0 - 1}
        return (shapes[NAMES[labels[i]]] + 0.1 * noise)[None]

    is_held_out = tuple(i >= n_classes - n_held_out for i in range(n_classes))
    titles = tuple(f"{NAMES[label]} {i}" for i, label in enumerate(labels))
    fingerprint = f"{seed}-{n_classes}-{per_class}-{n_held_out}"
    return Labelled("image", NAMES[:n_classes], is_held_out, labels, titles, load, fingerprint)


class WaveEncoder:
    """Patches of `patch` steps: their shape and the magnitudes of their spectrum."""

    def __init__(self, patch: int = 16):
        self.patch, self.d_features, self.device = patch, patch + patch // 2 + 1, torch.device("cpu")
        self.name = self.fingerprint = f"waves-{patch}"

    def __call__(self, inputs: Any, /) -> Features:
        if inputs.ndim != 3:
            raise EncoderError("waves are [n, 1, steps]")
        patches = inputs.float()[:, 0].unfold(1, self.patch, self.patch // 2)  # [n, t, patch]
        magnitudes = torch.fft.rfft(patches, norm="ortho").abs()
        return Features(torch.cat([patches, magnitudes], dim=-1))
