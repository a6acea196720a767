"""Train Doc-to-LoRA from a recipe: documents become LoRAs with which the base answers questions without seeing them.

A run starts from a fresh hypernetwork, whose units are measured on data, or from a checkpoint that grows by parts. Some
parts are set in closed form: the units of a memory, and what tells from a sentence whether a rule holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from loracast.base.chat import encode_text, encode_with_offsets
from loracast.base.forward import pad_right
from loracast.base.load import Base
from loracast.documents import split_text
from loracast.errors import ConfigError, TrainingError
from loracast.hypernets.associative_memory import N_PLACES, MemoryWrites
from loracast.hypernets.config import ModuleRow
from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
from loracast.hypernets.encoders import Features, HiddenStatesEncoder
from loracast.hypernets.protocol import Hypernetwork
from loracast.lab.data.everyday import make_document
from loracast.lab.data.facts import tokens_between
from loracast.lab.training import memory_start
from loracast.lab.training.document_source import DataConfig, EpisodeSource
from loracast.lab.training.loras import read_window_lora
from loracast.lab.training.losses import Distillation, MemoryLosses, Teacher, retrieval_loss, sentence_gates, write_loss
from loracast.lab.training.recipe import (
    HypernetRecipe,
    Layers,
    check_values,
    keys_of,
    recorded,
    start_from,
    target_at,
    train_hypernet,
)
from loracast.lab.training.scoring import AnswerScores, Batch, Episode, Passes, pack, read_in_groups, score_answers
from loracast.lora.algebra import LoRA, LoRABatch
from loracast.lora.factors import Rows

CALIBRATION_ROWS = 12
CALIBRATION_CHUNKS = 320


_DERIVED = {"modules", "memory_modules", "static_modules", "encoder_modules", "d_features"}
"""Options of DocToLoRAConfig that follow from the recipe and the base."""


@dataclass(frozen=True, kw_only=True)
class DocRecipe(HypernetRecipe):
    """One training run of Doc-to-LoRA.

    Of its options `d_values` may be "auto", as wide as the base, and `reader_layers` a share of the depth.
    """

    OPTIONS = keys_of(DocToLoRAConfig) - _DERIVED
    OBJECTIVE = ("memory_loss_weight", "distillation_weight", "kl_to_base_weight", "l1_weight")
    kinds: tuple[str, ...] = ("down_proj",)
    """Module kinds that receive a LoRA of each chunk; none for a memory alone."""
    layers: Layers = 0.2
    """Layers that receive a LoRA, by number or as shares of the base's depth (`Layers` in recipe.py)."""
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


_GROWABLE = {
    "kinds", "encoder_kinds", "encoder_rank", "memory_layers", "calibration_questions", "static_kinds",
    "static_modules_rank", "head_shared_rank", "memory_near_tokens", "memory_rank", "memory_verdicts",
    "memory_gate_power",
}  # fmt: skip
"""Keys allowed with --init-from: they add a part, make one smaller, or set how much is written."""
_ANY_BASE: Mapping[str, Any] = {"reader_layers": (0.27,), "d_values": "auto"}
"""Options of a recipe that does not name them; they fit any base."""


def build_doc_hypernet(base: Base, recipe: DocRecipe, source: EpisodeSource) -> DocToLoRA:
    """A fresh hypernetwork for a base, its units measured on the data.

    Raises ConfigError for `memory_verdicts`, which are fitted to a trained memory.
    """
    if recipe.hypernetwork.get("memory_verdicts"):
        raise ConfigError("memory_verdicts needs a trained memory: give its checkpoint with --init-from")
    torch.manual_seed(recipe.training.seed)
    hypernet = DocToLoRA(doc_config(base.model.config, base.tokenizer, recipe))
    rows, episodes = calibration_data(base, recipe, source)
    encoder = hypernet.hidden_states_encoder(base)
    with torch.no_grad():  # the first token is an attention sink, whose states are hundreds of times larger
        states = [encoder(row).states[..., 1:, :].float().flatten(0, -2) for row in rows]
        standardise(hypernet, torch.cat(states))
    if hypernet.memory is not None:
        set_memory_units(hypernet, base, encoder, rows, episodes)
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
    options |= added_modules(base_config, recipe, recipe.layers, options["reader_layers"])
    # Without kinds there is a memory alone, and nothing to target.
    modules = target_at(base_config, recipe.kinds, recipe.layers).rows if recipe.kinds else ()
    return DocToLoRAConfig(d_features=d_features, modules=modules, **options)


