"""Fits a LoRA to a task's examples, by ridge regression on what the other examples add to attention at each one.

Each example is read behind the description and the other examples, with its answer: once as the text that the
hypernetwork reads, once as turns of a conversation. At every token t, a layer misses the attention delta y_t, the mean
of the two, once nothing of this is in the prompt. What it has then, under the LoRA cast so far, are the inputs of
attention's output projection and of the MLP's, which x_t joins, each scaled to a mean square of 1. In each layer, the
fitted LoRA is a share of the best linear map from one to the other,

    min over W of  sum over t of w_t |y_t - W x_t|^2 + ridge |W|^2

whose columns for each projection are cut to a small rank. The columns that a hypernetwork casts are means over tokens;
these differ from token to token. The MLP's inputs are features that no linear map of attention's outputs can make.
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
MLP_KIND = "down_proj"
"""Kind of the output projections of MLPs."""
# Chosen on the tasks of benchmarks/unseen_tasks.py (docs/notebook/2026-11-28.md; the rank 2026-12-01.md).
RANK = 8
"""Rank of the fitted LoRA in each module."""
_RIDGE = 0.1
"""Of the mean of |x_t|^2."""
_SHARE = 0.7
"""Of the fitted map that is written: the hypernetwork's own columns write their part beside it."""
_BEFORE_ANSWER = 0.1
"""Weight of a token before the answer; the others have 1."""
_MOST_READ = 8
"""Examples that are read behind the others, of all groups together; each takes three forward passes."""


def fit_examples(
    encoder: AttentionDeltaEncoder, groups: Sequence[TaskSpec], projections: Sequence[Sequence[str]], lora: LoRABatch
) -> LoRA:
    """Fit a LoRA to examples of a task.

    Args:
        groups: the task in groups of examples that are read together.
        projections: modules that the LoRA is for, kind by kind one for each layer that the encoder reads: attention's
            output projections, the MLP's, or both.
        lora: what the hypernetwork has cast for the task, 1 row; the fitted LoRA joins it.

    Returns:
        the fitted LoRA; an empty one where nothing stands before any example.
    """
    pairs = behind_the_others(groups)
    if not pairs:
        return LoRA()
    names = [name for kind in projections for name in kind]
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    ys, weights = [], []
    for spec, example in pairs:
        read = two_views(encoder, spec, example)
        n = read.deltas.shape[1]
        for name, x in encoder.module_inputs(names, read.ids, lora).items():
            inputs[name].append(x[-n:])
        ys.append(read.deltas)
        weights.append(torch.where(torch.arange(n) < read.n_input, _BEFORE_ANSWER, 1.0))
    y, w = torch.cat(ys, dim=1), torch.cat(weights).to(ys[0])
    fitted: dict[str, Factors] = {}
    for i, of_layer in enumerate(zip(*projections, strict=True)):
        sides, rows = ridge([torch.cat(inputs[name]) for name in of_layer], y[i], w, _RIDGE)
        whole = {name: Factors(a, _SHARE * rows.T) for name, a in zip(of_layer, sides, strict=True)}
        fitted |= compress(LoRA(whole), RANK)[0].factors
    return LoRA(fitted)


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


def ridge(xs: Sequence[Tensor], y: Tensor, weights: Tensor, strength: float) -> tuple[list[Tensor], Tensor]:
    """Ridge regression of y on several inputs together: y_t is about the sum of the B^T A x_t.

    Each input is scaled so that the weighted mean of |x_t|^2 is 1, so that one strength suits them all.

    Args:
        xs: inputs, each [t, d_in] with a d_in of its own.
        y: [t, d_out].
        weights: of the t rows [t].
        strength: of the ridge, as a share of the mean of the weighted square of all inputs together.

    Returns:
        for each input A [t, d_in], and B rows [t, d_out], which all of them share.
    """
    tiny, root = torch.finfo(y.dtype).tiny, weights.sqrt()[:, None]
    xs, y = [x * root for x in xs], y * root
    scales = [(x.square().sum() / weights.sum()).clamp_min(tiny).rsqrt() for x in xs]
    scaled = torch.cat([x * scale for x, scale in zip(xs, scales, strict=True)], dim=1)
    # W = Y^T (X X^T + ridge)^-1 X, since few examples have fewer rows than a row has numbers.
    gram = scaled @ scaled.T  # [t, t]
    diagonal = gram.diagonal()
    diagonal += (strength * diagonal.mean()).clamp_min(tiny)
    solved = torch.linalg.solve(gram, scaled).split([x.shape[1] for x in xs], dim=1)
    return [a * scale for a, scale in zip(solved, scales, strict=True)], y
