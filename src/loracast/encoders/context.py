"""The base as its own encoder: hidden states of a text after chosen blocks, computed no deeper than the deepest one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ContextEncoder:
    """Reads the base's hidden states. Shares the base's weights: building one costs nothing."""

    def __init__(self, model: Any, layers: Sequence[int]):
        """`model` is the base (a causal LM); `layers` says after which blocks to read, 0 meaning the embeddings."""
        self.layers = tuple(layers)
        decoder = model.get_decoder()
        # A second decoder around the same blocks, cut after the deepest one that is read.
        self._decoder = copy.copy(decoder)
        self._decoder._modules = dict(decoder._modules)
        self._decoder.layers = decoder.layers[: max(self.layers)]
        self._decoder.config = copy.copy(decoder.config)
        self._decoder.config.num_hidden_layers = max(self.layers)
        self._decoder.norm = nn.Identity()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids [n, t], padded on the right -> features [n, t, d], or [n, layers, t, d] if several layers are read.

        Attention is causal, so padding on the right changes nothing before it and needs no mask here.
        """
        states: dict[int, Tensor] = {}

        def keep(layer: int):
            def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
                states[layer] = output if isinstance(output, Tensor) else output[0]

            return hook

        handles = [self._decoder.layers[n - 1].register_forward_hook(keep(n)) for n in set(self.layers) if n > 0]
        try:
            embedded = self._decoder.get_input_embeddings()(input_ids)
            states[0] = embedded
            self._decoder(inputs_embeds=embedded, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(self.layers) == 1:
            return states[self.layers[0]]
        return torch.stack([states[n] for n in self.layers], dim=1)
