"""The base as its own encoder: hidden states of a text after chosen blocks. Deeper blocks are not computed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.base.capture import capture_inputs
from loracast.base.chat import encode_inside
from loracast.base.twin import twin
from loracast.batching import length_groups
from loracast.encoders.features import OF_THE_BASE, Features
from loracast.errors import EncoderError
from loracast.lora.inject import inject, model_lock

if TYPE_CHECKING:
    from loracast.lora.algebra import LoRABatch


def cut(decoder: Any, depth: int) -> Any:
    """A decoder of the first `depth` blocks of another one, sharing their weights, without the final norm.

    Raises:
        EncoderError: it has fewer blocks.
    """
    if depth > len(decoder.layers):
        raise EncoderError(
            f"the base has {len(decoder.layers)} blocks, and it is read after block {depth}: give the base that the "
            "hypernetwork was made for"
        )
    shorter = copy.copy(decoder)
    shorter._modules = dict(decoder._modules)
    shorter.layers = decoder.layers[:depth]
    shorter.config = copy.copy(decoder.config)
    shorter.config.num_hidden_layers = depth
    shorter.norm = nn.Identity()
    return shorter


class _Modules(threading.local):
    """The modules with which a thread reads, its own: another one may begin to read while it gives way."""

    def __init__(self, make: Callable[[], tuple[Any, Any]]):
        self.model, self.decoder = make()  # in each thread that reads


class HiddenStatesEncoder:
    """Reads the base's hidden states: the `Encoder` of documents. It shares the base's weights.

    A thread that reads under the base's lock gives way before each block to those who wait for the lock, so that nobody
    waits for a whole batch. What they do to the base's modules meanwhile is not seen here, nor the other way round.
    """

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
        with_final_norm: bool = False,
    ):
        """
        Args:
            model: the base (a causal LM).
            layers: blocks after which states are read; 0 means what enters the first block.
            with_values: append each token's value to its features: the unit vector that, added to the last hidden
                state, makes the base generate that token (its output embedding, centred and weighted like the final
                norm does).
            prefix: token ids read before each row and then dropped. The first token of a text is an attention sink: its
                state is huge and nearly the same whatever the token is.
            key_modules: names of modules whose inputs are read as well; they come in the order of their layers. Needs
                `with_values` and the tokenizer, from which it finds the token that begins an answer.
            fingerprint: the base's own, of its weights.
            lora: gives the encoder LoRA, which the base carries while it reads, or None; with one, features are
                differentiable.
            with_final_norm: the states after the last of `layers` pass the base's final norm, as the last one of
                transformers' `hidden_states` does.
        """
        self.fingerprint, self.device = fingerprint, model.device
        self._lock, self._lora = model_lock(model), lora
        weight = model.get_output_embeddings().weight
        self.d_features: int = weight.shape[1] * (2 if with_values else 1)
        self.layers, self.prefix = tuple(layers), tuple(prefix)
        self._tokenizer = tokenizer
        self._starts: dict[int, int] = {}
        self._embeddings = model.get_output_embeddings() if with_values else None
        decoder = model.get_decoder()
        if with_values:
            self._mean = weight.float().mean(0)
            ones = torch.ones(1, 1, weight.shape[1], device=weight.device)
            self._gain = decoder.norm(ones).float()[0, 0].to(weight.device)
        depth = max(self.layers)
        self.key_modules: list[str] = []
        modules = dict(model.named_modules())
        for layer, block in enumerate(decoder.layers):
            inside = {id(module) for module in block.modules()}
            found = [name for name in key_modules if id(modules.get(name)) in inside]
            self.key_modules += found
            depth = max(depth, layer + 1) if found else depth
        self._final_norm = decoder.norm if with_final_norm else nn.Identity()

        def modules_of_a_thread() -> tuple[Any, Any]:
            apart = twin(model)
            shorter = cut(apart.get_decoder(), depth)
            if apart is not model:
                for block in shorter.layers:
                    block.register_forward_pre_hook(self._give_way)
            return apart, shorter

        self._own = _Modules(modules_of_a_thread)
        if missing := [name for name in key_modules if name not in modules]:
            raise EncoderError(
                f"the base has no module {missing[0]}, whose inputs are read: give the base that the hypernetwork was "
                "made for"
            )

    def __call__(self, input_ids: Tensor, mask: Tensor | None = None, lora: LoRABatch | None = None) -> Features:
        """input_ids [n, t], padded on the right -> their features: states of the base's width, twice that with values.

        Attention is causal, so padding on the right changes nothing before it: the mask [n, t] is only handed on. A
        LoRA that is given takes the place of the encoder LoRA.
        """
        lora = self._lora() if lora is None else lora
        with torch.set_grad_enabled(torch.is_grad_enabled() and lora is not None):
            with inject(self._own.model, lora) if lora is not None else nullcontext():
                states, keys = self._read(input_ids)
            features = torch.stack([states[n] for n in self.layers], dim=1)  # [n, layers, t, d]
            if self._embeddings is not None:
                values = self.values(input_ids).to(features.dtype)[:, None].expand_as(features)
                features = torch.cat([features, values], dim=-1)
            features = features[:, 0] if len(self.layers) == 1 else features
            if not self.key_modules:
                return Features(features, mask=mask)
            starts = self.values(self._start_ids(input_ids)).to(features.dtype)
            return Features(features, starts, torch.stack([keys[name] for name in self.key_modules], dim=1), mask)

    def _give_way(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._lock.is_owned():
            self._lock.give_way()

    def _read(self, input_ids: Tensor) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """States [n, t, d] by block, and inputs [n, t, in] of the key modules by name."""
        model, decoder = self._own.model, self._own.decoder
        n_prefix, n_blocks = len(self.prefix), len(decoder.layers)
        prefix = torch.tensor(self.prefix, dtype=input_ids.dtype, device=input_ids.device)
        read = torch.cat([prefix.expand(input_ids.shape[0], -1), input_ids], dim=1)
        embedded = decoder.get_input_embeddings()(read)
        # The state after a block is what enters the next one; after the last, the norm.
        after = {n: "norm" if n == n_blocks else f"layers.{n}" for n in self.layers}
        blocks = list(after.values())
        with capture_inputs(decoder, blocks) as inputs, capture_inputs(model, self.key_modules) as keys:
            decoder(inputs_embeds=embedded, use_cache=False)
        # A device map spreads the blocks over devices: what they give is gathered on the first one.
        states = {n: inputs[name].to(self.device) for n, name in after.items()}
        states[max(states)] = self._final_norm(states[max(states)])
        kept = {name: rows[:, n_prefix:].to(self.device) for name, rows in keys.items()}
        return {n: rows[:, n_prefix:] for n, rows in states.items()}, kept

    @torch.no_grad()
    def values(self, input_ids: Tensor) -> Tensor:
        """input_ids [...] -> for each token the unit vector [..., d] that makes the base generate it."""
        assert self._embeddings is not None
        weight = self._embeddings.weight
        embedded = weight[input_ids.to(weight.device)].float() - self._mean
        return functional.normalize(embedded * self._gain, dim=-1).to(input_ids.device)

    def _start_ids(self, input_ids: Tensor) -> Tensor:
        """input_ids [n, t] -> for each token the one that begins an answer with the same text (after a space)."""
        known = self._starts
        for i in set(input_ids.flatten().tolist()) - known.keys():
            text = self._tokenizer.decode([i]).strip()
            if "\ufffd" in text:  # some bytes of a character
                known[i] = self._without_space(i)
            else:
                known[i] = (encode_inside(self._tokenizer, text) or [i])[0] if text else i
        starts = [[known[i] for i in row] for row in input_ids.tolist()]
        return torch.tensor(starts, dtype=input_ids.dtype, device=input_ids.device)

    def _without_space(self, i: int) -> int:
        """The token of the same bytes without a space before them; the token itself where there is none."""
        piece = self._tokenizer.convert_ids_to_tokens(i).lstrip("Ġ▁")
        other = self._tokenizer.convert_tokens_to_ids(piece)
        return other if other is not None and self._tokenizer.convert_ids_to_tokens(other) == piece else i


def read_in_groups(encoder: HiddenStatesEncoder, input_ids: Tensor, mask: Tensor, n: int) -> Features:
    """The features of rows [c, t], read in at most `n` groups of similar length; those of padding mean nothing.

    Args:
        mask: [c, t], true where a token is real.
    """
    if n == 1:
        return encoder(input_ids, mask)
    lengths = mask.sum(1).clamp_min(1).tolist()
    groups = length_groups(lengths, n)
    read = [encoder(input_ids[rows, : lengths[rows[0]]]) for rows in groups]
    order = torch.tensor([row for rows in groups for row in rows], device=input_ids.device).argsort()

    def joined(name: str) -> Tensor | None:
        parts = [getattr(one, name) for one in read]
        if parts[0] is None:
            return None
        padded = [functional.pad(part, (0, 0, 0, input_ids.shape[1] - part.shape[-2])) for part in parts]
        return torch.cat(padded)[order]

    states = joined("states")
    assert states is not None
    return Features(states, joined("starts"), joined("keys"), mask)