def added_modules(
    base_config: Any, recipe: DocRecipe, layers: Layers, read: Sequence[int], memory: Sequence[ModuleRow] = ()
) -> dict[str, tuple[ModuleRow, ...]]:
    """The modules of the memory, the static LoRA and the encoder's LoRA that the recipe names, by their option.

    Args:
        layers: those with a static LoRA.
        read: blocks after which states are read; the encoder's LoRA is in all blocks that are computed meanwhile.
        memory: modules of a memory that there is already.
    """
    found = {}
    if recipe.memory_layers:
        found["memory_modules"] = memory = target_at(base_config, ("o_proj",), recipe.memory_layers).rows
    if recipe.static_kinds:
        found["static_modules"] = target_at(base_config, recipe.static_kinds, layers).rows
    if recipe.encoder_kinds:
        depth = max([*read, *(layer + 1 for _, layer, *_ in memory)])
        found["encoder_modules"] = target_at(base_config, recipe.encoder_kinds, range(depth)).rows
    return found


def grow(hypernet: DocToLoRA, base: Base, recipe: DocRecipe, source: EpisodeSource) -> DocToLoRA:
    """Add the recipe's parts to a hypernetwork: memory layers, static modules, an encoder LoRA, low-rank heads.

    A recipe may also keep some of its memory layers only, or the memory alone (`kinds = []`), and change how many
    tokens of a chunk are written.
    """
    if "kinds" in recipe.given:
        if recipe.kinds:
            raise ConfigError("with --init-from, `kinds` can only be [], for the memory alone")
        hypernet = memory_alone(hypernet, base, sample_chunks(base, recipe, source))
    c, has_memory = hypernet.config, hypernet.memory is not None
    changes: dict[str, Any] = dict(recipe.hypernetwork)
    near, verdicts = changes.get("memory_near_tokens"), changes.get("memory_verdicts")
    there = {"static_kinds": c.static_modules, "encoder_kinds": c.encoder_modules}
    for key, part in {**there, "head_shared_rank": c.head_shared_rank}.items():
        if part and (getattr(recipe, key, None) or key in changes):
            raise ConfigError(f"the checkpoint has what {key} adds already; leave {key} out of the recipe")
    for key, added in (("static_modules_rank", recipe.static_kinds), ("encoder_rank", recipe.encoder_kinds)):
        if key in changes and not added:
            raise ConfigError(f"{key} is of modules that the recipe adds with --init-from; leave it out")
    if near is not None and (not has_memory or c.memory_near_tokens or near < 1 or recipe.memory_layers):
        raise ConfigError(
            "memory_near_tokens, 1 or more, is for a checkpoint whose memory has none, and without memory_layers"
        )
    if verdicts is not None and (not has_memory or c.memory_verdicts or recipe.memory_layers or near is not None):
        raise ConfigError(
            "memory_verdicts is for a checkpoint whose memory has none, without memory_layers or memory_near_tokens"
        )
    changes |= added_modules(base.model.config, recipe, c.layers, c.reader_layers, c.memory_modules)
    old, new = set(c.memory_modules), set(changes.get("memory_modules", ()))
    if recipe.memory_layers and not (old < new or new < old):
        raise ConfigError(
            f"the checkpoint has a memory in the layers {[layer for _, layer, *_ in c.memory_modules]}; "
            "leave memory_layers out of the recipe, or give these and more, or some of these"
        )
    if not changes:
        return hypernet
    torch.manual_seed(recipe.training.seed)
    grown = DocToLoRA(dataclasses.replace(c, **changes))
    weights = hypernet.state_dict()
    if recipe.memory_layers or near is not None:
        weights = {name: value for name, value in weights.items() if not name.startswith("memory.")}
    grown.load_state_dict(weights, strict=False)
    if new - old:
        set_memory_units(grown, base, grown.hidden_states_encoder(base), *calibration_data(base, recipe, source))
    if hypernet.memory is not None and grown.memory is not None:
        if recipe.memory_layers:
            theirs = {module: i for i, module in enumerate(c.memory_modules)}
            both = {i: theirs[module] for i, module in enumerate(grown.config.memory_modules) if module in theirs}
            memory_start.take_modules(grown.memory, hypernet.memory, both)
        if near is not None:
            memory_start.take_without_near(grown.memory, hypernet.memory)
    if verdicts:
        fit_verdicts(grown, base, recipe.data.max_chunk_tokens, recipe.data.seed)
    if "head_shared_rank" in changes:
        for kind in c.kinds:
            memory_start.take_low_rank(grown.head(kind), hypernet.head(kind))
    return grown


