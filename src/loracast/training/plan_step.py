"""Runs a training step on tensors without data: its peak of memory and its computation, from configs alone.

The step is the real one: the same modules, hooks, precision and gradient checkpointing, forward and backward. What is
alive is counted at every operation, so no formula has to know what an architecture keeps for its backward pass.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from loracast.base.capture import capture_inputs
from loracast.base.checkpointing import checkpointed_blocks
from loracast.base.embedded import quiet_transformers
from loracast.batching import length_groups
from loracast.encoders.features import Features
from loracast.hypernets.doc_config import DocToLoRAConfig
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.lora.algebra import LoRABatch
from loracast.scoring.likelihood import Passes, under_loras


@dataclass(frozen=True)
class StepShape:
    """The lengths in one step's batch."""

    chunks: tuple[int, ...]
    """Tokens of each chunk."""
    chunks_per_document: int
    rows: tuple[tuple[int, int], ...]
    """By document, the tokens of its row of questions and of their answers."""

    def evened(self, n: int) -> StepShape:
        """The shape with chunks and rows of equal lengths: those that they have on average, padded in `n` groups.

        It holds as many tokens, and takes as much, without a run for each group.
        """
        chunks = _mean_padded(self.chunks, n)
        rows = _mean_padded([length for length, _ in self.rows], n)
        return replace(self, chunks=(chunks,) * len(self.chunks), rows=tuple((rows, k) for _, k in self.rows))


def _mean_padded(lengths: Sequence[int], n: int) -> int:
    """The mean length of sequences that are padded in at most n groups of similar length, rounded up."""
    groups = length_groups(lengths, n)
    return -(-sum(len(group) * lengths[group[0]] for group in groups) // len(lengths))


@dataclass(frozen=True)
class StepCost:
    """What a step takes."""

    peak: int
    """Bytes alive at its peak, gradients included, without weights and the optimizer's state."""
    flops: int
    """Floating-point operations of its matrix products, forward and backward."""


@dataclass(frozen=True)
class Machine:
    """Where a step runs, as far as its memory depends on it."""

    device: str
    """Type of device, such as "cuda" or "cpu"."""
    dtype: torch.dtype
    """Of the base's weights."""
    autocast: bool
    """Whether the rest computes in bf16."""


def step_cost(
    base_config: Any, config: DocToLoRAConfig, shape: StepShape, machine: Machine, passes: Passes
) -> StepCost:
    """Run one step of `shape` without data.

    Args:
        base_config: in transformers' form.
        config: of the hypernetwork.
    """
    from transformers import AutoModelForCausalLM

    even = shape.evened(passes.length_groups)
    with torch.device("meta"), quiet_transformers():
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(base_config), dtype=machine.dtype)
        hypernet = DocToLoRA(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").eval().requires_grad_(False)
        hypernet.to_empty(device="cpu").train()
        precision = torch.autocast("cpu", torch.bfloat16, enabled=machine.autocast)
        with Counter(model, hypernet) as counter:
            _step(model, hypernet, even, torch.device(machine.device), precision, passes.checkpoint_activations)
        return StepCost(counter.peak, counter.flops)


class Counter(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they are alive, and floating-point operations.

    Views of the weights of the given modules are no new tensors.
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.peak = self.flops = self._now = 0
        held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # fake tensors ask for their device twice as often as for the rest
            return args[0].fake_device
        made = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += n_bytes
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key, n_bytes)

    def _free(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self._now -= n_bytes


def _step(
    model: Any, hypernet: DocToLoRA, shape: StepShape, device: torch.device, precision: Any, is_checkpointed: bool
) -> None:
    """One step as `training.doc.answer_questions` has it, with losses that keep what the real ones keep."""
    with precision:
        features = _read(model, hypernet, shape)
        assert features.mask is not None
        rows, writes = hypernet.rows_and_writes(features, features.mask)
        loras = hypernet.merge(rows, shape.chunks_per_document)
        keys = [name for name, *_ in hypernet.config.memory_modules]
        hidden, inputs = _run(model, loras, shape, keys, device, is_checkpointed)
        logits = model.get_output_embeddings()(hidden).float()
        if cap := getattr(model.config.get_text_config(), "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        loss = functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        if writes is not None:
            loss = loss + writes.pointer_scores.log_softmax(-1).mean() + writes.gate_logits.float().square().mean()
            for name, x in inputs.items():  # each answer token against all written tokens of the step
                loss = loss + (x.float() @ loras.factors[name].a.float().flatten(0, 1).T).logsumexp(-1).mean()
    loss.backward()


def _read(model: Any, hypernet: DocToLoRA, shape: StepShape) -> Features:
    base: Any = SimpleNamespace(model=model, tokenizer=None, fingerprint=SimpleNamespace(matrices=""))
    encoder = hypernet.hidden_states_encoder(base)
    vars(encoder)["_start_ids"] = lambda ids: ids  # which tokens begin an answer is looked up by their text
    size = len(shape.chunks), max(shape.chunks)
    return encoder(torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool))


def _run(
    model: Any, loras: LoRABatch, shape: StepShape, keys: list[str], device: torch.device, is_checkpointed: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Last hidden states, and the inputs of the memory's modules, at the answers' tokens."""
    decoder = model.get_decoder()
    d, t, n = len(shape.rows), max(length for length, _ in shape.rows), sum(n for _, n in shape.rows)
    gates = {name: torch.zeros(d, t, loras.factors[name].a.shape[1]) for name in keys}
    prepared = partial(under_loras, model, loras, gates, device)
    recomputed = checkpointed_blocks(decoder, prepared) if is_checkpointed else nullcontext()
    with prepared(), recomputed, capture_inputs(model, keys) as found:
        ids = torch.zeros(d, t, dtype=torch.long)
        is_eager = decoder.config._attn_implementation == "eager"
        mask = torch.zeros(d, 1, t, t, dtype=model.dtype if is_eager else torch.bool)
        states = decoder(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False).last_hidden_state
    at = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    return states[at], {name: x[at] for name, x in found.items()}
