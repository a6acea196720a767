"""Published checkpoints of Doc-to-LoRA and Text-to-LoRA: the architectures that only they need, read and converted.

Only published checkpoints have, of Doc-to-LoRA, latents that read first, a gated projection, MLPs in each layer and
chat markers around each chunk; of Text-to-LoRA, the variant S (arXiv 2602.15902, appendix; arXiv 2506.06105).

Pickled files are read without running any of their code: PyTorch's weights-only unpickler rebuilds tensors and plain
containers, and refuses every other name. The configs in such a checkpoint are objects of packages that need not be
installed here: each becomes a `Record`, which has their attributes and none of their code. Tensors stay mapped to the
file until they are used.

What a checkpoint is like follows from its config and the shapes of its tensors, which are renamed. A setting that is
known and not supported is refused by its name.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from loracast.base.embedded import Say
from loracast.base.load import Base
from loracast.errors import HypernetworkError
from loracast.hypernets.config import MOST_BLOCKS, DocToLoRAConfig, failed
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.encoders import Features
from loracast.hypernets.perceiver import GatedMLP, Perceiver, Queries, per_layer
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lora.target import target_from_config, text_config


@dataclass(frozen=True)
class PublishedDocToLoRAConfig(DocToLoRAConfig):
    """The config of a published checkpoint."""

    n_encoder_blocks: int = 0
    """Blocks in which `n_latents` latents read the features; 0 lets the decoder read the features themselves."""
    n_latents: int = 0
    """Latents of the encoder."""
    n_latent_mlps: int = 0
    """Residual MLPs with weights for each layer, between the decoder and the heads."""
    chat_prefix: tuple[int, ...] = ()
    """Token ids in front of each chunk that are read like the chunk's own: the chat template's turn of the user."""
    chat_suffix: tuple[int, ...] = ()
    """Token ids behind each chunk that are read like the chunk's own: where the assistant's turn begins."""
    with_final_norm: bool = False
    """Whether the states after the last of `reader_layers` pass the base's final norm."""
    chunk_tokens: int = 512
    """Longest chunk by default: as long as in the published training."""

    def _problems(self) -> list[str]:
        n_read, n_blocks = len(self.reader_layers), max(self.n_encoder_blocks, self.n_latent_mlps)
        n_layers, is_half = len(self.layers), (self.n_encoder_blocks > 0) != (self.n_latents > 0)
        return [problem for problem in super()._problems() if not problem.startswith("reader_layers")] + failed(
            (n_read not in (1, n_layers), f"reader_layers must be one, or one for each of the {n_layers} layers"),
            (is_half, "n_encoder_blocks and n_latents must both be zero or both be positive"),
            (n_blocks > MOST_BLOCKS, f"more than {MOST_BLOCKS} blocks or MLPs"),
            (self.d_values or self.memory_modules, "published checkpoints copy no values and have no memory"),
        )

    @property
    def reads_each_layer(self) -> bool:
        """Whether each targeted layer reads hidden states of its own."""
        return len(self.reader_layers) > 1


class PublishedDocToLoRA(DocToLoRA):
    """Doc-to-LoRA with the reader of the published checkpoints."""

    config_class: ClassVar[Any] = PublishedDocToLoRAConfig

    def _build_reader(self, c: PublishedDocToLoRAConfig) -> None:
        block = (c.width, c.n_heads, c.n_kv_heads, c.head_dim, c.norm_eps)
        self.project = GatedMLP(c.d_features, 4 * c.d_features, c.width)
        if c.n_encoder_blocks:
            self.encoder_latents = Queries(1, c.n_latents, c.width, factorised=False)
            self.encoder = Perceiver(c.n_encoder_blocks, *block)
        groups = 1 if c.reads_each_layer else len(c.layers)  # else the layers are rows of the batch
        self.rank_latents = Queries(groups, len(c.kinds) * c.rank, c.width, factorised=False)
        self.decoder = Perceiver(c.n_decoder_blocks, *block)
        self.latent_mlps = nn.ModuleList(LatentMLP(len(c.layers), c.width) for _ in range(c.n_latent_mlps))

    def encoder_for(self, base: Base | None, encoder: str | None, say: Say) -> Callable[[Any], Features]:
        encode, c = super().encoder_for(base, encoder, say), self.config
        return lambda rows: encode([[*c.chat_prefix, *row, *c.chat_suffix] for row in rows])

    def read(self, standard: Tensor, mask: Tensor) -> Tensor:
        """Standardised features [n, t, d], or [n, layers, t, d] when each layer reads its own -> rank latents."""
        c, n_layers = self.config, len(self.config.layers)
        if c.reads_each_layer:
            standard, mask = standard.flatten(0, 1), mask.repeat_interleave(n_layers, dim=0)  # [n * layers, t, d]
        context = self.project(standard)
        if c.n_encoder_blocks:
            context = self.encoder(self.encoder_latents(), context, mask)
        latents = self.decoder(self.rank_latents(), context, None if c.n_encoder_blocks else mask)
        latents = latents.view(-1, n_layers, len(c.kinds) * c.rank, c.width)
        for mlp in self.latent_mlps:
            latents = mlp(latents)
        return latents


