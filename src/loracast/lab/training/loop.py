"""The training loop: AdamW with warm-up, schedule, clipping and gradient accumulation; it resumes exactly.

The loop knows neither documents nor questions: an objective turns the number of a step into a loss. It stops after a
number of steps, at a wall-clock budget or at SIGTERM. Processes of `accelerate launch` or torchrun share its batches.

Save and load the state of a training run, for exact resumption: weights, optimizer, position.

The random state of a batch follows from its number (`loop.py`), so none is kept. The files are safetensors and JSON
only (accelerate's checkpoints pickle the optimizer). A state is
a folder `state-<step>`; `state.json` names the current one and is replaced last, so a run killed at any moment leaves
the previous state in force.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loracast.base.footprint import bf16_autocast
from loracast.base.forward import Schedule, lr_factor
from loracast.errors import ConfigError, LoracastError, TrainingError
from loracast.files import write_atomically, write_with
from loracast.lab.training.scoring import Passes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it to the kernel.

    A step allocates and frees gigabytes; without this, page faults took 40 % of its time (docs/notebook).
    """
    if sys.platform.startswith("linux"):
        with suppress(AttributeError):  # another libc
            mallopt, largest = ctypes.CDLL(None).mallopt, 2**31 - 1
            for option, value in ((_M_MMAP_THRESHOLD, largest), (_M_TRIM_THRESHOLD, largest), (_M_TOP_PAD, 2**28)):
                mallopt(option, value)


