"""Measure, once before training, the units in which a base thinks: what its features and target modules look like on real text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from loracast.base.load import Base
from loracast.batching import pad_right
from loracast.encoders.hidden_states import HiddenStatesEncoder
from loracast.errors import TrainingError
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.memory import N_PLACES
from loracast.lora.algebra import LoRABatch
from loracast.lora.inject import inject
from loracast.scoring.episodes import Episode

_QUESTIONS_FOR_UNITS = 200
_PLACES_TO_MATCH = 3  # of an answer: later ones say less of the question
_SEQUENCES_AT_ONCE = 16


@torch.no_grad()
def calibrate(
    hypernet: DocToLoRA, base: Base, encoder: HiddenStatesEncoder, rows: Sequence[Tensor], episodes: Sequence[Episode]
) -> None:
    """Set the units of `hypernet` from `rows` of real text's token ids, each [1, t], and from documents with their questions.

    The first token of a row is left out: its activations are an attention sink, hundreds of times larger than any other's.
    """
    features = [encoder(row) for row in rows]

    hypernet.standardise(torch.cat([f.states[..., 1:, :].float().flatten(0, -2) for f in features]))
    if hypernet.memory is not None:
        set_memory_units(hypernet, base, encoder, rows, episodes)


@torch.no_grad()
def set_memory_units(
    hypernet: DocToLoRA, base: Base, encoder: HiddenStatesEncoder, rows: Sequence[Tensor], episodes: Sequence[Episode]
) -> None:
    """Set the units of the memory: its keys' over rows and questions, and at each place of the answers; then its question map.

    Questions are read as they will be asked: with what every document's LoRA has in common.
    """
    memory = hypernet.memory
    assert memory is not None
    questions = [question for episode in episodes for question in episode.questions]
    chunks = [chunk for episode in episodes for chunk in episode.chunks]
    asked = [(*question.prompt, *question.answer) for question in questions]
    seen = [keys[:, 1:] for keys in _keys(encoder, base, [row[0].tolist() for row in rows])]
    totals, counts = torch.zeros(1, device=base.device), torch.zeros(N_PLACES)
    at_answers: list[Tensor] = []  # of each question, at the first places of its answer: [modules, places, in]
    for i, keys in enumerate(_keys(encoder, base, asked, hypernet.static_lora())):
        if i < _QUESTIONS_FOR_UNITS:
            seen.append(keys[:, 1:])
        keys = keys[:, len(questions[i].prompt) - 1 : -1]  # where the answer's tokens are predicted from
        places = torch.arange(keys.shape[1]).clamp_max(N_PLACES - 1)
        one_hot = functional.one_hot(places, N_PLACES).T.to(keys)  # [N_PLACES, answer tokens]
        totals, counts = totals + one_hot @ keys, counts + one_hot.sum(1).cpu()
        at_answers.append(keys[:, :_PLACES_TO_MATCH].clone())
    if not counts.all():
        raise TrainingError(f"no answer among those to calibrate on has {N_PLACES} tokens; give more varied data")
    means = totals / counts[:, None].to(totals)  # [modules, places, in]
    stop = torch.tensor([base.chat.end_of_turn], device=base.device)
    memory.set_units(torch.cat(seen, dim=1), means, encoder.values(stop)[0])

    said: list[set[tuple[int, int]]] = [set() for _ in chunks]  # in each chunk: where a statement ends, its question
    first_chunk = first_question = 0
    for episode in episodes:
        for mark in episode.marks:
            said[first_chunk + mark.chunk].add((mark.end, first_question + mark.statement))
        first_chunk += len(episode.chunks)
        first_question += len(episode.questions)
    ends, answers = [], []
    for pairs, keys in zip(said, _keys(encoder, base, chunks), strict=True):
        for end, question in sorted(pairs):
            at_answer = at_answers[question] - means[:, : at_answers[question].shape[1]]
            ends.append(keys[:, end, None].expand_as(at_answer))
            answers.append(at_answer)
    if not ends:
        raise TrainingError("no statement among those to calibrate on has its question; give documents with marks")
    memory.set_question_map(torch.cat(ends, dim=1), torch.cat(answers, dim=1), means)


def _keys(
    encoder: HiddenStatesEncoder, base: Base, sequences: Sequence[Sequence[int]], lora: LoRABatch | None = None
) -> Iterator[Tensor]:
    """What enters a memory's modules at each of t tokens, [modules, t, in], of one sequence after the other."""
    for start in range(0, len(sequences), _SEQUENCES_AT_ONCE):
        some = sequences[start : start + _SEQUENCES_AT_ONCE]
        ids, _ = pad_right(some, base.pad_id)
        with inject(base.model, lora):
            keys = encoder(ids.to(base.device)).keys
        assert keys is not None, "the encoder of a memory reads keys"
        for sequence, its_keys in zip(some, keys, strict=True):
            yield its_keys[:, : len(sequence)].float()