class LatentMLP(nn.Module):
    """A residual MLP on the rank latents with weights of its own in each layer: x + LN(W2 silu(W1 LN(x)))."""

    def __init__(self, n_layers: int, width: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.w1 = nn.Parameter(torch.randn(n_layers, width, 4 * width) / width**0.5)
        self.b1 = nn.Parameter(torch.zeros(n_layers, 1, 4 * width))
        self.w2 = nn.Parameter(torch.randn(n_layers, 4 * width, width) / (4 * width) ** 0.5)
        self.b2 = nn.Parameter(torch.zeros(n_layers, 1, width))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, latents: Tensor) -> Tensor:  # [n, layers, q, w] -> [n, layers, q, w]
        inner = functional.silu(per_layer(self.norm_in(latents), self.w1) + self.b1)
        return latents + self.norm_out(per_layer(inner, self.w2) + self.b2)


class PublishedTextToLoRA(TextToLoRA):
    """Text-to-LoRA S as published: the row of a factor is asked for after the second block, by its position."""

    config_class: ClassVar[Any] = TextToLoRAConfig

    def __init__(self, config: TextToLoRAConfig):
        super().__init__(config)
        self.asked = nn.Parameter(torch.randn(len(config.target.kinds), 2, 1, config.width))
        self.position = nn.Sequential(nn.Embedding(config.rank, config.width), nn.LayerNorm(config.width))

    def latents(self, embeddings: Tensor) -> Tensor:
        """The heads' input [n, layers, kinds, sides, rows, head_width]."""
        second = self.blocks[1]
        x = self.module_conditions(embeddings)[..., None, None, :] + self.asked_norm(self.asked)
        row = self.position(torch.arange(self.config.rank, device=x.device))  # [rows, w]
        return self.last(x + second(x) + row + second(row))


_MODULES = frozenset(
    {
        "ctx_to_lora.configs", "ctx_to_lora.modeling.aggregator", "ctx_to_lora.modeling.ctx_encoder",
        "ctx_to_lora.modeling.hypernet", "peft.tuners.lora.config", "peft.utils.peft_types",
    }
)  # fmt: skip
"""Modules whose classes become records: the configs in a published checkpoint."""


