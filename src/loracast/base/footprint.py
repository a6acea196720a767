"""What a base takes: its precision and quantisation, and its memory, known before any weights are read.

Keeps the linear modules of a base in 8 or 4 bits: the libraries that do it, and what may be done with such weights.

Only weights are quantized, so a base computes what it would with its weights dequantised, one row of a batch as alone:
8 bits are integers with a scale for each row (torchao), 4 bits are NormalFloat with a scale for each 64 weights
(bitsandbytes; Dettmers et al., arXiv 2305.14314). torchao's kernels for 4 bits need a GPU, and the 8 bits of
bitsandbytes also round what enters a module, by the largest values of the whole batch. Embeddings, norms and the output
head stay as they are.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loracast.base.embedded import Say, quiet_transformers
from loracast.errors import BaseModelError, ConfigError
from loracast.lora.target import layer_shapes, text_config

if TYPE_CHECKING:
    import torch


_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def has_fast_bf16(device_type: str) -> bool:
    """Whether a device multiplies matrices in bf16 at least as fast as in float32.

    Processors and GPUs without instructions for it emulate bf16 at a fraction of the speed: x86 without AVX512-BF16 or
    AMX, as in most laptops, and GPUs of NVIDIA before Ampere.
    """
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return any(getattr(torch.cpu, check, lambda: False)() for check in _CHECKS)


def bf16_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Run forward passes in bf16 where a device is fast at it, and in the type of the weights elsewhere."""
    import torch

    return torch.autocast(device.type, torch.bfloat16) if has_fast_bf16(device.type) else nullcontext()


def fastest_dtype(device: str) -> torch.dtype:
    """The type of weights with which a base runs fastest on a device such as "cpu" or "cuda:0"."""
    import torch

    return torch.bfloat16 if has_fast_bf16(torch.device(device).type) else torch.float32


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point type from its name in torch, such as "bfloat16". Raises ConfigError for anything else."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{dtype!r} is no type of weights: give one such as float32, bfloat16 or float16")
    return found


LIBRARIES: dict[Quantization, str] = {"8bit": "torchao", "4bit": "bitsandbytes"}


def check_quantize(quantize: str | None) -> Quantization | None:
    """A quantization by its name. Raises ConfigError for an unknown one, BaseModelError where its library is absent."""
    if quantize is None:
        return None
    found = next((known for known in LIBRARIES if known == quantize), None)
    if found is None:
        raise ConfigError(f"a base is quantized to {' or '.join(LIBRARIES)}, and not to {quantize!r}")
    if find_spec(LIBRARIES[found]) is None:
        raise BaseModelError(f"{found} needs {LIBRARIES[found]}: pip install 'loracast[quantize]'")
    return found


def quantization_config(quantize: Quantization, dtype: torch.dtype) -> Any:
    """What transformers takes to quantize the linear modules while it loads a base that computes in `dtype`."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantize == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it complains of kernels for GPUs that are not there
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    finally:
        logging.disable(before)
    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def keep_unpacked(model: torch.nn.Module) -> None:
    """Keep 4-bit weights as they are on processors with AVX512-BF16.

    bitsandbytes would pack them in the first forward pass: it only takes rows of whole blocks of 64 weights, and rounds
    scales to bf16, so that answers depend on the processor.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_plain(weight: Any) -> bool:
    """Whether a weight is a tensor of numbers that can be read and added to, and not one that is quantized."""
    import torch

    return type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point()


Quantization = Literal["8bit", "4bit"]
_BYTES_PER_WEIGHT: dict[Quantization, float] = {"8bit": 1.0, "4bit": 0.5}
_GROUP: dict[Quantization, int] = {"8bit": 256, "4bit": 64}
"""Weights that share a float32 scale, at the fewest (an upper bound of the scales' size)."""
_CGROUP = Path("/sys/fs/cgroup")
_LIVE_HIDDEN, _LIVE_INNER = 6, 3
"""Tensors of the width of the residual stream, and of the MLP, that one block holds at once: the stream, its norm in
float32 (twice as wide), the queries and what is added; gate, up and their product."""

_COUNTED: dict[str, tuple[int, int]] = {}
"""What `count_parameters` found, by config: a plan asks for each quantization of one base."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a base takes."""

    n_parameters: int
    weights: int
    """Its weights."""
    kv_per_token: int
    """Keys and values that generation keeps for a token of the window."""
    forward_per_token: int
    """What a forward pass without gradients holds for a token at its peak: the tensors of one block."""
    logits_per_token: int
    """Scores of the whole vocabulary for a token, in float32 and once more in the base's type."""

    def generating(self, n_tokens: int) -> int:
        """Peak of reading and continuing a text of at most `n_tokens` tokens, the weights included."""
        return self.weights + n_tokens * (self.kv_per_token + self.forward_per_token) + self.logits_per_token


