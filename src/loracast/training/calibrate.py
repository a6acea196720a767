"""Measure, once before training, the units in which a base thinks: what its features and target modules look like on real text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loracast.base import Base
from loracast.encoders.context import ContextEncoder
from loracast.errors import TrainingError
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.hypernets.memory import N_PLACES, AssociativeMemory
from loracast.training.episodes import Question


@torch.no_grad()
def calibrate(
    hypernet: DocToLoRA, base: Base, encoder: ContextEncoder, rows: Sequence[Tensor], asked: Sequence[Question]
) -> None:
    """Set the units of `hypernet` from `rows` of real text's token ids, each [1, t], and from questions with their answers.

    The first token of a row is left out: its activations are an attention sink, hundreds of times larger than any other's.
    """
    target = hypernet.config.target
    squares_in: dict[str, Tensor] = {}
    squares_out: dict[str, Tensor] = {}
    n_tokens = sum(row.shape[1] - 1 for row in rows)

    def measure(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for squares, x in ((squares_in, inputs[0]), (squares_out, output)):
                total = x[:, 1:].float().square().sum((0, 1))
                squares[name] = squares.get(name, torch.zeros_like(total)) + total

        return hook

    modules = dict(base.model.named_modules())
    handles = [modules[module.name].register_forward_hook(measure(module.name)) for module in target.modules]
    try:
        for row in rows:
            base.model.get_decoder()(input_ids=row, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    features = [encoder(row) for row in rows]

    def by_kind(squares: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            kind: torch.stack([(squares[m.name] / n_tokens).sqrt() for m in target.of_kind(kind)])
            for kind in hypernet.config.kinds
        }

    hypernet.standardise(torch.cat([f.states[..., 1:, :].float().flatten(0, -2) for f in features]))
    if hypernet.config.whitened:
        inputs, outputs = by_kind(squares_in), by_kind(squares_out)
        for kind in hypernet.config.kinds:
            hypernet.head(kind).set_units(inputs[kind], outputs[kind])
    if hypernet.memory is not None:
        set_memory_units(hypernet.memory, base, encoder, rows, asked)


@torch.no_grad()
def set_memory_units(
    memory: AssociativeMemory, base: Base, encoder: ContextEncoder, rows: Sequence[Tensor], asked: Sequence[Question]
) -> None:
    """Set the units of a memory: its keys' over rows and questions, and at each place of the answers."""

    def keys_of(row: Tensor) -> Tensor:  # [1, t] -> [modules, t, in]
        keys = encoder(row).keys
        assert keys is not None, "the encoder of a memory reads keys"
        return keys[0].float()

    seen = [keys_of(row)[:, 1:] for row in rows]
    at_places: list[list[Tensor]] = [[] for _ in range(N_PLACES)]
    for question in asked:
        keys = keys_of(torch.tensor([[*question.prompt, *question.answer]], device=base.device))
        seen.append(keys[:, 1:])
        for place in range(len(question.answer)):  # where the answer's tokens are predicted from
            at_places[min(place, N_PLACES - 1)].append(keys[:, len(question.prompt) - 1 + place])
    if not all(at_places):
        raise TrainingError(f"no answer among those to calibrate on has {N_PLACES} tokens; give more varied data")
    everything = torch.cat(seen, dim=1)  # [modules, t, in]
    means = torch.stack([torch.stack(keys).mean(0) for keys in at_places], dim=1)  # [modules, places, in]
    stop = torch.tensor([base.chat.end_of_turn], device=base.device)
    memory.set_units(everything, means, encoder.values(stop)[0])