class Record:
    """Stands in for a pickled config object or enum: its attributes, or the values it was made from."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def read_pickled(path: Path) -> dict[str, Any]:
    """The dictionary in a pickled checkpoint: mapped tensors, numbers, strings, and records for config objects.

    Raises:
        HypernetworkError: it is no such checkpoint, is damaged, or names anything but tensors and known configs.
    """
    if not zipfile.is_zipfile(path):
        raise HypernetworkError(f"{path} is not a checkpoint that torch.save of PyTorch 1.6 or newer has written")
    try:
        named = get_unsafe_globals_in_checkpoint(path)
        refused = sorted(name for name in named if name.rpartition(".")[0] not in _MODULES)
        records: list[Any] = [(type(name.rpartition(".")[2], (Record,), {}), name) for name in named]
        with safe_globals(records):
            content = None if refused else torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # damage makes the unpickler raise nearly anything
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise HypernetworkError(f"{path} is damaged, or no checkpoint of a hypernetwork ({reason})") from error
    if refused:
        raise HypernetworkError(f"{path} is refused: it names {', '.join(refused)}, which could run code")
    if not isinstance(content, dict):
        raise HypernetworkError(f"{path} holds a {type(content).__name__}, not the dictionary of a checkpoint")
    for name, value in content.items():
        if isinstance(value, torch.Tensor) and value.nbytes > value.untyped_storage().nbytes():
            raise HypernetworkError(f"{path} is refused: {name} claims more numbers than the file holds for it")
    return content


HEAD_DIM = 128
"""Width of an attention head of the published Perceiver, which no config names."""
_PERCEIVER = "aggregator.perceiver"
_BLOCK = {
    "norm_latents": "input_latents_layernorm", "norm_context": "input_context_layernorm",
    "norm_attended": "post_attention_layernorm", "norm_before_mlp": "pre_ff_layernorm",
    "norm_after_mlp": "post_ff_layernorm", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
"""Our names in a block of cross-attention, and the checkpoint's."""
_NEEDED: dict[str, dict[str, Any]] = {
    "hypernet_config": {
        "use_light_weight_lora": False, "per_rank_gen": True, "use_per_rank_bias": False, "use_token_mixing": False,
        "extra_modules": None,
    },
    "aggregator_config": {"aggregator_type": "perceiver", "num_self_attn_per_block": 0, "shared_weights": False},
}  # fmt: skip
"""The only supported value of each setting; a checkpoint from before a setting existed lacks it."""


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Raise HypernetworkError for what a checkpoint raises that lacks parts or is damaged."""
    try:
        yield
    except (KeyError, AttributeError, IndexError) as error:
        raise HypernetworkError(f"this is no checkpoint of {what}, or is damaged: it lacks {error}") from error
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise HypernetworkError(
            f"this checkpoint of {what}, or a file beside it, is damaged ({type(error).__name__}: {error})"
        ) from error


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
    with _reported("Doc-to-LoRA"):
        published, encoder = checkpoint["hypernet_config"], checkpoint["ctx_encoder_args"]
        parts = {"hypernet_config": published, "aggregator_config": published.aggregator_config}
        problems = [
            f"{part}.{name} is {getattr(parts[part], name)!r}, not {value!r}"
            for part, settings in _NEEDED.items()
            for name, value in settings.items()
            if (getattr(parts[part], name, value) or None) != (value or None)
        ]
        other = encoder.ctx_encoder_model_name_or_path
        if other is not None and other != checkpoint.get("base_model_name_or_path"):
            problems.append(f"it reads documents with {other!r}, not with its base")
        if problems:
            raise HypernetworkError(f"this checkpoint of Doc-to-LoRA is not supported: {'; '.join(problems)}")
        weights = {name.removeprefix("_orig_mod."): value for name, value in checkpoint.items()}
        config = _doc_config(published, encoder, weights, base_config, chat_prefix, chat_suffix)
        with torch.device("meta"):
            hypernet = PublishedDocToLoRA(config)
        hypernet.take_weights(
            _doc_weights(config, weights, getattr(published, "per_layer_processing", True)), "this checkpoint"
        )
    return hypernet


def _doc_config(
    published: Any, encoder: Any, weights: Mapping[str, Any], base_config: Any, prefix: Any, suffix: Any
) -> PublishedDocToLoRAConfig:
    lora, aggregator = published.lora_config, published.aggregator_config
    kinds = sorted(lora.target_modules)
    target = target_from_config(base_config, kinds, published.layer_indices.tolist())
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

    def n_blocks(prefix: str) -> int:  # whose tensors are called PREFIX0..., PREFIX1...
        return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})

    return PublishedDocToLoRAConfig.for_target(
        target,
        aggregator.feature_size,
        reader_layers=reader_layers,
        rank=lora.r,
        width=width,
        n_heads=n_heads_width // HEAD_DIM,
        n_kv_heads=kv_width // HEAD_DIM,
        head_dim=HEAD_DIM,
        n_encoder_blocks=n_blocks(f"{_PERCEIVER}.encoder.layers."),
        n_latents=aggregator.n_latent_queries,
        n_decoder_blocks=n_blocks(f"{_PERCEIVER}.decoder.layers."),
        n_latent_mlps=n_blocks("layers."),
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


def _doc_weights(c: PublishedDocToLoRAConfig, theirs: Mapping[str, Any], has_layer_mlps: bool) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names and in our shapes."""
    order = sorted(c.kinds)  # theirs; ours is that of KINDS
    by_kind = [order.index(kind) for kind in c.kinds]
    names = {
        f"project.{side}.weight": f"{_PERCEIVER}.modality_projection.{side}_proj.weight"
        for side in ("gate", "up", "down")
    }
    if c.n_encoder_blocks:
        names["encoder_latents.free"] = f"{_PERCEIVER}.encoder.latents_q"
    for part, n_blocks in (("encoder", c.n_encoder_blocks), ("decoder", c.n_decoder_blocks)):
        if n_blocks:
            names[f"{part}.norm.weight"] = f"{_PERCEIVER}.{part}.layernorm.weight"
        for i in range(n_blocks):
            for ours, name in _BLOCK.items():
                names[f"{part}.blocks.{i}.{ours}.weight"] = f"{_PERCEIVER}.{part}.layers.{i}.{name}.weight"
    weights = {ours: theirs[name] for ours, name in names.items()}
    # The features stay as they are: published hypernetworks standardise nothing.
    weights |= {"feature_mean": torch.zeros(c.d_features), "feature_std": torch.ones(c.d_features)}
    queries = theirs[f"{_PERCEIVER}.decoder.latents_q"].unflatten(0, (-1, len(order), c.rank))
    weights["rank_latents.free"] = queries[:, by_kind].flatten(0, 2)
    for i in range(c.n_latent_mlps):
        weights |= _latent_mlp(i, theirs, len(c.layers), has_layer_mlps)
    for i, kind in zip(by_kind, c.kinds, strict=True):
        (d_in, d_out), head = next(row[3:] for row in c.modules if row[2] == kind), theirs["head.weight"]
        # The heads of several kinds are one tensor [layers, kinds, w, d], as wide as the widest kind needs.
        weights[f"heads.{kind}.weight"] = head if head.ndim == 3 else head[:, i, :, : d_in + d_out]
        weights[f"heads.{kind}.scaler_a"] = theirs[f"scaler_A.{kind}"][0]
        weights[f"heads.{kind}.scaler_b"] = theirs[f"scaler_B.{kind}"][0]
        if c.static_rank:
            weights[f"static.{kind}.a"] = theirs[f"bias_A.{kind}"]
            weights[f"static.{kind}.b"] = theirs[f"bias_B.{kind}"] * c.scale
    return weights