def calibration_data(base: Base, recipe: DocRecipe, source: EpisodeSource) -> tuple[list[Tensor], list[Episode]]:
    """Token ids [1, t] of text like that of the documents, and documents with questions."""
    rng = random.Random(recipe.data.seed)
    texts = [encode_text(base.tokenizer, source.sample_text(rng, 256)) for _ in range(CALIBRATION_ROWS)]
    n_wanted = recipe.calibration_questions if recipe.memory_layers else 1
    episodes: list[Episode] = []
    steps = itertools.count()
    while sum(len(episode.questions) for episode in episodes) < n_wanted:
        episodes += source.step(next(steps))
    return [torch.tensor([text]) for text in texts], episodes


def sample_chunks(base: Base, recipe: DocRecipe, source: EpisodeSource) -> list[list[int]]:
    """Token ids of texts as long as the recipe's chunks."""
    rng = random.Random(recipe.data.seed)
    lengths = [
        rng.randint(recipe.data.min_chunk_tokens, recipe.data.max_chunk_tokens) for _ in range(CALIBRATION_CHUNKS)
    ]
    return [encode_text(base.tokenizer, source.sample_text(rng, length)) for length in lengths]


_QUESTIONS_FOR_UNITS = 200
_PLACES_TO_MATCH = 3  # answer tokens whose activations are matched; later ones depend less on the question
_CALIBRATED_AT_ONCE = 16


