"""Reads checkpoints in the formats of SakanaAI/doc-to-lora and SakanaAI/text-to-lora into this project's hypernetworks.

They are pickles. Nothing of a pickle is executed here: tensors are rebuilt from their raw bytes, the few classes that
occur become empty stand-ins, and any other name is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracast.hypernets.published import PublishedDocToLoRA, PublishedDocToLoRAConfig
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lora.target import KINDS, target_from_config

PUBLISHED = Path(__file__).parent / "files" / "published"
DOC_TO_LORA = PUBLISHED / "doc-to-lora"
TEXT_TO_LORA = PUBLISHED / "text-to-lora"

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


def doc_to_lora(checkpoint: dict[str, Any], base_config: Any, reader_layers: tuple[int, ...]) -> PublishedDocToLoRA:
    """A published checkpoint as a PublishedDocToLoRA.

    The published scale multiplies the document-independent LoRA too; here it is folded into that LoRA's B.
    """
    c = checkpoint["hypernet_config"]
    lora, aggregator = c.lora_config, c.aggregator_config
    kinds = sorted(lora.target_modules)
    perceiver = "aggregator.perceiver"
    n_heads_dim, width = checkpoint[f"{perceiver}.decoder.layers.0.self_attn.q_proj.weight"].shape
    kv_dim = checkpoint[f"{perceiver}.decoder.layers.0.self_attn.k_proj.weight"].shape[0]
    head_dim = 128
    config = PublishedDocToLoRAConfig.for_target(
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
        n_latent_mlps=c.num_pre_head_layers,
        static_rank=lora.r if c.use_bias else 0,
        scale=lora.lora_alpha,
    )
    hypernet = PublishedDocToLoRA(config)
    state = {name: hypernet.state_dict()[name] for name in ("feature_mean", "feature_std")}  # neutral from the start
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
    if config.static_rank:
        state[f"static.{kind}.a"] = checkpoint[f"bias_A.{kind}"]
        state[f"static.{kind}.b"] = checkpoint[f"bias_B.{kind}"] * config.scale
    hypernet.load_state_dict(state, strict=True)
    return hypernet.eval()


_TEXT_PARTS = {
    "task.0": "task_encoder.mlp.0", "task.1": "task_encoder.mlp.1", "layer.1": "layer_depth_encoder.1",
    "kind.1": "layer_type_encoder.1", "mixer.0": "mixer.1", "mixer.3": "mixer.4",
    "last.0": "mlp3.0", "last.1.0": "mlp3.1", "last.1.3": "mlp3.4",
}  # fmt: skip
for _block, _theirs in ((0, "mlp1"), (1, "mlp2")):
    _TEXT_PARTS |= {
        f"blocks.{_block}.0": f"{_theirs}.mlp.0", f"blocks.{_block}.1.0": f"{_theirs}.mlp.1",
        f"blocks.{_block}.1.3": f"{_theirs}.mlp.4",
    }  # fmt: skip


def text_to_lora(checkpoint: dict[str, Any], variant: str, module_order: tuple[str, ...]) -> TextToLoRA:
    """A published text-to-LoRA checkpoint (L or M) for a base of Llama's shape, without the scale, as it writes them.

    Args:
        module_order: the module kinds in the order of the checkpoint's type embeddings.
    """
    layers, rank, _ = checkpoint[f"AB_offset.A.{module_order[0]}"].shape
    kinds = tuple(kind for kind in KINDS if kind in module_order)
    shapes = {
        kind: (checkpoint[f"AB_offset.A.{kind}"].shape[2], checkpoint[f"AB_offset.B.{kind}"].shape[1]) for kind in kinds
    }
    modules = tuple(
        (f"model.layers.{layer}.self_attn.{kind}", layer, kind, *shapes[kind])
        for layer in range(layers)
        for kind in kinds
    )
    config = TextToLoRAConfig(
        d_text=checkpoint["task_encoder.mlp.0.weight"].shape[1],
        modules=modules,
        variant=variant,
        rank=rank,
        width=checkpoint["mixer.1.weight"].shape[1],
        head_width=checkpoint["mlp3.4.weight"].shape[0],
        scale=1.0,
    )
    parts = _TEXT_PARTS | {f"heads.{kind}.linear": f"heads.{kind}" for kind in kinds}
    parts |= {"asked_norm": "out_emb_norm"} if variant == "M" else {}
    state = {
        f"{ours}.{end}": checkpoint[f"{theirs}.{end}"] for ours, theirs in parts.items() for end in ("weight", "bias")
    }
    state["layer.0.weight"] = checkpoint["layer_depth_encoder.0.weight"]
    state["kind.0.weight"] = checkpoint["layer_type_encoder.0.weight"][[module_order.index(kind) for kind in kinds]]
    for kind in kinds:
        state[f"heads.{kind}.shared_a"] = checkpoint[f"AB_offset.A.{kind}"]
        state[f"heads.{kind}.shared_b"] = checkpoint[f"AB_offset.B.{kind}"].transpose(1, 2)
        state[f"heads.{kind}.scaler_b"] = torch.ones(layers, rank, 1)
    if variant == "M":
        asked = [torch.stack([checkpoint[f"out_emb.{kind}.{side}"] for side in "AB"]) for kind in kinds]
        state["asked"] = torch.stack(asked)[:, :, None]  # [kinds, 2, 1, width]
    hypernet = TextToLoRA(config)
    state["seen"] = hypernet.seen
    hypernet.load_state_dict(state, strict=True)
    return hypernet.eval().requires_grad_(False)
