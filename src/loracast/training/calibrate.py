"""Set a new document hypernetwork's normalisation statistics before training, from the base's activations."""

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
from loracast.scoring.episodes import Episode

_QUESTIONS_FOR_UNITS = 200
_PLACES_TO_MATCH = 3  # answer tokens whose activations are matched; later ones depend less on the question
_BATCH = 16


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
    for i, keys in enumerate(_keys(encoder, base, answered, hypernet.static_lora() or LoRABatch(1, {}, {}))):
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
    for start in range(0, len(sequences), _BATCH):
        some = sequences[start : start + _BATCH]
        ids, _ = pad_right(some, base.pad_id)
        keys = encoder(ids.to(base.device), lora=lora).keys
        assert keys is not None, "the encoder of a memory reads keys"
        for sequence, its_keys in zip(some, keys, strict=True):
            yield its_keys[:, : len(sequence)].float()
