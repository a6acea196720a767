"""Train Text-to-LoRA (arXiv 2506.06105, section 3.2): a description's LoRA makes the base solve the task's examples.

Or by reconstruction (section 3.1, `reconstruction.py`). Two terms join the answers' cross-entropy: generated numbers
stay small, and null conditions (gibberish, random vectors) yield hardly any LoRA, which makes descriptions matter:
without it training partly learns one LoRA for all tasks.
"""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack, get_args

import torch
from torch import Tensor, nn

from loracast.base.embedded import DEFAULT_ENCODER
from loracast.base.load import Base
from loracast.base.scoring import pack, score_answers
from loracast.errors import ConfigError
from loracast.files import file_sha256
from loracast.hypernets.attention_delta import AttentionDeltaToLoRA, AttentionDeltaToLoRAConfig
from loracast.hypernets.descriptions import DescriptionHypernetwork
from loracast.hypernets.encoders import TextEncoder, load_text_encoder
from loracast.hypernets.store import with_config
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lab.data.tasks import Task
from loracast.lab.training.document_start import fit_position_probes
from loracast.lab.training.loop import TrainConfig, Workers
from loracast.lab.training.oracle import (
    Match,
    library_sha256,
    matching,
    read_library,
    read_oracle,
    relative_square_error,
    tasks_with_oracles,
)
from loracast.lab.training.recipe import (
    Reporting,
    check_not_given,
    check_values,
    keys_of,
    read_recipe_as,
    start_from,
    train_hypernet,
)
from loracast.lab.training.task_source import DrawnTask, TaskDataConfig, TaskSource
from loracast.lora.algebra import LoRABatch
from loracast.lora.target import Layers, target_from_config

N_GIBBERISH = 256  # strings without meaning, drawn once


@dataclass(frozen=True)
class TextRecipe:
    """One training run, as the tables `[hypernetwork]`, `[objective]`, `[data]` and `[training]` of a TOML file."""

    kinds: tuple[str, ...] = ("q_proj", "v_proj")
    """Module kinds that receive a LoRA."""
    layers: Layers = None
    """Layers that receive a LoRA; by default all."""
    encoder: str = DEFAULT_ENCODER
    """The text encoder."""
    hypernetwork: Mapping[str, Any] = field(default_factory=dict)
    """Options of TextToLoRAConfig, or of AttentionDeltaToLoRAConfig with the variant `attention_delta`."""
    l1_weight: float = 1e-3
    """Weight of the L2 penalty on the generated factors: their mean square (published: 1e-3)."""
    null_condition_weight: float = 0.1
    """Weight of the size of the deltas of null conditions, relative to that of descriptions."""
    encoder_lora_is_trained: bool = False
    """Whether the encoder LoRA of the variant `attention_delta` is trained, with a gradient through the encoder."""
    task_bank_only: bool = False
    """Whether only the task bank of the variant `attention_delta` is trained."""
    match: Match = "product"
    """What must match between a LoRA and the oracle in reconstruction."""
    data: TaskDataConfig = field(default_factory=TaskDataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    given: frozenset[str] = frozenset()
    """Keys that the table `[hypernetwork]` has; `--init-from` refuses those that the checkpoint fixes."""

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise ConfigError(f"unknown match {self.match!r}; one of {', '.join(get_args(Match))}")
        if min(self.l1_weight, self.null_condition_weight) < 0:
            raise ConfigError("l1_weight and null_condition_weight must not be negative")


_ATTENTION_DELTA = "attention_delta"
_DERIVED = {"modules", "d_text", "d_state", "n_seen", "bank_sizes"}
"""Keys of the configs that follow from the base and the data."""
# Keys of the table [objective].
_BY_EXAMPLES = ("l1_weight", "null_condition_weight", "encoder_lora_is_trained", "task_bank_only")
_BY_ORACLES = ("match",)


def read_text_recipe(path: Path | None, overrides: Sequence[str] = ()) -> TextRecipe:
    """Read a recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables`."""
    return read_recipe_as(
        TextRecipe,
        path,
        overrides,
        hypernetwork=(keys_of(TextToLoRAConfig) | keys_of(AttentionDeltaToLoRAConfig)) - _DERIVED,
        fields=("kinds", "layers", "encoder"), objective=(*_BY_EXAMPLES, *_BY_ORACLES),
    )  # fmt: skip


def gibberish(rng: random.Random, n: int) -> list[str]:
    """Draw meaningless strings: random letters in the shape of a sentence."""

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))

    return [" ".join(word() for _ in range(rng.randint(3, 14))) for _ in range(n)]


