"""LoRAs trained by gradient descent, with PEFT itself: the references that generated adapters are measured by.

A folder of one holds PEFT's own files and `loracast.json`, which is written last: what it was trained on and how.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loracast.base.fingerprint import Fingerprint, check
from loracast.base.load import Base
from loracast.errors import AdapterError, ConfigError, TrainingError
from loracast.files import write_atomically
from loracast.lora.algebra import LoRABatch
from loracast.lora.target import target_from_config
from loracast.scoring.episodes import Episode, pack
from loracast.scoring.likelihood import score_answers
from loracast.training.loop import TrainConfig, resumable_settings, train
from loracast.training.runtime import Workers

ABOUT = "loracast.json"
"""Beside PEFT's files: what the LoRA was trained on and how. It is written last."""


@dataclass(frozen=True)
class PeftConfig:
    """The LoRA itself, as PEFT is told."""

    kinds: tuple[str, ...] = ("q_proj", "v_proj")
    """Module kinds that receive a LoRA."""
    layers: tuple[int, ...] | None = None
    """Layers that receive a LoRA; all if None."""
    rank: int = 8
    """Rank."""
    scale: float = 5.66
    """Factor on the delta; alpha is rank times this (published: 16 / sqrt(8))."""


def train_lora(
    base: Base,
    lora: PeftConfig,
    training: TrainConfig,
    episodes: Callable[[int], Sequence[Episode]],
    folder: Path,
    *,
    about: Mapping[str, Any],
    command: str = "",
    budget_s: float | None = None,
    on_metrics: Callable[[dict[str, float]], None] = lambda figures: None,
) -> bool:
    """Train one LoRA, or go on with it; whether it is done now.

    Args:
        episodes: the rows of a step (of each of its `accumulate` parts), by its number: the same for the same number.
        about: what is trained on; a folder with a LoRA that was trained on something else is left alone.
        budget_s: stop after this many seconds; the same call goes on from there.

    Raises:
        TrainingError: the folder has a LoRA that was trained otherwise, or several workers were started.
    """
    if Workers.join(base.device.type).n > 1:
        raise TrainingError("LoRAs of this kind are trained by one process; start it without a launcher")
    about = {"base": base.fingerprint.norms, "lora": dataclasses.asdict(lora), **about}
    settings = resumable_settings(training, about)
    if (folder / ABOUT).is_file():
        stored = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        differing = sorted(k for k, v in settings.items() if stored.get("settings", {}).get(k) != v)
        if differing:
            raise TrainingError(
                f"{folder} holds a LoRA that was trained otherwise ({', '.join(differing)}); give another --out, or remove it"
            )
        return True
    fingerprint = base.fingerprint  # before the base has other modules
    config = training if budget_s is None else dataclasses.replace(training, budget_s=budget_s)
    with _with_lora(base, lora, training.seed) as (wrapped, factors):

        def objective(step: int, micro: int) -> tuple[Tensor, dict[str, float]]:
            batch = pack(episodes(step * config.accumulate + micro), base.pad_id).to(base.device)
            with torch.autocast(base.device.type, torch.bfloat16) if config.bf16 else nullcontext():
                seen = score_answers(base.model, LoRABatch(1, {}, {}), batch)  # PEFT adds the LoRA
            figures = {"exact": seen.exact, "token_accuracy": seen.token_accuracy, "tokens": batch.n_tokens}
            return seen.loss, figures

        last = train(
            factors, objective, config, folder,
            save_model=lambda out: wrapped.save_pretrained(str(out)), settings=about, on_metrics=on_metrics,
        )  # fmt: skip
    if last.get("step") != config.steps:
        return False
    done = {"made_for": fingerprint.to_dict(), "command": command, "settings": settings, "last": last}
    write_atomically(folder / ABOUT, json.dumps(done, indent=1).encode())
    for state in folder.glob("state*"):  # done: nothing goes on from it
        shutil.rmtree(state) if state.is_dir() else state.unlink()
    return True


def read_about(folder: Path, base: Fingerprint, command: str) -> dict[str, Any]:
    """What the LoRA in a folder was trained on and how, checked against a base.

    Raises:
        AdapterError: there is none, or its training is not done: `command` is what goes on with it.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        made_for = Fingerprint(**about["made_for"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder} holds no trained LoRA, or one whose training is not done (`{command}` goes on): {error}"
        ) from error
    check(made_for, base, f"the LoRA in {folder}")
    return about


@contextmanager
def _with_lora(base: Base, lora: PeftConfig, seed: int) -> Iterator[tuple[Any, nn.Module]]:
    """PEFT's model around the base, and a module of nothing but its factors; the base is its old self afterwards."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("training LoRAs needs PEFT: pip install 'loracast[train]'") from error
    target = target_from_config(base.model.config, lora.kinds, lora.layers)
    torch.manual_seed(seed)
    options = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank * lora.scale,  # type: ignore[arg-type]  # PEFT takes and divides any number
        target_modules=list(target.names),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(base.model, options)
    try:
        trained = {name.replace(".", "/"): p for name, p in wrapped.named_parameters() if p.requires_grad}
        yield wrapped, nn.ParameterDict(trained)
    finally:
        wrapped.unload()
