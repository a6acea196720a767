"""How much memory a base takes, from its config alone: no weights are read, so any base can be asked about anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loracast.base.embedded import DEFAULT_BASE, embedded, pull, quiet_transformers
from loracast.base.packages import Say
from loracast.base.precision import dtype_of
from loracast.errors import BaseModelError
from loracast.hub import folder_of
from loracast.lora.target import layer_shapes, text_config

if TYPE_CHECKING:
    import torch

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

    def generating(self, n_tokens: int, n_rows: int = 1) -> int:
        """Peak of reading and continuing `n_rows` texts of at most `n_tokens` tokens, the weights included."""
        per_token = self.kv_per_token + self.forward_per_token
        return self.weights + n_rows * (n_tokens * per_token + self.logits_per_token)

    def encoding(self, n_tokens: int) -> int:
        """Peak of reading `n_tokens` tokens at once without keeping keys or values, the weights included."""
        return self.weights + n_tokens * self.forward_per_token


def footprint(config: Any, dtype: str | torch.dtype, quantization: Quantization | None = None) -> Footprint:
    """Compute what a base takes.

    Args:
        config: in transformers' form (`read_base_config`).
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


def read_base_config(source: str | Path | None, say: Say = lambda text: None) -> Any:
    """The config of an embedded base, or of one in a folder or a hub repository, in transformers' form.

    Nothing but config.json is fetched or read of a base that is not embedded.

    Raises:
        BaseModelError: there is none.
    """
    from transformers import AutoConfig

    name = str(source) if source is not None else DEFAULT_BASE
    where = (
        pull(name, say=say) if name in embedded("base") else folder_of(name, ("config.json",), "base", BaseModelError)
    )
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"the base {name!r} has no config of transformers ({error})") from error


def free_memory(device: str) -> int | None:
    """Bytes that a device such as "cpu" or "cuda:0" has to give now; None where the system does not say.

    On a CPU it is what Linux can give without swapping, or less where a control group (a container) has a limit.
    """
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if torch.device(device).type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        most, used = (int((_CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no such file, or "max"
        return free
    return min(free, most - used + int(stat["inactive_file"]))  # cached files give way