def build_text_hypernet(base: Base, recipe: TextRecipe) -> DescriptionHypernetwork:
    """A fresh hypernetwork for a base. Raises ConfigError for options that the variant does not have."""
    torch.manual_seed(recipe.training.seed)
    modules = target_from_config(base.model.config, recipe.kinds, recipe.layers).rows
    options = dict(recipe.hypernetwork)
    if options.get("variant") != _ATTENTION_DELTA:
        _check_options(options, TextToLoRAConfig)
        encoder = load_text_encoder(recipe.encoder, base)
        return TextToLoRA(TextToLoRAConfig(d_text=encoder.d_text, modules=modules, encoder=encoder.name, **options))
    if "encoder" in recipe.given:
        raise ConfigError(
            f"the variant {_ATTENTION_DELTA!r} reads descriptions with the base; leave hypernetwork.encoder out"
        )
    del options["variant"]
    _check_options(options, AttentionDeltaToLoRAConfig)
    d_state = base.model.config.get_text_config().hidden_size
    return AttentionDeltaToLoRA(AttentionDeltaToLoRAConfig(d_state=d_state, modules=modules, **options))


def _check_options(options: Mapping[str, Any], config: type) -> None:
    if unknown := sorted(options.keys() - keys_of(config)):
        raise ConfigError(f"this variant has no {', '.join(f'hypernetwork.{name}' for name in unknown)}")
    check_values(config, options)


def train_text(
    base: Base,
    recipe: TextRecipe,
    tasks: Sequence[Task],
    out_dir: Path,
    *,
    oracles: Path | None = None,
    init_from: Path | None = None,
    shared_from: Path | None = None,
    workers: Workers | None = None,
    **reporting: Unpack[Reporting],
) -> dict[str, float]:
    """Train a hypernetwork for `base` on tasks that are not held out, or resume the run in `out_dir`.

    Args:
        oracles: library of `train_oracles`: learn by reconstruction of its LoRAs instead of the tasks' examples.
        init_from: hypernetwork that a fresh run starts from; the recipe's `[hypernetwork]` may only have the keys that
            the hypernetwork lists as `changeable`.
        shared_from: LoRA trained on all tasks (`train_multitask`), from which a fresh run's shared factors start.

    Returns the last metrics, as `train_hypernet`.
    """
    workers = workers or Workers.join(base.device.type)
    by_examples = oracles is None
    used = tasks if oracles is None else tasks_with_oracles(tasks, oracles)
    source = TaskSource(recipe.data, used, base.chat, is_specified=by_examples)
    source.check_lengths()
    hypernet = _start_from(init_from, recipe, base) if init_from is not None else build_text_hypernet(base, recipe)
    hypernet.select_trained(encoder_lora=recipe.encoder_lora_is_trained, task_bank_only=recipe.task_bank_only)
    encoder = hypernet.text_encoder(base)
    if shared_from is not None:
        hypernet.start_shared_from(read_oracle(shared_from, base.fingerprint))
    hypernet.to(workers.device)
    with torch.no_grad():
        conditions = encoder(source.descriptions).to(workers.device)
    if init_from is None and isinstance(hypernet, AttentionDeltaToLoRA):
        lora = hypernet.encoder_lora_batch()
        hypernet.set_position_probes(fit_position_probes(base, lora, hypernet.probed_modules, source))
    torch.manual_seed(recipe.training.seed)
    hypernet.start_training(conditions, source.n_descriptions, is_fresh=init_from is None)
    hypernet.train()
    if oracles is None:
        reader = encoder if recipe.encoder_lora_is_trained else CachedEncoder(encoder, source.descriptions, conditions)
        of_step = _by_examples(base, recipe, hypernet, source, reader)
    else:
        library = read_library(source.tasks, oracles, base.fingerprint, hypernet.config, recipe.match)
        of_step = _by_oracles(hypernet, source, library.to(workers.device), recipe.match, encoder)

    def objective(number: int) -> tuple[Tensor, dict[str, float]]:
        return of_step(number, source.draw(number))

    @torch.no_grad()
    def remember_seen() -> None:
        hypernet.remember_seen(encoder(source.descriptions).to(workers.device))

    about = {
        "tasks": [task.name for task in source.tasks],
        "tasks_sha256": source.sha256,
        "objective": {name: getattr(recipe, name) for name in (_BY_EXAMPLES if by_examples else _BY_ORACLES)},
        "data": dataclasses.asdict(recipe.data),
    }
    if shared_from is not None:
        about["shared_from_sha256"] = file_sha256(shared_from / "adapter_model.safetensors")
    if oracles is not None:
        about["oracles_sha256"] = library_sha256(source.tasks, oracles)
    return train_hypernet(
        hypernet, objective, recipe.training, out_dir,
        base=base, init_from=init_from, about=about, workers=workers, **reporting,
        finish=remember_seen if recipe.encoder_lora_is_trained else None,
    )  # fmt: skip


