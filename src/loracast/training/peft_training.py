"""Train LoRAs by gradient descent with PEFT: the references for LoRAs that are cast.

The folder of such a LoRA holds PEFT's own files and `loracast.json`, which is written last.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from loracast.lora.target import Layers, target_from_config
from loracast.scoring.episodes import Episode, pack
from loracast.scoring.likelihood import score_answers
from loracast.training.loop import OnMetrics, TrainConfig, resumable_settings, train
from loracast.training.runtime import Workers

ABOUT = "loracast.json"  # file beside PEFT's own: what the LoRA was trained on and how


@dataclass(frozen=True)
class PeftConfig:
    """Shape of the LoRA."""

    kinds: tuple[str, ...] = ("q_proj", "v_proj")
    """Module kinds that receive a LoRA."""
    layers: Layers = None
    """Layers that receive a LoRA; by default all."""
    rank: int = 8
    """Rank of the LoRA."""
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
    on_metrics: OnMetrics = lambda figures: None,
) -> bool:
    """Train one LoRA, or resume. Returns whether it is finished.

    Args:
        episodes: number of a batch -> its rows; always the same for the same number.
        about: what is trained on; it is recorded, and a folder with other values is refused (TrainingError).
        budget_s: stop after this many seconds; the same call resumes there.
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
                f"{folder} holds a LoRA with other settings ({', '.join(differing)}); give another --out, or remove it"
            )
        return True
    fingerprint = base.fingerprint  # taken before PEFT changes the modules
    config = training if budget_s is None else dataclasses.replace(training, budget_s=budget_s)
    with _with_lora(base, lora, training.seed) as (wrapped, factors):

        def objective(number: int) -> tuple[Tensor, dict[str, float]]:
            batch = pack(episodes(number), base.pad_id).to(base.device)
            with config.autocast(base.device):
                scores = score_answers(
                    base.model, LoRABatch(1, {}, {}), batch, passes=config.passes
                )  # PEFT adds the LoRA
            figures = {"exact": scores.exact, "token_accuracy": scores.token_accuracy, "tokens": batch.n_tokens}
            return scores.loss, figures

        last = train(
            factors, objective, config, folder,
            save_model=lambda out: wrapped.save_pretrained(str(out)), settings=about, on_metrics=on_metrics,
        )  # fmt: skip
    if last.get("step") != config.steps:
        return False
    done = {"made_for": fingerprint.to_dict(), "command": command, "settings": settings, "last": last}
    write_atomically(folder / ABOUT, json.dumps(done, indent=1).encode())
    for state in folder.glob("state*"):  # a finished run is never resumed
        shutil.rmtree(state) if state.is_dir() else state.unlink()
    return True


def read_about(folder: Path, base: Fingerprint, command: str) -> dict[str, Any]:
    """Read what the LoRA in a folder was trained on and how, and check it against a base.

    Raises AdapterError, which names the `command` that trains such a LoRA, if there is none or it is not finished.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        made_for = Fingerprint(**about["made_for"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder} holds no LoRA whose training is finished (`{command}` trains or resumes it): {error}"
        ) from error
    check(made_for, base, f"the LoRA in {folder}")
    return about


@contextmanager
def _with_lora(base: Base, lora: PeftConfig, seed: int) -> Iterator[tuple[Any, nn.Module]]:
    """Wrap the base with PEFT, yield PEFT's model and a module of its factors, and unwrap the base afterwards."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("training LoRAs needs PEFT: pip install 'loracast[train]'") from error
    names = list(target_from_config(base.model.config, lora.kinds, lora.layers).names)
    torch.manual_seed(seed)
    alpha: Any = lora.rank * lora.scale  # PEFT accepts any number
    options = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")
    wrapped = get_peft_model(base.model, options)
    try:
        trained = {name.replace(".", "/"): p for name, p in wrapped.named_parameters() if p.requires_grad}
        yield wrapped, nn.ParameterDict(trained)
    finally:
        wrapped.unload()