@dataclass(frozen=True)
class Workers:
    """This process among the workers that torchrun or `accelerate launch` started.

    The batches of a step are shared out, and their gradients summed, so that the number of workers changes nothing but
    the time that a step takes. A method that talks to the others raises TrainingError where one of them has ended.
    """

    rank: int
    n: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls, device: str | None = None) -> Workers:
        """Join the other workers, if the launcher's environment names any."""
        n = int(os.environ.get("WORLD_SIZE", "1"))
        rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
        where = torch.device(f"cuda:{local_rank}" if on_gpu else "cpu")
        if n > 1 and not torch.distributed.is_initialized():
            if on_gpu:
                torch.cuda.set_device(where)
            torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        return cls(rank, n, where)

    def batches(self, step: int, n_batches: int) -> range:
        """The numbers of this worker's batches, of the `n_batches` of a step.

        Raises ConfigError if they cannot be shared out evenly.
        """
        if n_batches % self.n:
            raise ConfigError(
                f"{self.n} processes share the batches of a step, which are {n_batches}: "
                f"set training.accumulate to a multiple of {self.n}"
            )
        n_mine = n_batches // self.n
        first = step * n_batches + self.rank * n_mine
        return range(first, first + n_mine)

    def copy_first(self, model: nn.Module) -> None:
        """Give all workers the weights of the first."""
        if self.n > 1:
            with _together():
                for value in model.state_dict().values():
                    torch.distributed.broadcast(whole := value.contiguous(), 0)
                    value.copy_(whole)

    def sum_gradients(self, model: nn.Module) -> None:
        """Add the gradients of all workers up. A parameter that has none on any of them has none afterwards.

        DistributedDataParallel is not used: it wants each parameter in every batch, and a memory has no loss in some.
        """
        if self.n == 1:
            return
        trained = [p for p in model.parameters() if p.requires_grad]
        flags = self.gather([p.grad is not None for p in trained])
        present = [p for p, *of_workers in zip(trained, *flags, strict=True) if any(of_workers)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in present])
        with _together():
            torch.distributed.all_reduce(flat)
        for p, part in zip(present, flat.split([p.numel() for p in present]), strict=True):
            p.grad = part.view_as(p)

    def gather(self, value: Any) -> list[Any]:
        """The value of every worker, in the order of their ranks."""
        if self.n == 1:
            return [value]
        values: list[Any] = [None] * self.n
        with _together():
            torch.distributed.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any worker sets the flag, so that all stop together."""
        return any(self.gather(flag))


@contextmanager
def _together() -> Iterator[None]:
    """Turn a failed exchange with the other workers into a TrainingError that tells its cause and remedy."""
    try:
        yield
    except RuntimeError as error:  # of the connection to a process that has ended
        raise TrainingError(
            f"another process of this training has ended ({str(error).splitlines()[0]}); "
            "the same command goes on from the last checkpoint"
        ) from error


_OPTIMIZER = "optimizer.0."  # before the optimizer's values


def save_state(
    out_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, elapsed_s: float,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """Write the state of a run after `step` steps, then delete the older states."""
    from safetensors.torch import save_file

    values: dict[str, Tensor] = {f"model.{name}": value for name, value in model.state_dict().items()}
    for parameter, of_parameter in optimizer.state_dict()["state"].items():
        values |= {f"{_OPTIMIZER}{parameter}.{name}": value for name, value in of_parameter.items()}
    tensors = {name: value.detach().contiguous() for name, value in values.items()}
    folder = out_dir / f"state-{step}"
    folder.mkdir(exist_ok=True)
    write_with(folder / "state.safetensors", lambda path: save_file(tensors, path))
    state = {"step": step, "elapsed_s": elapsed_s, "folder": folder.name, "settings": settings}
    write_atomically(out_dir / "state.json", json.dumps(state, indent=1).encode())
    for other in out_dir.glob("state-*"):
        if other != folder:
            shutil.rmtree(other)


def load_state(
    out_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> tuple[int, float]:
    """Restore the state in `out_dir`, if there is one. Returns (steps done, seconds spent), (0, 0) for a fresh folder.

    Raises TrainingError if the state was made with other settings, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = out_dir / "state.json"
    if not path.is_file():
        return 0, 0.0
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(out_dir / state["folder"] / "state.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TrainingError(f"the state of the run in {out_dir} cannot be read ({error}); start a new run") from error
    differing = _differences(settings, state["settings"])
    if differing:
        raise TrainingError(
            f"{out_dir} holds a run with other settings ({', '.join(differing)}); give the same ones to resume it, "
            "another --out for a new run, or --init-from to start from its weights"
        )
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    restored: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        if key.startswith(_OPTIMIZER):
            parameter, name = key.removeprefix(_OPTIMIZER).split(".")
            restored[int(parameter)][name] = value
    optimizer.load_state_dict({"state": restored, "param_groups": optimizer.state_dict()["param_groups"]})
    return state["step"], state["elapsed_s"]


def _differences(wanted: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys in which two nested settings differ."""
    keys: list[str] = []
    for key in sorted(wanted.keys() | found.keys()):
        a, b = wanted.get(key), found.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the optimizer, its schedule, precision and checkpoints, whatever the data and the objective are."""

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
    schedule: Schedule = "cosine"
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
        return lr_factor(step, self.steps, self.warmup_steps, self.schedule)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The precision of a forward pass on a device."""
        return bf16_autocast(device) if self.bf16 else nullcontext()


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


@contextmanager
def sigterm_noticed() -> Iterator[threading.Event]:
    """Turn SIGTERM into an event, so that a run stops after the current step; Ctrl-C waits for no step."""
    noticed = threading.Event()
    previous = None
    with suppress(ValueError):  # not the main thread: the thread's owner decides when it stops
        previous = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield noticed
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def train(
    model: nn.Module,
    objective: Objective,
    config: TrainConfig,
    out_dir: Path,
    *,
    save_model: Callable[[Path], None],
    settings: Mapping[str, Any] | None = None,
    on_metrics: OnMetrics = lambda metrics: None,
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
    workers = Workers.join(next(model.parameters()).device.type)
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
    figures: dict[str, list[float]] = defaultdict(list)  # those of each batch that had them, since the last line
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
        together: dict[str, list[float]] = defaultdict(list)
        for of_worker in workers.gather(dict(figures)):
            for name, values in of_worker.items():
                together[name] += values
        figures.clear()
        means = {name: sum(values) / len(values) for name, values in together.items()}
        last = {"step": step, "elapsed_s": round(elapsed_s(), 1), **means}
        if workers.is_first:
            log.write(json.dumps(last) + "\n")
            log.flush()
            on_metrics(last)

    def update() -> None:
        """Change the model once, by the batches of a step at the learning rate of the schedule."""
        bad: float | None = None
        for number in workers.batches(step, config.accumulate):
            torch.manual_seed(number)
            loss, others = objective(number)
            if not torch.isfinite(loss):
                bad = loss.item()
            (loss / config.accumulate).backward()
            for name, value in {"loss": loss.item(), **others}.items():
                figures[name].append(value)
        workers.sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm).item()
        if bad is not None:
            raise TrainingError(f"the loss of step {step} is {bad}; {_DIVERGED}")
        if not math.isfinite(norm):  # an update would ruin the weights, and the next checkpoint with them
            raise TrainingError(f"the gradient of step {step} is not finite; {_DIVERGED}")
        figures["grad_norm"].append(norm)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * config.lr_factor(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with sigterm_noticed() as stop, open(out_dir / "metrics.jsonl", "a", encoding="utf-8") as log:
        while step < config.steps:
            is_over = config.budget_s is not None and time.monotonic() - started_s > config.budget_s
            if workers.any(stop.is_set() or is_over):
                break
            update()
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


def _resume_metrics(path: Path, step: int) -> dict[str, float]:
    """Drop lines, whole or half, that a killed run logged after its last checkpoint. Returns the last line kept."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    kept = [row for row in rows if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return kept[-1] if kept else {}


def resumable_settings(config: TrainConfig, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that a resumed run must share, in JSON's types; duration and intervals may change."""
    free = {"budget_s", "save_every_s", "log_every", "checkpoint_activations", "length_groups"} | (
        {"steps"} if config.schedule == "constant" else set()
    )
    training = {name: value for name, value in asdict(config).items() if name not in free}
    return json.loads(json.dumps({"training": training, **(others or {})}))


_SHARES = ("token_accuracy", "relative_error")


def require_matplotlib(needed_by: str = "the curve of a training needs", extra: str = "train") -> None:
    """Raise LoracastError where nothing can be drawn: before the work, not after it."""
    if find_spec("matplotlib") is None:
        raise LoracastError(f"{needed_by} matplotlib: pip install 'loracast[{extra}]'")


def pyplot() -> Any:
    """matplotlib's pyplot, set up to draw into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_metrics(metrics: Path, plot: Path) -> bool:
    """Plot loss, accuracies and relative errors over the steps; False if there are none. Needs the extra `train`."""
    plt = pyplot()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not rows:
        return False
    steps = [row["step"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(steps, [row["loss"] for row in rows], color="tab:blue")
    left.set(xlabel="step", title="loss", yscale="log")
    figures = sorted({name for row in rows for name in row if name.startswith("exact") or name in _SHARES})
    for name in figures:
        points = [(row["step"], row[name]) for row in rows if name in row]
        right.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    highest = max([1.0, *(row[name] for row in rows for name in figures if name in row)])
    right.set(xlabel="step", ylim=(0, highest), title="in training")
    if figures:
        right.legend(loc="lower left")
    figure.suptitle(f"{rows[-1]['step']} steps in {rows[-1]['elapsed_s'] / 3600:.1f} h")
    figure.savefig(plot, dpi=120)
    plt.close(figure)
    return True
