"""A base in 8 or 4 bits computes what it does with its weights dequantised, also under LoRAs; and it is the same base."""

from __future__ import annotations

import copy
import warnings
from contextlib import closing
from importlib.util import find_spec

import pytest
import torch

import loracast
from loracast.base.footprint import LIBRARIES, check_quantize
from loracast.base.generate import Sampling, answers
from loracast.base.load import Base, load_base
from loracast.errors import AdapterError, BaseModelError, ConfigError
from loracast.lora.algebra import LoRA, inject
from loracast.lora.factors import Factors
from loracast.serving.engine import LocalEngine
from loracast.serving.generation import GenerationRequest
from tiny import make_model, make_tokenizer

BOUND = 1e-5  # of the largest logit: the order of summation, in float32
QUESTIONS = (
    "What is the capital of France?", "Name three colours.", "How many days has a week?", "What do bees make?",
    "Who wrote Hamlet?", "What is water made of?", "Why is the sky blue?", "Write a sentence about a dog.",
    "What is 7 times 8?", "Translate 'good morning' into French.", "What is the largest planet?",
    "Give a synonym of happy.", "What is photosynthesis?", "How do I boil an egg?", "What is the opposite of hot?",
    "Tell me a fact about the moon.", "What language is spoken in Brazil?", "What is a noun?",
    "Who painted the Mona Lisa?", "How long is a marathon?",
)  # fmt: skip
each_quantization = pytest.mark.parametrize(
    "quantize",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                find_spec(library) is None, reason=f"needs {library}: pip install 'loracast[quantize]'"
            ),
        )
        for name, library in LIBRARIES.items()
    ],
)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tmp_path_factory):
    """A tiny base whose matrices are wide enough to be quantized in whole groups."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def dequantised(base: Base, quantize: str) -> Base:
    """The same base with plain linear modules, whose weights the library itself has dequantised."""
    model = copy.deepcopy(base.model)
    if quantize == "4bit":
        model = model.dequantize(dtype=torch.float32)
    else:
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    assert all(type(m.weight) is torch.nn.Parameter for m in model.modules() if isinstance(m, torch.nn.Linear))
    return Base(base.name, model.eval(), base.tokenizer)


def lora_for(base: Base, seed: int, rank: int = 3) -> LoRA:
    """A random LoRA of all linear modules of two layers that changes the logits as much as the base's own noise."""
    free = torch.Generator().manual_seed(seed)
    names = [n for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    sizes = {n: (base.model.get_submodule(n).out_features, base.model.get_submodule(n).in_features) for n in names}
    return LoRA(
        {
            name: Factors(torch.randn(rank, d_in, generator=free) / 4, torch.randn(d_out, rank, generator=free) / 4)
            for name, (d_out, d_in) in sizes.items()
        }
    )


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@torch.no_grad()
def logits(base: Base, ids: torch.Tensor, loras=None) -> torch.Tensor:
    with inject(base.model, loras):
        return base.model(ids).logits.float()


@each_quantization
def test_loras_on_quantized_weights_act_as_on_dequantised_ones(folder, quantize):
    quantized = load_base(folder, device="cpu", dtype="float32", quantize=quantize)
    plain = dequantised(quantized, quantize)
    ids = torch.arange(30).view(3, 10) + 20
    one, other = lora_for(plain, 1), lora_for(plain, 2, rank=5)
    without = logits(plain, ids)
    assert difference(logits(quantized, ids), without) < BOUND
    full = load_base(folder, device="cpu", dtype="float32")
    assert difference(logits(full, ids), without) > 1e-3  # the weights are rounded
    for loras in (one, [one, None, other]):  # for all rows, and another one for each
        wanted = logits(plain, ids, loras)
        assert difference(wanted, without) > 0.1
        assert difference(logits(quantized, ids, loras), wanted) < BOUND


@each_quantization
def test_the_engine_serves_loras_on_quantized_weights(folder, quantize):
    quantized = load_base(folder, device="cpu", dtype="float32", quantize=quantize)
    plain = dequantised(quantized, quantize)
    loras = [lora_for(plain, 1), None, lora_for(plain, 2), lora_for(plain, 1, rank=5)]
    prompts = [plain.chat.prompt(text, "") for text in ("What is it?", "Who was it?", "The lamp", "a b c")]
    assert engine_logprobs(quantized, prompts, loras) == pytest.approx(engine_logprobs(plain, prompts, loras), abs=1e-4)


def engine_logprobs(base: Base, prompts, loras) -> list[float]:
    """Log-probabilities of six tokens of each answer; all requests run in one batch."""
    with closing(LocalEngine(base)) as engine:
        asked = [
            engine.submit(GenerationRequest(prompt, lora, sampling=Sampling(6), n_logprobs=0))
            for prompt, lora in zip(prompts, loras, strict=True)
        ]
        return [token.logprob for one in asked for token in one if token.id is not None]


@each_quantization
def test_a_quantized_base_is_the_same_base(folder, quantize, tmp_path):
    full = load_base(folder, device="cpu", dtype="float32")
    quantized = load_base(folder, device="cpu", dtype="float32", quantize=quantize)
    assert quantized.fingerprint == full.fingerprint
    given = load_base(quantized.model, tokenizer=quantized.tokenizer)  # where it came from is not known
    assert (given.fingerprint.config, given.fingerprint.norms) == (full.fingerprint.config, full.fingerprint.norms)
    assert given.fingerprint.matrices != full.fingerprint.matrices


@each_quantization
def test_an_adapter_moves_between_a_base_and_a_quantized_one(tiny_folder, tiny_hypernet_folder, quantize, tmp_path):
    note = loracast.Document.from_text("The lamp on the desk was made in the north.")

    def load(**options):
        return loracast.load(tiny_folder, tiny_hypernet_folder, library=tmp_path, device="cpu", **options)

    full, quantized = load(dtype="float32"), load(dtype="float32", quantize=quantize)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        full.learn(note, "of-full")
        quantized.learn(note, "of-quantized", replace=True)
        for model in (full, quantized):
            for name in ("of-full", "of-quantized"):
                assert isinstance(model.ask("What was made in the north?", name, always=True), str)


@each_quantization
def test_a_lora_is_not_merged_into_quantized_weights(folder, quantize, tmp_path):
    from loracast.export.base import write_merged

    quantized = load_base(folder, device="cpu", dtype="float32", quantize=quantize)
    with pytest.raises(AdapterError, match="is quantized, and a LoRA cannot be added to such weights"):
        write_merged(lora_for(quantized, 1), tmp_path / "out", quantized)
    assert not (tmp_path / "out").exists()


@each_quantization
def test_a_hypernetwork_trains_on_quantized_weights(folder, quantize):
    """Gradients reach a LoRA through the quantized modules, as through dequantised ones."""
    quantized = load_base(folder, device="cpu", dtype="float32", quantize=quantize)
    ids = torch.arange(20).view(2, 10) + 20
    gradients = []
    for base in (quantized, dequantised(quantized, quantize)):
        lora = lora_for(base, 1)
        leaves = [side.requires_grad_() for pair in lora.factors.values() for side in (pair.a, pair.b)]
        with inject(base.model, lora):
            base.model(ids).logits.float().logsumexp(-1).sum().backward()
        gradients.append(torch.cat([leaf.grad.flatten() for leaf in leaves]))
    assert difference(*gradients) < 1e-4


def test_wrong_options_and_missing_libraries(tiny_folder, monkeypatch):
    with pytest.raises(ConfigError, match="8bit or 4bit, and not to '3bit'"):
        load_base(tiny_folder, quantize="3bit")
    monkeypatch.setattr("loracast.base.footprint.find_spec", lambda name: None)
    for quantize, library in LIBRARIES.items():
        with pytest.raises(BaseModelError, match=rf"{library}: pip install 'loracast\[quantize\]'"):
            check_quantize(quantize)
    with pytest.raises(ConfigError, match="quantize: the model is loaded already"):
        load_base(make_model(), tokenizer=make_tokenizer(), quantize="4bit")


@pytest.mark.base
@each_quantization
def test_the_embedded_base_answers_as_with_dequantised_weights(quantize):
    quantized = load_base(device="cpu", dtype="float32", quantize=quantize)
    plain = dequantised(quantized, quantize)
    prompts = [plain.chat.prompt(question, "") for question in QUESTIONS]
    for prompt in prompts[::5]:
        assert difference(*(logits(base, torch.tensor([prompt])) for base in (quantized, plain))) < BOUND
    received = [answers(base, prompts, [None] * len(prompts), Sampling(24)) for base in (quantized, plain)]
    assert sum(one.text == other.text for one, other in zip(*received, strict=True)) >= 18
