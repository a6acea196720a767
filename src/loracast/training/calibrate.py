"""Measure, once before training, the units in which a base thinks: what its features and target modules look like on real text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loracast.base import Base
from loracast.encoders.context import ContextEncoder
from loracast.hypernets.doc_to_lora import DocToLoRA


@torch.no_grad()
def calibrate(hypernet: DocToLoRA, base: Base, encoder: ContextEncoder, rows: Sequence[Tensor]) -> None:
    """Set the units of `hypernet` from `rows` of real text's token ids, each [1, t].

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
    if hypernet.memory is not None:
        keys = torch.cat([f.keys[0, :, 1:] for f in features if f.keys is not None], dim=1).float()  # [modules, t, in]
        stop = torch.tensor([base.chat.end_of_turn], device=base.device)
        hypernet.memory.set_units(keys.mean(1), keys.std(1), encoder.values(stop)[0])
    if hypernet.config.whitened:
        inputs, outputs = by_kind(squares_in), by_kind(squares_out)
        for kind in hypernet.config.kinds:
            hypernet.head(kind).set_units(inputs[kind], outputs[kind])
