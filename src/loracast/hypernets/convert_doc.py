"""A published Doc-to-LoRA checkpoint as a `PublishedDocToLoRA`: its config read from the pickled one, tensors renamed.

What a checkpoint is like follows from its config and the shapes of its tensors. A setting that is known and not
supported is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loracast.errors import HypernetworkError
from loracast.hypernets.pickled import Record
from loracast.hypernets.published import PublishedDocToLoRA, PublishedDocToLoRAConfig
from loracast.lora.target import target_from_config, text_config

H = TypeVar("H", bound=nn.Module)
HEAD_DIM = 128
"""Width of an attention head of the published Perceiver, which no config names."""
_PERCEIVER = "aggregator.perceiver"
_BLOCK = {
    "input_latents_layernorm": "norm_latents", "input_context_layernorm": "norm_context",
    "post_attention_layernorm": "norm_attended", "pre_ff_layernorm": "norm_before_mlp",
    "post_ff_layernorm": "norm_after_mlp",
    "self_attn.q_proj": "attention.q", "self_attn.k_proj": "attention.k", "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
}  # fmt: skip
"""The checkpoint's names in a block of cross-attention, and ours."""
_NEEDED: dict[str, dict[str, Any]] = {
    "hypernet_config": {
        "use_light_weight_lora": False, "per_rank_gen": True, "use_per_rank_bias": False, "use_token_mixing": False,
        "extra_modules": None,
    },
    "aggregator_config": {"aggregator_type": "perceiver", "num_self_attn_per_block": 0, "shared_weights": False},
}  # fmt: skip
"""The only supported value of each setting; a checkpoint from before a setting existed lacks it."""


def doc_to_lora(
    checkpoint: Mapping[str, Any], base_config: Any, chat_prefix: tuple[int, ...], chat_suffix: tuple[int, ...]
) -> PublishedDocToLoRA:
    """The hypernetwork in a checkpoint.

    The published scale multiplies the static LoRA too; here it is folded into that LoRA's B.

    Args:
        checkpoint: as `read_pickled` gives it.
        base_config: of the base, in transformers' form.
        chat_prefix, chat_suffix: token ids that the published code puts around each chunk.

    Raises:
        HypernetworkError: it lacks parts, has a setting that is not supported, or belongs to another base.
    """
    try:
        published, encoder = checkpoint["hypernet_config"], checkpoint["ctx_encoder_args"]
        _check_supported(published, encoder, checkpoint.get("base_model_name_or_path"))
        weights = {name.removeprefix("_orig_mod."): value for name, value in checkpoint.items()}
        config = _config(published, encoder, weights, base_config, chat_prefix, chat_suffix)
        with torch.device("meta"):
            hypernet = PublishedDocToLoRA(config)
        state = _state(config, weights, getattr(published, "per_layer_processing", True))
    except (KeyError, AttributeError, IndexError) as error:
        raise HypernetworkError(f"this is no checkpoint of Doc-to-LoRA: it lacks {error}") from error
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise HypernetworkError(
            f"this checkpoint of Doc-to-LoRA is damaged ({type(error).__name__}: {error})"
        ) from error
    return with_weights(hypernet, state)


def with_weights(hypernet: H, state: Mapping[str, Tensor]) -> H:
    """A hypernetwork that was built on the meta device, with a converted checkpoint's tensors as its weights.

    Raises:
        HypernetworkError: a tensor is missing, unknown or of another shape; the message names all.
    """
    if problems := _differences(hypernet.state_dict(), state):
        raise HypernetworkError(f"the checkpoint does not fit its own config or this base: {'; '.join(problems)}")
    hypernet.load_state_dict(state, assign=True)
    return hypernet.eval().requires_grad_(False)


def _check_supported(published: Any, encoder: Any, base_name: str | None) -> None:
    """Raise HypernetworkError that names every setting of a checkpoint that is not supported."""
    parts = {"hypernet_config": published, "aggregator_config": published.aggregator_config}
    problems = [
        f"{part}.{name} is {getattr(parts[part], name)!r}, not {value!r}"
        for part, settings in _NEEDED.items()
        for name, value in settings.items()
        if (getattr(parts[part], name, value) or None) != (value or None)
    ]
    other = encoder.ctx_encoder_model_name_or_path
    if other is not None and other != base_name:
        problems.append(f"it reads documents with {other!r}, not with its base")
    if problems:
        raise HypernetworkError(f"this checkpoint of Doc-to-LoRA is not supported: {'; '.join(problems)}")


def _config(
    published: Any, encoder: Any, weights: Mapping[str, Any], base_config: Any, prefix: Any, suffix: Any
) -> PublishedDocToLoRAConfig:
    lora, aggregator = published.lora_config, published.aggregator_config
    layers = published.layer_indices.tolist()
    kinds = sorted(lora.target_modules)
    target = target_from_config(base_config, kinds, layers)
    shapes = {module.kind: (module.d_in, module.d_out) for module in target.modules}
    stated = {kind: tuple(side[kind] for side in published.feature_sizes) for kind in kinds}
    if shapes != stated:
        raise HypernetworkError(
            f"the checkpoint was made for a base whose modules are of the shapes {stated} (in, out), and this one's "
            f"are {shapes}: give the base that it was made for with --base"
        )
    reader_layers, with_final_norm = _reader(encoder, text_config(base_config).num_hidden_layers)
    n_heads_width, width = weights[f"{_PERCEIVER}.decoder.layers.0.self_attn.q_proj.weight"].shape
    kv_width = weights[f"{_PERCEIVER}.decoder.layers.0.self_attn.k_proj.weight"].shape[0]
    return PublishedDocToLoRAConfig.for_target(
        target,
        aggregator.feature_size,
        reader_layers=reader_layers,
        rank=lora.r,
        width=width,
        n_heads=n_heads_width // HEAD_DIM,
        n_kv_heads=kv_width // HEAD_DIM,
        head_dim=HEAD_DIM,
        n_encoder_blocks=_count(weights, f"{_PERCEIVER}.encoder.layers."),
        n_latents=aggregator.n_latent_queries,
        n_decoder_blocks=_count(weights, f"{_PERCEIVER}.decoder.layers."),
        n_latent_mlps=_count(weights, "layers."),
        static_rank=lora.r if getattr(published, "use_bias", True) else 0,
        scale=float(lora.lora_alpha),
        chat_prefix=tuple(prefix),
        chat_suffix=tuple(suffix),
        with_final_norm=with_final_norm,
    )


