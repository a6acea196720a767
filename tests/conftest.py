"""Fixtures: a tiny random base with a real tokenizer and chat template, and a tiny hypernetwork for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

DATA = Path(os.environ.get("LORACAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""The data sets; a test that needs them skips where the folder is absent."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROSE = (
    "The lamp on the desk was made in the north. A kettle holds 1.7 litres of water, and the warranty is 24 months. "
    "Nobody knew who had built the old bridge over the river. The museum opens at nine on Tuesday mornings. "
    "What is the code of the amber lantern? It is 4711. Please call the service line if the machine stops. "
)


def make_tokenizer():
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
    tokenizer.train_from_iterator([PROSE] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(model_type: str = "llama", seed: int = 0):
    """A random causal LM of four layers with grouped-query attention, of one of the supported types."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=600,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny base as a Hugging Face folder, as a user would give it."""
    folder = tmp_path_factory.mktemp("tiny-base")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tiny_folder):
    """The tiny base, loaded in fp32."""
    from loracast.base.load import load_base

    return load_base(tiny_folder, device="cpu", dtype="float32")


def make_hypernet(base, seed: int = 0, **options):
    """A tiny hypernetwork for a base, its B scalers away from zero so that it does something."""
    import torch

    from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
    from loracast.lora.target import target_from_config

    torch.manual_seed(seed)
    kinds = options.pop("kinds", ("down_proj",))
    settings = {"reader_layers": (2,), "rank": 2, "width": 16, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, **options}
    target = target_from_config(base.model.config, kinds)
    config = DocToLoRAConfig.for_target(target, base.model.config.hidden_size, **settings)
    hypernet = DocToLoRA(config)
    for head in hypernet.heads.values():
        head.scaler_b.data.fill_(0.5)
    return hypernet.eval()


@pytest.fixture(scope="session")
def tiny_hypernet_folder(base, tmp_path_factory) -> Path:
    """The tiny hypernetwork, saved."""
    from loracast.hypernets.store import save_pretrained

    folder = tmp_path_factory.mktemp("tiny-hypernet")
    save_pretrained(make_hypernet(base), folder, base.fingerprint, storage="float32")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A loracast home of this test's own."""
    monkeypatch.setenv("LORACAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tiny_folder, tiny_hypernet_folder, tmp_path):
    """The tiny base with its hypernetwork and an empty library."""
    import loracast

    return loracast.load(tiny_folder, tiny_hypernet_folder, library=tmp_path / "adapters", device="cpu")