def footprint(config: Any, dtype: str | torch.dtype, quantization: Quantization | None = None) -> Footprint:
    """Compute what a base takes.

    Args:
        config: in transformers' form.
        dtype: of the weights, such as "bfloat16"; of those that are not quantized, where some are.
        quantization: of the linear modules in the blocks; embeddings, norms and the head stay as they are.

    Raises:
        BaseModelError: a base of a type that is not supported.
    """
    text = text_config(config)
    width = dtype_of(dtype).itemsize
    n_parameters, n_in_blocks = count_parameters(config)
    weights = n_parameters * width
    if quantization is not None:
        packed = n_in_blocks * (_BYTES_PER_WEIGHT[quantization] + 4 / _GROUP[quantization])
        weights = (n_parameters - n_in_blocks) * width + round(packed)
    shapes = layer_shapes(config)
    (hidden, queries), (_, keys), (_, inner) = shapes["q_proj"], shapes["k_proj"], shapes["gate_proj"]
    return Footprint(
        n_parameters,
        weights,
        kv_per_token=2 * keys * text.num_hidden_layers * width,
        forward_per_token=(_LIVE_HIDDEN * max(hidden, queries) + 2 * keys + _LIVE_INNER * inner) * width,
        logits_per_token=text.vocab_size * (4 + width),
    )


def count_parameters(config: Any) -> tuple[int, int]:
    """The numbers of a base's parameters, and of those in the linear modules of its blocks; tied ones count once."""
    import torch
    from transformers import AutoModelForCausalLM

    key = config.to_json_string(use_diff=False)
    if key not in _COUNTED:
        with torch.device("meta"), quiet_transformers():
            model: Any = AutoModelForCausalLM.from_config(config)
        linear = [module for module in model.get_decoder().layers.modules() if isinstance(module, torch.nn.Linear)]
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        _COUNTED[key] = n_parameters, sum(module.weight.numel() for module in linear)
    return _COUNTED[key]


def free_memory(device: str) -> int | None:
    """Bytes that a device such as "cpu" or "cuda:0" has to give now; None where the system does not say.

    On a CPU it is what the system can give without swapping, or less where a control group (a container) has a limit.
    """
    import torch
    from accelerate.utils import get_max_memory

    place = torch.device(device)
    free = get_max_memory().get(place.index or 0 if place.type == "cuda" else place.type)
    if place.type != "cpu" or free is None:
        return free
    try:
        most, used = (int((_CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no such file, or "max"
        return free
    return min(free, most - used + int(stat["inactive_file"]))  # cached files give way


_WINDOW = 1024
"""Tokens that a base must be able to read and continue to be of use."""
_SMALL = 2 * 10**9
"""Bytes up to which nothing is said."""


def devices_of(device: str, device_map: str | dict[str, Any] | None) -> list[str]:
    """The devices that a base is spread over; none where the map names something else, such as the disk."""
    import torch

    if device_map is None:
        return [device]
    if isinstance(device_map, dict):
        named = [f"cuda:{place}" if isinstance(place, int) else str(place) for place in device_map.values()]
        return [] if "disk" in named else list(dict.fromkeys(named))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or [device]
    return [device_map]


def check_memory(
    name: str, config: Any, dtype: torch.dtype, quantization: Quantization | None, devices: Sequence[str], say: Say
) -> None:
    """Say what a base takes, if that is much.

    Args:
        devices: as `devices_of` gives them; what they have free is added up.

    Raises:
        BaseModelError: its weights and a window of 1,024 tokens do not fit into what is free.
    """
    if getattr(config, "quantization_config", None) is not None:
        return  # the checkpoint is quantized: its config does not tell how large it is
    takes = footprint(config, dtype, quantization)
    needed = takes.generating(_WINDOW)
    if needed < _SMALL:
        return
    how = quantization or str(dtype).removeprefix("torch.")
    message = (
        f"the base {name!r} takes {_gb(takes.weights)} in {how}, and {_gb(needed)} while it answers in a window of "
        f"{_WINDOW:,} tokens"
    )
    of_each = [free_memory(device) for device in devices]
    free = [n_bytes for n_bytes in of_each if n_bytes is not None]
    if not free or len(free) < len(of_each):
        say(message)
        return
    where = ", ".join(devices)
    if needed > sum(free):
        smaller = (
            "a smaller dtype (bfloat16), or quantize (8bit, 4bit)" if dtype.itemsize > 2 else "quantize (8bit, 4bit)"
        )
        remedy = "take a smaller base or a larger machine" if quantization == "4bit" else f"give {smaller}"
        raise BaseModelError(f"{message}, and {where} has {_gb(sum(free))} free: {remedy}")
    say(f"{message}; {where} has {_gb(sum(free))} free")


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
