"""Plans a training of Doc-to-LoRA before anything is loaded: parameters, memory and time, from configs alone.

Runs a training step on tensors without data: its peak of memory and its computation, from configs alone.

The step is the real one: the same modules, hooks, precision and gradient checkpointing, forward and backward. What is
alive is counted at every operation, so no formula has to know what an architecture keeps for its backward pass.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import time
import tomllib
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from loracast.base.chat import ChatFormat, encode_with_offsets
from loracast.base.embedded import DEFAULT_BASE, Say, embedded, pull, quiet_transformers
from loracast.base.footprint import Quantization, footprint
from loracast.base.forward import capture_inputs, under_loras
from loracast.errors import BaseModelError, ConfigError
from loracast.files import folder_of
from loracast.hypernets.config import DocToLoRAConfig
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.lab.data.everyday import make_document
from loracast.lab.training.doc import DocRecipe, doc_config, merged
from loracast.lab.training.document_source import EpisodeSource
from loracast.lab.training.recipe import file_overrides, read_recipe
from loracast.lab.training.scoring import Batch, Passes, checkpointed_blocks, length_groups, pack
from loracast.lora.algebra import LoRABatch


def read_base_config(source: str | Path | None, say: Say = lambda text: None) -> Any:
    """The config of an embedded base, or of one in a folder or a hub repository, in transformers' form.

    Nothing but config.json is fetched or read of a base that is not embedded.

    Raises:
        BaseModelError: there is none.
    """
    from transformers import AutoConfig

    name = str(source) if source is not None else DEFAULT_BASE
    where = (
        pull(name, say=say) if name in embedded("base") else folder_of(name, ("config.json",), "base", BaseModelError)
    )
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"the base {name!r} has no config of transformers ({error})") from error


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
    """Memory and operations of a step."""

    peak: int
    """Bytes alive at its peak, gradients included, without weights and the optimizer's state."""
    flops: int
    """Floating-point operations of its matrix products, forward and backward."""


@dataclass(frozen=True)
class Machine:
    """The kind of device, the type of weights and the precision that a step runs with."""

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
        with Counter(model, hypernet) as counter:
            _step(model, hypernet, even, machine, passes.checkpoint_activations)
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


