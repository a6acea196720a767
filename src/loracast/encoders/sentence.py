"""Text encoders: a description becomes one vector, the condition of a task's LoRA. Torch loads on first use.

There are two families: sentence encoders (a folder or hub repository in the layout of sentence-transformers, read with
transformers alone), of which the default is MiniLM from a PyPI package; and the base itself, by its state at the
description's last token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loracast.base.embedded import embedded, pull, quiet_transformers
from loracast.base.packages import Say
from loracast.encoders.features import OF_THE_BASE
from loracast.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor

    from loracast.base.load import Base

_TEXTS_AT_ONCE = 64
_PARTS = ("Transformer", "Pooling", "Normalize")  # the parts of sentence encoders that this module implements


class TextEncoder(Protocol):
    """An encoder of descriptions, as text-to-LoRA hypernetworks use it."""

    name: str
    """The name that a user gives, and that the hypernetwork's config keeps."""
    d_text: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> their vectors [n, d_text], fp32, of length sqrt(d_text)."""
        ...

    def fits(self, text: str) -> bool:
        """Whether it reads the whole text."""
        ...


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
                self._model: Any = AutoModel.from_pretrained(where).eval().requires_grad_(False)
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
        import torch

        lengths = list(map(self._length, texts))
        if max(lengths) > self._max_tokens:
            raise EncoderError(
                f"a description has {max(lengths)} tokens and the text encoder {self.name!r} reads {self._max_tokens}: "
                "say it shorter"
            )
        vectors = []
        with torch.inference_mode():
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                some = self._tokenizer(list(texts[start : start + _TEXTS_AT_ONCE]), padding=True, return_tensors="pt")
                states = self._model(**some).last_hidden_state  # [n, t, d]
                vectors.append(_pool(states, some["attention_mask"].bool(), self._pooling))
        return _unit(torch.cat(vectors))

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
        import torch

        from loracast.base.chat import encode_text
        from loracast.batching import pad_right

        vectors = []
        with torch.inference_mode():
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                some = [encode_text(self._base.tokenizer, text) for text in texts[start : start + _TEXTS_AT_ONCE]]
                ids, mask = pad_right(some, self._base.pad_id)
                ids, mask = ids.to(self._base.device), mask.to(self._base.device)
                states = self._base.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
                vectors.append(_pool(states, mask, "lasttoken").float().cpu())
        return _unit(torch.cat(vectors))

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


def _unit(vectors: Tensor) -> Tensor:
    """Vectors scaled to length sqrt(d), so that their numbers are about 1 whatever the encoder."""
    from torch.nn.functional import normalize

    return normalize(vectors.float(), dim=-1) * vectors.shape[-1] ** 0.5


def _read_json(where: str | Path, name: str, otherwise: Any = None) -> Any:
    """A file of a model's folder or hub repository; `otherwise` if it has none. Raises OSError if that is None too."""
    from transformers.utils import cached_file, has_file

    is_there = (Path(where) / name).is_file() if Path(where).is_dir() else has_file(str(where), name)
    if otherwise is not None and not is_there:
        return otherwise
    return json.loads(Path(str(cached_file(str(where), name))).read_text(encoding="utf-8"))
