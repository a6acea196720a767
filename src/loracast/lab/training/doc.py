"""Train Doc-to-LoRA from a recipe: documents become LoRAs with which the base answers questions without seeing them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors.torch import save
from torch import Tensor

from loracast.base.chat import encode_text
from loracast.base.load import Base
from loracast.base.scoring import AnswerScores, Batch, Episode, Passes, pack, score_answers
from loracast.errors import ConfigError
from loracast.hypernets.config import ModuleRow
from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig, MergedCast
from loracast.hypernets.encoders import HiddenStatesEncoder, read_in_groups
from loracast.lab.training.document_source import DataConfig, EpisodeSource
from loracast.lab.training.document_start import calibrate, fit_verdicts, memory_alone, set_memory_units
from loracast.lab.training.loop import TrainConfig, Workers
from loracast.lab.training.losses import Distillation, MemoryLosses, Teacher, retrieval_loss, sentence_gates, write_loss
from loracast.lab.training.recipe import (
    Reporting,
    check_values,
    keys_of,
    read_recipe_as,
    recorded,
    start_from,
    train_hypernet,
)
from loracast.lora.algebra import LoRA
from loracast.lora.target import Layers, target_from_config

CALIBRATION_ROWS = 12


@dataclass(frozen=True)
class DocRecipe:
    """One training run, as the tables `[hypernetwork]`, `[objective]`, `[data]` and `[training]` of a TOML file."""

    kinds: tuple[str, ...] = ("down_proj",)
    """Module kinds that receive a LoRA of each chunk; none for a memory alone."""
    layers: Layers = 0.2
    """Layers that receive a LoRA, by number or as shares of the base's depth (`lora.target.Layers`)."""
    hypernetwork: Mapping[str, Any] = field(default_factory=dict)
    """Options of DocToLoRAConfig other than the target. `d_values` may be "auto", as wide as the base, and
    `reader_layers` a share of the depth."""
    memory_layers: tuple[int | float, ...] = ()
    """Layers whose attention output (`o_proj`) holds an associative memory, by number or as shares of the depth."""
    static_kinds: tuple[str, ...] = ()
    """Module kinds, in the targeted layers, that receive a static LoRA: the same for every document."""
    encoder_kinds: tuple[str, ...] = ()
    """Module kinds that carry a trained LoRA while the base reads a document, up to the deepest block that is read."""
    calibration_questions: int = 3000
    """Questions on which a new memory's normalisation statistics are measured before training."""
    memory_loss_weight: float = 0.3
    """Weight of the memory losses: what to write, and retrieving it."""
    distillation_weight: float = 0.0
    """Share of the answers' loss that is context distillation: the divergence from a teacher that sees the document."""
    kl_to_base_weight: float = 1.0
    """Weight of the divergence from the plain base on unrelated questions."""
    l1_weight: float = 0.0
    """Weight of the mean absolute value of the chunks' factors (published: 0.1)."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    given: frozenset[str] = frozenset()
    """Keys that the table `[hypernetwork]` has; `--init-from` refuses those that the checkpoint fixes."""


_GROWABLE = {
    "kinds", "encoder_kinds", "encoder_rank", "memory_layers", "calibration_questions", "static_kinds",
    "static_modules_rank", "head_shared_rank", "memory_near_tokens", "memory_rank", "memory_verdicts",
    "memory_gate_power",
}  # fmt: skip
"""Keys allowed with --init-from: they add a part, make one smaller, or set how much is written."""
_FREE = ("memory_rank", "memory_gate_power")
"""Those that fit any weights."""
_FIELDS = ("kinds", "layers", "memory_layers", "static_kinds", "encoder_kinds", "calibration_questions")
_OBJECTIVE = ("memory_loss_weight", "distillation_weight", "kl_to_base_weight", "l1_weight")
_ANY_BASE: Mapping[str, Any] = {"reader_layers": (0.27,), "d_values": "auto"}
"""Options of a recipe that does not name them; they fit any base."""
_DERIVED = {"modules", "memory_modules", "static_modules", "encoder_modules", "d_features"}
"""Options of DocToLoRAConfig that follow from the recipe and the base."""


def read_doc_recipe(path: Path | None, overrides: Sequence[str] = ()) -> DocRecipe:
    """Read a recipe from a TOML file, changed by overrides. Raises ConfigError as `read_tables`."""
    return read_recipe_as(
        DocRecipe, path, overrides, hypernetwork=keys_of(DocToLoRAConfig) - _DERIVED,
        fields=_FIELDS, objective=_OBJECTIVE,
    )  # fmt: skip


def build_doc_hypernet(base: Base, recipe: DocRecipe, source: EpisodeSource) -> DocToLoRA:
    """A fresh hypernetwork for a base, its units measured on the data.

    Raises ConfigError for `memory_verdicts`, which are fitted to a trained memory.
    """
    if recipe.hypernetwork.get("memory_verdicts"):
        raise ConfigError("memory_verdicts needs a trained memory: give its checkpoint with --init-from")
    torch.manual_seed(recipe.training.seed)
    hypernet = DocToLoRA(doc_config(base.model.config, base.tokenizer, recipe))
    calibrate(hypernet, base, hypernet.hidden_states_encoder(base), *calibration_data(base, recipe, source))
    return hypernet


def doc_config(base_config: Any, tokenizer: Any, recipe: DocRecipe) -> DocToLoRAConfig:
    """The config of a fresh hypernetwork for a base, whose config is in transformers' form."""
    options = {"prefix": tuple(encode_text(tokenizer, "\n"))[:1], **_ANY_BASE, **recipe.hypernetwork}
    text = base_config.get_text_config()
    if options["d_values"] == "auto":
        options["d_values"] = text.hidden_size
    read = options["reader_layers"]
    options["reader_layers"] = tuple(n if isinstance(n, int) else round(n * text.num_hidden_layers) for n in read)
    d_features = text.hidden_size + options["d_values"]
    check_values(DocToLoRAConfig, options)
    if recipe.memory_layers:
        options["memory_modules"] = target_from_config(base_config, ("o_proj",), recipe.memory_layers).rows
    if recipe.static_kinds:
        options["static_modules"] = target_from_config(base_config, recipe.static_kinds, recipe.layers).rows
    if recipe.encoder_kinds:
        memory = options.get("memory_modules", ())
        options["encoder_modules"] = encoder_modules(base_config, recipe, options["reader_layers"], memory)
    # Without kinds there is a memory alone, and nothing to target.
    modules = target_from_config(base_config, recipe.kinds, recipe.layers).rows if recipe.kinds else ()
    return DocToLoRAConfig(d_features=d_features, modules=modules, **options)