def _latent_mlp(i: int, theirs: Mapping[str, Any], n_layers: int, has_layer_mlps: bool) -> dict[str, Tensor]:
    """The tensors of the i-th `LatentMLP`; an MLP that all layers share is repeated for each."""
    part, places = ("layers", (0, 1, 3, 4)) if has_layer_mlps else ("mlp", (0, 2, 5, 6))
    weights: dict[str, Tensor] = {}
    for ours, place in zip(("norm_in", "1", "2", "norm_out"), places, strict=True):
        weight, bias = (theirs[f"layers.{i}.{part}.{place}.{end}"] for end in ("weight", "bias"))
        if ours.startswith("norm"):
            weights |= {f"latent_mlps.{i}.{ours}.weight": weight, f"latent_mlps.{i}.{ours}.bias": bias}
            continue
        if not has_layer_mlps:
            weight, bias = weight.T.expand(n_layers, -1, -1), bias.expand(n_layers, -1)
        # Biases of layers lie as [1, layers, 1, 1, w].
        weights |= {f"latent_mlps.{i}.w{ours}": weight, f"latent_mlps.{i}.b{ours}": bias.reshape(n_layers, 1, -1)}
    return weights


_PARTS = {
    "task.0": "task_encoder.mlp.0", "task.1": "task_encoder.mlp.1", "layer.1": "layer_depth_encoder.1",
    "kind.1": "layer_type_encoder.1", "mixer.0": "mixer.1", "mixer.3": "mixer.4",
    "blocks.0.0": "mlp1.mlp.0", "blocks.0.1.0": "mlp1.mlp.1", "blocks.0.1.3": "mlp1.mlp.4",
    "blocks.1.0": "mlp2.mlp.0", "blocks.1.1.0": "mlp2.mlp.1", "blocks.1.1.3": "mlp2.mlp.4",
    "last.0": "mlp3.0", "last.1.0": "mlp3.1", "last.1.3": "mlp3.4",
}  # fmt: skip
"""Our modules with weight and bias, and the checkpoint's names for them."""
_TEXT_NEEDED = {"use_one_hot_task_emb": False, "pred_z_score": False}
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
    bad = [
        f"{key} is {args[key]!r}, not {value!r}" for key, value in _TEXT_NEEDED.items() if args.get(key, value) != value
    ]
    if args.get("training_task") == "recon" and not args.get("factorized"):
        bad.append("it makes dense deltas and no factors")
    is_shared, by_row = args.get("shared_AB_head", False), args.get("autoreg_gen", False)
    if by_row and not (is_shared and args.get("learnable_pos_emb", False)):
        bad.append("it makes rows one at a time in another way than the published variant S")
    if bad:
        raise HypernetworkError(f"this checkpoint of Text-to-LoRA is not supported: {'; '.join(bad)}")
    with _reported("Text-to-LoRA"):
        order = [name.split(".")[1] for name in checkpoint if name.startswith("heads.") and name.endswith(".weight")]
        rank = adapter["r"]
        n_layers = checkpoint["layer_depth_encoder.0.weight"].shape[0]
        architecture: type[TextToLoRA] = PublishedTextToLoRA if by_row else TextToLoRA
        config = architecture.config_class(
            d_text=checkpoint["task_encoder.mlp.0.weight"].shape[1],
            modules=target_from_config(base_config, order, range(n_layers)).rows,
            encoder=args["emb_model"],
            variant="S" if by_row else "M" if is_shared else "L",
            rank=rank,
            width=checkpoint["mixer.1.weight"].shape[1],
            head_width=checkpoint["mlp3.4.weight"].shape[0],
            scale=adapter["lora_alpha"] / (rank**0.5 if adapter.get("use_rslora") else rank),
        )
        with torch.device("meta"):
            hypernet = architecture(config)
        hypernet.take_weights(_text_weights(config, checkpoint, order), "this checkpoint")
    return hypernet