@torch.no_grad()
def set_memory_units(
    hypernet: DocToLoRA, base: Base, encoder: HiddenStatesEncoder, rows: Sequence[Tensor], episodes: Sequence[Episode]
) -> None:
    """Set the memory's units and its question map.

    `rows` are token ids of real text, each [1, t], whose first token is left out: its activations are an attention
    sink, hundreds of times larger than any other's. `episodes` are documents with questions.

    The units are the statistics of its modules' inputs over text and questions, and at each place of the answers. The
    question map takes the input at the end of a statement to the inputs at the answer of its question. Questions are
    read with the static LoRA, as they will be later.
    """
    memory = hypernet.memory
    assert memory is not None
    questions = [question for episode in episodes for question in episode.questions]
    chunks = [chunk for episode in episodes for chunk in episode.chunks]
    static = hypernet.static.lora(hypernet.config.target.rows)
    answered = [(*question.prompt, *question.answer) for question in questions]
    seen = [keys[:, 1:] for keys in _keys(encoder, base, [row[0].tolist() for row in rows])]
    totals, counts = torch.zeros(1, device=base.device), torch.zeros(N_PLACES)
    at_answers: list[Tensor] = []  # by question, at the first places of its answer: [modules, places, in]
    for i, keys in enumerate(_keys(encoder, base, answered, static)):
        if i < _QUESTIONS_FOR_UNITS:
            seen.append(keys[:, 1:])
        keys = keys[:, len(questions[i].prompt) - 1 : -1]  # where the answer's tokens are predicted
        places = torch.arange(keys.shape[1]).clamp_max(N_PLACES - 1)
        one_hot = functional.one_hot(places, N_PLACES).T.to(keys)  # [N_PLACES, answer tokens]
        totals, counts = totals + one_hot @ keys, counts + one_hot.sum(1).cpu()
        at_answers.append(keys[:, :_PLACES_TO_MATCH].clone())
    if not counts.all():
        raise TrainingError(f"no calibration answer has {N_PLACES} tokens; give more varied data")
    means = totals / counts[:, None].to(totals)  # [modules, places, in]
    end_of_turn = torch.tensor([base.chat.end_of_turn], device=base.device)
    memory_start.set_units(memory, torch.cat(seen, dim=1), means, encoder.values(end_of_turn)[0])

    # By chunk: the token that ends a statement, and the statement's question.
    stated: list[set[tuple[int, int]]] = [set() for _ in chunks]
    first_chunk = first_question = 0
    for episode in episodes:
        for label in episode.token_labels:
            if label.statement >= 0:
                stated[first_chunk + label.chunk].add((label.end, first_question + label.statement))
        first_chunk += len(episode.chunks)
        first_question += len(episode.questions)
    ends, answers = [], []
    for pairs, keys in zip(stated, _keys(encoder, base, chunks), strict=True):
        for end, question in sorted(pairs):
            at_answer = at_answers[question] - means[:, : at_answers[question].shape[1]]
            ends.append(keys[:, end, None].expand_as(at_answer))
            answers.append(at_answer)
    if not ends:
        raise TrainingError("no calibration statement has a question; give documents with token labels")
    memory_start.set_question_map(memory, torch.cat(ends, dim=1), torch.cat(answers, dim=1), means)


def _keys(
    encoder: HiddenStatesEncoder, base: Base, sequences: Sequence[Sequence[int]], lora: LoRABatch | None = None
) -> Iterator[Tensor]:
    """Inputs of the memory's modules at each of t tokens [modules, t, in], sequence by sequence.

    They are those of a base with the LoRA that is given, or else with the encoder LoRA.
    """
    for start in range(0, len(sequences), _CALIBRATED_AT_ONCE):
        some = sequences[start : start + _CALIBRATED_AT_ONCE]
        ids, _ = pad_right(some, base.pad_id)
        keys = encoder(ids.to(base.device), lora=lora).keys
        assert keys is not None, "the encoder of a memory reads keys"
        for sequence, its_keys in zip(some, keys, strict=True):
            yield its_keys[:, : len(sequence)].float()


N_DOCUMENTS = 1000
"""Generated documents whose sentences are read, of which about 1,100 state a rule."""
_STRENGTH = 6.0  # of a verdict beside a value that is written (chosen on dev: docs/notebook/2026-11-29.md)
_VERDICT_RIDGE = 500.0  # on the squared weights, beside the sum of the sentences' losses
_MAX_STEPS = 200


def fit_verdicts(hypernet: DocToLoRA, base: Base, max_chunk_tokens: int, seed: int) -> None:
    """Set the verdicts of a hypernetwork's memory: what each sentence says, and the direction from No to Yes.

    Args:
        max_chunk_tokens: of the chunks in which documents are read.
        seed: of the documents.

    Raises ConfigError where answers begin alike with Yes and No in this base's tokens.
    """
    memory = hypernet.memory
    assert memory is not None
    first = [base.chat.answer(text)[0] for text in ("Yes", "No")]
    if first[0] == first[1]:
        raise ConfigError("Yes and No begin with the same token of this base: leave memory_verdicts out of the recipe")
    encoder = hypernet.hidden_states_encoder(base)
    yes, no = encoder.values(torch.tensor(first, device=base.device)).float()
    states, labels = zip(*_sentences(hypernet, base, encoder, max_chunk_tokens, seed), strict=True)
    weight, bias = logistic_regressions(torch.cat(states), torch.cat(labels))
    with torch.no_grad():
        memory.verdict.weight.copy_(weight)
        memory.verdict.bias.copy_(bias)
        memory.verdict_value.copy_(_STRENGTH * functional.normalize(yes - no, dim=0))


