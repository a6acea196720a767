"""The target: which linear modules of a base receive a LoRA, in a fixed order, from the base's config alone.

No weights are read here: a hypernetwork for a 70B base can be built and run on a machine that could never hold that
base.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loracast.errors import BaseModelError, ConfigError

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The module kinds that can be targeted, in the order they take inside a layer."""

_PARENT = {kind: "self_attn" if kind in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for kind in KINDS}
_SUPPORTED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "phi3", "olmo2",
)  # fmt: skip
_FUSED = {"phi3": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
"""By type of base, kinds that are parts of a larger matrix there and cannot be targeted one by one."""


@dataclass(frozen=True)
class TargetModule:
    """One linear module of the base: `y [*, d_out] = x [*, d_in] @ W.T`."""

    name: str
    layer: int
    kind: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Target:
    """The ordered modules that receive a LoRA: by layer, then in the order of `KINDS`."""

    modules: tuple[TargetModule, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({module.layer for module in self.modules}))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in KINDS if kind in self._by_kind)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(module.name for module in self.modules)

    @property
    def rows(self) -> tuple[tuple[str, int, str, int, int], ...]:
        """The modules as configs and files have them: (name, layer, kind, d_in, d_out)."""
        return tuple((m.name, m.layer, m.kind, m.d_in, m.d_out) for m in self.modules)

    def of_kind(self, kind: str) -> tuple[TargetModule, ...]:
        return self._by_kind.get(kind, ())

    @cached_property
    def _by_kind(self) -> dict[str, tuple[TargetModule, ...]]:
        present = {module.kind for module in self.modules}
        return {kind: tuple(module for module in self.modules if module.kind == kind) for kind in present}


def text_config(config: Any) -> Any:
    """The language part of a config, which a multimodal config nests. Raises BaseModelError for unsupported types."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if config.model_type not in _SUPPORTED:
        raise BaseModelError(
            f"a base of type {config.model_type!r} is not supported; use a causal language model of one of these "
            "types: " + ", ".join(_SUPPORTED)
        )
    return config


def module_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """`kind -> (d_in, d_out)` for every kind that the base has as a module of its own."""
    fused = _FUSED.get(text_config(config).model_type, ())
    return {kind: shape for kind, shape in layer_shapes(config).items() if kind not in fused}


def layer_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """`kind -> (d_in, d_out)` for every kind, grouped-query attention included."""
    config = text_config(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = getattr(config, "head_dim", None) or hidden // n_heads
    return {
        "q_proj": (hidden, n_heads * head_dim),
        "k_proj": (hidden, n_kv_heads * head_dim),
        "v_proj": (hidden, n_kv_heads * head_dim),
        "o_proj": (n_heads * head_dim, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def target_from_config(
    config: Any, kinds: Iterable[str] = ("down_proj",), layers: Iterable[int] | None = None
) -> Target:
    """Choose the modules of a base that receive a LoRA, from the base's config.

    Args:
        config: a transformers config (attributes as in LlamaConfig).
        kinds: which of `KINDS`; their order does not matter, the result always follows `KINDS`.
        layers: the numbers of layers; all if None.

    Raises:
        ConfigError: an unknown kind or a layer that the base does not have.
        BaseModelError: a base whose layers loracast cannot target.
    """
    wanted = set(kinds)
    text = text_config(config)
    n_layers = text.num_hidden_layers
    prefix = "model.layers" if text is config else "model.language_model.layers"  # where a multimodal base has them
    chosen = range(n_layers) if layers is None else sorted(set(layers))
    shapes = module_shapes(config)
    problems = [f"unknown module kind {kind!r}" for kind in sorted(wanted - set(KINDS))]
    problems += [f"layer {layer} is outside 0..{n_layers - 1}" for layer in chosen if not 0 <= layer < n_layers]
    if not wanted or not chosen:
        problems.append("no module is targeted")
    fused = sorted(wanted & set(KINDS) - shapes.keys())
    problems += [f"a base of type {text.model_type!r} has no module {kind} of its own" for kind in fused]
    if problems:
        raise ConfigError(f"bad target: {'; '.join(problems)} (kinds: {', '.join(shapes)})")
    return Target(
        tuple(
            TargetModule(f"{prefix}.{layer}.{_PARENT[kind]}.{kind}", layer, kind, *shapes[kind])
            for layer in chosen
            for kind in KINDS
            if kind in wanted
        )
    )
