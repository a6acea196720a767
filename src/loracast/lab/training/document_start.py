"""Initialise hypernetworks in closed form before training: normalisation, position probes, verdicts.

Another one begins with what a trained one has left without its Perceiver.

Fit the part of a memory that tells from a sentence whether a rule holds, before training.

Generated everyday documents state rules that hold and rules that do not ("Dogs are welcome.", "Please leave your dog at
home."). Two logistic regressions on the mean state of a sentence tell each of the two from all other sentences.

Takes the Perceiver from a trained hypernetwork for documents: its memory and static LoRA remain.

What the Perceiver casts is much the same for all chunks: of the shipped one's deltas the mean had 58 to 86 % of the
energy, by layer. The mean goes into the static LoRA, which costs a question nothing.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from loracast.base.chat import encode_with_offsets
from loracast.base.forward import capture_inputs, pad_right
from loracast.base.load import Base
from loracast.base.scoring import Episode
from loracast.documents import split_text
from loracast.errors import ConfigError, TrainingError
from loracast.hypernets.associative_memory import N_PLACES
from loracast.hypernets.attention_delta_encoder import POSITIONS, tokens_around_input
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.encoders import HiddenStatesEncoder
from loracast.lab.data.everyday import make_document
from loracast.lab.data.facts import tokens_between
from loracast.lab.training.task_source import TaskSource
from loracast.lora.algebra import LoRABatch, inject

_QUESTIONS_FOR_UNITS = 200
_PLACES_TO_MATCH = 3  # answer tokens whose activations are matched; later ones depend less on the question
_CALIBRATED_AT_ONCE = 16


@torch.no_grad()
def calibrate(
    hypernet: DocToLoRA, base: Base, encoder: HiddenStatesEncoder, rows: Sequence[Tensor], episodes: Sequence[Episode]
) -> None:
    """Standardise the features of `hypernet` on real text, and set the units of its memory, if it has one.

    `rows` are token ids of real text, each [1, t]; `episodes` are documents with questions, for the memory. The first
    token of a row is left out: its activations are an attention sink, hundreds of times larger than any other's.
    """
    features = [encoder(row) for row in rows]
    hypernet.standardise(torch.cat([f.states[..., 1:, :].float().flatten(0, -2) for f in features]))
    if hypernet.memory is not None:
        set_memory_units(hypernet, base, encoder, rows, episodes)


@torch.no_grad()
def set_memory_units(
    hypernet: DocToLoRA, base: Base, encoder: HiddenStatesEncoder, rows: Sequence[Tensor], episodes: Sequence[Episode]
) -> None:
    """Set the memory's units and its question map.

    The units are the statistics of its modules' inputs over text and questions, and at each place of the answers. The
    question map takes the input at the end of a statement to the inputs at the answer of its question. Questions are
    read with the static LoRA, as they will be later.
    """
    memory = hypernet.memory
    assert memory is not None
    questions = [question for episode in episodes for question in episode.questions]
    chunks = [chunk for episode in episodes for chunk in episode.chunks]
    answered = [(*question.prompt, *question.answer) for question in questions]
    seen = [keys[:, 1:] for keys in _keys(encoder, base, [row[0].tolist() for row in rows])]
    totals, counts = torch.zeros(1, device=base.device), torch.zeros(N_PLACES)
    at_answers: list[Tensor] = []  # by question, at the first places of its answer: [modules, places, in]
    for i, keys in enumerate(_keys(encoder, base, answered, hypernet.static_lora())):
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
    memory.set_units(torch.cat(seen, dim=1), means, encoder.values(end_of_turn)[0])

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
    memory.set_question_map(torch.cat(ends, dim=1), torch.cat(answers, dim=1), means)


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


_N_EXAMPLES = 256
_BATCH = 16
_RIDGE = 1e-3  # relative to the mean square of an input
_ELSEWHERE = "elsewhere"


@torch.no_grad()
def fit_position_probes(base: Base, lora: LoRABatch, names: Sequence[str], source: TaskSource) -> Tensor:
    """Probes [modules, positions, in], each about 1 at its position (of `POSITIONS`) and 0 at the others.

    Weighted least squares on training examples; every position has the same weight. The base carries `lora` while it
    reads; `names` are those of the modules.
    """
    rows = _examples(base, source)
    n_of = {position: max(1, sum(at.count(position) for _, at in rows)) for position in (*POSITIONS, _ELSEWHERE)}
    gram: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for start in range(0, len(rows), _BATCH):
        some = rows[start : start + _BATCH]
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
        ridge = _RIDGE * gram[name].diagonal().mean() * torch.eye(len(gram[name]), device=gram[name].device)
        probes.append(torch.linalg.solve(gram[name] + ridge, moments[name].T).T)
    return torch.stack(probes)


def _examples(base: Base, source: TaskSource) -> list[tuple[list[int], list[str]]]:
    """Token ids of training examples, and the position of each token."""
    rng = random.Random(0)
    n_before, n_after = tokens_around_input(base.chat)
    rows = []
    for _ in range(_N_EXAMPLES):
        example = rng.choice(source.short_enough(rng.choice(source.tasks)))
        prompt, answer = base.chat.prompt(example.input, ""), base.chat.reply(example.outputs[0])[:-1]
        n_input = len(prompt) - n_before - n_after
        positions = [_ELSEWHERE] * n_before + ["input"] * n_input + ["turn"] * (n_after - 1)
        rows.append(([*prompt, *answer], [*positions, "start", *["answer"] * len(answer)]))
    return rows


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
    found = list(_sentences(hypernet, base, encoder, max_chunk_tokens, seed))
    weight, bias = fit(torch.cat([states for states, _ in found]), torch.cat([labels for _, labels in found]))
    with torch.no_grad():
        memory.verdict.weight.copy_(weight)
        memory.verdict.bias.copy_(bias)
        memory.verdict_value.copy_(_STRENGTH * functional.normalize(yes - no, dim=0))


def fit(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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
