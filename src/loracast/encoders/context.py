"""The base as its own encoder: hidden states of a text after chosen blocks, computed no deeper than the deepest one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from loracast.hypernets.doc_to_lora import DocToLoRAConfig


class ContextEncoder:
    """Reads the base's hidden states. Shares the base's weights: building one costs nothing."""

    def __init__(self, model: Any, layers: Sequence[int], with_values: bool = False, lead_in: Sequence[int] = ()):
        """
        Args:
            model: the base (a causal LM).
            layers: after which blocks to read, 0 meaning the embeddings.
            with_values: append to each token's features the unit vector that, written into the last hidden state, makes
                the base say that token: its output embedding, centred, weighted as the final norm does.
            lead_in: token ids read before each row and then dropped. The first token of a text is an attention sink: its
                state is huge and nearly the same whatever the token is.
        """
        self.layers, self.lead_in = tuple(layers), tuple(lead_in)
        self._embeddings = model.get_output_embeddings() if with_values else None
        decoder = model.get_decoder()
        if with_values:
            weight = model.get_output_embeddings().weight
            self._mean = weight.float().mean(0)
            self._gain = decoder.norm(torch.ones(1, 1, weight.shape[1], device=weight.device)).float()[0, 0]
        # A second decoder around the same blocks, cut after the deepest one that is read.
        self._decoder = copy.copy(decoder)
        self._decoder._modules = dict(decoder._modules)
        self._decoder.layers = decoder.layers[: max(self.layers)]
        self._decoder.config = copy.copy(decoder.config)
        self._decoder.config.num_hidden_layers = max(self.layers)
        self._decoder.norm = nn.Identity()

    @classmethod
    def for_hypernet(cls, model: Any, config: DocToLoRAConfig) -> ContextEncoder:
        """The encoder that a hypernetwork was trained to read with."""
        return cls(model, config.reader_layers, with_values=config.d_values > 0, lead_in=config.lead_in)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids [n, t], padded on the right -> features [n, t, d], or [n, layers, t, d] if several layers are read;
        d is the base's width, twice that with values.

        Attention is causal, so padding on the right changes nothing before it and needs no mask here.
        """
        states: dict[int, Tensor] = {}

        def keep(layer: int):
            def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
                states[layer] = output if isinstance(output, Tensor) else output[0]

            return hook

        handles = [self._decoder.layers[n - 1].register_forward_hook(keep(n)) for n in set(self.layers) if n > 0]
        try:
            lead_in = torch.tensor(self.lead_in, dtype=input_ids.dtype, device=input_ids.device)
            read = torch.cat([lead_in.expand(input_ids.shape[0], -1), input_ids], dim=1)
            embedded = self._decoder.get_input_embeddings()(read)
            states[0] = embedded
            self._decoder(inputs_embeds=embedded, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        features = torch.stack([states[n][:, len(self.lead_in) :] for n in self.layers], dim=1)  # [n, layers, t, d]
        if self._embeddings is not None:
            values = self.values(input_ids).to(features.dtype)[:, None].expand_as(features)
            features = torch.cat([features, values], dim=-1)
        return features[:, 0] if len(self.layers) == 1 else features

    @torch.no_grad()
    def values(self, input_ids: Tensor) -> Tensor:
        """input_ids [n, t] -> for each token the unit vector [n, t, d] that makes the base say it."""
        assert self._embeddings is not None
        embedded = self._embeddings.weight[input_ids].float() - self._mean
        return torch.nn.functional.normalize(embedded * self._gain, dim=-1)
