"""A published Text-to-LoRA checkpoint (variants L, M and S) as a `TextToLoRA` or `PublishedTextToLoRA`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loracast.errors import HypernetworkError
from loracast.hypernets.convert_doc import with_weights
from loracast.hypernets.published import PublishedTextToLoRA, PublishedTextToLoRAConfig
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lora.target import target_from_config

_PARTS = {
    "task.0": "task_encoder.mlp.0", "task.1": "task_encoder.mlp.1", "layer.1": "layer_depth_encoder.1",
    "kind.1": "layer_type_encoder.1", "mixer.0": "mixer.1", "mixer.3": "mixer.4",
    "blocks.0.0": "mlp1.mlp.0", "blocks.0.1.0": "mlp1.mlp.1", "blocks.0.1.3": "mlp1.mlp.4",
    "blocks.1.0": "mlp2.mlp.0", "blocks.1.1.0": "mlp2.mlp.1", "blocks.1.1.3": "mlp2.mlp.4",
    "last.0": "mlp3.0", "last.1.0": "mlp3.1", "last.1.3": "mlp3.4",
}  # fmt: skip
"""Our modules with weight and bias, and the checkpoint's names for them."""
_NEEDED = {"use_one_hot_task_emb": False, "pred_z_score": False}
"""The only supported value of each setting in args.yaml. Another `training_task` than "sft" only matters with them."""


def text_to_lora(
    checkpoint: Mapping[str, Tensor], args: Mapping[str, Any], adapter: Mapping[str, Any], base_config: Any
) -> TextToLoRA:
    """The hypernetwork in a checkpoint.

    The order of the module kinds came from a Python set when it was trained: the checkpoint's heads lie in it.

    Args:
        checkpoint: the tensors of hypermod.pt.
        args: the settings in args.yaml.
        adapter: adapter_config.json, PEFT's config of the LoRAs that it makes.
        base_config: of the base, in transformers' form.

    Raises:
        HypernetworkError: it lacks parts, has a setting that is not supported, or belongs to another base.
    """
    bad = [f"{key} is {args[key]!r}, not {value!r}" for key, value in _NEEDED.items() if args.get(key, value) != value]
    if args.get("training_task") == "recon" and not args.get("factorized"):
        bad.append("it makes dense deltas and no factors")
    if bad:
        raise HypernetworkError(f"this checkpoint of Text-to-LoRA is not supported: {'; '.join(bad)}")
    try:
        return _read(checkpoint, args, adapter, base_config)
    except KeyError as error:
        raise HypernetworkError(f"this is no checkpoint of Text-to-LoRA: it lacks {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise HypernetworkError(
            f"this checkpoint of Text-to-LoRA, or a file beside it, is damaged ({type(error).__name__}: {error})"
        ) from error


def _read(
    theirs: Mapping[str, Tensor], args: Mapping[str, Any], adapter: Mapping[str, Any], base_config: Any
) -> TextToLoRA:
    order = [name.split(".")[1] for name in theirs if name.startswith("heads.") and name.endswith(".weight")]
    rank = adapter["r"]
    n_layers = theirs["layer_depth_encoder.0.weight"].shape[0]
    target = target_from_config(base_config, order, range(n_layers))
    settings: dict[str, Any] = {
        "d_text": theirs["task_encoder.mlp.0.weight"].shape[1],
        "modules": target.rows,
        "encoder": args["emb_model"],
        "variant": _variant(args),
        "rank": rank,
        "width": theirs["mixer.1.weight"].shape[1],
        "head_width": theirs["mlp3.4.weight"].shape[0],
        "scale": adapter["lora_alpha"] / (rank**0.5 if adapter.get("use_rslora") else rank),
    }
    with torch.device("meta"):
        if settings["variant"] == "S":
            hypernet: TextToLoRA = PublishedTextToLoRA(PublishedTextToLoRAConfig(**settings))
        else:
            hypernet = TextToLoRA(TextToLoRAConfig(**settings))
    return with_weights(hypernet, _state(hypernet, theirs, order))


def _variant(args: Mapping[str, Any]) -> str:
    """The variant by the published settings: whether A and B share a head, and whether its rows come one at a time."""
    is_shared, by_row = args.get("shared_AB_head", False), args.get("autoreg_gen", False)
    if is_shared and by_row and args.get("learnable_pos_emb", False):
        return "S"
    if by_row:
        raise HypernetworkError("this checkpoint makes rows one at a time in a way that is not supported")
    return "M" if is_shared else "L"


def _state(hypernet: TextToLoRA, theirs: Mapping[str, Tensor], order: list[str]) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names, in the order of our module kinds."""
    c, kinds = hypernet.config, hypernet.config.target.kinds
    n_layers = len(c.target.layers)
    parts = _PARTS | {f"heads.{kind}.linear": f"heads.{kind}" for kind in kinds}
    if c.variant != "L":
        parts |= {"asked_norm": "out_emb_norm"}
    if c.variant == "S":
        parts |= {"position.1": "pos_emb.1"}
    state = {f"{ours}.{end}": theirs[f"{name}.{end}"] for ours, name in parts.items() for end in ("weight", "bias")}
    state["layer.0.weight"] = theirs["layer_depth_encoder.0.weight"]
    state["kind.0.weight"] = theirs["layer_type_encoder.0.weight"][[order.index(kind) for kind in kinds]]
    for kind in kinds:
        state[f"heads.{kind}.shared_a"] = theirs[f"AB_offset.A.{kind}"]
        state[f"heads.{kind}.shared_b"] = theirs[f"AB_offset.B.{kind}"].transpose(1, 2)
        state[f"heads.{kind}.scaler_b"] = torch.ones(n_layers, c.rank, 1)
    if c.variant != "L":
        asked = [torch.stack([theirs[f"out_emb.{kind}.{side}"] for side in "AB"]) for kind in kinds]
        state["asked"] = torch.stack(asked)[:, :, None]  # [kinds, 2, 1, width]
    if c.variant == "S":
        state["position.0.weight"] = theirs["pos_emb.0.weight"]
    state["seen"] = torch.zeros(0, c.d_text)
    return state
