"""The base as its own encoder: hidden states of a text after chosen blocks, computed no deeper than the deepest one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loracast.base.chat import encode_inside
from loracast.encoders.features import OF_THE_BASE, Features
from loracast.lora.inject import inject

if TYPE_CHECKING:
    from loracast.lora.algebra import LoRABatch


def cut(decoder: Any, depth: int) -> Any:
    """A second decoder around the same blocks, cut after the first `depth` of them; its last states are what the last of these gives."""
    shorter = copy.copy(decoder)
    shorter._modules = dict(decoder._modules)
    shorter.layers = decoder.layers[:depth]
    shorter.config = copy.copy(decoder.config)
    shorter.config.num_hidden_layers = depth
    shorter.norm = nn.Identity()
    return shorter


class HiddenStatesEncoder:
    """Reads the base's hidden states: the `Encoder` of documents. Shares the base's weights: building one costs nothing."""

    name = OF_THE_BASE

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        with_values: bool = False,
        prefix: Sequence[int] = (),
        key_modules: Sequence[str] = (),
        tokenizer: Any = None,
        fingerprint: str = "",
        lora: Callable[[], LoRABatch | None] = lambda: None,
    ):
        """
        Args:
            model: the base (a causal LM).
            layers: after which blocks to read, 0 meaning the embeddings.
            with_values: append to each token's features the unit vector that, written into the last hidden state, makes
                the base say that token: its output embedding, centred, weighted as the final norm does.
            prefix: token ids read before each row and then dropped. The first token of a text is an attention sink: its
                state is huge and nearly the same whatever the token is.
            key_modules: names of modules whose inputs are read as well, in the order of their layers; needs `with_values` and
                the tokenizer, which says how an answer begins with a token.
            fingerprint: the base's own, of its weights.
            lora: what the base carries while it reads, if anything; features then have a gradient where one is wanted.
        """
        self.fingerprint, self.device = fingerprint, model.device
        self._model, self._lora = model, lora
        self.d_features: int = model.get_output_embeddings().weight.shape[1] * (2 if with_values else 1)
        self.layers, self.prefix, self.key_modules = tuple(layers), tuple(prefix), tuple(key_modules)
        self._tokenizer = tokenizer
        self._starts: dict[int, int] = {}
        self._embeddings = model.get_output_embeddings() if with_values else None
        decoder = model.get_decoder()
        if with_values:
            weight = model.get_output_embeddings().weight
            self._mean = weight.float().mean(0)
            self._gain = decoder.norm(torch.ones(1, 1, weight.shape[1], device=weight.device)).float()[0, 0]
        depth = max(self.layers)
        self._keyed: list[nn.Module] = []
        for layer, block in enumerate(decoder.layers):
            inside = {id(module) for module in block.modules()}
            found = [m for name in self.key_modules if id(m := model.get_submodule(name)) in inside]
            self._keyed += found
            depth = max(depth, layer + 1) if found else depth
        self._decoder = cut(decoder, depth)

    def __call__(self, input_ids: Tensor, mask: Tensor | None = None) -> Features:
        """input_ids [n, t], padded on the right -> their features: states of the base's width, twice that with values.

        Attention is causal, so padding on the right changes nothing before it: the mask [n, t] is only handed on.
        """
        lora = self._lora()
        with torch.set_grad_enabled(torch.is_grad_enabled() and lora is not None):
            with inject(self._model, lora) if lora is not None else nullcontext():
                states, keys = self._read(input_ids)
            features = torch.stack([states[n] for n in self.layers], dim=1)  # [n, layers, t, d]
            if self._embeddings is not None:
                values = self.values(input_ids).to(features.dtype)[:, None].expand_as(features)
                features = torch.cat([features, values], dim=-1)
            features = features[:, 0] if len(self.layers) == 1 else features
            if not self._keyed:
                return Features(features, mask=mask)
            starts = self.values(self._start_ids(input_ids)).to(features.dtype)
            return Features(features, starts, torch.stack([keys[module] for module in self._keyed], dim=1), mask)

    def _read(self, input_ids: Tensor) -> tuple[dict[int, Tensor], dict[nn.Module, Tensor]]:
        """The states [n, t, d] after the blocks that are read, and what entered the keyed modules [n, t, in]."""
        n_lead = len(self.prefix)
        states: dict[int, Tensor] = {}
        keys: dict[nn.Module, Tensor] = {}

        def keep_state(layer: int):
            def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
                states[layer] = (output if isinstance(output, Tensor) else output[0])[:, n_lead:]

            return hook

        def keep_key(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            keys[module] = inputs[0][:, n_lead:]

        handles = [self._decoder.layers[n - 1].register_forward_hook(keep_state(n)) for n in set(self.layers) if n > 0]
        handles += [module.register_forward_pre_hook(keep_key) for module in self._keyed]
        try:
            prefix = torch.tensor(self.prefix, dtype=input_ids.dtype, device=input_ids.device)
            read = torch.cat([prefix.expand(input_ids.shape[0], -1), input_ids], dim=1)
            embedded = self._decoder.get_input_embeddings()(read)
            states[0] = embedded[:, n_lead:]
            self._decoder(inputs_embeds=embedded, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return states, keys

    @torch.no_grad()
    def values(self, input_ids: Tensor) -> Tensor:
        """input_ids [...] -> for each token the unit vector [..., d] that makes the base say it."""
        assert self._embeddings is not None
        embedded = self._embeddings.weight[input_ids].float() - self._mean
        return torch.nn.functional.normalize(embedded * self._gain, dim=-1)

    def _start_ids(self, input_ids: Tensor) -> Tensor:
        """input_ids [n, t] -> the token with which, after a space, an answer begins that begins with this token's text."""
        known = self._starts
        for i in set(input_ids.flatten().tolist()) - known.keys():
            text = self._tokenizer.decode([i]).strip()
            known[i] = (encode_inside(self._tokenizer, text) or [i])[0] if text else i
        starts = [[known[i] for i in row] for row in input_ids.tolist()]
        return torch.tensor(starts, dtype=input_ids.dtype, device=input_ids.device)
