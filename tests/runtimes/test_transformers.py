"""PEFT and a merged checkpoint in transformers answer with an exported adapter as loracast does."""

from __future__ import annotations

import torch

from loracast.base.load import DEFAULT_BASE, base_folder
from loracast.export.adapter import export_adapter


def _agreement(model, rows) -> tuple[int, int, int]:
    """(texts that are the same, tokens that agree when the true ones before them are told, tokens in all)."""
    same = agreeing = n_tokens = 0
    for row in rows:
        ids = torch.tensor([row.prompt + row.tokens[:-1]])
        with torch.no_grad():
            likeliest = model(input_ids=ids).logits[0, len(row.prompt) - 1 :].argmax(-1).tolist()
        hits = sum(one == other for one, other in zip(likeliest, row.tokens, strict=True))
        same += hits == len(row.tokens)  # then greedy decoding goes the same way
        agreeing, n_tokens = agreeing + hits, n_tokens + len(row.tokens)
    return same, agreeing, n_tokens


def _loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def _check(name: str, asked, answers_of) -> None:
    totals = [0, 0, 0]
    for adapter in dict.fromkeys(row.adapter for row in asked):
        rows = [row for row in asked if row.adapter is adapter]
        totals = [a + b for a, b in zip(totals, _agreement(answers_of(adapter), rows), strict=True)]
    same, agreeing, n_tokens = totals
    print(
        f"\n{name}: {same} of {len(asked)} texts the same, {agreeing} of {n_tokens} tokens ({100 * agreeing / n_tokens:.1f} %) agree when told"
    )
    assert agreeing >= 0.95 * n_tokens


def test_peft(asked, tmp_path):
    from peft import PeftModel

    def answers_of(adapter):
        export_adapter(adapter, "peft", tmp_path / adapter.name)
        return PeftModel.from_pretrained(_loaded(base_folder(DEFAULT_BASE)), str(tmp_path / adapter.name))

    _check("PEFT", asked, answers_of)


def test_merged(asked, model, tmp_path):
    def answers_of(adapter):
        export_adapter(adapter, "merged", tmp_path / adapter.name, load=lambda name: model.base)
        return _loaded(tmp_path / adapter.name)

    _check("merged", asked, answers_of)
