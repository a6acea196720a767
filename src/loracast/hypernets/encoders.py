"""Encoders turn a condition (a text, a description) into the features that a hypernetwork reads.

Documents are read by the base itself: deeper blocks of it than the deepest one asked for are not computed.

A description becomes one vector, by a sentence encoder (a folder or hub repository in the layout of
sentence-transformers, read with transformers alone; by default MiniLM from a PyPI package), or by the base: its state
at the description's last token.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.base.chat import encode_inside, encode_text
from loracast.base.embedded import Say, embedded, pull, quiet_transformers
from loracast.base.forward import capture_inputs, pad_right, twin
from loracast.base.load import Base
from loracast.errors import EncoderError
from loracast.lora.algebra import LoRABatch, inject
from loracast.lora.inject import model_lock

OF_THE_BASE = "base"
"""The encoder name that means the base itself."""


@dataclass(frozen=True)
class Features:
    """Features of n chunks or descriptions of t tokens each, padding included."""

    states: Tensor
    """[n, t, d], or [n, layers, t, d] where each layer reads its own; the last columns may be values to copy."""
    starts: Tensor | None = None
    """[n, t, d_values]: values that begin an answer with the token; for a memory."""
    keys: Tensor | None = None
    """[n, modules, t, d_in]: inputs of the modules that hold a memory."""
    mask: Tensor | None = None
    """[n, t] bool, true where a token is real; None: all are. `cast` gives padding rows of zero."""
    read: Tensor | None = None
    """[n, t, 2 * d]: states and input embeddings for a reader (hypernets/reader.py)."""

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Features:
        """The same on a device, their numbers in another type if one is given."""
        there = {key: value for key, value in vars(self).items() if value is not None}
        return Features(**{k: v.to(device, dtype if v.is_floating_point() else None) for k, v in there.items()})

    @property
    def n_chunks(self) -> int:
        return self.states.shape[0]


def cut(decoder: Any, depth: int) -> Any:
    """A decoder of the first `depth` blocks of another one, sharing their weights, without the final norm.

    Raises:
        EncoderError: it has fewer blocks.
    """
    if depth > len(decoder.layers):
        raise EncoderError(f"the base has no block {depth}, which is read: give the hypernetwork's own base")
    shorter = copy.copy(decoder)
    shorter._modules = dict(decoder._modules)
    shorter.layers = decoder.layers[:depth]
    shorter.config = copy.copy(decoder.config)
    shorter.config.num_hidden_layers = depth
    shorter.norm = nn.Identity()
    return shorter


class HiddenStatesEncoder:
    """Reads the base's hidden states: the encoder of documents. It shares the base's weights.

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
        reader_layer: int | None = None,
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
            reader_layer: the block after which states are read for a reader.
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
        modules = dict(model.named_modules())
        layer_of = {id(module): layer for layer, block in enumerate(decoder.layers) for module in block.modules()}
        holding = {name: layer_of.get(id(modules.get(name)), -1) for name in key_modules}
        self.key_modules = sorted(holding, key=holding.__getitem__)
        self._reader_layers = () if reader_layer is None else (reader_layer,)
        depth = max(*self.layers, *self._reader_layers, *(layer + 1 for layer in holding.values()), 0)
        self._final_norm = decoder.norm if with_final_norm else nn.Identity()
        self._model, self._depth = model, depth
        self._own = threading.local()
        self._modules()  # raises for a base of too few blocks
        if missing := [name for name, layer in holding.items() if layer < 0]:
            raise EncoderError(f"the base has no {missing[0]}, whose inputs are read: give the hypernetwork's own base")

    def __call__(self, input_ids: Tensor, mask: Tensor | None = None, lora: LoRABatch | None = None) -> Features:
        """input_ids [n, t], padded on the right -> their features: states of the base's width, twice that with values.

        Attention is causal, so padding on the right changes nothing before it: the mask [n, t] is only handed on. A
        LoRA that is given takes the place of the encoder LoRA.
        """
        lora = self._lora() if lora is None else lora
        with torch.set_grad_enabled(torch.is_grad_enabled() and lora is not None):
            model, decoder = self._modules()
            with inject(model, lora) if lora is not None else nullcontext():
                states, keys = self._read(model, decoder, input_ids)
            features = torch.stack([states[n] for n in self.layers], dim=1)  # [n, layers, t, d]
            read = None
            for layer in self._reader_layers:
                embedded = decoder.get_input_embeddings()(input_ids)
                read = torch.cat([states[layer], embedded.to(states[layer])], -1)
            if self._embeddings is not None:
                values = self.values(input_ids).to(features.dtype)[:, None].expand_as(features)
                features = torch.cat([features, values], dim=-1)
            features = features[:, 0] if len(self.layers) == 1 else features
            if not self.key_modules:
                return Features(features, read=read, mask=mask)
            starts = self.values(self._start_ids(input_ids)).to(features.dtype)
            return Features(features, starts, torch.stack([keys[name] for name in self.key_modules], dim=1), mask, read)

    def _modules(self) -> tuple[Any, Any]:
        """The model and decoder with which this thread reads: another may begin to read while it gives way."""
        if not hasattr(self._own, "modules"):
            model = twin(self._model)
            decoder = cut(model.get_decoder(), self._depth)
            if model is not self._model:
                for block in decoder.layers:
                    block.register_forward_pre_hook(self._give_way)
            self._own.modules = model, decoder
        return self._own.modules

    def _give_way(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._lock.is_owned():
            self._lock.give_way()

    def _read(self, model: Any, decoder: Any, input_ids: Tensor) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """States [n, t, d] by block, and inputs [n, t, in] of the key modules by name."""
        n_prefix, n_blocks = len(self.prefix), len(decoder.layers)
        prefix = torch.tensor(self.prefix, dtype=input_ids.dtype, device=input_ids.device)
        read = torch.cat([prefix.expand(input_ids.shape[0], -1), input_ids], dim=1)
        embedded = decoder.get_input_embeddings()(read)
        # The state after a block is what enters the next one; after the last, the norm.
        after = {n: "norm" if n == n_blocks else f"layers.{n}" for n in (*self.layers, *self._reader_layers)}
        blocks = list(after.values())
        with capture_inputs(decoder, blocks) as inputs, capture_inputs(model, self.key_modules) as keys:
            decoder(inputs_embeds=embedded, use_cache=False)
        # A device map spreads the blocks over devices: what they give is gathered on the first one.
        states = {n: inputs[name].to(self.device) for n, name in after.items()}
        states[max(self.layers)] = self._final_norm(states[max(self.layers)])
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


_TEXTS_AT_ONCE = 64
_PARTS = ("Transformer", "Pooling", "Normalize")  # the parts of sentence encoders that this module implements


class TextEncoder(Protocol):
    """An encoder of descriptions, as text-to-LoRA hypernetworks use it."""

    name: str
    """The name that a user gives, and that the hypernetwork's config keeps."""
    d_text: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> their vectors [n, d_text], fp32, of length sqrt(d_text)."""

    def fits(self, text: str) -> bool:
        """Whether it reads the whole text."""


def load_text_encoder(name: str, base: Base | None = None, say: Say = lambda text: None) -> TextEncoder:
    """Load a text encoder by name.

    Args:
        name: an embedded encoder, `base`, or a folder or hub id of a sentence encoder.
        base: needed only for the encoder `base`.

    Raises:
        EncoderError: it cannot be found, fetched or used; the message says what to do.
    """
    if name == OF_THE_BASE:
        if base is None:
            raise EncoderError("this hypernetwork reads descriptions with its base, which is not loaded")
        return BaseTextEncoder(base)
    return SentenceEncoder(name, pull(name, say=say) if name in embedded("text encoder") else name)


class SentenceEncoder:
    """A sentence encoder in the layout of sentence-transformers: a transformer and the pooling of its states."""

    def __init__(self, name: str, where: str | Path):
        """
        Args:
            name: the name that the user gave.
            where: its folder or hub id.
        """
        from transformers import AutoModel, AutoTokenizer

        try:
            with quiet_transformers():
                self._tokenizer = AutoTokenizer.from_pretrained(where, padding_side="right")
                self._model: Any = AutoModel.from_pretrained(where, use_kernels=False).eval().requires_grad_(False)
            pooling = _read_json(where, "1_Pooling/config.json")
            parts = _read_json(where, "modules.json", [])
            lengths = _read_json(where, "sentence_bert_config.json", {})
        except (OSError, ValueError, KeyError) as error:
            raise EncoderError(
                f"cannot load the text encoder {name!r}: give one of {', '.join(embedded('text encoder'))}, "
                f"{OF_THE_BASE}, or a folder or hub id of a sentence encoder in the layout of sentence-transformers "
                f"({str(error).splitlines()[0]})"
            ) from error
        modes = [mode for mode in ("cls_token", "mean_tokens", "lasttoken") if pooling.get(f"pooling_mode_{mode}")]
        extra = [part["type"] for part in parts if part["type"].rpartition(".")[2] not in _PARTS]
        if len(modes) != 1 or extra:
            raise EncoderError(f"the text encoder {name!r} pools in a way that is not supported: {extra or pooling}")
        self.name, self._pooling = name, modes[0]
        self.d_text = int(self._model.config.hidden_size)
        limits = [lengths.get("max_seq_length"), getattr(self._model.config, "max_position_embeddings", None)]
        self._max_tokens = min([int(limit) for limit in limits if limit] or [512])

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """n texts -> vectors [n, d_text], fp32, of length sqrt(d_text). Raises EncoderError for too long a text."""
        lengths = list(map(self._length, texts))
        if max(lengths) > self._max_tokens:
            raise EncoderError(
                f"a description has {max(lengths)} tokens, and {self.name!r} reads {self._max_tokens}: say it shorter"
            )
        return _in_batches(self._read, texts)

    def _read(self, texts: Sequence[str]) -> Tensor:
        encoded = self._tokenizer(list(texts), padding=True, return_tensors="pt")
        return _pool(self._model(**encoded).last_hidden_state, encoded["attention_mask"].bool(), self._pooling)

    def fits(self, text: str) -> bool:
        return self._length(text) <= self._max_tokens

    def _length(self, text: str) -> int:
        return len(self._tokenizer(text, verbose=False)["input_ids"])


class BaseTextEncoder:
    """The base's own state at a description's last token, after its final norm."""

    name = OF_THE_BASE

    def __init__(self, base: Base):
        self._base = base
        self.d_text = int(base.model.config.get_text_config().hidden_size)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> their vectors [n, d_text], fp32, of length sqrt(d_text)."""
        return _in_batches(self._read, texts)

    def _read(self, texts: Sequence[str]) -> Tensor:
        base = self._base
        ids, mask = pad_right([encode_text(base.tokenizer, text) for text in texts], base.pad_id)
        states = base.model.get_decoder()(input_ids=ids.to(base.device), use_cache=False).last_hidden_state
        return _pool(states, mask.to(base.device), "lasttoken").cpu()

    def fits(self, text: str) -> bool:
        return True  # as far as the base's window reaches


def _pool(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """States [n, t, d] of texts padded on the right -> one vector each [n, d]."""
    if how == "cls_token":
        return states[:, 0]
    lengths = mask.sum(1)
    if how == "lasttoken":
        return states[range(len(states)), lengths - 1]
    return (states * mask[..., None]).sum(1) / lengths[:, None]


def _in_batches(read: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """The vectors that `read` gives for texts [n, d], scaled to length sqrt(d): their numbers are about 1."""
    with torch.inference_mode():
        parts = [read(texts[start : start + _TEXTS_AT_ONCE]) for start in range(0, len(texts), _TEXTS_AT_ONCE)]
    vectors = torch.cat(parts).float()
    return functional.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5


def _read_json(where: str | Path, name: str, otherwise: Any = None) -> Any:
    """A file of a model's folder or hub repository; `otherwise` if it has none. Raises OSError if that is None too."""
    from transformers.utils import cached_file, has_file

    is_there = (Path(where) / name).is_file() if Path(where).is_dir() else has_file(str(where), name)
    if otherwise is not None and not is_there:
        return otherwise
    return json.loads(Path(str(cached_file(str(where), name))).read_text(encoding="utf-8"))
