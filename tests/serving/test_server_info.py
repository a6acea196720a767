"""What a server says of itself: its base, the cost of a token, the folders that it watches."""

from __future__ import annotations

import pytest
import torch
from fastapi.testclient import TestClient

from loracast.documents import Document
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine, token_bytes
from loracast.serving.errors import ApiError
from loracast.serving.resolve import Names
from loracast.serving.settings import ServerSettings
from servers import eventually


def test_a_token_costs_what_the_bases_own_cache_takes(base):
    with torch.no_grad():
        cache = base.model(torch.tensor([[5, 6, 7, 8]]), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == 4 * token_bytes(base)


def test_a_server_tells_of_its_base_and_of_watched_folders(model, tmp_path, home):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "kettle.txt").write_text("The kettle holds 1.7 litres.")
    app = create_app(model, LocalEngine(model.base), ServerSettings(watched=(folder,)))
    with TestClient(app, base_url="http://127.0.0.1:8000") as api:
        eventually(lambda: api.get("/v1/server").json()["watched"][0]["n_documents"] == 1)
        result = api.get("/v1/server").json()
        assert result["base"] == api.get("/v1/models").json()["data"][0]["id"] and result["window"] == model.base.window
        assert result["watched"][0]["folder"] == "notes" and result["watched"][0]["failed"] == []
    assert not app.state.service.watcher._thread.is_alive()


def test_an_answer_says_what_its_lora_takes_in_memory(model):
    adapter = model.learn(Document.from_text("The kettle holds 1.7 litres of water."), "kettle")
    with TestClient(create_app(model, LocalEngine(model.base)), base_url="http://127.0.0.1:8000") as api:

        def lora_bytes(name: str) -> int:
            body = {"model": name, "max_tokens": 2, "always": True}
            body["messages"] = [{"role": "user", "content": "How much water does the kettle hold?"}]
            return api.post("/v1/chat/completions", json=body).json()["loracast"]["lora_bytes"]

        base = api.get("/v1/models").json()["data"][0]["id"]
        assert lora_bytes(base) == 0
        numbers = sum(pair.a.numel() + pair.b.numel() for pair in adapter.lora().factors.values())
        assert 0 < lora_bytes("kettle") <= numbers * model.base.model.dtype.itemsize


def test_a_name_is_looked_up_again_only_when_the_library_has_changed(model, monkeypatch):
    names, looked_up = Names(model, 8), []
    find, adapter = model.library.find, model.adapter
    monkeypatch.setattr(model.library, "find", lambda name: looked_up.append(name) or find(name))
    monkeypatch.setattr(model, "adapter", lambda name: (adapter(name), looked_up.pop())[0])  # which looks it up too
    first = model.learn(Document.from_text("The kettle holds 1.7 litres."), "doc").manifest.version
    for _ in range(3):
        assert names.adapter("doc").manifest.version == names.adapter(f"doc@{first[:8]}").manifest.version == first
    assert len(looked_up) == 2
    second = model.learn(Document.from_text("The kettle holds 2 litres."), "doc", replace=True).manifest.version
    assert names.adapter("doc").manifest.version == second != first
    assert names.adapter(f"doc@{first[:8]}").manifest.version == first
    assert len(looked_up) == 4
    model.library.describe("doc", tags=["kitchen"])
    assert names.adapter("doc").manifest.version == second and len(looked_up) == 5
    model.library.remove("doc")
    for _ in range(2):
        with pytest.raises(ApiError, match="does not exist"):
            names.adapter("doc")
