"""Train LoRAs by gradient descent with PEFT: oracles, the multi-task LoRA, and Text-to-LoRA by reconstruction.

The folder of such a LoRA holds PEFT's own files and `loracast.json`, which is written last.

Train oracles and the multi-task LoRA with PEFT: the references for LoRAs that are cast from descriptions.

An **oracle** is trained on one task's examples: what a description could at best be worth. The **multi-task LoRA** is
one LoRA for all training tasks, trained on the same rows in the same steps as Text-to-LoRA: what remains of it without
descriptions. Its second form has the description in every prompt.

Text-to-LoRA by reconstruction (arXiv 2506.06105, section 3.1): a description becomes its task's trained LoRA.

The base is not run: a step is a few matmuls. Many pairs of factors have the same product, so a loss compares either the
products, through small Gram matrices, or the factors as trained, each number z-scored over the library (as published).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from loracast.base.fingerprint import Fingerprint, check
from loracast.base.load import Base
from loracast.base.scoring import Episode, Question, common_prefix, pack, score_answers
from loracast.errors import AdapterError, ConfigError, TrainingError
from loracast.files import file_sha256, write_atomically
from loracast.hypernets.attention_delta import AttentionDeltaToLoRAConfig
from loracast.hypernets.text_to_lora import TextToLoRAConfig
from loracast.lab.data.tasks import Task
from loracast.lab.training.loop import TrainConfig, Workers, resumable_settings, train
from loracast.lab.training.recipe import Reporting, read_lora_recipe
from loracast.lab.training.task_source import TaskDataConfig, TaskSource
from loracast.library.manifest import check_name
from loracast.lora.algebra import LoRA, LoRABatch, stack
from loracast.lora.peft_format import read_peft
from loracast.lora.target import Layers, target_from_config

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
    budget_s: float | None = None,
    **reporting: Unpack[Reporting],
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
            save_model=lambda out: wrapped.save_pretrained(str(out)), settings=about,
            on_metrics=reporting.get("on_metrics", lambda metrics: None),
        )  # fmt: skip
    if last.get("step") != config.steps:
        return False
    command = reporting.get("command", "")
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


_MADE_BY = "loracast train oracle"
_TOKENS_IN_A_ROW = 384  # of questions; the cost of attention grows with the square of a row's length

OnTaskMetrics = Callable[[str, dict[str, float]], None]
"""Receives (task, its latest metrics)."""


@dataclass(frozen=True)
class OracleRecipe:
    """One training run, as the tables `[lora]`, `[data]` and `[training]` of a TOML file."""

    lora: PeftConfig = field(default_factory=PeftConfig)
    data: TaskDataConfig = field(
        default_factory=lambda: TaskDataConfig(tasks_per_step=1, examples_per_task=64, tokens_per_task=2048)
    )
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, lr=1e-3, warmup_steps=10))


MULTITASK = OracleRecipe(data=TaskDataConfig(), training=TrainConfig())  # with the defaults of Text-to-LoRA


def read_oracle_recipe(
    path: Path | None, overrides: Sequence[str] = (), default: OracleRecipe = OracleRecipe()
) -> OracleRecipe:
    """Read a recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables`."""
    return read_lora_recipe(default, path, overrides)


def train_oracles(
    base: Base,
    recipe: OracleRecipe,
    tasks: Sequence[Task],
    oracles: Path,
    *,
    command: str = "",
    budget_s: float | None = None,
    on_metrics: OnTaskMetrics = lambda task, figures: None,
) -> list[str]:
    """Train an oracle for each task, one after the other, each in a folder of its name; finished oracles are skipped.

    It stops after `budget_s` seconds, also within a task; the same call resumes there. Returns the names of the tasks
    whose oracles are finished. Raises TrainingError if a task cannot be trained on (then nothing is done), or its
    folder has an oracle with other settings.
    """
    if recipe.data.tasks_per_step != 1:
        raise TrainingError("an oracle learns one task; leave data.tasks_per_step at 1")
    sources = _sources(base, recipe, tasks)
    ends_s = None if budget_s is None else time.monotonic() + budget_s
    for name, source in sources.items():
        left_s = None if ends_s is None else ends_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            break
        reporting: Reporting = {"command": command, "on_metrics": partial(on_metrics, name)}
        if not _train(base, recipe, source, oracles / name, left_s, **reporting):
            break  # stopped by a signal or the budget
    return [name for name in sources if (oracles / name / ABOUT).is_file()]


def _sources(base: Base, recipe: OracleRecipe, tasks: Sequence[Task]) -> dict[str, TaskSource]:
    """The data of each task, by name. Raises TrainingError for all tasks that cannot be trained on, in one message."""
    sources: dict[str, TaskSource] = {}
    problems = []
    for task in tasks:
        try:
            check_name(task.name)
            sources[task.name] = TaskSource(recipe.data, [task], base.chat, heldout_too=True)
            sources[task.name].check_lengths()
        except TrainingError as error:
            problems.append(f"{task.name}: {error}" if task.train else f"{task.name}: no example to train on")
    if problems:
        raise TrainingError("; ".join(problems))
    return sources


def train_multitask(
    base: Base,
    recipe: OracleRecipe,
    tasks: Sequence[Task],
    out_dir: Path,
    *,
    described: bool = False,
    command: str = "",
    budget_s: float | None = None,
    on_metrics: OnTaskMetrics = lambda task, figures: None,
) -> bool:
    """Train one LoRA on all tasks that are not held out, or resume. Returns whether it is finished.

    `MULTITASK` is the recipe with the defaults of Text-to-LoRA; the class's own defaults are an oracle's. `described`
    puts the description that a step draws for a task into the prompts of its examples.
    """
    source = TaskSource(recipe.data, tasks, base.chat, described=described, is_specified=described)
    source.check_lengths()
    reporting: Reporting = {"command": command, "on_metrics": partial(on_metrics, out_dir.name)}
    return _train(base, recipe, source, out_dir, budget_s, is_multitask=True, **reporting)


def read_oracle(folder: Path, base: Fingerprint) -> LoRA:
    """Read a LoRA that `train_oracles` or `train_multitask` made for a base; AdapterError if none is finished."""
    read_about(folder, base, _MADE_BY)
    return LoRA(read_peft(folder))


def read_multitask(folder: Path, base: Fingerprint, described: bool) -> LoRA:
    """Read a multi-task LoRA. Raises AdapterError as `read_oracle`, or if it is an oracle, or `described` differs."""
    settings = read_about(folder, base, _MADE_BY)["settings"]
    if settings["described"] != described or not settings["is_multitask"]:
        how = "with" if settings["described"] else "without"
        what = f"a multi-task LoRA {how} descriptions" if settings["is_multitask"] else "the LoRA of a single task"
        wanted = "`loracast train multitask --described`" if described else "`loracast train multitask`"
        raise AdapterError(f"{folder} holds {what}; give what {wanted} makes")
    return LoRA(read_peft(folder))


def oracles_in(oracles: Path) -> tuple[str, ...]:
    """The names of the tasks whose oracles are finished."""
    return tuple(sorted(path.parent.name for path in oracles.glob(f"*/{ABOUT}")))


def _train(
    base: Base,
    recipe: OracleRecipe,
    source: TaskSource,
    folder: Path,
    budget_s: float | None,
    is_multitask: bool = False,
    **reporting: Unpack[Reporting],
) -> bool:
    about = {
        "data": dataclasses.asdict(source.config),
        "is_multitask": is_multitask,
        "described": source.described,
        "heldout": [task.name for task in source.tasks if task.is_heldout],
        "tasks": [task.name for task in source.tasks],
        "tasks_sha256": source.sha256,
    }
    return train_lora(
        base, recipe.lora, recipe.training, lambda number: _rows(source.episodes(source.draw(number))), folder,
        about=about, budget_s=budget_s, **reporting,
    )  # fmt: skip


def _rows(episodes: Sequence[Episode]) -> list[Episode]:
    """The same questions in shorter rows, since all of them have the same LoRA.

    What the prompts of an episode begin with, such as a description and examples, stands once in a row.
    """
    rows = []
    for episode in episodes:
        n_shared = common_prefix([question.prompt for question in episode.questions])
        row: list[Question] = []
        n_tokens = 0
        for question in episode.questions:
            n = len(question.prompt) - n_shared + len(question.answer)
            if row and n_tokens + n > _TOKENS_IN_A_ROW:
                rows.append(dataclasses.replace(episode, questions=tuple(row)))
                row, n_tokens = [], 0
            row.append(question)
            n_tokens += n
        rows.append(dataclasses.replace(episode, questions=tuple(row)))
    return rows


Match = Literal["product", "factors"]  # what must match between a generated LoRA and the oracle


def tasks_with_oracles(tasks: Sequence[Task], oracles: Path) -> list[Task]:
    """The training tasks whose oracles are in a library. Raises ConfigError if there are none."""
    finished = set(oracles_in(oracles))
    found = [task for task in tasks if task.name in finished and not task.is_heldout]
    if not found:
        raise ConfigError(f"{oracles} has no oracle of a training task; `loracast train oracle` makes them")
    return found


def read_library(
    tasks: Sequence[Task],
    oracles: Path,
    base: Fingerprint,
    config: TextToLoRAConfig | AttentionDeltaToLoRAConfig,
    match: Match,
) -> LoRABatch:
    """Read the oracles of some tasks: A [tasks, r, in] and B [tasks, out, r] of every module.

    Raises ConfigError if they have other modules than the hypernetwork, or a rank that it cannot reach.
    """
    loras, rank = [read_oracle(oracles / task.name, base) for task in tasks], max(config.ranks.values())
    for task, lora in zip(tasks, loras, strict=True):
        if set(lora.names) != set(config.target.names):
            raise ConfigError(f"the oracle of {task.name} has other modules than the hypernetwork: make both equal")
        if lora.rank > rank or (match == "factors" and lora.rank != rank):
            raise ConfigError(
                f"the oracle of {task.name} has rank {lora.rank}, the hypernetwork {rank}: make both equal"
            )
    if match == "factors" and len(loras) < 2:
        raise ConfigError("factors are compared in units of how they differ between tasks; give at least two oracles")
    batch = stack([lora.to(dtype=torch.float32) for lora in loras])
    return LoRABatch(len(loras), {name: batch.factors[name] for name in config.target.names}, {})


def library_sha256(tasks: Sequence[Task], oracles: Path) -> str:
    """Hash of the oracles of some tasks; a resumed run must have the same."""
    parts = [file_sha256(oracles / task.name / "adapter_model.safetensors") for task in tasks]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def relative_square_error(made: LoRABatch, wanted: LoRABatch) -> Tensor:
    """|made - wanted|^2 / |wanted|^2 of each row's products, over all modules [n]."""
    energy = wanted.squared_norms()
    return (made.squared_norms() - 2 * made.inner(wanted) + energy) / energy.clamp_min(1e-12)


def matching(library: LoRABatch, match: Match) -> Callable[[LoRABatch, Sequence[int]], Tensor]:
    """The loss of generated LoRAs against rows of a library: (made, rows) -> scalar."""
    if match == "product":
        return lambda made, rows: relative_square_error(made, library.take(rows)).mean()
    deviations = {name: (_deviation(a), _deviation(b)) for name, (a, b) in library.factors.items()}

    def loss(made: LoRABatch, rows: Sequence[int]) -> Tensor:
        wanted = library.take(rows).factors
        # Mean absolute difference of the z-scored numbers; their means over the library cancel.
        apart = [
            ((one - other) / deviation).abs().mean()
            for name, pair in made.factors.items()
            for deviation, one, other in zip(deviations[name], pair, wanted[name], strict=True)
        ]
        return torch.stack(apart).mean()

    return loss


def _deviation(factor: Tensor) -> Tensor:
    """Deviation of each number of a factor [tasks, ...] over the tasks, with a floor for numbers that hardly differ."""
    deviation = factor.std(0, correction=0)
    return deviation + 0.1 * deviation.mean() + 1e-8
