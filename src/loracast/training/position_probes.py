"""Fit position probes before training: linear maps from a module's inputs to the position in a conversation."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from loracast.base.capture import capture_inputs
from loracast.base.load import Base
from loracast.batching import pad_right
from loracast.encoders.attention_delta import POSITIONS, tokens_around_input
from loracast.lora.algebra import LoRABatch
from loracast.lora.inject import inject
from loracast.training.task_source import TaskSource

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
