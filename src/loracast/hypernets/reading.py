"""Text-to-LoRA that reads: the tokens of a description, not one vector for all of it, become a LoRA in one forward pass.

    states and values [n, t, d] -> Perceiver -> rank latents -> heads, and copies of the values pointed to -> A, B of the description
    states, what enters o_proj -> an associative memory (optional; memory.py) -> further A, B in a few modules
    mean state -> gate [n] -> how much of all these, and of factors that all descriptions share, there is

One vector says which of the known tasks is meant; what words an answer shall be made of stands in the tokens. The parts are those of
Doc-to-LoRA (`doc_to_lora.py`), with one chunk; a memory may come from a trained one, since a label is found in a description as a fact is in a document. The gate closes for what describes nothing. Knows shapes, never a base's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from loracast.encoders.features import Features
from loracast.errors import ConfigError
from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
from loracast.hypernets.known import KnowsDescriptions, open_gate, shared_factors
from loracast.hypernets.memory import AssociativeMemory
from loracast.lora import Factors, LoRA, LoRABatch
from loracast.target import Target

_GAIN_RATE = 30.0  # Adam moves every number by about the learning rate


@dataclass(frozen=True)
class ReadingToLoRAConfig:
    """Everything that fixes the architecture; the shapes of the base are in `modules`."""

    d_state: int
    """Width of the base's states, and of the values: what the base must be told to say a token."""
    modules: tuple[tuple[str, int, str, int, int], ...]
    """The target, one (name, layer, kind, d_in, d_out) for each module, in the target's order."""
    reader_layer: int = 8
    """After which block of the base its states are read."""
    lead_in: tuple[int, ...] = ()
    """Token ids read before each description and then dropped."""
    rank: int = 4
    """Rank of what is made from a description."""
    shared_rank: int = 16
    """Rank of the factors that all descriptions share."""
    width: int = 256
    """Width of the rank latents."""
    n_heads: int = 8
    """Heads of an attention."""
    n_blocks: int = 2
    """Blocks in which the rank latents read the tokens."""
    head_shared_rank: int = 32
    """The layers share the heads; each corrects them by this rank."""
    scale: float = 45.25
    """Factor on what is made from a description, folded into B."""
    memory_modules: tuple[tuple[str, int, str, int, int], ...] = ()
    """Modules in which an associative memory of the description's tokens lies; empty for none."""
    memory_rank: int = 64
    """Most tokens of a description that it stores."""
    memory_heads: int = 3
    """As in DocToLoRAConfig."""
    memory_question_rank: int = 96
    """As in DocToLoRAConfig."""
    memory_blocks: int = 2
    """As in DocToLoRAConfig."""
    n_known: int = 0
    """Descriptions seen in training, whose mean states are kept to tell how far a new one is from all of them."""

    def __post_init__(self) -> None:
        if (
            min(self.d_state, self.reader_layer, self.shared_rank, self.head_shared_rank) < 1
            or self.width % self.n_heads
        ):
            raise ConfigError(
                "bad ReadingToLoRAConfig: d_state, reader_layer, shared_rank and head_shared_rank must be at least 1, and width a multiple "
                "of n_heads"
            )
        if all(d_out != self.d_state for *_, d_out in self.modules):
            raise ConfigError(
                "bad ReadingToLoRAConfig: no module writes into the residual stream, where values go; add o_proj or down_proj"
            )
        self.doc  # noqa: B018  # says what else is wrong
        if self.memory_modules:
            self.memory  # noqa: B018
            shapes = {name: (d_in, d_out) for name, _, _, d_in, d_out in self.modules}
            if any(shapes.get(name) != (d_in, d_out) for name, _, _, d_in, d_out in self.memory_modules):
                raise ConfigError("bad ReadingToLoRAConfig: the memory's modules must be among those of the target")

    @property
    def doc(self) -> DocToLoRAConfig:
        """The same as the hypernetwork for documents calls it."""
        return DocToLoRAConfig(
            d_features=2 * self.d_state, modules=self.modules, reader_layers=(self.reader_layer,), lead_in=self.lead_in, rank=self.rank,
            width=self.width, n_heads=self.n_heads, n_kv_heads=self.n_heads, head_dim=self.width // self.n_heads,
            n_decoder_blocks=self.n_blocks, head_shared_rank=self.head_shared_rank, document_independent_rank=self.shared_rank,
            scale=self.scale, d_values=self.d_state,
        )  # fmt: skip

    @property
    def memory(self) -> DocToLoRAConfig:
        """What the memory is like, as the hypernetwork for documents calls it."""
        (kind,) = {kind for _, _, kind, _, _ in self.memory_modules} or {""}
        others = tuple(module for module in self.modules if module[2] != kind)
        return DocToLoRAConfig(
            d_features=2 * self.d_state, modules=others, d_values=self.d_state, width=self.width, n_heads=self.n_heads,
            n_kv_heads=self.n_heads, memory_modules=self.memory_modules, memory_rank=self.memory_rank, memory_heads=self.memory_heads,
            memory_question_rank=self.memory_question_rank, memory_blocks=self.memory_blocks,
        )  # fmt: skip

    @property
    def target(self) -> Target:
        return self.doc.target

    @property
    def encoder(self) -> str:
        """The text encoder: the base, token by token."""
        return f"base:{self.reader_layer}"

    @property
    def d_text(self) -> int:
        """Width of a condition's tokens: state, value, for a memory the token's own value and its keys, and whether the token is real."""
        keys = self.d_state + sum(d_in for *_, d_in, _ in self.memory_modules) if self.memory_modules else 0
        return 2 * self.d_state + keys + 1

    @property
    def lora_rank(self) -> int:
        """Largest rank of a task's LoRA."""
        return self.rank + self.shared_rank + (self.memory_rank if self.memory_modules else 0)


