"""The one training loop: AdamW (or Muon on the matrices), warm-up, cosine, clipping, bf16 autocast, gradient accumulation.

It knows neither documents nor questions: an objective turns a step's number into losses. It stops at a number of steps, at a wall-clock
budget or at SIGTERM, saves all that a later run needs to go on exactly, and runs under `accelerate launch` and torchrun as it is.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loracast.errors import ConfigError, TrainingError
from loracast.files import write_atomically
from loracast.training.checkpoint import load_state, save_state
from loracast.training.runtime import Workers


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what to train on is the objective's matter."""

    steps: int = 1000
    """Optimizer steps in all; with a cosine schedule also its length."""
    lr: float = 5e-4
    """Peak learning rate of AdamW."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon orthogonalises the updates of the matrices and leaves the rest to AdamW."""
    muon_lr: float = 0.01
    """Peak learning rate of Muon."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to a tenth of the peak over `steps`, or flat."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    accumulate: int = 1
    """Batches in one optimizer step."""
    budget_s: float | None = None
    """Stop after this many seconds of wall clock in this run; a later run goes on."""
    save_every_s: float = 180.0
    """Seconds between checkpoints."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    seed: int = 0
    """Seed of the initial weights."""
    bf16: bool = True
    """Compute the hypernetwork's matmuls in bf16 (weights and optimizer stay fp32)."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1 or self.log_every < 1:
            raise ConfigError("steps, accumulate and log_every must be at least 1")

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step (counted from 0), as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


_DIVERGED = (
    "start a new run from the last checkpoint (--init-from, another --out) with a lower rate (--set training.lr=...)"
)

Objective = Callable[[int, int], tuple[Tensor, dict[str, float]]]
"""(step, micro-batch) -> loss, and figures to log."""


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW on everything, or Muon on the matrices inside the network and AdamW on embeddings, norms, scalers and stacked heads."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    matrices = [
        p
        for name, p in trainable
        if config.optimizer == "muon" and p.ndim == 2 and "latents" not in name and id(p) not in tables
    ]
    others = [p for _, p in trainable if not any(p is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="original")
        )
    return optimizers


class Stop:
    """Turns SIGTERM and SIGINT into a request to stop after the step in hand."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: whoever runs the thread decides when it stops
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: no waiting for the step, the last checkpoint stays
        self.requested = True


def train(
    model: nn.Module,
    objective: Objective,
    config: TrainConfig,
    out_dir: Path,
    *,
    save_model: Callable[[Path], None],
    settings: Mapping[str, Any] | None = None,
    on_metrics: Callable[[dict[str, float]], None] = lambda metrics: None,
    workers: Workers | None = None,
) -> dict[str, float]:
    """Train `model` on `objective`; go on where `out_dir` holds the state of an earlier run with the same settings.

    Writes `metrics.jsonl`, `state.json` and `state-<step>/` into `out_dir`, and the model through `save_model(out_dir)` beside every state.

    Returns:
        the last metrics.

    Raises:
        TrainingError: a state of other settings, or a loss or gradient that is not finite (the last good state stays).
    """
    workers = workers or Workers.join(next(model.parameters()).device.type)
    out_dir.mkdir(parents=True, exist_ok=True)
    optimizers = make_optimizers(model, config)
    fixed = resumable_settings(config, settings)
    step, elapsed_before_s = load_state(out_dir, model, optimizers, settings=fixed)
    started_s = last_save_s = time.monotonic()
    seen: dict[str, list[float]] = {}
    last = _resume_metrics(out_dir / "metrics.jsonl", step) if workers.is_first else {}

    def save() -> None:
        if workers.is_first:
            save_model(out_dir)
            elapsed_s = elapsed_before_s + time.monotonic() - started_s
            save_state(out_dir, model, optimizers, step, elapsed_s, settings=fixed)

    with Stop() as stop, open(out_dir / "metrics.jsonl", "a", encoding="utf-8") as log:
        while step < config.steps:
            is_over = config.budget_s is not None and time.monotonic() - started_s > config.budget_s
            if workers.any(stop.requested or is_over):
                break
            figures = _optimizer_step(model, objective, optimizers, config, step)
            step += 1
            for name, value in figures.items():
                seen.setdefault(name, []).append(value)
            if step % config.log_every == 0 or step == config.steps:
                elapsed_s = elapsed_before_s + time.monotonic() - started_s
                last = {"step": step, "elapsed_s": round(elapsed_s, 1)}
                last |= _means(seen)
                if workers.is_first:
                    log.write(json.dumps(last) + "\n")
                    log.flush()
                    on_metrics(last)
                seen = {}
            if time.monotonic() - last_save_s > config.save_every_s:
                save()
                last_save_s = time.monotonic()
        save()
    return last


def _optimizer_step(
    model: nn.Module, objective: Objective, optimizers: Iterable[torch.optim.Optimizer], config: TrainConfig, step: int
) -> dict[str, float]:
    """One update from `accumulate` batches; the learning rates follow the schedule."""
    seen: dict[str, list[float]] = {}
    for micro in range(config.accumulate):
        loss, others = objective(step, micro)
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss of step {step} is {loss.item()}; {_DIVERGED}")
        (loss / config.accumulate).backward()
        for name, value in {"loss": loss.item(), **others}.items():
            seen.setdefault(name, []).append(value)
    figures = _means(seen)
    figures["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm).item()
    if not math.isfinite(figures["grad_norm"]):  # an update would ruin the weights, and the next checkpoint with them
        raise TrainingError(f"the gradient of step {step} is not finite; {_DIVERGED}")
    for optimizer in optimizers:
        peak = config.muon_lr if isinstance(optimizer, torch.optim.Muon) else config.lr
        for group in optimizer.param_groups:
            group["lr"] = peak * config.lr_factor(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return figures


def _resume_metrics(path: Path, step: int) -> dict[str, float]:
    """Drop what a killed run logged after its last checkpoint, half a line included. Returns the last metrics kept."""
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


def _means(seen: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each figure over the batches that had it."""
    return {name: sum(values) / len(values) for name, values in seen.items()}


def resumable_settings(config: TrainConfig, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that a resumed run must share, in JSON's types; how long to run and how often to save may change."""
    free = {"budget_s", "save_every_s", "log_every"}
    if config.schedule == "constant":
        free.add("steps")  # nothing depends on where it ends
    training = {name: value for name, value in asdict(config).items() if name not in free}
    return json.loads(json.dumps({"training": training, **(others or {})}))
