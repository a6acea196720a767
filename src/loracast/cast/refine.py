"""Refine a cast LoRA by gradient descent on a user's examples, for some seconds on the same machine.

A new LoRA is trained beside the cast one, which stays as it is: a learning rate that teaches a LoRA within seconds
would spoil the cast factors. Some examples are kept for validation; the new LoRA with the smallest loss on them joins
the cast one, unless it makes that loss larger, and descent stops early once the loss rises.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loracast.base.footprint import bf16_autocast
from loracast.base.forward import PackedRows, Schedule, answer_loss, lr_factor, pack_rows
from loracast.base.load import Base
from loracast.cast.task import Refine
from loracast.documents.task_spec import Example
from loracast.errors import ConfigError
from loracast.lora.algebra import LoRABatch
from loracast.lora.factors import Rows, joined_ranks

FEWEST_EXAMPLES = 4  # three to learn from, and one held back
_HELD_BACK = 4  # one example in so many is held back
_MOST_HELD = 32  # more would take longer to look at than to learn from
_WARMUP_STEPS = 4
_FEWEST_DECAYING = 20  # steps within which the learning rate falls
_BETAS = (0.9, 0.99)  # AdamW's decay rates
_CLIP_NORM = 1.0
_PATIENCE = 4  # descent stops after so many looks at the held-back examples without a smaller loss


@dataclass(frozen=True)
class RefineConfig:
    """How a LoRA is refined."""

    seconds: float = 30.0
    """Most seconds of descent."""
    steps: int = 200
    """Most steps."""
    rank: int = 16
    """Rank of the new LoRA."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, ten times what the cast factors bear (docs/notebook/2026-11-28.md)."""
    decay_passes: int = 7
    """Passes over the examples, 20 steps at least, within which the rate falls to a tenth; 0: it stays as it is."""
    examples_per_step: int = 8
    """Most examples in one step."""
    look_every: int = 2
    """Steps between two evaluations on the validation examples."""
    seed: int = 0
    """Seed of what is held back and of the order."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or min(self.steps, self.rank, self.examples_per_step, self.look_every) < 1:
            raise ConfigError("seconds must be above 0, steps, rank, examples_per_step and look_every at least 1")
        if self.decay_passes < 0:
            raise ConfigError("decay_passes must be at least 0")


@dataclass(frozen=True)
class Refined:
    """The rows that did best so far on the held-back examples, and what it took."""

    rows: Rows
    """Those of the start, with the new LoRA's behind them from the first step that made them better."""
    steps: int
    """Steps after which they were kept; 0 if none made them better."""
    seconds: float
    """Seconds of the descent so far."""
    loss_before: float
    """Mean loss of a held-back example's answer."""
    loss_after: float


def refine(
    base: Base,
    rows: Rows,
    loras_of: Callable[[Rows], LoRABatch],
    examples: Sequence[Example],
    config: RefineConfig = RefineConfig(),
) -> Refined:
    """Refine the rows of one LoRA, for the seconds and the steps that the config allows; arguments as in `descent`."""
    for n_steps, refined in enumerate(descent(base, rows, loras_of, examples, config)):
        if n_steps >= config.steps or refined.seconds >= config.seconds:
            break
    return refined