def encoder_modules(
    base_config: Any, recipe: DocRecipe, read: Sequence[int], memory: Sequence[ModuleRow]
) -> tuple[ModuleRow, ...]:
    """The modules of the recipe's `encoder_kinds` in all blocks that are computed while the base reads a document.

    Args:
        read: blocks after which states are read.
        memory: modules whose inputs are read as well.
    """
    depth = max([*read, *(layer + 1 for _, layer, *_ in memory)])
    return target_from_config(base_config, recipe.encoder_kinds, range(depth)).rows


def grow(hypernet: DocToLoRA, base: Base, recipe: DocRecipe, source: EpisodeSource) -> DocToLoRA:
    """Add the recipe's parts to a hypernetwork: memory layers, static modules, an encoder LoRA, low-rank heads.

    A recipe may also keep some of its memory layers only, or the memory alone (`kinds = []`), and change how many
    tokens of a chunk are written.
    """
    if "kinds" in recipe.given:
        if recipe.kinds:
            raise ConfigError("with --init-from, `kinds` can only be [], for the memory alone")
        hypernet = memory_alone(hypernet, base, sample_chunks(base, recipe, source))
    c, base_config = hypernet.config, base.model.config
    changes: dict[str, Any] = {}
    if recipe.memory_layers:
        changes["memory_modules"] = modules = target_from_config(base_config, ("o_proj",), recipe.memory_layers).rows
        if not (set(c.memory_modules) < set(modules) or set(modules) < set(c.memory_modules)):
            raise ConfigError(
                f"the checkpoint has a memory in the layers {[layer for _, layer, *_ in c.memory_modules]}; "
                "leave memory_layers out of the recipe, or give these and more, or some of these"
            )
    if recipe.static_kinds:
        _refuse(c.static_modules, "the checkpoint has static modules", "static_kinds")
        changes["static_modules"] = target_from_config(base_config, recipe.static_kinds, c.layers).rows
        changes["static_modules_rank"] = recipe.hypernetwork.get("static_modules_rank", c.static_modules_rank)
    if recipe.encoder_kinds:
        _refuse(c.encoder_modules, "the checkpoint has an encoder LoRA", "encoder_kinds")
        changes["encoder_modules"] = encoder_modules(base_config, recipe, c.reader_layers, c.memory_modules)
        changes["encoder_rank"] = recipe.hypernetwork.get("encoder_rank", c.encoder_rank)
    head_rank = recipe.hypernetwork.get("head_shared_rank")
    if head_rank is not None:
        _refuse(c.head_shared_rank, "the checkpoint's heads are of low rank", "head_shared_rank")
        changes["head_shared_rank"] = head_rank
    near = recipe.hypernetwork.get("memory_near_tokens")
    if near is not None:
        if hypernet.memory is None or c.memory_near_tokens or near < 1 or recipe.memory_layers:
            raise ConfigError(
                "memory_near_tokens, 1 or more, is for a checkpoint whose memory has none, and without memory_layers"
            )
        changes["memory_near_tokens"] = near
    changes |= {key: recipe.hypernetwork[key] for key in _FREE if key in recipe.hypernetwork}
    if recipe.hypernetwork.get("memory_verdicts"):
        if hypernet.memory is None or c.memory_verdicts or recipe.memory_layers or near is not None:
            raise ConfigError(
                "memory_verdicts is for a checkpoint whose memory has none, without memory_layers or memory_near_tokens"
            )
        changes["memory_verdicts"] = True
    if not changes:
        return hypernet
    torch.manual_seed(recipe.training.seed)
    grown = DocToLoRA(dataclasses.replace(c, **changes))
    weights = hypernet.state_dict()
    if recipe.memory_layers or near is not None:
        weights = {name: value for name, value in weights.items() if not name.startswith("memory.")}
    grown.load_state_dict(weights, strict=False)
    if set(grown.config.memory_modules) - set(c.memory_modules):
        set_memory_units(grown, base, grown.hidden_states_encoder(base), *calibration_data(base, recipe, source))
    if recipe.memory_layers and hypernet.memory is not None and grown.memory is not None:
        theirs = {module: i for i, module in enumerate(c.memory_modules)}
        both = {i: theirs[module] for i, module in enumerate(grown.config.memory_modules) if module in theirs}
        grown.memory.take_modules(hypernet.memory, both)
    if near is not None and hypernet.memory is not None and grown.memory is not None:
        grown.memory.take_without_near(hypernet.memory)
    if "memory_verdicts" in changes:
        fit_verdicts(grown, base, recipe.data.max_chunk_tokens, recipe.data.seed)
    if head_rank is not None:
        for kind in c.kinds:
            grown.head(kind).take_low_rank(hypernet.head(kind))
    return grown


