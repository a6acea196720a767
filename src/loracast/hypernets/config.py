"""What all configs of hypernetworks share, and the config of Doc-to-LoRA: every choice that fixes its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loracast.errors import ConfigError
from loracast.hypernets.encoders import OF_THE_BASE
from loracast.lora.merge import Merging
from loracast.lora.target import KINDS, Target, TargetModule

MOST_BLOCKS = 1000
"""Most blocks, MLPs or heads of a kind: a config that claims millions would be built for minutes, and then refused."""
ModuleRow = tuple[str, int, str, int, int]
"""(name, layer, kind, d_in, d_out) of one module."""
NEWER = "newer"
"""In the metadata of a field that configs got after hypernetworks had ids: at its default, the id leaves it out."""


def failed(*checks: tuple[object, str]) -> list[str]:
    """The messages of those checks (what must not be, what is said of it) that fail."""
    return [message for is_wrong, message in checks if is_wrong]


def problems_of(rows: Sequence[ModuleRow]) -> list[str]:
    """Faults of a target (`Target.rows`), whose heads serve one kind over all layers."""
    kinds, layers = {kind for _, _, kind, _, _ in rows}, {layer for _, layer, _, _, _ in rows}
    unknown = sorted(kinds - set(KINDS))
    is_ordered = unknown or list(rows) == sorted(rows, key=lambda row: (row[1], KINDS.index(row[2])))
    return failed(
        (not rows, "no target modules"),
        (len(kinds) * len(layers) != len(rows), "every targeted layer must target the same kinds"),
        (unknown, f"unknown module kinds: {', '.join(unknown)}"),
        (not is_ordered, "the modules are not in the target's order: by layer, then by kind"),
        (len({row[2:] for row in rows}) != len(kinds), "modules of one kind must have the same shape in every layer"),
    )


class ArchitectureConfig:
    """The base of a hypernetwork's config (a frozen dataclass): its target, and one error for all that is wrong."""

    modules: tuple[ModuleRow, ...]

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ConfigError(f"bad {type(self).__name__}: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        return problems_of(self.modules)

    @property
    def target(self) -> Target:
        return Target(tuple(TargetModule(*module) for module in self.modules))


@dataclass(frozen=True)
class DocToLoRAConfig(ArchitectureConfig):
    """Everything that fixes the architecture; the shapes of the base are in `modules`."""

    d_features: int
    """Width of the encoder's features, copied values included."""
    modules: tuple[ModuleRow, ...]
    """The target modules of the Perceiver's factors, in the target's order. Empty for a memory alone."""
    encoder: str = OF_THE_BASE
    """Name of the encoder that the features come from; `base` for the base's own hidden states."""
    encoder_fingerprint: str = ""
    """Fingerprint of an encoder other than the base."""
    reader_layers: tuple[int, ...] = (8,)
    """Block of the base after which its hidden states are read."""
    prefix: tuple[int, ...] = ()
    """Token ids read before each chunk and then dropped: the first token of any text is an attention sink."""
    encoder_modules: tuple[ModuleRow, ...] = ()
    """Modules of the base that carry the encoder LoRA while it reads a document; empty for none."""
    encoder_rank: int = 8
    """Rank of the encoder LoRA."""
    rank: int = 8
    """Rank of one chunk's LoRA in `modules`."""
    width: int = 256
    """Width of the latents."""
    n_heads: int = 8
    """Query heads of a cross-attention."""
    n_kv_heads: int = 8
    """Key and value heads; fewer than `n_heads` means grouped queries."""
    head_dim: int = 32
    """Width of one attention head."""
    n_decoder_blocks: int = 3
    """Blocks in which the rank latents attend to the features."""
    head_shared_rank: int | None = None
    """Rank of each layer's correction to one head that all layers share; None gives each layer a head of its own."""
    static_rank: int = 0
    """Rank of the static LoRA in `modules`, which is the same for every document; 0 for none."""
    static_modules: tuple[ModuleRow, ...] = ()
    """Further modules, of kinds not in `modules` or the memory, that receive a static LoRA and nothing else.

    With it the base learns to carry the question to the token that begins the answer, where the memory retrieves."""
    static_modules_rank: int = 16
    """Rank of the static LoRA in `static_modules`."""
    scale: float = 45.25
    """Factor on every delta, folded into B (published: 2 * rank ** 1.5, not divided by the rank)."""
    d_values: int = 0
    """Number of the features' last columns that B rows may copy: the tokens' values. 0 for none."""
    memory_modules: tuple[ModuleRow, ...] = ()
    """Modules that hold an associative memory: all of one kind, none of `modules`. Empty for no memory."""
    memory_rank: int = 64
    """Most tokens of a chunk that the memory stores."""
    memory_heads: int = 3
    """Pointer heads that find a token's keys: one for the owner's name, one for the sentence's end, the others free."""
    memory_question_rank: int = 96
    """Rank of the map from the end of a sentence to the end of a question about it."""
    memory_near_tokens: int = field(default=0, metadata={NEWER: True})
    """Tokens, from the written one on, whose mean input is mapped to a question about it; 0 for no such key."""
    memory_verdicts: bool = field(default=False, metadata={NEWER: True})
    """Whether the memory writes what a sentence says of a rule, for questions that are answered with Yes or No."""
    memory_gate_power: float = field(default=1.0, metadata={NEWER: True})
    """A token's value is as long as its write gate (0 to 1) to this power: below 1, half-open gates write more."""
    memory_blocks: int = 2
    """Blocks of self-attention among a chunk's tokens in the memory."""
    max_unscaled_chunks: int | None = None
    """Chunks of a document up to which the Perceiver's factors add up; of K > this, each is scaled by this / K.

    What all chunks have in common would otherwise outgrow the memory, which is never scaled. None: no limit."""
    key_decorrelation: float | None = None
    """Ridge of key decorrelation, where chunks with a memory are merged (lora/merge.py); None for none."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""

    def _problems(self) -> list[str]:
        least = min(self.n_decoder_blocks, self.rank, self.n_kv_heads)
        largest = max(self.n_decoder_blocks, self.memory_blocks, self.memory_heads)
        widths, most = {d_out for _, _, _, _, d_out in self.modules}, self.max_unscaled_chunks
        is_shared = _kinds(self.static_modules) & _kinds((*self.modules, *self.memory_modules))
        ridge, reads = self.key_decorrelation, bool(self.encoder_modules)
        return [
            *(super()._problems() if self.modules or not self.memory_modules else ()),
            *(problems_of(self.static_modules) if self.static_modules else ()),
            *(problems_of(self.encoder_modules) if self.encoder_modules else ()),
            *(self._memory_problems() if self.memory_modules else ()),
            *failed(
                (len(self.reader_layers) != 1, "reader_layers must name one layer"),
                (least < 1, "n_decoder_blocks, rank and n_kv_heads must be at least 1"),
                (least > 0 and self.n_heads % self.n_kv_heads, "n_heads must be a multiple of n_kv_heads"),
                (largest > MOST_BLOCKS, f"more than {MOST_BLOCKS} blocks or heads"),
                (widths and self.d_values not in {0, *widths}, f"no module writes {self.d_values} numbers (d_values)"),
                (is_shared, "the static modules must be of kinds that `modules` and the memory leave alone"),
                (self.static_modules and self.static_modules_rank < 1, "static_modules_rank must be at least 1"),
                (reads and self.encoder_rank < 1, "encoder_modules need an encoder_rank of at least 1"),
                (reads and self.encoder != OF_THE_BASE, "encoder_modules need the base as the encoder"),
                (most is not None and most < 1, "max_unscaled_chunks must be at least 1"),
                (ridge is not None and not self.memory_modules, "key_decorrelation needs a memory"),
                (ridge is not None and ridge <= 0, "key_decorrelation must be above 0"),
            ),
        ]

    def _memory_problems(self) -> list[str]:
        memory, kinds = self.memory_modules, _kinds(self.memory_modules)
        is_uniform = len({module[2:] for module in memory}) == 1 and kinds <= set(KINDS)
        return failed(
            (not is_uniform, "the memory's modules must be of one kind and one shape"),
            (kinds & _kinds(self.modules), "the memory's modules must be of a kind that `modules` leaves alone"),
            (self.d_values != memory[0][4], "a memory needs values as wide as its modules' outputs"),
            (list(memory) != sorted(memory, key=lambda m: m[1]), "memory modules are not in the order of their layers"),
            (min(self.memory_rank, self.memory_question_rank) < 1, "memory_rank, memory_question_rank at least 1"),
            (self.memory_heads < 2, "memory_heads at least 2"),
            (self.memory_near_tokens < 0, "memory_near_tokens must be 0 or more"),
            (not 0 < self.memory_gate_power <= 1, "memory_gate_power must be above 0, and at most 1"),
        )

    @classmethod
    def for_target(cls, target: Target, d_features: int, **options):
        return cls(d_features=d_features, modules=target.rows, **options)

    @property
    def target(self) -> Target:
        """All modules that receive factors: the Perceiver's, the memory's and the static ones."""
        of_all = (*self.modules, *self.memory_modules, *self.static_modules)
        ordered = sorted(of_all, key=lambda module: (module[1], KINDS.index(module[2])))
        return Target(tuple(TargetModule(*module) for module in ordered))

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of one chunk's LoRA, by kind; 0 for kinds that receive a static LoRA alone."""
        others = dict.fromkeys(_kinds(self.memory_modules), self.memory_rank)
        others |= dict.fromkeys(_kinds(self.static_modules), 0)
        return {kind: others.get(kind, self.rank) for kind in self.target.kinds}

    @property
    def merging(self) -> Merging:
        """How the chunks of a document become one LoRA."""
        most, ridge = self.max_unscaled_chunks, self.key_decorrelation
        return Merging(
            {} if most is None else dict.fromkeys(self.kinds, most),
            {} if ridge is None else {self.memory_modules[0][2]: ridge},
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of `modules`."""
        return tuple(sorted({layer for _, layer, _, _, _ in self.modules}))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of `modules`."""
        return tuple(kind for kind in KINDS if kind in _kinds(self.modules))


def _kinds(modules: tuple[ModuleRow, ...]) -> set[str]:
    return {kind for _, _, kind, _, _ in modules}
