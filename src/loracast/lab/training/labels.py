"""Fits labels of a user's own for images: logistic regression on the features of a vision model, a linear probe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from loracast.base.embedded import DEFAULT_IMAGE_ENCODER, Say
from loracast.cast.vision import load_features
from loracast.errors import ConfigError
from loracast.files import write_with
from loracast.lab.data.labelled import Labelled
from loracast.library.save import Progress

_STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # scikit-learn's C, the probe's only setting
_PARTS = 5  # of the images, each of which is held back once to choose the strength
_AT_ONCE = 16


def train_labels(
    images: Labelled,
    out: Path,
    encoder: str | None = None,
    *,
    device: str | None = None,
    say: Say = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> float:
    """Fit the labels of a set of images, and write them to the file `out`, which `load_vision` reads.

    Args:
        encoder: an embedded vision model, or a folder or hub id; EfficientNet-lite0 if None.

    Returns:
        the share of images held back that a fit to the others names rightly.

    Raises:
        ConfigError: the file has another ending, or a class has fewer than two images.
        EncoderError: the vision model cannot be loaded.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = np.bincount(images.labels)
    if len(counts) < 2 or counts.min() < 2:
        raise ConfigError("labels are fitted to at least two names, with at least two images each")
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out} has to end in .safetensors, by which `learn --labels` knows such a file")
    (read, fingerprint), features, n = load_features(encoder, device, say), [], len(images)
    for first in range(0, n, _AT_ONCE):
        features.append(read([images.load(i) for i in range(first, min(first + _AT_ONCE, n))]))
        progress(min(first + _AT_ONCE, n), n)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    search = GridSearchCV(probe, {"logisticregression__C": _STRENGTHS}, cv=min(_PARTS, counts.min()))
    scaler, fit = search.fit(torch.cat(features).numpy(), images.labels).best_estimator_
    weight, bias = fit.coef_ / scaler.scale_, fit.intercept_
    bias = bias - weight @ scaler.mean_
    if len(counts) == 2:  # scikit-learn's only row says how much likelier the second name is
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    about = {"names": json.dumps(images.names), "encoder": encoder or DEFAULT_IMAGE_ENCODER, "fingerprint": fingerprint}
    stored = {"weight": torch.tensor(weight).float().contiguous(), "bias": torch.tensor(bias).float()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_with(out, lambda path: save_file(stored, path, about))
    return float(search.best_score_)