def _step(model: Any, hypernet: DocToLoRA, shape: StepShape, machine: Machine, is_checkpointed: bool) -> None:
    """One step as `training.doc.answer_questions` has it, with losses that keep what the real ones keep."""
    base: Any = SimpleNamespace(model=model, tokenizer=None, fingerprint=SimpleNamespace(matrices=""))
    size = len(shape.chunks), max(shape.chunks)
    with torch.autocast("cpu", torch.bfloat16, enabled=machine.autocast):
        encoder = hypernet.hidden_states_encoder(base)
        vars(encoder)["_start_ids"] = lambda ids: ids  # which tokens begin an answer is looked up by their text
        features = encoder(torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool))
        assert features.mask is not None
        rows, writes = hypernet.rows_and_writes(features, features.mask)
        loras = merged(hypernet, rows, shape.chunks_per_document)
        keys = [name for name, *_ in hypernet.config.memory_modules]
        hidden, inputs = _run(model, loras, shape, keys, torch.device(machine.device), is_checkpointed)
        logits = model.get_output_embeddings()(hidden).float()
        if cap := getattr(model.config.get_text_config(), "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        loss = functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        if writes is not None:
            loss = loss + writes.pointer_scores.log_softmax(-1).mean() + writes.gate_logits.float().square().mean()
            for name, x in inputs.items():  # each answer token against all written tokens of the step
                loss = loss + (x.float() @ loras.factors[name].a.float().flatten(0, 1).T).logsumexp(-1).mean()
    loss.backward()


def _run(
    model: Any, loras: LoRABatch, shape: StepShape, keys: list[str], device: torch.device, is_checkpointed: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Last hidden states, and the inputs of the memory's modules, at the answers' tokens."""
    decoder = model.get_decoder()
    d, t, n = len(shape.rows), max(length for length, _ in shape.rows), sum(n for _, n in shape.rows)
    gates = {name: torch.zeros(d, t, loras.factors[name].a.shape[1]) for name in keys}
    recomputed = checkpointed_blocks(model, loras, device, gates) if is_checkpointed else nullcontext()
    with under_loras(model, loras, device, gates), recomputed, capture_inputs(model, keys) as found:
        ids = torch.zeros(d, t, dtype=torch.long)
        is_eager = decoder.config._attn_implementation == "eager"
        mask = torch.zeros(d, 1, t, t, dtype=model.dtype if is_eager else torch.bool)
        states = decoder(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False).last_hidden_state
    at = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    return states[at], {name: x[at] for name, x in found.items()}


UTILISATION = 0.3
"""Share of a GPU's stated throughput that a training step is taken to reach: an assumption, not a measurement."""
CUDA_BYTES = 800_000_000
"""What CUDA and its libraries keep for themselves: an assumption."""
FRAGMENTS = 0.08
"""What a GPU's allocator holds beyond what is alive, as a share of all: an assumption."""
CPU_BYTES = 250_000_000
"""What a step on a CPU holds beyond its tensors: 0.17 to 0.34 GB was measured (docs/any-base.md)."""
MEASURE_S = 10.0
"""How long this machine is measured."""
_ADAM = 8
"""Bytes of AdamW's two moments for a parameter; its update holds as many for a moment, after the gradients."""
_DRAWN = 4
"""Steps of each kind that are drawn; the largest is planned for."""


@dataclass(frozen=True)
class GPU:
    """A GPU as its maker's data sheet has it."""

    name: str
    memory_gb: float
    tflops: float
    """Of dense bf16 matrix products."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training."""

    base: int
    """The base's frozen weights."""
    hypernetwork: int
    """Weights and two moments of AdamW for each parameter, in float32."""
    step: int
    """Gradients and activations at the peak of the largest step."""
    overhead: int
    """CUDA's own, and what an allocator holds beyond what is alive."""

    @property
    def total(self) -> int:
        return self.base + self.hypernetwork + self.step + self.overhead


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on a base."""

    base_parameters: int
    hypernetwork_parameters: int
    memory: Memory
    context_tokens: float
    """Tokens of documents in a step, on average."""
    row_tokens: float
    """Tokens of questions and answers in a step, on average."""
    flops: float
    """Floating-point operations of an optimizer step, on average."""
    steps: int

    def hours(self, flops_per_s: float) -> float:
        """Hours for all steps at a throughput."""
        return self.steps * self.flops / flops_per_s / 3600


def gpus(wanted: str) -> list[GPU]:
    """The GPUs of a name such as "RTX 4090", or with a memory such as "24GB".

    Raises:
        ConfigError: no such GPU is in the table.
    """
    table = tomllib.loads((files("loracast") / "lab" / "training" / "gpus.toml").read_text(encoding="utf-8"))["gpus"]
    known = [GPU(**one) for one in table]
    key = wanted.lower().replace(" ", "")
    if found := [gpu for gpu in known if key in (gpu.name.lower().replace(" ", ""), f"{gpu.memory_gb:g}gb")]:
        return found
    names = ", ".join(gpu.name for gpu in known)
    raise ConfigError(f"no GPU {wanted!r}: give one of {names}, or a memory that one of them has, such as 24GB")


class Planner:
    """Plans one recipe for one base on one machine."""

    def __init__(self, base_config: Any, tokenizer: Any, recipe: Path | None, change: Sequence[str], machine: Machine):
        """Draw steps of the recipe.

        Args:
            base_config: in transformers' form.
            change: overrides of the recipe.
        """
        self.base_config = base_config
        # Files of documents are stood in for by generated ones, as long as the recipe lets documents be.
        with tempfile.TemporaryDirectory() as folder:
            stand_in = Path(folder) / "documents.jsonl"
            files = file_overrides(texts=[str(stand_in)], documents=[str(stand_in)])
            sources = ["data.text_sources=[]", "data.document_sources=[]"]
            self.recipe = read_recipe(DocRecipe(), recipe, [*change, *files, *sources])
            _write_documents(stand_in, self.recipe, tokenizer)
            source = EpisodeSource(self.recipe.data, tokenizer, ChatFormat(tokenizer))
        self.machine = replace(machine, autocast=machine.autocast and self.recipe.training.bf16)
        self.config = doc_config(base_config, tokenizer, self.recipe)
        self._shapes = [
            (share, [shape_of(pack(source.of_kind(kind, n), 0)) for n in range(_DRAWN)])
            for kind, share in self.recipe.data.shares.items()
            if share > 1e-9
        ]
        self._costs: dict[Passes, StepCost] = {}
        self._largest = max((shape for _, shapes in self._shapes for shape in shapes), key=_size)

    def plan(self, quantization: Quantization | None = None, passes: Passes | None = None) -> Plan:
        """The plan, of the recipe as it is or with other passes or a quantized base."""
        base = footprint(self.base_config, self.machine.dtype, quantization)
        with torch.device("meta"):
            n = sum(parameter.numel() for parameter in DocToLoRA(self.config).parameters())
        training = self.recipe.training
        passes = passes or training.passes
        if passes not in self._costs:
            self._costs[passes] = step_cost(self.base_config, self.config, self._largest, self.machine, passes)
        cost = self._costs[passes]

        def mean(size: Callable[[StepShape], int]) -> float:
            """The mean size of a step's batches together, over the kinds of episodes by their shares."""
            weighed = ((training.accumulate * share / _DRAWN, s) for share, shapes in self._shapes for s in shapes)
            return sum((weight * size(shape) for weight, shape in weighed), 0.0)

        context, rows = mean(lambda s: sum(s.chunks)), mean(lambda s: sum(length for length, _ in s.rows))
        flops = cost.flops * mean(_size) / _size(self._largest)
        held = base.weights, (4 + _ADAM) * n, max(cost.peak, _ADAM * n)
        is_gpu = self.machine.device == "cuda"
        overhead = round(CUDA_BYTES + FRAGMENTS * sum(held) if is_gpu else CPU_BYTES)
        memory = Memory(*held, overhead)
        return Plan(base.n_parameters, n, memory, context, rows, flops, training.steps)

    def remedies(self, most: float) -> list[str]:
        """What would make a step fit into so many bytes, by the planned peak."""
        training, data = self.recipe.training, self.recipe.data
        found = []
        checkpointed = replace(training.passes, checkpoint_activations=True)
        kinds = (None, *get_args(Quantization))
        fitting = [kind for kind in kinds if self.plan(kind, checkpointed).memory.total <= most]
        if None in fitting and not training.checkpoint_activations:
            found.append("with --set training.checkpoint_activations=true it fits")
        if quantization := next(filter(None, fitting), None):
            found.append(f"with a base quantized to {quantization} and training.checkpoint_activations=true it fits")
        halved = f"data.questions_per_step={max(1, data.questions_per_step // 2)}"
        halved += f" --set data.context_tokens_per_step={data.context_tokens_per_step // 2}"
        return [*found, f"half the step: --set {halved} --set training.accumulate={2 * training.accumulate}"]

    def measured_flops_per_s(self, device: str) -> float:
        """The throughput of this machine: forward and backward passes of one block of the base, of random weights."""
        from transformers import AutoModelForCausalLM

        lengths = sorted(length for length, _ in self._largest.rows)
        size = len(lengths), lengths[len(lengths) // 2]
        text = copy.deepcopy(self.base_config.get_text_config())
        text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 8, None
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_config(text, dtype=self.machine.dtype)
        block = model.get_decoder().to(device).eval().requires_grad_(False)
        states = torch.randn(*size, text.hidden_size, dtype=self.machine.dtype, device=device, requires_grad=True)

        def run() -> None:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.machine.autocast):
                block(inputs_embeds=states, use_cache=False).last_hidden_state.float().square().mean().backward()
            if device.startswith("cuda"):
                torch.cuda.synchronize()

        with Counter(model) as counter:
            run()
        n, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < MEASURE_S or not n:
            run()
            n += 1
        return n * counter.flops / elapsed


def _write_documents(file: Path, recipe: DocRecipe, tokenizer: Any) -> None:
    """Write generated documents with questions, short ones and some as long as the recipe's longest."""
    rng, most = random.Random(0), recipe.data.max_chunks * recipe.data.max_chunk_tokens
    with open(file, "w", encoding="utf-8") as out:
        for i in range(48):
            parts = [make_document(rng, split="train") for _ in range(1 + i % 6)]
            text = "\n\n".join(part.text for part in parts)
            facts = [fact for part in parts for fact in part.facts if fact.kind == "span"]
            offsets = encode_with_offsets(tokenizer, text)[1]
            if len(offsets) > most:
                text = text[: offsets[most - 1][0]].rstrip()
                facts = [fact for fact in facts if fact.statement in text]
            asked = [{"question": f.question, "answers": [f.answer], "span": True} for f in facts]
            out.write(json.dumps({"document": text, "questions": asked}) + "\n")


def shape_of(batch: Batch) -> StepShape:
    """The lengths in a batch."""
    rows = torch.bincount(batch.answer_rows, minlength=len(batch.input_ids)).tolist()
    chunks = tuple(batch.chunk_mask.sum(1).clamp_min(1).tolist())
    return StepShape(chunks, batch.chunks_per_document, tuple(zip(batch.row_lengths, rows, strict=True)))


def _size(shape: StepShape) -> int:
    """How large a step is among others: its tokens with padding, those with a backward pass thrice."""
    return len(shape.chunks) * max(shape.chunks) + 3 * len(shape.rows) * max(length for length, _ in shape.rows)
