"""Change trained hypernetworks: average several, or give one another config that its weights fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loracast.errors import ConfigError
from loracast.hypernets.attention_delta import AttentionDeltaToLoRA, AttentionDeltaToLoRAConfig
from loracast.hypernets.store import H, Pretrained


def average(hypernet: Pretrained, others: Sequence[Pretrained]) -> None:
    """Set a hypernetwork's parameters to the mean of its own and others'; its buffers stay, former ids go.

    The mean of a network and those trained further from it often keeps the strengths of each (Wortsman et al., arXiv
    2203.05482).

    Raises:
        ConfigError: they are of different architectures.
    """
    if any(type(other) is not type(hypernet) or other.config != hypernet.config for other in others):
        raise ConfigError("only hypernetworks of the same architecture and config can be averaged")
    theirs = [dict(other.named_parameters()) for other in others]
    with torch.no_grad():
        for name, value in hypernet.named_parameters():
            value.copy_(torch.stack([value, *(weights[name] for weights in theirs)]).mean(0))
    hypernet.former_ids = ()  # they named other weights


def with_config(hypernet: H, changes: Mapping[str, Any]) -> H:
    """The same weights with other values of config keys that fix no weight.

    An attention-delta hypernetwork can also get a smaller `depth`, or lose its task bank.

    Raises:
        ConfigError: the weights do not fit.
    """
    architecture: type[Any] = type(hypernet)
    changed = architecture(dataclasses.replace(hypernet.config, **changes))
    changed.made_for = hypernet.made_for
    weights = hypernet.state_dict()
    if isinstance(hypernet, AttentionDeltaToLoRA):
        weights = _weights_for(hypernet, changed.config)
    try:
        changed.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{', '.join(changes)}: the weights that there are do not fit another value") from error
    return changed


def _weights_for(hypernet: AttentionDeltaToLoRA, config: AttentionDeltaToLoRAConfig) -> dict[str, Tensor]:
    """The weights for a config with a smaller depth, or without the task bank; ConfigError for a larger depth."""
    if missing := set(config.layers) - set(hypernet.config.layers):
        raise ConfigError(f"the layers {sorted(missing)} were not trained; depth can only be made smaller")
    kept = [i for i, layer in enumerate(hypernet.config.layers) if layer in config.layers]
    weights = hypernet.state_dict()
    if not config.bank_sizes:
        weights = {name: value for name, value in weights.items() if not name.startswith("task_bank.")}
    for name in ("where", "mix", "down", "up"):
        weights[name] = weights[name][kept]
    for name in ("mean", "std"):
        weights[name] = hypernet.by_position(weights[name][None])[0, :, kept].flatten()
    return weights