class ReadingToLoRA(KnowsDescriptions, nn.Module):
    """The hypernetwork. Its start is an exact no-op, because every B starts at zero."""

    config_class: ClassVar = ReadingToLoRAConfig
    known: Tensor
    memory_mean: Tensor
    memory_std: Tensor

    def __init__(self, config: ReadingToLoRAConfig):
        super().__init__()
        self.config = config
        self.reader = DocToLoRA(config.doc)
        self.gate = open_gate(config.d_state)
        self.memory: AssociativeMemory | None = None
        if config.memory_modules:
            self.memory = AssociativeMemory(config.memory)
            self.memory_gain = nn.Parameter(torch.zeros(()))  # the start changes nothing
            self.register_buffer("memory_mean", torch.zeros(2 * config.d_state))
            self.register_buffer("memory_std", torch.ones(2 * config.d_state))
        self.register_buffer("known", torch.zeros(config.n_known, config.d_state))

    def hold_in_bf16(self) -> None:
        """As `DocToLoRA.hold_in_bf16`."""
        self.reader.hold_in_bf16()

    def know(self, conditions: Tensor) -> None:
        """Keep what tells the descriptions seen in training apart, and take the units of the reader's input from them. [m, t, d_text]"""
        self.config = replace(self.config, n_known=len(conditions))
        self.known = self.pooled(conditions).detach().clone()
        real = conditions[..., -1] > 0
        self.reader.standardise(conditions[..., : 2 * self.config.d_state][real].float())

    def pooled(self, conditions: Tensor) -> Tensor:
        """The mean state of each description's tokens [n, d_state]."""
        real = conditions[..., -1:]
        return (conditions[..., : self.config.d_state] * real).sum(1) / real.sum(1)

    def constant(self) -> Tensor:
        """A condition that describes nothing: one token, one deviation above the mean in all that it has [1, 1, d_text]."""
        features = self.reader.feature_mean + self.reader.feature_std
        rest = features.new_zeros(self.config.d_text - len(features) - 1)
        return torch.cat([features, rest, torch.ones_like(features[:1])])[None, None]

    def meaningless(self, n: int, generator: torch.Generator) -> Tensor:
        """Conditions [n, t, d_text] that no text has: random states with the values of random directions."""
        t = 12
        mean, std = self.reader.feature_mean, self.reader.feature_std
        random = torch.randn(n, t, len(mean), generator=generator).to(mean) * std + mean
        rest = random.new_zeros(n, t, self.config.d_text - len(mean) - 1)
        return torch.cat([random, rest, torch.ones_like(random[..., :1])], dim=-1)

    def start_shared_from(self, lora: LoRA) -> None:
        """Let the factors that all share start as a LoRA that was trained on all tasks. Raises ConfigError where it does not fit."""
        target = self.config.target
        for kind in target.kinds:
            shared = self.reader.shared(kind)
            assert shared is not None
            a, b = shared_factors(lora, target.of_kind(kind), self.config.shared_rank)
            shared.a.data.copy_(a)
            shared.b.data.copy_(b)

    def _centred(self, vectors: Tensor) -> Tensor:
        """States have a large mean in common, beside which all of them are alike."""
        return super()._centred(vectors) - self.reader.feature_mean[: self.config.d_state]

    def openness(self, conditions: Tensor) -> Tensor:
        """How far the gate opens for each description, as a logit [n]."""
        mean, std = (x[: self.config.d_state] for x in (self.reader.feature_mean, self.reader.feature_std))
        return self.gate((self.pooled(conditions) - mean) / std).squeeze(-1)

    def _remembered(self, conditions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The memory's A [n, modules, r, in] and B rows [n, modules, r, out]."""
        assert self.memory is not None
        c = self.config
        state, start, value, keys = conditions[..., :-1].split(
            [c.d_state, c.d_state, c.d_state, c.d_text - 3 * c.d_state - 1], dim=-1
        )
        states = torch.cat([state, value], dim=-1)
        keys = keys.unflatten(-1, (len(c.memory_modules), -1)).transpose(1, 2)  # [n, modules, t, in]
        standard = (states - self.memory_mean) / self.memory_std
        a, b, _ = self.memory(standard, Features(states, start, keys, mask), mask)
        return a, b * (_GAIN_RATE * self.memory_gain)

    def forward(self, conditions: Tensor) -> LoRABatch:
        """What a `DescriptionReader` reads of n descriptions [n, t, d_text] -> their n LoRAs, differentiable."""
        mask = conditions[..., -1] > 0
        loras = self.reader(Features(conditions[..., : 2 * self.config.d_state], mask=mask)).loras
        factors = dict(loras.factors)
        if self.memory is not None:
            remembered = self._remembered(conditions, mask)
            for (name, *_), a, b in zip(
                self.config.memory_modules, *(side.unbind(1) for side in remembered), strict=True
            ):
                own = factors[name]
                factors[name] = Factors(
                    torch.cat([own.a, a.to(own.a)], dim=1), torch.cat([own.b, b.transpose(1, 2).to(own.b)], dim=2)
                )
        gate = self.openness(conditions).sigmoid()[:, None, None]
        # Without a gradient in place: a hundred descriptions' factors are half a gigabyte.
        gated = torch.mul if torch.is_grad_enabled() else Tensor.mul_
        return LoRABatch(
            loras.n, {name: pair._replace(b=gated(pair.b, gate.to(pair.b))) for name, pair in factors.items()}, {}
        )


def with_memory_of(config: ReadingToLoRAConfig, doc: DocToLoRAConfig) -> ReadingToLoRAConfig:
    """The config with a memory such as a hypernetwork for documents has. Raises ConfigError where it has none, or one that does not fit."""
    if not doc.memory_modules:
        raise ConfigError("the hypernetwork for documents has no memory to start from")
    if (doc.width, doc.n_heads, doc.d_values, doc.d_features) != (
        config.width,
        config.n_heads,
        config.d_state,
        2 * config.d_state,
    ) or (doc.reader_layers, doc.lead_in) != ((config.reader_layer,), config.lead_in):
        raise ConfigError(
            "a memory can be taken only from a hypernetwork of the same width and heads that reads the same block after the same lead-in"
        )
    return replace(
        config, memory_modules=doc.memory_modules, memory_rank=doc.memory_rank, memory_heads=doc.memory_heads,
        memory_question_rank=doc.memory_question_rank, memory_blocks=doc.memory_blocks,
    )  # fmt: skip


@torch.no_grad()
def with_memory(hypernet: ReadingToLoRA, doc: DocToLoRA) -> ReadingToLoRA:
    """The same hypernetwork with the memory of one for documents; what it gives is the same until the memory's gain has been trained.

    Raises:
        ConfigError: as `with_memory_of`; or it has a memory already.
    """
    if hypernet.memory is not None:
        raise ConfigError("this hypernetwork has a memory already")
    larger = ReadingToLoRA(with_memory_of(hypernet.config, doc.config))
    larger.load_state_dict(hypernet.state_dict(), strict=False)
    assert larger.memory is not None and doc.memory is not None
    larger.memory.load_state_dict(doc.memory.state_dict())
    larger.memory_mean.copy_(doc.feature_mean)
    larger.memory_std.copy_(doc.feature_std)
    return larger
