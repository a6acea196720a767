"""Keeps the linear modules of a base in 8 or 4 bits: the libraries that do it, and what may be done with such weights.

Only weights are quantized, so a base computes what it would with its weights dequantised, one row of a batch as alone:
8 bits are integers with a scale for each row (torchao), 4 bits are NormalFloat with a scale for each 64 weights
(bitsandbytes; Dettmers et al., arXiv 2305.14314). torchao's kernels for 4 bits need a GPU, and the 8 bits of
bitsandbytes also round what enters a module, by the largest values of the whole batch. Embeddings, norms and the output
head stay as they are.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loracast.base.footprint import Quantization
from loracast.errors import BaseModelError, ConfigError

if TYPE_CHECKING:
    import torch

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