def descent(
    base: Base,
    rows: Rows,
    loras_of: Callable[[Rows], LoRABatch],
    examples: Sequence[Example],
    config: RefineConfig = RefineConfig(),
) -> Iterator[Refined]:
    """Refine the rows of one LoRA step by step, until the held-back examples have not got better for a while.

    Args:
        rows: by module kind, A [1, modules, r, in] and B rows [1, modules, r, out]; they stay as they are.
        loras_of: rows -> the LoRA that the base carries, differentiable (`Hypernetwork.loras`).
        examples: of the task.

    Yields:
        what was best so far, before the first step and after each.

    Raises:
        ConfigError: there are fewer than `FEWEST_EXAMPLES` examples.
    """
    check_enough(examples)
    started = time.monotonic()
    rng = random.Random(config.seed)
    order = rng.sample(list(examples), len(examples))
    n_held = min(max(1, len(order) // _HELD_BACK), _MOST_HELD)
    held, learned = _batch(base, order[:n_held]), order[n_held:]
    rate = _schedule(config, len(learned))
    start = {kind: (_copy(a, base.device), _copy(b, base.device)) for kind, (a, b) in rows.items()}
    sides = nn.ParameterList(side for pair in _new(start, config).values() for side in pair)

    def loss_of(batch: PackedRows) -> Tensor:
        with bf16_autocast(base.device):
            return answer_loss(base.model, loras_of(_joined(start, list(sides))), batch)

    @torch.no_grad()
    def look() -> float:
        return loss_of(held).item()

    optimizer = torch.optim.AdamW(sides.parameters(), lr=config.lr, betas=_BETAS, weight_decay=0.0)
    before = best = look()
    kept, kept_step, n_worse, step = start, 0, 0, 0
    queue: list[Example] = []
    while True:
        yield Refined(kept, kept_step, time.monotonic() - started, before, best)
        if n_worse == _PATIENCE:
            return
        if not queue:
            queue = rng.sample(learned, len(learned))
        some, queue = queue[: config.examples_per_step], queue[config.examples_per_step :]
        loss_of(_batch(base, some)).backward()
        torch.nn.utils.clip_grad_norm_(sides.parameters(), _CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % config.look_every == 0:
            n_worse += 1
            if (loss := look()) < best:
                kept = _joined(start, [side.detach() for side in sides])
                best, kept_step, n_worse = loss, step, 0


def _schedule(config: RefineConfig, n_learned: int) -> Callable[[int], float]:
    """The learning rate by step: without its decay, descent on a few dozen examples soon learns them by heart."""
    steps = max(_FEWEST_DECAYING, config.decay_passes * math.ceil(n_learned / config.examples_per_step))
    schedule: Schedule = "cosine" if config.decay_passes else "constant"
    return lambda step: config.lr * lr_factor(step, steps, _WARMUP_STEPS, schedule)


def check_enough(examples: Sequence[object]) -> None:
    """Raise ConfigError where there are too few examples to refine on."""
    if len(examples) < FEWEST_EXAMPLES:
        raise ConfigError(
            f"refining takes at least {FEWEST_EXAMPLES} examples, and there are {len(examples)}: give more, or leave "
            "refining out"
        )


def refiner(base: Base, config: RefineConfig) -> Refine:
    """Refinement of one base's LoRAs, as casting takes it: the rows themselves where nothing made them better."""

    def refined(rows: Rows, loras_of: Callable[[Rows], LoRABatch], examples: Sequence[Example]) -> Rows:
        found = refine(base, rows, loras_of, examples, config)
        return found.rows if found.steps else rows

    return refined


def _copy(side: Tensor, device: torch.device) -> Tensor:
    """One of two factors in fp32; gradients may be taken through it, if the original was made in inference mode too."""
    return side.detach().clone().float().to(device)


def _new(rows: Rows, config: RefineConfig) -> Rows:
    """Rows of a LoRA for the same modules, a no-op at first: A is drawn, B zero (arXiv 2106.09685, section 4.1)."""
    generator = torch.Generator().manual_seed(config.seed)
    new = {}
    for kind, (a, b) in rows.items():
        n_modules, d_in = a.shape[1], a.shape[3]
        drawn = torch.randn(1, n_modules, config.rank, d_in, generator=generator) / d_in**0.5
        new[kind] = (drawn.to(a), b.new_zeros(1, n_modules, config.rank, b.shape[3]))
    return new


def _joined(rows: Rows, sides: Sequence[Tensor]) -> Rows:
    """Rows with further ones behind them, which come as sides: A and B of each kind in turn."""
    return joined_ranks(rows, dict(zip(rows, zip(sides[::2], sides[1::2], strict=True), strict=True)))


def _batch(base: Base, examples: Sequence[Example]) -> PackedRows:
    """Examples as the branches of one row, under the empty system turn with which adapters answer."""
    chat = base.chat
    return pack_rows([[(chat.prompt(e.input, ""), chat.reply(e.outputs[0])) for e in examples]], base.pad_id).to(
        base.device
    )
