"""The training loop: AdamW with warm-up, schedule, clipping and gradient accumulation; it resumes exactly.

The loop knows neither documents nor questions: an objective turns the number of a step into a loss. It stops after a
number of steps, at a wall-clock budget or at SIGTERM. Processes of `accelerate launch` or torchrun share its batches.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loracast.base.precision import has_fast_bf16
from loracast.errors import ConfigError, TrainingError
from loracast.files import write_atomically
from loracast.scoring.likelihood import Passes
from loracast.training.checkpoint import load_state, save_state
from loracast.training.runtime import Workers


@dataclass(frozen=True)
class TrainConfig:
    """How to train, whatever the data and the objective are."""

    steps: int = 1000
    """Number of optimizer steps; a cosine schedule ends there."""
    lr: float = 5e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up the rate falls to a tenth of the peak over `steps`, or stays."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    accumulate: int = 1
    """Batches in one optimizer step, shared out among the processes; their number must divide it."""
    budget_s: float | None = None
    """Stop after this many seconds of wall clock in this run; a later run goes on."""
    save_every_s: float = 180.0
    """Seconds between checkpoints."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    seed: int = 0
    """Seed of the initial weights."""
    bf16: bool = True
    """Whether the forward pass runs under bf16 autocast, where the device is fast at it; weights stay fp32."""
    checkpoint_activations: bool = False
    """Whether the backward pass computes each block of the base again, in place of keeping its activations: a third
    more computation for a fraction of the memory, and the same gradients."""
    length_groups: int = 1
    """Groups of similar length that go through the base one by one, each padded to its own longest; same gradients."""

    def __post_init__(self) -> None:
        if min(self.steps, self.accumulate, self.log_every, self.length_groups) < 1:
            raise ConfigError("steps, accumulate, log_every and length_groups must be at least 1")

    @property
    def passes(self) -> Passes:
        """How the base runs on a batch."""
        return Passes(self.checkpoint_activations, self.length_groups)

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step (counted from 0), as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The precision of a forward pass on a device."""
        return (
            torch.autocast(device.type, torch.bfloat16) if self.bf16 and has_fast_bf16(device.type) else nullcontext()
        )


_DIVERGED = (
    "start a new run from the last checkpoint (--init-from, another --out) with a lower rate (--set training.lr=...)"
)

Objective = Callable[[int], tuple[Tensor, dict[str, float]]]
"""Number of the batch -> loss, and figures to log. It may depend on the number and torch's random state alone."""
OnMetrics = Callable[[dict[str, float]], None]
"""Receives each line of metrics."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW on all parameters that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


class Stop:
    """Turns SIGTERM into a request to stop after the current step; Ctrl-C waits for no step."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Stop:
        with suppress(ValueError):  # not the main thread: the thread's owner decides when it stops
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, number: int, _: object) -> None:
        self.requested = True


def train(
    model: nn.Module,
    objective: Objective,
    config: TrainConfig,
    out_dir: Path,
    *,
    save_model: Callable[[Path], None],
    settings: Mapping[str, Any] | None = None,
    on_metrics: OnMetrics = lambda metrics: None,
    workers: Workers | None = None,
) -> dict[str, float]:
    """Train `model` on `objective`; resume where `out_dir` holds the state of an earlier run with the same settings.

    Writes `metrics.jsonl`, `state.json` and `state-<step>/` into `out_dir`, and the model with `save_model(out_dir)`
    beside every state. Torch's random state follows from a batch's number, so a run goes on exactly, with any number of
    workers. Returns the last metrics.

    Raises:
        ConfigError: the workers cannot share the batches of a step evenly.
        TrainingError: the state has other settings, or a loss or gradient is not finite, or another worker has ended;
            the last good state stays.
    """
    workers = workers or Workers.join(next(model.parameters()).device.type)
    out_dir.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(model, config)
    workers.batches(0, config.accumulate)  # raises before anything is written
    fixed = resumable_settings(config, settings)
    step, elapsed_before_s = load_state(out_dir, model, optimizer, settings=fixed)
    if len(found := set(workers.gather(step))) > 1:
        steps = " and ".join(map(str, sorted(found)))
        raise TrainingError(f"the processes find states of step {steps} in {out_dir}; it must be one folder for all")
    workers.copy_first(model)
    started_s = last_save_s = time.monotonic()
    noted = step
    figures = _Means()
    last = _resume_metrics(out_dir / "metrics.jsonl", step) if workers.is_first else {}

    def elapsed_s() -> float:
        return elapsed_before_s + time.monotonic() - started_s

    def save() -> None:
        if workers.is_first:
            save_model(out_dir)
            save_state(out_dir, model, optimizer, step, elapsed_s(), settings=fixed)

    def note_metrics() -> None:
        nonlocal last, noted
        noted = step
        last = {"step": step, "elapsed_s": round(elapsed_s(), 1), **figures.take(workers)}
        if workers.is_first:
            log.write(json.dumps(last) + "\n")
            log.flush()
            on_metrics(last)

    with Stop() as stop, open(out_dir / "metrics.jsonl", "a", encoding="utf-8") as log:
        while step < config.steps:
            is_over = config.budget_s is not None and time.monotonic() - started_s > config.budget_s
            if workers.any(stop.requested or is_over):
                break
            _optimizer_step(model, objective, optimizer, config, step, workers, figures)
            step += 1
            if step % config.log_every == 0 or step == config.steps:
                note_metrics()
            if time.monotonic() - last_save_s > config.save_every_s:
                save()
                last_save_s = time.monotonic()
        if step > noted:  # stopped between two lines
            note_metrics()
        save()
    return last


def _optimizer_step(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
    workers: Workers,
    figures: _Means,
) -> None:
    """Update the model once from the batches of a step, at the learning rate of the schedule."""
    bad: float | None = None
    for number in workers.batches(step, config.accumulate):
        torch.manual_seed(number)
        loss, others = objective(number)
        if not torch.isfinite(loss):
            bad = loss.item()
        (loss / config.accumulate).backward()
        figures.add({"loss": loss.item(), **others})
    workers.sum_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm).item()
    if bad is not None:
        raise TrainingError(f"the loss of step {step} is {bad}; {_DIVERGED}")
    if not math.isfinite(norm):  # an update would ruin the weights, and the next checkpoint with them
        raise TrainingError(f"the gradient of step {step} is not finite; {_DIVERGED}")
    figures.add({"grad_norm": norm})
    for group in optimizer.param_groups:
        group["lr"] = config.lr * config.lr_factor(step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class _Means:
    """Mean of each figure over the batches that had it."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._values.setdefault(name, []).append(value)

    def take(self, workers: Workers) -> dict[str, float]:
        """The means so far, over the batches of all workers; the count starts anew."""
        together: dict[str, list[float]] = {}
        for of_worker in workers.gather(self._values):
            for name, values in of_worker.items():
                together.setdefault(name, []).extend(values)
        self._values = {}
        return {name: sum(values) / len(values) for name, values in together.items()}


def _resume_metrics(path: Path, step: int) -> dict[str, float]:
    """Drop lines, whole or half, that a killed run logged after its last checkpoint. Returns the last line kept."""
    if not path.is_file():
        return {}
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(row)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return kept[-1] if kept else {}


def resumable_settings(config: TrainConfig, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that a resumed run must share, in JSON's types; duration and intervals may change."""
    free = {"budget_s", "save_every_s", "log_every", "checkpoint_activations", "length_groups"} | (
        {"steps"} if config.schedule == "constant" else set()
    )
    training = {name: value for name, value in asdict(config).items() if name not in free}
    return json.loads(json.dumps({"training": training, **(others or {})}))