def _text_weights(c: TextToLoRAConfig, theirs: Mapping[str, Tensor], order: list[str]) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names, in the order of our module kinds."""
    kinds = c.target.kinds
    parts = _PARTS | {f"heads.{kind}.linear": f"heads.{kind}" for kind in kinds}
    if c.variant != "L":
        parts |= {"asked_norm": "out_emb_norm"}
    if c.variant == "S":
        parts |= {"position.1": "pos_emb.1"}
    weights = {f"{ours}.{end}": theirs[f"{name}.{end}"] for ours, name in parts.items() for end in ("weight", "bias")}
    weights["layer.0.weight"] = theirs["layer_depth_encoder.0.weight"]
    weights["kind.0.weight"] = theirs["layer_type_encoder.0.weight"][[order.index(kind) for kind in kinds]]
    for kind in kinds:
        weights[f"heads.{kind}.shared_a"] = theirs[f"AB_offset.A.{kind}"]
        weights[f"heads.{kind}.shared_b"] = theirs[f"AB_offset.B.{kind}"].transpose(1, 2)
        weights[f"heads.{kind}.scaler_b"] = torch.ones(len(c.target.layers), c.rank, 1)
    if c.variant != "L":
        asked = [torch.stack([theirs[f"out_emb.{kind}.{side}"] for side in "AB"]) for kind in kinds]
        weights["asked"] = torch.stack(asked)[:, :, None]  # [kinds, 2, 1, width]
    if c.variant == "S":
        weights["position.0.weight"] = theirs["pos_emb.0.weight"]
    weights["seen"] = torch.zeros(0, c.d_text)
    return weights