def _start_from(folder: Path, recipe: TextRecipe, base: Base) -> DescriptionHypernetwork:
    """The hypernetwork that a fresh run starts from, with the changes that the recipe makes to it."""
    given = recipe.given | recipe.hypernetwork.keys()
    hypernet = start_from(folder, DescriptionHypernetwork, base)
    changed = given & hypernet.changeable
    check_not_given(given - changed)
    changes = {name: recipe.hypernetwork[name] for name in changed}
    if changes.get("task_bank_rank") == 0:  # the bank goes, since another encoder LoRA would not find its tasks
        changes["bank_sizes"] = ()
    return with_config(hypernet, changes) if changes else hypernet


class CachedEncoder:
    """A text encoder that keeps the conditions of some texts."""

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], conditions: Tensor):
        self.name, self.d_text, self._encoder = encoder.name, encoder.d_text, encoder
        self._conditions, self._row_of = conditions, {text: i for i, text in enumerate(texts)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in texts if text not in self._row_of]
        read = iter(self._encoder(new)) if new else iter(())
        return torch.stack(
            [self._conditions[self._row_of[text]] if text in self._row_of else next(read) for text in texts]
        )

    def fits(self, text: str) -> bool:
        return self._encoder.fits(text)


OfStep = Callable[[int, Sequence[DrawnTask]], tuple[Tensor, dict[str, float]]]
"""(number of the step, drawn tasks) -> loss, and figures to log."""


def _by_examples(
    base: Base,
    recipe: TextRecipe,
    hypernet: DescriptionHypernetwork,
    source: TaskSource,
    encoder: TextEncoder,
) -> OfStep:
    """The objective in which the base does the tasks' examples, each with the LoRA of its task."""
    nonsense = gibberish(random.Random(recipe.data.seed), N_GIBBERISH)
    device = base.device

    def of_step(number: int, drawn: Sequence[DrawnTask]) -> tuple[Tensor, dict[str, float]]:
        episodes = source.episodes(drawn)
        batch = pack(episodes, base.pad_id).to(device)
        n = len(episodes)
        read = [one.within(encoder.fits).text for one in drawn]
        rng = random.Random(f"{recipe.data.seed}/calm/{number}")
        conditions = encoder(read).to(device)
        if recipe.null_condition_weight > 0:
            with torch.no_grad():
                meaningless = encoder(rng.sample(nonsense, (n + 1) // 2)).to(device)
            free = hypernet.meaningless(n // 2, torch.Generator().manual_seed(rng.randrange(2**31)))
            conditions = torch.cat([conditions, meaningless, hypernet.constant().to(free), free])
        with recipe.training.autocast(device):
            both = hypernet(conditions)
            loras = both.take(range(n))
            scores = score_answers(base.model, loras, batch, passes=recipe.training.passes)
        of_descriptions, of_null = (squares := both.squared_norms())[:n], squares[n:]
        # A LoRA that is still near zero is no unit: at least 1.
        null_condition = of_null.sum() / max(1, len(of_null)) / of_descriptions.mean().detach().clamp_min(1.0)
        squares_of = [a.float().square().mean() + b.float().square().mean() for a, b in loras.factors.values()]
        size = torch.stack(squares_of).mean()
        loss = scores.loss + recipe.l1_weight * size + recipe.null_condition_weight * null_condition
        return loss, {
            "answer_loss": scores.loss.item(), "exact": scores.exact, "token_accuracy": scores.token_accuracy,
            "delta_norm": of_descriptions.mean().sqrt().item(), "null_condition": null_condition.item(),
            "questions": batch.n_questions, "tokens": batch.n_tokens,
        }  # fmt: skip

    return of_step


def _by_oracles(
    hypernet: nn.Module, source: TaskSource, library: LoRABatch, match: Match, encoder: TextEncoder
) -> OfStep:
    """The objective in which the LoRAs of descriptions match their tasks' oracles; the base is not run."""
    row_of = {task.name: i for i, task in enumerate(source.tasks)}
    loss_of = matching(library, match)
    device = next(iter(library.factors.values())).a.device

    def of_step(number: int, drawn: Sequence[DrawnTask]) -> tuple[Tensor, dict[str, float]]:
        rows = [row_of[one.task.name] for one in drawn]
        made = hypernet(encoder([one.text for one in drawn]).to(device))
        with torch.no_grad():
            error = relative_square_error(made, library.take(rows)).clamp_min(0).mean().sqrt().item()
        return loss_of(made, rows), {"relative_error": error, "tasks": len(rows)}

    return of_step