def _refuse(is_there: Any, what: str, key: str) -> None:
    """Raise ConfigError for a key of the recipe that adds what the checkpoint has."""
    if is_there:
        raise ConfigError(f"{what} already; leave {key} out of the recipe")


def calibration_data(base: Base, recipe: DocRecipe, source: EpisodeSource) -> tuple[list[Tensor], list[Episode]]:
    """Token ids [1, t] of text like that of the documents, and documents with questions."""
    rng = random.Random(recipe.data.seed)
    texts = [encode_text(base.tokenizer, source.sample_text(rng, 256)) for _ in range(CALIBRATION_ROWS)]
    n_wanted = recipe.calibration_questions if recipe.memory_layers else 1
    episodes: list[Episode] = []
    for step in itertools.count():
        if sum(len(episode.questions) for episode in episodes) >= n_wanted:
            break
        episodes += source.step(step)
    return [torch.tensor([text]) for text in texts], episodes


def sample_chunks(base: Base, recipe: DocRecipe, source: EpisodeSource, n: int = 320) -> list[list[int]]:
    """Token ids of texts as long as the recipe's chunks."""
    rng = random.Random(recipe.data.seed)
    lengths = [rng.randint(recipe.data.min_chunk_tokens, recipe.data.max_chunk_tokens) for _ in range(n)]
    return [encode_text(base.tokenizer, source.sample_text(rng, length)) for length in lengths]


