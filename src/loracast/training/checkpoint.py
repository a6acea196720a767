"""Save and load the state of a training run, for exact resumption: weights, optimizer, position.

The random state of a batch follows from its number (`loop.py`), so none is kept. The files are safetensors and JSON
only (accelerate's checkpoints pickle the optimizer). A state is
a folder `state-<step>`; `state.json` names the current one and is replaced last, so a run killed at any moment leaves
the previous state in force.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loracast.errors import TrainingError
from loracast.files import sync_folder, write_atomically

_OPTIMIZER = "optimizer.0."  # before the optimizer's values


def save_state(
    out_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    elapsed_s: float,
    settings: dict[str, Any],
) -> None:
    """Write the state of a run after `step` steps, then delete the older states."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": value.detach().contiguous() for name, value in model.state_dict().items()}
    numbers: dict[str, float] = {}
    for parameter, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            key = f"{_OPTIMIZER}{parameter}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach().contiguous()
            else:
                numbers[key] = value
    folder = out_dir / f"state-{step}"
    folder.mkdir(exist_ok=True)
    part = folder / "state.safetensors.part"
    save_file(tensors, part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, folder / "state.safetensors")
    sync_folder(folder)
    state = {"step": step, "elapsed_s": elapsed_s, "folder": folder.name, "numbers": numbers, "settings": settings}
    write_atomically(out_dir / "state.json", json.dumps(state, indent=1).encode())
    for other in out_dir.glob("state-*"):
        if other.name != folder.name:
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
    restored: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *state["numbers"].items()]:
        if key.startswith(_OPTIMIZER):
            parameter, name = key.removeprefix(_OPTIMIZER).split(".", 1)
            restored.setdefault(int(parameter), {})[name] = value
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
