"""Fits a LoRA to a task's examples, by ridge regression on what the other examples add to attention at each one.

Each example is read behind the description and the other examples, with its answer: once as the text that the
hypernetwork reads, once as turns of a conversation. At every token t, attention's output projection misses the
attention delta y_t, the mean of the two, once nothing of this is in the prompt, and gets the input x_t then, under the
LoRA cast so far. In each layer, the fitted LoRA is a share of the best linear map from one to the other,

    min over W of  sum over t of w_t |y_t - W x_t|^2 + ridge |W|^2

cut to a small rank. The columns that a hypernetwork casts are means over tokens; this one differs from token to token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loracast.data.task_examples import TaskSpec
from loracast.data.tasks import Example
from loracast.encoders.attention_delta import AttentionDeltaEncoder, TokenDeltas
from loracast.lora.algebra import Factors, LoRA, LoRABatch, compress

FEWEST_EXAMPLES = 2
RANK = 16
"""Rank of the fitted LoRA."""
# Chosen on the tasks of benchmarks/unseen_tasks.py (docs/notebook/2026-11-28.md).
_RIDGE = 0.1
"""Of the mean of |x_t|^2."""
_SHARE = 0.7
"""Of the fitted map that is written: the hypernetwork's own columns write their part beside it."""
_BEFORE_ANSWER = 0.1
"""Weight of a token before the answer; the others have 1."""
_MOST_READ = 8
"""Examples that are read behind the others, of all groups together; each takes three forward passes."""


def fit_examples(
    encoder: AttentionDeltaEncoder, groups: Sequence[TaskSpec], names: Sequence[str], lora: LoRABatch
) -> LoRA:
    """Fit a LoRA to examples of a task.

    Args:
        groups: the task in groups of examples that are read together.
        names: the attention's output projections, one for each layer that the encoder reads.
        lora: what the hypernetwork has cast for the task, 1 row; the fitted LoRA joins it.

    Returns:
        the fitted LoRA; an empty one where nothing stands before any example.
    """
    pairs = behind_the_others(groups)
    if not pairs:
        return LoRA()
    xs, ys, weights = [], [], []
    for spec, example in pairs:
        read = two_views(encoder, spec, example)
        n = read.deltas.shape[1]
        xs.append(encoder.outputs_of_attention(read.ids, lora)[:, -n:])
        ys.append(read.deltas)
        weights.append(torch.where(torch.arange(n) < read.n_input, _BEFORE_ANSWER, 1.0))
    x, y = torch.cat(xs, dim=1), torch.cat(ys, dim=1)
    a, b = ridge(x, y, torch.cat(weights).to(x), _RIDGE)
    fitted = LoRA({name: Factors(a[i], _SHARE * b[i].T) for i, name in enumerate(names)})
    return compress(fitted, RANK)[0]


def two_views(encoder: AttentionDeltaEncoder, spec: TaskSpec, example: Example) -> TokenDeltas:
    """The attention deltas of a task at an example: the mean of those of a text and of turns of a conversation."""
    text, turns = encoder.at_example(spec.text(), example), encoder.after_turns(spec, example)
    n = min(text.deltas.shape[1], turns.deltas.shape[1])  # the input's first token may change after a text
    return replace(
        text,
        deltas=(text.deltas[:, -n:] + turns.deltas[:, -n:]) / 2,
        n_input=text.n_input - text.deltas.shape[1] + n,
    )


def behind_the_others(groups: Sequence[TaskSpec], most: int = _MOST_READ) -> list[tuple[TaskSpec, Example]]:
    """At most so many examples, spread evenly over all, each with what stands before it.

    That is the rest of its group, those after it first.
    """
    pairs = []
    for group in groups:
        for i, example in enumerate(group.examples):
            others = (*group.examples[i + 1 :], *group.examples[:i])
            pairs.append((replace(group, examples=others), example))
    pairs = [(spec, example) for spec, example in pairs if spec.text()]
    n = min(len(pairs), most)
    return [pairs[i * len(pairs) // n] for i in range(n)]


def ridge(x: Tensor, y: Tensor, weights: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Ridge regression of y on x in factors, W = B^T A, layer by layer.

    Args:
        x: [layers, t, d_in].
        y: [layers, t, d_out].
        weights: of the t rows [t].
        strength: of the ridge, as a share of the mean of the weighted |x_t|^2.

    Returns:
        A [layers, t, d_in] and B rows [layers, t, d_out].
    """
    root = weights.sqrt()[None, :, None]
    x, y = x * root, y * root
    gram = x.transpose(1, 2) @ x
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += (strength * diagonal.sum(1) / x.shape[1]).clamp_min(torch.finfo(x.dtype).tiny)[:, None]
    return torch.linalg.solve(gram, x.transpose(1, 2)).transpose(1, 2), y