def logistic_regressions(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Two logistic regressions: weights [2, d] and biases [2].

    Args:
        states: of m sentences [m, d].
        labels: whether each says yes, and whether it says no [m, 2]; the others count as much as these together.
    """
    is_rule = labels.any(1)
    shares = torch.where(is_rule, 1.0, is_rule.sum() / (~is_rule).sum().clamp_min(1))[:, None]
    weight = torch.zeros(2, states.shape[1], device=states.device, requires_grad=True)
    bias = torch.zeros(2, device=states.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_MAX_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = functional.binary_cross_entropy_with_logits(states @ weight.T + bias, labels, shares, reduction="sum")
        total = losses + _VERDICT_RIDGE * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weight.detach(), bias.detach()


@torch.no_grad()
def _sentences(
    hypernet: DocToLoRA, base: Base, encoder: HiddenStatesEncoder, max_chunk_tokens: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each chunk the mean states of its m sentences [m, d], and whether each says yes, and no, to a rule [m, 2]."""
    memory, encode = hypernet.memory, partial(encode_with_offsets, base.tokenizer)
    assert memory is not None
    for i in range(N_DOCUMENTS):
        document = make_document(random.Random(f"{seed}/verdicts/{i}"), split="train")
        for chunk in split_text(document.text, encode, max_tokens=max_chunk_tokens, title=document.title):
            ids, offsets = encode(chunk.prompt)
            labels = torch.zeros(len(ids), 2, device=base.device)
            for fact in document.facts:
                if fact.rule and (at := chunk.prompt.find(fact.rule)) >= 0:
                    end = tokens_between(offsets, at, at + len(fact.rule))[-1]
                    labels[end, int(fact.answer == "No")] = 1
            features = encoder(torch.tensor([ids], device=base.device))
            mask = torch.ones(1, len(ids), dtype=torch.bool, device=base.device)
            standard = hypernet.standard(features.states.float())
            means, _, lengths = memory.sentence_means(standard, mask, memory.read(standard, mask)[1])
            is_end = memory.is_end(mask, lengths)[0] | labels.any(1)
            yield means[0, is_end], labels[is_end]


_CHUNKS_OF_A_QUESTION = 1.8
"""How many times the mean is added: a question gets several chunks. Of 1, 1.4, 1.8 and 2.4 the best on dev."""


def memory_alone(hypernet: DocToLoRA, base: Base, chunks: Sequence[Sequence[int]]) -> DocToLoRA:
    """The hypernetwork without its Perceiver, of which the mean over some chunks is kept in the static LoRA.

    Args:
        chunks: token ids of texts like those that it casts.

    Raises:
        ConfigError: it has no memory, so that nothing would remain.
    """
    c = hypernet.config
    if not c.memory_modules:
        raise ConfigError("`kinds = []` is for a checkpoint with a memory, which then remains alone")
    static = tuple(row for row in c.target.rows if row[2] not in hypernet.memory_kinds)
    rank = max(c.static_modules_rank if c.static_modules else 0, c.static_rank + c.rank)
    alone = DocToLoRA(
        dataclasses.replace(c, modules=(), static_rank=0, static_modules=static, static_modules_rank=rank)
    )
    weights = hypernet.state_dict()
    for name, value in alone.state_dict().items():
        if name in weights:
            taken = weights[name]
            # A static LoRA [layers, r, d] of a smaller rank keeps fresh rows behind its own: their B is 0.
            (value if value.shape == taken.shape else value[:, : taken.shape[1]]).copy_(taken)
    for kind, delta in mean_deltas(hypernet, base, chunks).items():
        u, s, vh = torch.linalg.svd(_CHUNKS_OF_A_QUESTION * delta, full_matrices=False)
        root, rows, part = s[:, : c.rank].sqrt(), slice(c.static_rank, c.static_rank + c.rank), alone.static[kind]
        with torch.no_grad():
            part.a[:, rows] = root[:, :, None] * vh[:, : c.rank]
            part.b[:, rows] = (u[:, :, : c.rank] * root[:, None]).mT
    return alone


@torch.no_grad()
def mean_deltas(hypernet: DocToLoRA, base: Base, chunks: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The mean delta that the Perceiver casts for chunks, by module kind [modules, out, in], fp32."""
    encoder = hypernet.hidden_states_encoder(base)
    sums: dict[str, Tensor] = {}
    for chunk in chunks:
        rows = hypernet.cast(encoder(torch.tensor([chunk], device=base.device))).rows
        for kind in hypernet.config.kinds:
            a, b = (side[0].float() for side in rows[kind])  # [modules, r, in and out]
            sums[kind] = sums.get(kind, 0) + b.mT @ a
    return {kind: total / len(chunks) for kind, total in sums.items()}


class MergedCast(NamedTuple):
    """The merged LoRA of each document, with the unmerged rows and the memory's writes; differentiable."""

    loras: LoRABatch
    """One merged LoRA for each document."""
    writes: MemoryWrites | None
    """What the memory wrote; None without a memory."""
    rows: Rows
    """The rows of each chunk, before merging."""
    n_real: int
    """Number of chunks that are not padding; the rows of padding are zero."""


def merged(hypernet: Hypernetwork, rows: Rows, chunks_per_document: int) -> LoRABatch:
    """Rows of chunks -> one LoRA for each document, of rank K * r plus the static LoRA's; differentiable.

    Args:
        rows: a document's chunks are consecutive.
        chunks_per_document: K.
    """

    def by_document(side: Tensor) -> Sequence[Tensor]:  # [n, modules, r, d] -> K of [modules, documents, r, d]
        return side.unflatten(0, (-1, chunks_per_document)).permute(1, 2, 0, 3, 4).unbind(0)

    # All rows, in their places, by which training weighs and scores them; an adapter merges the strongest keys.
    merging, joined = dataclasses.replace(hypernet.merging, most_keys=math.inf), Rows()
    for kind, (a, b) in rows.items():
        sides = merging.join(kind, by_document(a), by_document(b.expand(-1, a.shape[1], -1, -1)))
        joined[kind] = sides[0].transpose(0, 1), sides[1].transpose(0, 1)
    return hypernet.loras(joined)


def cast_documents(hypernet: DocToLoRA, features: Features, chunks_per_document: int = 1) -> MergedCast:
    """Chunks -> one merged LoRA for each document, with what the memory wrote and the chunks' own rows.

    Args:
        features: a document's chunks are consecutive.
        chunks_per_document: K; the rows of K neighbours are joined along the rank.
    """
    rows, writes = hypernet.cast_and_write(features)
    n_real = features.n_chunks if features.mask is None else int(features.mask.any(-1).sum())
    return MergedCast(merged(hypernet, rows, chunks_per_document), writes, rows, n_real)


@torch.no_grad()
def standardise(hypernet: DocToLoRA, features: Tensor) -> None:
    """Have a hypernetwork standardise features by mean and deviation of those of real tokens [tokens, d_features]."""
    hypernet.feature_mean.copy_(features.mean(0))
    hypernet.feature_std.copy_(features.std(0).clamp_min(1e-3))


def answer_questions(
    model: Any, encoder: HiddenStatesEncoder, hypernet: DocToLoRA, batch: Batch, passes: Passes = Passes()
) -> tuple[AnswerScores, MemoryLosses, MergedCast]:
    """Documents -> features -> LoRAs -> scores of their questions' answers, losses of the memory, and what was cast."""
    features = read_in_groups(encoder, batch.chunk_ids, batch.chunk_mask, passes.length_groups)
    cast = cast_documents(hypernet, features, batch.chunks_per_document)
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
    base: Base, recipe: DocRecipe, out: Path, init_from: Path | None = None, teacher: Path | None = None, **record: Any
) -> dict[str, float]:
    """Train a hypernetwork for `base`, or resume the run in `out`. Returns the last metrics, as `train_hypernet`.

    Args:
        init_from: hypernetwork that a fresh run starts from; of the recipe's `[hypernetwork]` table only keys that add
            or shrink a part are allowed then.
        teacher: folder of a LoRA (`train_window`) with which the teacher of `distillation_weight` reads the document.
        record: `command` and `on_metrics` of `train_hypernet`.
    """
    distils = recipe.distillation_weight > 0
    if teacher is not None and not distils:
        raise ConfigError("a teacher is given but not used: set objective.distillation_weight, such as 0.5")
    taught_by = read_window_lora(teacher, base.fingerprint) if teacher else None
    source = EpisodeSource(recipe.data, base.tokenizer, base.chat, is_taught=distils)
    plain = Teacher(base.model, base.pad_id)
    distillation = Distillation(plain, dataclasses.replace(plain, lora=taught_by) if distils else None)
    if init_from is not None:
        started = start_from(init_from, DocToLoRA, base, recipe, lambda hypernet: _GROWABLE)
        hypernet = grow(started, base, recipe, source)
    else:
        hypernet = build_doc_hypernet(base, recipe, source)
    hypernet.to(base.device).train()
    encoder = hypernet.hidden_states_encoder(base)

    def objective(number: int) -> tuple[Tensor, dict[str, float]]:
        episodes = distillation.with_soft_targets(source.step(number))
        batch = pack(episodes, base.pad_id).to(base.device)
        with recipe.training.autocast(base.device):
            scores, memory, cast = answer_questions(base.model, encoder, hypernet, batch, recipe.training.passes)
        losses = {
            "answer_loss": (1 - recipe.distillation_weight, scores.loss),
            "distillation_loss": (recipe.distillation_weight, scores.distillation_loss),
            "memory_loss": (recipe.memory_loss_weight, memory.loss),
            "kl_to_base": (recipe.kl_to_base_weight, scores.kl_to_base),
            "l1": (recipe.l1_weight, mean_absolute(cast) if recipe.l1_weight > 0 else None),
        }
        present = {name: (w, loss) for name, (w, loss) in losses.items() if loss is not None and w > 0}
        total = torch.stack([weight * loss for weight, loss in present.values()]).sum()
        found = {name: loss.item() for name, (_, loss) in present.items()} | memory.figures
        for name, share in (("exact", scores.exact), ("token_accuracy", scores.token_accuracy)):
            found |= {name: share, f"{name}_{episodes[0].task}": share}
        sizes = {"questions": batch.n_questions, "tokens": batch.n_tokens, "context_tokens": batch.chunk_ids.numel()}
        return total, {**found, **sizes}

    about: dict[str, Any] = {"data": recorded(recipe.data), "objective": recipe.objective}
    if taught_by is not None:
        about["teacher_sha256"] = _sha256(taught_by)
    return train_hypernet(
        hypernet, objective, recipe.training, out, base=base, init_from=init_from, about=about, **record
    )


def _sha256(lora: LoRA) -> str:
    """Hash of a LoRA's factors."""
    sides = {
        f"{name}.{side}": value for name, pair in lora.factors.items() for side, value in zip("ab", pair, strict=True)
    }
    return hashlib.sha256(save({name: value.cpu().contiguous() for name, value in sides.items()})).hexdigest()


def mean_absolute(cast: MergedCast) -> Tensor:
    """[]: mean absolute value of the real chunks' rows."""
    sides = [side for pair in cast.rows.values() for side in pair]
    total = torch.stack([side.abs().sum(dtype=torch.float32) for side in sides]).sum()
    return total / (cast.n_real * sum(side[0].numel() for side in sides))
