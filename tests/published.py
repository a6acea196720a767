"""Reads the checkpoints that SakanaAI/doc-to-lora publishes, into this project's own hypernetwork.

They are pickles. Nothing of a pickle is executed here: tensors are rebuilt from their raw bytes, the few classes that occur become empty
stand-ins, and any other name is refused.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
from loracast.target import target_from_config

FIXTURES = Path(os.environ.get("LORACAST_FIXTURES", Path(__file__).parents[2] / "shared" / "fixtures"))
DOC_TO_LORA = FIXTURES / "published" / "doc-to-lora"

_DTYPES = {
    "FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
}  # fmt: skip


class Record:
    """Stands in for a config object: its attributes, none of its code."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset).clone()


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module.split(".")[0] in ("ctx_to_lora", "peft"):
            return type(name, (Record,), {})
        allowed = {
            ("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("__builtin__", "set"): set, ("builtins", "set"): set,
        }  # fmt: skip
        if (module, name) in allowed:
            return allowed[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} has no business in a checkpoint")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}/data/{key}")), dtype=dtype)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary in a `pytorch_model.bin`."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        return _Unpickler(archive, root).load()


_BLOCK = {
    "input_latents_layernorm": "norm_latents", "input_context_layernorm": "norm_context",
    "post_attention_layernorm": "norm_attended", "pre_ff_layernorm": "norm_before_mlp",
    "post_ff_layernorm": "norm_after_mlp",
    "self_attn.q_proj": "attention.q", "self_attn.k_proj": "attention.k", "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
}  # fmt: skip


def doc_to_lora(checkpoint: dict[str, Any], base_config: Any, reader_layers: tuple[int, ...]) -> DocToLoRA:
    """A published checkpoint as a DocToLoRA.

    The published scale multiplies the document-independent LoRA too; here it is folded into that LoRA's B.
    """
    c = checkpoint["hypernet_config"]
    lora, aggregator = c.lora_config, c.aggregator_config
    kinds = sorted(lora.target_modules)
    perceiver = "aggregator.perceiver"
    n_heads_dim, width = checkpoint[f"{perceiver}.decoder.layers.0.self_attn.q_proj.weight"].shape
    kv_dim = checkpoint[f"{perceiver}.decoder.layers.0.self_attn.k_proj.weight"].shape[0]
    head_dim = 128
    config = DocToLoRAConfig.for_target(
        target_from_config(base_config, kinds, c.layer_indices.tolist()),
        aggregator.feature_size,
        reader_layers=reader_layers,
        rank=lora.r,
        width=width,
        n_heads=n_heads_dim // head_dim,
        n_kv_heads=kv_dim // head_dim,
        head_dim=head_dim,
        n_encoder_blocks=aggregator.num_blocks,
        n_latents=aggregator.n_latent_queries,
        n_decoder_blocks=1,
        gated_projection=True,
        factorised_queries=False,
        n_latent_mlps=c.num_pre_head_layers,
        document_independent_rank=lora.r if c.use_bias else 0,
        scale=lora.lora_alpha,
    )
    hypernet = DocToLoRA(config)
    state = {name: hypernet.state_dict()[name] for name in ("feature_mean", "feature_std")}  # neutral from the start
    state |= {
        f"heads.{kind}.{name}": getattr(hypernet.heads[kind], name)
        for kind in kinds
        for name in ("in_scale", "out_scale")
    }
    for side in ("gate", "up", "down"):
        state[f"project.{side}.weight"] = checkpoint[f"{perceiver}.modality_projection.{side}_proj.weight"]
    for part, latents, n_blocks in (
        ("encoder", "encoder_latents", config.n_encoder_blocks),
        ("decoder", "rank_latents", config.n_decoder_blocks),
    ):
        state[f"{latents}.free"] = checkpoint[f"{perceiver}.{part}.latents_q"]
        state[f"{part}.norm.weight"] = checkpoint[f"{perceiver}.{part}.layernorm.weight"]
        for i in range(n_blocks):
            for theirs, ours in _BLOCK.items():
                name = f"{perceiver}.{part}.layers.{i}.{theirs}.weight"
                state[f"{part}.blocks.{i}.{ours}.weight"] = checkpoint[name]
    for i in range(config.n_latent_mlps):
        ours, theirs = f"latent_mlps.{i}", f"layers.{i}.layers"
        for place, norm in ((0, "norm_in"), (4, "norm_out")):
            state[f"{ours}.{norm}.weight"] = checkpoint[f"{theirs}.{place}.weight"]
            state[f"{ours}.{norm}.bias"] = checkpoint[f"{theirs}.{place}.bias"]
        for place, n in ((1, 1), (3, 2)):
            state[f"{ours}.w{n}"] = checkpoint[f"{theirs}.{place}.weight"]
            state[f"{ours}.b{n}"] = checkpoint[f"{theirs}.{place}.bias"][0, :, 0]  # [layers, 1, width]
    (kind,) = kinds  # the heads of several kinds are one matrix, in an order that no checkpoint at hand shows
    state[f"heads.{kind}.weight"] = checkpoint["head.weight"]
    state[f"heads.{kind}.scaler_a"] = checkpoint[f"scaler_A.{kind}"][0]
    state[f"heads.{kind}.scaler_b"] = checkpoint[f"scaler_B.{kind}"][0]
    if config.document_independent_rank:
        state[f"document_independent.{kind}.a"] = checkpoint[f"bias_A.{kind}"]
        state[f"document_independent.{kind}.b"] = checkpoint[f"bias_B.{kind}"] * config.scale
    hypernet.load_state_dict(state, strict=True)
    return hypernet.eval()
