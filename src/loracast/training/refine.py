"""Refine a cast LoRA by gradient descent on a user's examples, for some seconds on the same machine.

It starts from the LoRA's own factors. Some examples are kept for validation; the factors with the smallest loss on them
are kept, those of the start included, and descent stops early once that loss rises.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loracast.base.load import Base
from loracast.cast.task import Refine
from loracast.data.tasks import Example
from loracast.errors import ConfigError
from loracast.lora.algebra import Factors, LoRA, LoRABatch, Rows
from loracast.scoring.episodes import Batch, Episode, Question, pack
from loracast.scoring.likelihood import score_answers
from loracast.training.loop import TrainConfig, make_optimizer

FEWEST_EXAMPLES = 4  # three to learn from, and one held back
_HELD_BACK = 4  # one example in so many is held back
_PATIENCE = 4  # descent stops after so many looks at the held-back examples without a smaller loss


@dataclass(frozen=True)
class RefineConfig:
    """How a LoRA is refined."""

    seconds: float = 30.0
    """Most seconds of descent."""
    steps: int = 200
    """Most steps."""
    lr: float = 1e-4
    """Peak learning rate of AdamW; the best of 3e-5 to 1e-3 on development tasks."""
    examples_per_step: int = 8
    """Most examples in one step."""
    look_every: int = 2
    """Steps between two evaluations on the validation examples."""
    seed: int = 0
    """Seed of what is held back and of the order."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or min(self.steps, self.examples_per_step, self.look_every) < 1:
            raise ConfigError("seconds must be above 0, steps, examples_per_step and look_every at least 1")


@dataclass(frozen=True)
class Refined:
    """The rows that did best so far on the held-back examples, and what it took."""

    rows: Rows
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
    if len(examples) < FEWEST_EXAMPLES:
        raise ConfigError(
            f"refining takes at least {FEWEST_EXAMPLES} examples, and there are {len(examples)}: give more, or leave "
            "refining out"
        )
    started = time.monotonic()
    training = TrainConfig(steps=config.steps, lr=config.lr, warmup_steps=4, schedule="constant")
    rng = random.Random(config.seed)
    order = rng.sample(list(examples), len(examples))
    n_held = max(1, len(order) // _HELD_BACK)
    held, learned = _batch(base, order[:n_held]), order[n_held:]
    sides = nn.ParameterList(side.detach().clone().float().to(base.device) for pair in rows.values() for side in pair)

    def loss_of(batch: Batch) -> Tensor:
        with training.autocast(base.device):
            return score_answers(base.model, loras_of(_paired(rows, list(sides))), batch).loss

    @torch.no_grad()
    def look() -> float:
        return loss_of(held).item()

    def copied() -> Rows:
        return _paired(rows, [side.detach().clone() for side in sides])

    optimizer = make_optimizer(sides, training)
    before = best = look()
    kept, kept_step, n_worse, step = copied(), 0, 0, 0
    queue: list[Example] = []
    while True:
        yield Refined(kept, kept_step, time.monotonic() - started, before, best)
        if n_worse == _PATIENCE:
            return
        if not queue:
            queue = rng.sample(learned, len(learned))
        some, queue = queue[: config.examples_per_step], queue[config.examples_per_step :]
        loss_of(_batch(base, some)).backward()
        torch.nn.utils.clip_grad_norm_(sides.parameters(), training.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * training.lr_factor(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % config.look_every == 0:
            n_worse += 1
            if (loss := look()) < best:
                best, kept, kept_step, n_worse = loss, copied(), step, 0


def refiner(base: Base, config: RefineConfig) -> Refine:
    """Refinement of one base's LoRAs, as casting takes it."""

    def refined(rows: Rows, loras_of: Callable[[Rows], LoRABatch], examples: Sequence[Example]) -> Rows:
        return refine(base, rows, loras_of, examples, config).rows

    return refined


def rows_of(lora: LoRA) -> Rows:
    """A LoRA of factors as rows, each module on its own; `loras_of` is the way back."""
    return {name: (a[None, None], b.T[None, None]) for name, (a, b) in lora.factors.items()}


def loras_of(rows: Rows) -> LoRABatch:
    """The LoRA of rows that have a module each."""
    return LoRABatch(1, {name: Factors(a[:, 0], b[:, 0].transpose(1, 2)) for name, (a, b) in rows.items()}, {})


def _paired(rows: Rows, sides: Sequence[Tensor]) -> Rows:
    """The sides, A and B of each kind in turn, as rows of the same kinds."""
    return dict(zip(rows, zip(sides[::2], sides[1::2], strict=True), strict=True))


def _batch(base: Base, examples: Sequence[Example]) -> Batch:
    """Examples as the branches of one row, under the empty system turn with which adapters answer."""
    chat = base.chat
    questions = [Question(tuple(chat.prompt(e.input, "")), tuple(chat.reply(e.outputs[0]))) for e in examples]
    return pack([Episode((), tuple(questions), "tasks")], base.pad_id).to(base.device)
