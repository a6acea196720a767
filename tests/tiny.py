"""Tiny random models for tests: a base with a tokenizer, a sentence encoder, hypernetworks, LoRAs, and a picture."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from loracast.answering.answers import SourcedAnswer

# transformers and loracast are imported inside the functions: conftest.py sets the environment first

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
DOC_TO_LORA = {
    "reader_layers": (2,), "rank": 2, "width": 16, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "n_decoder_blocks": 1,
}  # fmt: skip
ATTENTION_DELTA = {"variant": "attention_delta", "rank": 5, "shared_rank": 3, "map_rank": 4}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROSE = (
    "The lamp on the desk was made in the north. A kettle holds 1.7 litres of water, and the warranty is 24 months. "
    "Nobody knew who had built the old bridge over the river. The museum opens at nine on Tuesday mornings. "
    "What is the code of the amber lantern? It is 4711. Please call the service line if the machine stops. "
)
DESCRIPTIONS = ["Answer with the opposite word.", "Say it louder", "Turn each word around, and end with a full stop."]


def make_tokenizer(prose: str = PROSE):
    """A small byte-level BPE tokenizer with two control tokens and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(token, special=True) for token in ("<|pad|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(model_type: str = "llama", seed: int = 0):
    """A random causal LM of four layers with grouped-query attention, of one of the supported types."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type, vocab_size=600, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
        max_position_embeddings=512, num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def for_base(hypernet, fingerprint):
    """The hypernetwork, made for the base with that fingerprint."""
    hypernet.made_for = fingerprint
    return hypernet


def make_hypernet(base, seed: int = 0, **options):
    """A random document hypernetwork for a base; its B scalers are not zero, so that its LoRAs do something."""
    from loracast.hypernets.doc_to_lora import DocToLoRA
    from loracast.hypernets.published import PublishedDocToLoRA
    from loracast.lora.target import target_from_config

    torch.manual_seed(seed)
    architecture = PublishedDocToLoRA if options.pop("published", False) else DocToLoRA
    kinds = options.pop("kinds", ("down_proj",))
    settings = {**DOC_TO_LORA, **options}
    target = target_from_config(base.model.config, kinds)
    d_features = base.model.config.hidden_size + settings.get("d_values", 0)
    hypernet = architecture(architecture.config_class.for_target(target, d_features, **settings))
    for head in hypernet.heads.values():
        head.scaler_b.data.fill_(0.5)
    hypernet.made_for = getattr(base, "fingerprint", None)
    return hypernet.eval()


def save_models(folder: Path):
    """Write a tiny base and a hypernetwork for it as folders `base` and `hypernetwork`; the base, loaded."""
    from loracast.base.load import load_base

    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    base = load_base(folder / "base", device="cpu", dtype="float32")
    make_hypernet(base).save_pretrained(folder / "hypernetwork", storage="float32")
    return base


def make_sentence_encoder(folder: Path, pooling: str = "mean_tokens", max_tokens: int = 200) -> Path:
    """A tiny random BERT in the layout of sentence-transformers."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, pad_token_id=0
    )
    BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens}))
    return folder


def make_task_hypernet(base, encoder: Path, seed: int, scale: float):
    """A random text-to-LoRA hypernetwork with a tiny sentence encoder; its B scalers are not zero."""
    from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
    from loracast.lora.target import target_from_config

    torch.manual_seed(seed)
    target = target_from_config(base.model.config, ("q_proj", "v_proj"))
    hypernet = TextToLoRA(
        TextToLoRAConfig(32, target.rows, encoder=str(encoder), rank=2, width=16, head_width=16, scale=scale)
    )
    for head in hypernet.heads.values():
        head.scaler_b.data.normal_()
    hypernet.made_for = getattr(base, "fingerprint", None)
    return hypernet


def make_attention_delta(base, kinds=("q_proj", "o_proj", "down_proj"), layers=None, *, fresh=False, **options):
    """A random attention-delta hypernetwork that has seen `DESCRIPTIONS`; a `fresh` one casts LoRAs that do nothing."""
    from loracast.hypernets.attention_delta import AttentionDeltaToLoRA, AttentionDeltaToLoRAConfig
    from loracast.lab.training.task_start import remember_seen, set_units
    from loracast.lora.target import target_from_config

    settings = {name: value for name, value in {**ATTENTION_DELTA, **options}.items() if name != "variant"}
    torch.manual_seed(1)
    target = target_from_config(base.model.config, kinds, layers)
    hypernet = AttentionDeltaToLoRA(AttentionDeltaToLoRAConfig(base.model.config.hidden_size, target.rows, **settings))
    if not fresh:
        for part in (*hypernet.shared.values(), *hypernet.encoder_lora.values()):
            part.b.data.normal_()
        hypernet.up.data.normal_()
        hypernet.gate[-1].weight.data.normal_()
    read = hypernet.text_encoder(base)(DESCRIPTIONS).detach()
    set_units(hypernet, read)
    remember_seen(hypernet, read)
    hypernet.made_for = getattr(base, "fingerprint", None)
    return hypernet.eval().requires_grad_(False)


def random_lora(rank: int, seed: int):
    """Random factors of two modules."""
    from loracast.lora.algebra import LoRA
    from loracast.lora.factors import Factors

    free = torch.Generator().manual_seed(seed)
    shapes = {"q": (10, 6), "v": (4, 6)}
    return LoRA(
        {
            name: Factors(torch.randn(rank, d_in, generator=free), torch.randn(d_out, rank, generator=free))
            for name, (d_out, d_in) in shapes.items()
        }
    )


def dense(lora) -> torch.Tensor:
    """The deltas of a LoRA's modules in the order of their names, as one vector."""
    return torch.cat([lora.delta(name).flatten() for name in sorted(lora.names)])


def gradient(width: int = 24, height: int = 16):
    """Red grows to the right, green downwards."""
    from PIL import Image

    red = np.tile(np.linspace(0, 255, width, dtype=np.uint8), (height, 1))
    green = np.tile(np.linspace(0, 255, height, dtype=np.uint8)[:, None], (1, width))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], axis=-1))


def drained(stream: Generator[str, None, SourcedAnswer]) -> tuple[list[str], SourcedAnswer]:
    """The pieces of a stream, and the answer that is its value."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def answer(base, prompt, lora=None, sampling=None, on_text=None, copy_bias=None):
    """The base's answer to one prompt of token ids."""
    from loracast.base.generate import Sampling, answers

    return answers(base, [prompt], [lora], sampling or Sampling(), [copy_bias], on_text)[0]


def make_reader(base, prefix: tuple[int, ...], refusing: float = 1e9):
    """A random reader for the tiny base, which finds an answer to whatever it is asked."""
    from loracast.hypernets.reader import Reader, ReaderConfig

    torch.manual_seed(3)
    config = ReaderConfig(
        base.model.config.hidden_size,
        base.model.config.vocab_size,
        1,
        prefix,
        width=16,
        inner=24,
        n_blocks=1,
        n_heads=2,
        n_best=3,
    )
    reader = Reader(config)
    reader.refusing.fill_(refusing)
    torch.nn.init.constant_(reader.says.bias, -10.0)  # a unit answers
    return reader