def answer_questions(
    model: Any,
    encoder: HiddenStatesEncoder,
    hypernet: Callable[..., MergedCast],
    batch: Batch,
    passes: Passes = Passes(),
) -> tuple[AnswerScores, MemoryLosses, MergedCast]:
    """Documents -> features -> LoRAs -> scores of their questions' answers, losses of the memory, and what was cast."""
    features = read_in_groups(encoder, batch.chunk_ids, batch.chunk_mask, passes.length_groups)
    cast = hypernet(features, batch.chunks_per_document)
    gate = None  # [d, t, k * r] the weights of the rows' sentences, the same in all modules
    if cast.writes is not None and batch.is_routed.any():
        assert cast.writes.tokens is not None
        rank = cast.loras.factors[encoder.key_modules[0]].rank
        gate = sentence_gates(cast.writes.tokens, batch, rank)
    gates = {} if gate is None else dict.fromkeys(encoder.key_modules, gate)
    scores = score_answers(model, cast.loras, batch, encoder.key_modules, gates, passes)
    if cast.writes is None:
        return scores, MemoryLosses(), cast
    # By module A [d, k * r, in], x [n, in].
    keys = {name: (cast.loras.factors[name].a, x) for name, x in scores.module_inputs.items()}
    written, retrieved = write_loss(cast.writes, batch), retrieval_loss(keys, cast.writes, batch, gate)
    if written.loss is None or retrieved is None:
        return scores, written, cast
    loss, accuracy = retrieved
    return scores, MemoryLosses(written.loss + loss, {**written.figures, "retrieval_accuracy": accuracy}), cast


def train_doc(
    base: Base,
    recipe: DocRecipe,
    out_dir: Path,
    *,
    init_from: Path | None = None,
    teacher: LoRA | None = None,
    workers: Workers | None = None,
    **reporting: Unpack[Reporting],
) -> dict[str, float]:
    """Train a hypernetwork for `base`, or resume the run in `out_dir`. Returns the last metrics, as `train_hypernet`.

    Args:
        init_from: hypernetwork that a fresh run starts from; of the recipe's `[hypernetwork]` table only keys that add
            or shrink a part are allowed then.
        teacher: LoRA (of `train_reader`) with which the teacher of `distillation_weight` reads the document, if any.
    """
    workers = workers or Workers.join(base.device.type)
    distils = recipe.distillation_weight > 0
    if teacher is not None and not distils:
        raise ConfigError("a teacher is given but not used: set objective.distillation_weight, such as 0.5")
    source = EpisodeSource(recipe.data, base.tokenizer, base.chat, shows_documents=distils)
    plain = Teacher(base.model, base.pad_id)
    distillation = Distillation(plain, dataclasses.replace(plain, lora=teacher) if distils else None)
    if init_from is not None:
        hypernet = start_from(init_from, DocToLoRA, base, (recipe.given | recipe.hypernetwork.keys()) - _GROWABLE)
        hypernet = grow(hypernet, base, recipe, source)
    else:
        hypernet = build_doc_hypernet(base, recipe, source)
    hypernet.to(workers.device).train()
    encoder = hypernet.hidden_states_encoder(base)

    def objective(number: int) -> tuple[Tensor, dict[str, float]]:
        episodes = distillation.with_soft_targets(source.step(number))
        batch = pack(episodes, base.pad_id).to(workers.device)
        with recipe.training.autocast(workers.device):
            scores, memory, cast = answer_questions(base.model, encoder, hypernet, batch, recipe.training.passes)
        losses = {
            "answer_loss": (1 - recipe.distillation_weight, scores.loss),
            "distillation_loss": (recipe.distillation_weight, scores.distillation_loss),
            "memory_loss": (recipe.memory_loss_weight, memory.loss),
            "kl_to_base": (recipe.kl_to_base_weight, scores.kl_to_base),
            "l1": (recipe.l1_weight, cast.mean_absolute() if recipe.l1_weight > 0 else None),
        }
        present = {name: (w, loss) for name, (w, loss) in losses.items() if loss is not None and w > 0}
        total = torch.stack([weight * loss for weight, loss in present.values()]).sum()
        found = {name: loss.item() for name, (_, loss) in present.items()} | memory.figures
        for name, share in (("exact", scores.exact), ("token_accuracy", scores.token_accuracy)):
            found |= {name: share, f"{name}_{episodes[0].task}": share}
        sizes = {"questions": batch.n_questions, "tokens": batch.n_tokens, "context_tokens": batch.chunk_ids.numel()}
        return total, {**found, **sizes}

    about: dict[str, Any] = {
        "data": recorded(recipe.data),
        "objective": {name: getattr(recipe, name) for name in _OBJECTIVE},
    }
    if teacher is not None:
        about["teacher_sha256"] = _sha256(teacher)
    return train_hypernet(
        hypernet, objective, recipe.training, out_dir,
        base=base, init_from=init_from, about=about, workers=workers, **reporting,
    )  # fmt: skip


def _sha256(lora: LoRA) -> str:
    """Hash of a LoRA's factors."""
    sides = {
        f"{name}.{side}": value for name, pair in lora.factors.items() for side, value in zip("ab", pair, strict=True)
    }
    return hashlib.sha256(save({name: value.cpu().contiguous() for name, value in sides.items()})).hexdigest()
