"""PEFT and a merged checkpoint in transformers answer with an exported adapter as loracast does."""

from __future__ import annotations

import json
from contextlib import nullcontext

import torch
from agreement import assert_agrees

from loracast.base.embedded import DEFAULT_BASE, embedded_folder
from loracast.export.adapter import export_adapter


def _loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@torch.no_grad()
def _answers(model, without, plain, base, file) -> list[dict]:
    """What `assert_agrees` asks for; inside `without()`, `plain` is the base without the adapter."""

    def generated(model, prompt: list[int]) -> str:
        ids = torch.tensor([prompt])
        given = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            eos_token_id=list(base.end_ids), pad_token_id=base.pad_id,
        )  # fmt: skip
        return base.tokenizer.decode(given[0, len(prompt) :], skip_special_tokens=True)

    found = []
    for row in json.loads(file.read_text()):
        likeliest = model(input_ids=torch.tensor([row["prompt"] + row["answer"][:-1]])).logits[0].argmax(-1).tolist()
        text = generated(model, row["prompt"])
        with without():
            free = generated(plain, row["prompt"])
        found.append({"text": text, "free": free, "forced": likeliest[len(row["prompt"]) - 1 :]})
    return found


def test_peft(asked, base, tmp_path):
    from peft import PeftModel

    def answers(adapter, file):
        export_adapter(adapter, "peft", tmp_path / adapter.name)
        model = PeftModel.from_pretrained(_loaded(embedded_folder(DEFAULT_BASE)), str(tmp_path / adapter.name))
        return _answers(model, model.disable_adapter, model, base, file)

    assert_agrees("PEFT", asked, tmp_path, answers)


def test_merged(asked, model, base, tmp_path):
    plain = _loaded(embedded_folder(DEFAULT_BASE))

    def answers(adapter, file):
        export_adapter(adapter, "merged", tmp_path / adapter.name)
        return _answers(_loaded(tmp_path / adapter.name), nullcontext, plain, base, file)

    assert_agrees("merged", asked, tmp_path, answers)
