"""Train the document hypernetwork on another modality: an image's features become a LoRA of the text-only base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracast.base.load import Base
from loracast.data.labelled import Labelled
from loracast.encoders.features import Encoder, check_encoder
from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
from loracast.lora.target import Layers, target_from_config
from loracast.scoring.episodes import pack
from loracast.scoring.likelihood import score_answers
from loracast.training.loop import OnMetrics, TrainConfig
from loracast.training.modality_source import ModalityDataConfig, ModalitySource
from loracast.training.recipe import check_values, read_recipe_as, recorded
from loracast.training.run import start_from, train_hypernet
from loracast.training.runtime import Workers
from loracast.training.teacher import Distillation, Teacher

_EXAMPLES_FOR_UNITS = 256
_OPTIONS = {
    "width", "rank", "n_heads", "n_kv_heads", "head_dim", "n_decoder_blocks", "head_shared_rank", "static_rank",
    "static_modules_rank", "scale",
}  # fmt: skip


@dataclass(frozen=True)
class ModalityRecipe:
    """One training run, as the tables `[hypernetwork]`, `[objective]`, `[data]` and `[training]` of a TOML file."""

    kinds: tuple[str, ...] = ("down_proj",)
    """Module kinds that receive a LoRA."""
    layers: Layers = None
    """Layers that receive a LoRA; by default all."""
    hypernetwork: Mapping[str, Any] = field(default_factory=dict)
    """Options of DocToLoRAConfig."""
    kl_to_base_weight: float = 1.0
    """Weight of the divergence from the plain base on unrelated questions."""
    data: ModalityDataConfig = field(default_factory=ModalityDataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    given: frozenset[str] = frozenset()
    """Keys that the table `[hypernetwork]` has; with `--init-from` there must be none."""


def read_modality_recipe(path: Path | None, overrides: Sequence[str] = ()) -> ModalityRecipe:
    """Read a recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables`."""
    return read_recipe_as(
        ModalityRecipe, path, overrides, hypernetwork=_OPTIONS,
        fields=("kinds", "layers"), objective={"kl_to_base_weight"},
    )  # fmt: skip


def build_modality_hypernet(base: Base, recipe: ModalityRecipe, encoder: Encoder, source: ModalitySource) -> DocToLoRA:
    """A fresh hypernetwork for a base and an encoder, its input units measured on the data."""
    torch.manual_seed(recipe.training.seed)
    check_values(DocToLoRAConfig, recipe.hypernetwork)
    target = target_from_config(base.model.config, recipe.kinds, recipe.layers)
    config = DocToLoRAConfig.for_target(
        target, encoder.d_features,
        encoder=encoder.name, encoder_fingerprint=encoder.fingerprint, reader_layers=(0,), **recipe.hypernetwork,
    )  # fmt: skip
    hypernet = DocToLoRA(config)
    n = len(source.states)
    chosen = torch.linspace(0, n - 1, min(_EXAMPLES_FOR_UNITS, n)).long()
    hypernet.standardise(source.states[chosen].float().flatten(0, 1))
    return hypernet


def train_modality(
    base: Base,
    recipe: ModalityRecipe,
    labelled: Labelled,
    encoder: Encoder,
    out_dir: Path,
    *,
    init_from: Path | None = None,
    command: str = "",
    workers: Workers | None = None,
    on_encoded: Callable[[int, int], None] = lambda done, total: None,
    on_metrics: OnMetrics = lambda metrics: None,
) -> dict[str, float]:
    """Train a hypernetwork for `base` and `encoder`, or resume the run in `out_dir`. Returns the last metrics.

    Args:
        init_from: hypernetwork that a fresh run starts from; the recipe's `[hypernetwork]` must be empty.
        on_encoded: receives (done, total) while examples are encoded for the first time.
    """
    workers = workers or Workers.join(base.device.type)
    made = ModalitySource(recipe.data, labelled, encoder, base.chat, progress=on_encoded) if workers.is_first else None
    workers.any(False)  # the others wait for the features
    source = made or ModalitySource(recipe.data, labelled, encoder, base.chat)
    if init_from is not None:
        c = (hypernet := start_from(init_from, DocToLoRA, base, recipe.given)).config
        check_encoder(c.encoder, c.encoder_fingerprint, c.d_features, encoder)
    else:
        hypernet = build_modality_hypernet(base, recipe, encoder, source)
    hypernet.to(workers.device).train()
    distillation = Distillation(Teacher(base.model, base.pad_id), None)

    def objective(number: int) -> tuple[Tensor, dict[str, float]]:
        features, episodes = source.step(number)
        batch = pack(distillation.with_soft_targets(episodes), base.pad_id).to(workers.device)
        with recipe.training.autocast(workers.device):
            cast = hypernet(features.to(workers.device))
            scores = score_answers(base.model, cast.loras, batch, passes=recipe.training.passes)
        loss, kl = scores.loss, scores.kl_to_base
        figures = {"answer_loss": loss.item(), "exact": scores.exact, "token_accuracy": scores.token_accuracy}
        if kl is not None:
            loss = loss + recipe.kl_to_base_weight * kl
            figures["kl_to_base"] = kl.item()
        return loss, {**figures, "questions": batch.n_questions, "tokens": batch.n_tokens}

    about = {
        "data": recorded(recipe.data),
        "objective": {"kl_to_base_weight": recipe.kl_to_base_weight},
        "examples": labelled.fingerprint,
        "encoder": encoder.fingerprint,
    }
    return train_hypernet(
        hypernet, objective, recipe.training, out_dir,
        base=base, init_from=init_from, about=about, command=command, workers=workers, on_metrics=on_metrics,
    )  # fmt: skip
