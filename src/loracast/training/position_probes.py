"""Where the LoRA of a task has to write, found once before training: which direction of what enters a module tells the place in a conversation."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from loracast.base.capture import capture_inputs
from loracast.base.load import Base
from loracast.batching import pad_right
from loracast.encoders.attention_delta import POSITIONS, tokens_around_input
from loracast.hypernets.attention_delta import AttentionDeltaToLoRA
from loracast.lora.inject import inject
from loracast.training.task_source import TaskSource

_N_EXAMPLES = 256
_AT_ONCE = 16
_RIDGE = 1e-3  # of the mean square of an input
_ELSEWHERE = "elsewhere"


@torch.no_grad()
def set_places(hypernet: AttentionDeltaToLoRA, base: Base, source: TaskSource) -> None:
    """Let the first rows of each A be 1 at one of the `POSITIONS` and 0 at the others, as nearly as a linear map can.

    Weighted least squares on training examples, where every place counts alike; the base carries what all descriptions share, as it will.
    """
    rows = _examples(base, source)
    n_of = {place: max(1, sum(places.count(place) for _, places in rows)) for place in (*POSITIONS, _ELSEWHERE)}
    c = hypernet.config
    layers = set(c.layers)
    names = [name for name, layer, kind, *_ in c.modules if kind == c.kind and layer in layers]
    gram: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        ids, real = pad_right([row for row, _ in some], base.pad_id)
        where = [place for _, places in some for place in places]
        weights = torch.tensor([1 / n_of[place] for place in where], device=base.device)
        wanted = torch.stack([torch.tensor([float(place == each) for place in where]) for each in POSITIONS]).to(
            weights
        )
        with inject(base.model, hypernet.encoder_lora_batch()), capture_inputs(base.model, names) as inputs:
            base.model.get_decoder()(input_ids=ids.to(base.device), use_cache=False)
        for name, x in inputs.items():
            x = x[real.to(x.device)].float()  # [tokens, d_in]
            weighted = x * weights[:, None]
            gram[name] = gram.get(name, 0) + weighted.T @ x
            moments[name] = moments.get(name, 0) + wanted @ weighted
    for i, name in enumerate(names):
        ridge = _RIDGE * gram[name].diagonal().mean() * torch.eye(len(gram[name]), device=gram[name].device)
        hypernet.where[i, : len(POSITIONS)] = torch.linalg.solve(gram[name] + ridge, moments[name].T).T


def _examples(base: Base, source: TaskSource) -> list[tuple[list[int], list[str]]]:
    """Token ids of training examples, and the place of each token."""
    rng = random.Random(0)
    n_before, n_after = tokens_around_input(base.chat)
    rows = []
    for _ in range(_N_EXAMPLES):
        example = rng.choice(source.short_enough(rng.choice(source.tasks)))
        prompt, answer = base.chat.prompt(example.input, ""), base.chat.reply(example.outputs[0])[:-1]
        n_input = len(prompt) - n_before - n_after
        told = [_ELSEWHERE] * n_before + ["input"] * n_input + ["turn"] * (n_after - 1)
        places = [*told, "start", *["answer"] * len(answer)]
        rows.append(([*prompt, *answer], places))
    return rows