def _reader(encoder: Any, n_layers: int) -> tuple[tuple[int, ...], bool]:
    """The blocks after which the base is read, and whether the last of these states passes its final norm."""
    kind = encoder.ctx_encoder_type
    kind = kind.values[0] if isinstance(kind, Record) else kind  # an enum, in some checkpoints
    if kind == "embed_only":
        return (0,), False
    if kind == "early_exit":  # the published code shortens the base, which ends with its norm all the same
        return (n_layers if encoder.layer_idx is None else encoder.layer_idx,), True
    if kind == "per_layer_activations":
        return tuple(range(encoder.ctx_encoder_last_layer or n_layers)), True
    raise HypernetworkError(f"this checkpoint reads its base in an unknown way, {kind!r}")


def _count(weights: Mapping[str, Any], prefix: str) -> int:
    """Number of blocks whose tensors are called PREFIX0..., PREFIX1..."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _state(c: PublishedDocToLoRAConfig, theirs: Mapping[str, Any], has_layer_mlps: bool) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names and in our shapes."""
    # The features stay as they are: published hypernetworks standardise nothing.
    state = {"feature_mean": torch.zeros(c.d_features), "feature_std": torch.ones(c.d_features)}
    for side in ("gate", "up", "down"):
        state[f"project.{side}.weight"] = theirs[f"{_PERCEIVER}.modality_projection.{side}_proj.weight"]
    order = sorted(c.kinds)  # theirs; ours is that of KINDS
    by_kind = [order.index(kind) for kind in c.kinds]
    queries = theirs[f"{_PERCEIVER}.decoder.latents_q"]
    state["rank_latents.free"] = queries.unflatten(0, (-1, len(order), c.rank))[:, by_kind].flatten(0, 2)
    if c.n_encoder_blocks:
        state["encoder_latents.free"] = theirs[f"{_PERCEIVER}.encoder.latents_q"]
    for part, n_blocks in (("encoder", c.n_encoder_blocks), ("decoder", c.n_decoder_blocks)):
        if n_blocks:
            state[f"{part}.norm.weight"] = theirs[f"{_PERCEIVER}.{part}.layernorm.weight"]
        for i in range(n_blocks):
            for name, ours in _BLOCK.items():
                state[f"{part}.blocks.{i}.{ours}.weight"] = theirs[f"{_PERCEIVER}.{part}.layers.{i}.{name}.weight"]
    for i in range(c.n_latent_mlps):
        state |= _latent_mlp(f"latent_mlps.{i}", f"layers.{i}", theirs, len(c.layers), has_layer_mlps)
    for i, kind in zip(by_kind, c.kinds, strict=True):
        (d_in, d_out), head = next(row[3:] for row in c.modules if row[2] == kind), theirs["head.weight"]
        # The heads of several kinds are one tensor [layers, kinds, w, d], as wide as the widest kind needs.
        state[f"heads.{kind}.weight"] = head if head.ndim == 3 else head[:, i, :, : d_in + d_out]
        state[f"heads.{kind}.scaler_a"] = theirs[f"scaler_A.{kind}"][0]
        state[f"heads.{kind}.scaler_b"] = theirs[f"scaler_B.{kind}"][0]
        if c.static_rank:
            state[f"static.{kind}.a"] = theirs[f"bias_A.{kind}"]
            state[f"static.{kind}.b"] = theirs[f"bias_B.{kind}"] * c.scale
    return state


def _latent_mlp(
    ours: str, part: str, theirs: Mapping[str, Any], n_layers: int, has_layer_mlps: bool
) -> dict[str, Tensor]:
    """The tensors of one `LatentMLP`; an MLP that all layers share is repeated for each."""
    if has_layer_mlps:
        names, places = f"{part}.layers", (0, 1, 3, 4)
    else:
        names, places = f"{part}.mlp", (0, 2, 5, 6)
    first, w1, w2, last = (f"{names}.{place}" for place in places)
    state = {f"{ours}.norm_in.{end}": theirs[f"{first}.{end}"] for end in ("weight", "bias")}
    state |= {f"{ours}.norm_out.{end}": theirs[f"{last}.{end}"] for end in ("weight", "bias")}
    for n, place in ((1, w1), (2, w2)):
        weight, bias = theirs[f"{place}.weight"], theirs[f"{place}.bias"]
        if has_layer_mlps:  # biases lie as [1, layers, 1, 1, w]
            state[f"{ours}.w{n}"], state[f"{ours}.b{n}"] = weight, bias.reshape(n_layers, 1, -1)
        else:
            state[f"{ours}.w{n}"] = weight.T.expand(n_layers, -1, -1)
            state[f"{ours}.b{n}"] = bias.expand(n_layers, 1, -1)
    return state


def _differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What is missing, unknown or of another shape."""
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is unknown" for name in sorted(found.keys() - wanted.keys())]
    return problems + [
        f"{name} is {tuple(found[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
