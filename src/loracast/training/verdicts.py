"""Fit the part of a memory that tells from a sentence whether a rule holds, before training.

Generated everyday documents state rules that hold and rules that do not ("Dogs are welcome.", "Please leave your dog at
home."). Two logistic regressions on the mean state of a sentence tell each of the two from all other sentences.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from loracast.base.chat import encode_with_offsets
from loracast.base.load import Base
from loracast.data.everyday import make_document
from loracast.data.spans import tokens_between
from loracast.documents import split_text
from loracast.encoders.hidden_states import HiddenStatesEncoder
from loracast.errors import ConfigError
from loracast.hypernets.doc_to_lora import DocToLoRA

N_DOCUMENTS = 1000
"""Generated documents whose sentences are read, of which about 1,100 state a rule."""
_STRENGTH = 6.0  # of a verdict beside a value that is written (chosen on dev: docs/notebook/2026-11-29.md)
_RIDGE = 500.0  # on the squared weights, beside the sum of the sentences' losses
_MOST_STEPS = 200


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
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_MOST_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = functional.binary_cross_entropy_with_logits(states @ weight.T + bias, labels, shares, reduction="sum")
        total = losses + _RIDGE * weight.square().sum()
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
