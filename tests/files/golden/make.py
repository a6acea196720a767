"""Makes the golden files of a version: `python tests/files/golden/make.py 0.2` in the repository's root (README.md).

A folder that is there is never written again. The expected values are then recorded by `python tests/project/test_golden.py`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import loracast
from loracast.base.load import Base, load_base
from loracast.documents.labels import Labels
from loracast.hypernets.doc_to_lora import DocToLoRA
from loracast.lora.target import target_from_config
from tiny import make_attention_delta, make_hypernet, make_tokenizer

GOLDEN = Path(__file__).resolve().parent
MANUAL = (GOLDEN / "manual.md").read_text(encoding="utf-8")
TASK = "Answer with the opposite word."


def make_base(folder: Path) -> None:
    """A random Llama of two layers in bf16, with the tokenizer and the chat template of the tests."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=512,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.2, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def document_hypernetwork(base: Base) -> DocToLoRA:
    """With an associative memory, verdicts, values that are copied, and static and encoder LoRAs."""
    config = base.model.config
    hypernet = make_hypernet(
        base, reader_layers=(1,), static_rank=1, d_values=32, memory_rank=12, memory_blocks=1, memory_question_rank=8,
        memory_modules=target_from_config(config, ("o_proj",)).rows, key_decorrelation=3.0, max_unscaled_chunks=2,
        encoder_modules=target_from_config(config, ("q_proj",), (0,)).rows, encoder_rank=2,
        static_modules=target_from_config(config, ("q_proj",)).rows, static_modules_rank=2,
        memory_near_tokens=2, memory_verdicts=True, memory_gate_power=0.5,
    )  # fmt: skip
    hypernet.memory.scale.data.fill_(0.05)
    for part in (*hypernet.static.values(), *hypernet.encoder_lora.values()):
        part.b.data.normal_(std=0.1)
    return hypernet


def make(folder: Path, work: Path) -> None:
    """The hypernetworks for documents and tasks, and an adapter of each modality."""
    loaded = load_base(GOLDEN / "base", device="cpu", dtype="float32")
    base = Base("golden", loaded.model, loaded.tokenizer)  # a name that is no path
    folder.mkdir()
    document_hypernetwork(base).save_pretrained(folder / "document-hypernetwork")
    bank = {"task_bank_rank": 2, "task_bank_width": 3, "bank_sizes": (2, 1)}
    tasks = make_attention_delta(base, ("q_proj", "o_proj"), rank=4, shared_rank=2, **bank)
    tasks.save_pretrained(folder / "task-hypernetwork")
    model = loracast.Model(
        base,
        work / "library",
        folder / "document-hypernetwork",
        folder / "task-hypernetwork",
    )
    adapters = {
        "document": model.learn(loracast.Document.from_text(MANUAL, title="Manual"), "document", max_chunk_tokens=48),
        "task": model.task(TASK, "task"),
        "image": model.learn(Labels({"lamp": 0.6, "kettle": 0.2}, kind="image"), "image"),
    }
    for name, adapter in adapters.items():
        shutil.make_archive(str(folder / name), "gztar", adapter.folder)  # SQLite's pages are mostly empty


if __name__ == "__main__":
    if not (GOLDEN / "base").is_dir():
        make_base(GOLDEN / "base")
    with tempfile.TemporaryDirectory() as work:
        make(GOLDEN / sys.argv[1], Path(work))
