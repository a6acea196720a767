"""Train Text-to-LoRA (arXiv 2506.06105, section 3.2): a description's LoRA makes the base solve the task's examples.

Two terms join the answers' cross-entropy: generated numbers stay small, and null conditions (gibberish, random vectors)
yield hardly any LoRA, which makes descriptions matter: without it training partly learns one LoRA for all tasks.

Or by reconstruction (section 3.1): a description becomes its task's trained LoRA. The base is not run: a step is a few
matmuls. Many pairs of factors have the same product, so the loss compares products, through small Gram matrices (the
published one compares the factors, each number z-scored over the library).
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracast.base.embedded import DEFAULT_ENCODER
from loracast.base.fingerprint import Fingerprint
from loracast.base.forward import capture_inputs, pad_right
from loracast.base.load import Base
from loracast.errors import ConfigError
from loracast.files import file_sha256
from loracast.hypernets.attention_delta import AttentionDeltaToLoRA, AttentionDeltaToLoRAConfig
from loracast.hypernets.attention_delta_encoder import POSITIONS, tokens_around_input
from loracast.hypernets.descriptions import DescriptionHypernetwork
from loracast.hypernets.encoders import TextEncoder, load_text_encoder
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lab.data.tasks import Task
from loracast.lab.training import task_start
from loracast.lab.training.checkpoint import with_config
from loracast.lab.training.loop import Objective
from loracast.lab.training.loras import oracles_in, read_oracle
from loracast.lab.training.recipe import (
    HypernetRecipe,
    Layers,
    check_values,
    keys_of,
    start_from,
    target_at,
    train_hypernet,
)
from loracast.lab.training.scoring import pack, score_answers
from loracast.lab.training.task_source import TaskDataConfig, TaskSource
from loracast.lora.algebra import LoRABatch, inject, stack

N_GIBBERISH = 256  # strings without meaning, drawn once


_ATTENTION_DELTA = "attention_delta"
_DERIVED = {"modules", "d_text", "d_state", "n_seen", "bank_sizes"}
"""Keys of the configs that follow from the base and the data."""


@dataclass(frozen=True, kw_only=True)
class TextRecipe(HypernetRecipe):
    """One training run of Text-to-LoRA.

    Its options are those of TextToLoRAConfig, or of AttentionDeltaToLoRAConfig with the variant `attention_delta`.
    """

    OPTIONS = (keys_of(TextToLoRAConfig) | keys_of(AttentionDeltaToLoRAConfig)) - _DERIVED
    OBJECTIVE = ("l1_weight", "null_condition_weight", "encoder_lora_is_trained", "task_bank_only")
    kinds: tuple[str, ...] = ("q_proj", "v_proj")
    """Module kinds that receive a LoRA."""
    layers: Layers = None
    """Layers that receive a LoRA; by default all."""
    encoder: str = DEFAULT_ENCODER
    """The text encoder."""
    l1_weight: float = 1e-3
    """Weight of the L2 penalty on the generated factors: their mean square (published: 1e-3)."""
    null_condition_weight: float = 0.1
    """Weight of the size of the deltas of null conditions, relative to that of descriptions."""
    encoder_lora_is_trained: bool = False
    """Whether the encoder LoRA of the variant `attention_delta` is trained, with a gradient through the encoder."""
    task_bank_only: bool = False
    """Whether only the task bank of the variant `attention_delta` is trained."""
    data: TaskDataConfig = field(default_factory=TaskDataConfig)

    def __post_init__(self) -> None:
        if min(self.l1_weight, self.null_condition_weight) < 0:
            raise ConfigError("l1_weight and null_condition_weight must not be negative")


def gibberish(rng: random.Random, n: int) -> list[str]:
    """Draw meaningless strings: random letters in the shape of a sentence."""

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))

    return [" ".join(word() for _ in range(rng.randint(3, 14))) for _ in range(n)]


def build_text_hypernet(base: Base, recipe: TextRecipe) -> DescriptionHypernetwork:
    """A fresh hypernetwork for a base. Raises ConfigError for options that the variant does not have."""
    torch.manual_seed(recipe.training.seed)
    modules = target_at(base.model.config, recipe.kinds, recipe.layers).rows
    options = dict(recipe.hypernetwork)
    is_delta = options.get("variant") == _ATTENTION_DELTA
    if is_delta:
        del options["variant"]
    config: Any = AttentionDeltaToLoRAConfig if is_delta else TextToLoRAConfig
    unknown = sorted(options.keys() - keys_of(config)) + ["encoder"] * (is_delta and "encoder" in recipe.given)
    if unknown:
        names = ", ".join(f"hypernetwork.{name}" for name in unknown)
        raise ConfigError(f"this variant has no {names}: leave it out of the recipe")
    check_values(config, options)
    if is_delta:
        d_state = base.model.config.get_text_config().hidden_size
        return AttentionDeltaToLoRA(config(d_state=d_state, modules=modules, **options))
    encoder = load_text_encoder(recipe.encoder, base)
    return TextToLoRA(config(d_text=encoder.d_text, modules=modules, encoder=encoder.name, **options))


def train_text(
    base: Base,
    recipe: TextRecipe,
    tasks: Sequence[Task],
    out: Path,
    *,
    oracles: Path | None = None,
    init_from: Path | None = None,
    shared_from: Path | None = None,
    **record: Any,
) -> dict[str, float]:
    """Train a hypernetwork for `base` on tasks that are not held out, or resume the run in `out`.

    Args:
        oracles: library of `train_oracles`: learn by reconstruction of its LoRAs instead of the tasks' examples.
        init_from: hypernetwork that a fresh run starts from; the recipe's `[hypernetwork]` may only have keys that
            may be changed (`task_start.changeable`).
        shared_from: LoRA trained on all tasks (`train_multitask`), from which a fresh run's shared factors start.
        record: `command` and `on_metrics` of `train_hypernet`.

    Returns the last metrics, as `train_hypernet`.
    """
    if oracles is not None:
        finished = oracles_in(oracles)
        tasks = [task for task in tasks if task.name in finished and not task.is_heldout]
        if not tasks:
            raise ConfigError(f"{oracles} has no oracle of a training task; `loracast train oracle` makes them")
    source = TaskSource(recipe.data, tasks, base.chat, is_specified=oracles is None)
    hypernet = _start_from(init_from, recipe, base) if init_from is not None else build_text_hypernet(base, recipe)
    task_start.select_trained(
        hypernet, encoder_lora=recipe.encoder_lora_is_trained, task_bank_only=recipe.task_bank_only
    )
    encoder = hypernet.text_encoder(base)
    if shared_from is not None:
        task_start.start_shared_from(hypernet, read_oracle(shared_from, base.fingerprint))
    hypernet.to(base.device)
    with torch.no_grad():
        conditions = encoder(source.descriptions).to(base.device)
    if init_from is None and isinstance(hypernet, AttentionDeltaToLoRA):
        lora = hypernet.encoder_lora_batch()
        probes = fit_position_probes(base, lora, hypernet.in_layers(hypernet.config.kind), source)
        hypernet.where.data[:, : probes.shape[1]] = probes  # [modules, positions, in]
    torch.manual_seed(recipe.training.seed)
    task_start.start_training(hypernet, conditions, source.n_descriptions, is_fresh=init_from is None)
    hypernet.train()
    about = {**source.about, "objective": recipe.objective}
    if oracles is None:
        reader = encoder if recipe.encoder_lora_is_trained else CachedEncoder(encoder, source.descriptions, conditions)
        objective = _by_examples(base, recipe, hypernet, source, reader)
    else:
        library = read_library(source.tasks, oracles, base.fingerprint, hypernet.config)
        objective = _by_oracles(hypernet, source, library.to(base.device), encoder)
        parts = [file_sha256(oracles / task.name / "adapter_model.safetensors") for task in source.tasks]
        digest = hashlib.sha256("".join(parts).encode()).hexdigest()
        about |= {"objective": {"match": "product"}, "oracles_sha256": digest}

    @torch.no_grad()
    def remember_all() -> None:
        task_start.remember_seen(hypernet, encoder(source.descriptions).to(base.device))

    if shared_from is not None:
        about["shared_from_sha256"] = file_sha256(shared_from / "adapter_model.safetensors")
    finish = remember_all if recipe.encoder_lora_is_trained else None
    return train_hypernet(
        hypernet, objective, recipe.training, out, base=base, init_from=init_from, about=about, finish=finish, **record
    )


def _start_from(folder: Path, recipe: TextRecipe, base: Base) -> DescriptionHypernetwork:
    """The hypernetwork that a fresh run starts from, with the changes that the recipe makes to it."""
    hypernet = start_from(folder, DescriptionHypernetwork, base, recipe, task_start.changeable)
    changes = dict(recipe.hypernetwork)
    if changes.get("task_bank_rank") == 0:  # the bank goes, since another encoder LoRA would not find its tasks
        changes["bank_sizes"] = ()
    return with_config(hypernet, changes) if changes else hypernet


_N_PROBED = 256
_PROBED_AT_ONCE = 16
_PROBE_RIDGE = 1e-3  # relative to the mean square of an input
_ELSEWHERE = "elsewhere"


@torch.no_grad()
def fit_position_probes(base: Base, lora: LoRABatch, names: Sequence[str], source: TaskSource) -> Tensor:
    """Probes [modules, positions, in], each about 1 at its position (of `POSITIONS`) and 0 at the others.

    Weighted least squares on training examples; every position has the same weight. The base carries `lora` while it
    reads; `names` are those of the modules.
    """
    rows = _probed_examples(base, source)
    n_of = {position: max(1, sum(at.count(position) for _, at in rows)) for position in (*POSITIONS, _ELSEWHERE)}
    gram: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for start in range(0, len(rows), _PROBED_AT_ONCE):
        some = rows[start : start + _PROBED_AT_ONCE]
        ids, real = pad_right([row for row, _ in some], base.pad_id)
        at = [position for _, positions in some for position in positions]
        weights = torch.tensor([1 / n_of[position] for position in at], device=base.device)
        wanted = torch.tensor([[float(position == each) for position in at] for each in POSITIONS]).to(weights)
        with capture_inputs(base.model, names) as inputs, inject(base.model, lora):
            base.model.get_decoder()(input_ids=ids.to(base.device), use_cache=False)
        for name, x in inputs.items():
            x = x[real.to(x.device)].float()  # [tokens, in]
            weighted = x * weights[:, None]
            gram[name] = gram.get(name, 0) + weighted.T @ x
            moments[name] = moments.get(name, 0) + wanted @ weighted
    probes = []
    for name in names:
        ridge = _PROBE_RIDGE * gram[name].diagonal().mean() * torch.eye(len(gram[name]), device=gram[name].device)
        probes.append(torch.linalg.solve(gram[name] + ridge, moments[name].T).T)
    return torch.stack(probes)


def _probed_examples(base: Base, source: TaskSource) -> list[tuple[list[int], list[str]]]:
    """Token ids of training examples, and the position of each token."""
    rng = random.Random(0)
    n_before, n_after = tokens_around_input(base.chat)
    rows = []
    for _ in range(_N_PROBED):
        example = rng.choice(source.short_enough[rng.choice(source.tasks).name])
        prompt, answer = base.chat.prompt(example.input, ""), base.chat.reply(example.outputs[0])[:-1]
        n_input = len(prompt) - n_before - n_after
        positions = [_ELSEWHERE] * n_before + ["input"] * n_input + ["turn"] * (n_after - 1)
        rows.append(([*prompt, *answer], [*positions, "start", *["answer"] * len(answer)]))
    return rows


class CachedEncoder:
    """A text encoder that keeps the conditions of some texts."""

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], conditions: Tensor):
        self.name, self.d_text, self._encoder = encoder.name, encoder.d_text, encoder
        self._kept = dict(zip(texts, conditions, strict=True))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in texts if text not in self._kept]
        read = iter(self._encoder(new) if new else ())
        return torch.stack([self._kept[text] if text in self._kept else next(read) for text in texts])

    def fits(self, text: str) -> bool:
        return self._encoder.fits(text)


def _by_examples(
    base: Base, recipe: TextRecipe, hypernet: DescriptionHypernetwork, source: TaskSource, encoder: TextEncoder
) -> Objective:
    """The objective in which the base does the tasks' examples, each with the LoRA of its task."""
    nonsense = gibberish(random.Random(recipe.data.seed), N_GIBBERISH)
    device = base.device

    def objective(number: int) -> tuple[Tensor, dict[str, float]]:
        drawn = source.draw(number)
        episodes = source.episodes(drawn)
        batch = pack(episodes, base.pad_id).to(device)
        n = len(episodes)
        read = [one.within(encoder.fits).text for one in drawn]
        rng = random.Random(f"{recipe.data.seed}/calm/{number}")
        conditions = encoder(read).to(device)
        if recipe.null_condition_weight > 0:
            with torch.no_grad():
                meaningless = encoder(rng.sample(nonsense, (n + 1) // 2)).to(device)
            generator = torch.Generator().manual_seed(rng.randrange(2**31))
            nothing = task_start.nothing_described(hypernet, n // 2, generator).to(device)
            conditions = torch.cat([conditions, meaningless, nothing])
        with recipe.training.autocast(device):
            both = task_start.cast_described(hypernet, conditions)
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

    return objective


def read_library(
    tasks: Sequence[Task], oracles: Path, base: Fingerprint, config: TextToLoRAConfig | AttentionDeltaToLoRAConfig
) -> LoRABatch:
    """Read the oracles of some tasks: A [tasks, r, in] and B [tasks, out, r] of every module.

    Raises ConfigError if they have other modules than the hypernetwork, or a rank that it cannot reach.
    """
    loras, rank = [read_oracle(oracles / task.name, base) for task in tasks], max(config.ranks.values())
    for task, lora in zip(tasks, loras, strict=True):
        if set(lora.names) != set(config.target.names):
            raise ConfigError(f"the oracle of {task.name} has other modules than the hypernetwork: make both equal")
        if lora.rank > rank:
            raise ConfigError(
                f"the oracle of {task.name} has rank {lora.rank}, the hypernetwork {rank}: make both equal"
            )
    batch = stack([lora.to(dtype=torch.float32) for lora in loras])
    return LoRABatch(len(loras), {name: batch.factors[name] for name in config.target.names}, {})


def _by_oracles(
    hypernet: DescriptionHypernetwork, source: TaskSource, library: LoRABatch, encoder: TextEncoder
) -> Objective:
    """The objective in which descriptions give the products of their tasks' oracles; the base is not run."""
    row_of = {task.name: i for i, task in enumerate(source.tasks)}
    device = next(iter(library.factors.values())).a.device

    def objective(number: int) -> tuple[Tensor, dict[str, float]]:
        drawn = source.draw(number)
        wanted = library.take([row_of[one.task.name] for one in drawn])
        made = task_start.cast_described(hypernet, encoder([one.text for one in drawn]).to(device))
        errors = relative_square_error(made, wanted)
        figures = {"relative_error": errors.detach().clamp_min(0).mean().sqrt().item(), "tasks": len(drawn)}
        return errors.mean(), figures

    return objective


def relative_square_error(made: LoRABatch, wanted: LoRABatch) -> Tensor:
    """|made - wanted|^2 / |wanted|^2 of each row's products, over all modules [n]."""
    energy = wanted.squared_norms()
    return (made.squared_norms() - 2 * made.inner(wanted) + energy) / energy.clamp_min(1e-12)
