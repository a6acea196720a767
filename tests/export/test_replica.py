"""Adapters on a vLLM replica: found in a library or a shared store, kept under a budget; the middleware of its server.

The server is a small FastAPI application with what the middleware uses of vLLM's.
"""

from __future__ import annotations

import json
import sys
import threading
import types
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient

import adapters
from adapters import random_factors, write
from loracast.errors import AdapterError, ConfigError, LoracastError
from loracast.export import vllm_middleware as replica_module
from loracast.export.vllm_middleware import FromLibrary, FromStore, LibraryMiddleware, Replica, lora_number
from loracast.library import storage
from loracast.library.library import Library
from loracast.lora.algebra import LoRA
from loracast.lora.peft_format import read_peft

GENEROUS = 2**30


@pytest.fixture
def at_once(monkeypatch):
    """Names are looked up whenever they are asked for, and files may go as soon as no request uses them."""
    monkeypatch.setattr(storage, "REFRESH_S", 0.0)
    monkeypatch.setattr(replica_module, "REFRESH_S", 0.0)
    monkeypatch.setattr(replica_module, "_GRACE_S", 0.0)


@pytest.fixture(params=["library", "folder", "s3"])
def source(request, tmp_path, at_once):
    """A library to write to, and where replicas find its adapters."""
    library = tmp_path / "library"
    library.mkdir()
    if request.param == "library":
        return library, FromLibrary(Library(library))
    url = str(tmp_path / "there") if request.param == "folder" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    Library(library).share(url)
    return library, FromStore(url)


@pytest.fixture
def make(tmp_path):
    """Makes replicas, each with a folder of its own."""
    made: list[Replica] = []

    def start(source, folder="replica", max_bytes=GENEROUS, max_rank=16, forget=print) -> Replica:
        made.append(Replica(source, tmp_path / folder, max_bytes=max_bytes, max_rank=max_rank, forget=forget))
        return made[-1]

    yield start
    for one in made:
        one.close()


def names_on_disk(replica: Replica) -> set[str]:
    return {path.name for path in replica._folder.iterdir()}


# ---- what a name means


def test_a_name_means_its_newest_version_on_every_replica_and_under_another_number(source, make):
    library, place = source
    first = write(library, name="press", seed=1)
    replicas = make(place, "one"), make(place, "two")
    olds = [replica.take("press") for replica in replicas]
    assert [old.name for old in olds] == [first.version] * 2 and olds[0].number == olds[1].number
    assert olds[0].number == int(first.manifest.version[:15], 16) + 1
    second = write(library, name="press", seed=2, replace=True)
    for replica, old in zip(replicas, olds, strict=True):
        new = replica.take("loracast:press")
        assert new.name == second.version and new.number != old.number and new.folder != old.folder
        assert replica.take(first.version) is old and replica.take(f"press@{first.manifest.version[:6]}") is old
        lora, whole = LoRA(read_peft(new.folder)), Library(library).open("press").lora()
        for module in whole.names:
            torch.testing.assert_close(lora.delta(module).float(), whole.delta(module).float())
    Library(library).remove("press")
    assert all(replica.take(name) is None for replica in replicas for name in ("press", first.version))


def test_a_version_that_came_back_is_one_version(source, make):
    library, place = source
    first, second, _ = (write(library, name="press", seed=seed, replace=True) for seed in (1, 2, 1))
    replica = make(place)
    assert place.versions("press") == [first.manifest.version, second.manifest.version]
    assert replica.take("press") is replica.take(f"press@{first.manifest.version}")


def test_what_nobody_is_called(source, make):
    library, place = source
    write(library, name="press")
    replica = make(place)
    for name in ("nobody", "press@0000", "../press", "loracast:", "press@", "Press", "meta/llama", "press@zzzz"):
        assert replica.take(name) is None
    assert not names_on_disk(replica)


def test_numbers_do_not_meet():
    assert len({lora_number(f"{i:064x}"[::-1]) for i in range(10_000)}) == 10_000
    assert 0 < lora_number("f" * 64) < 2**63 and lora_number("0" * 64) == 1


def test_of_a_store_out_of_reach_known_names_go_on(tmp_path, make, at_once):
    library, url = tmp_path / "library", tmp_path / "there"
    library.mkdir()
    Library(library).share(str(url))
    adapter, _ = write(library, name="press"), write(library, name="lathe", seed=1)
    replica = make(FromStore(str(url)))
    replica.give_back(replica.take("press"))
    url.rename(tmp_path / "gone")
    assert replica.take("press").name == adapter.version
    with pytest.raises(LoracastError, match="no shared library at"):
        replica.take("lathe")


def test_damaged_files_are_not_served(tmp_path, make, at_once):
    library, url = tmp_path / "library", tmp_path / "there"
    library.mkdir()
    Library(library).share(str(url))
    adapter = write(library, name="press")
    factors = next(url.glob(f"??/{adapter.manifest.version}/*.safetensors"))
    content = bytearray(factors.read_bytes())
    content[-1] ^= 1
    factors.write_bytes(content)
    replica = make(FromStore(str(url)))
    with pytest.raises(AdapterError, match="is damaged"):
        replica.take("press")
    assert not names_on_disk(replica) and replica.n_bytes == 0


# ---- the budget


def test_the_least_recently_used_go_but_never_one_in_use(tmp_path, make, at_once):
    library = tmp_path / "library"
    for i in range(5):
        write(library, name=f"doc-{i}", seed=i)
    probe = make(FromLibrary(Library(library)), "probe")
    size = probe.take("doc-0").n_bytes
    dropped: list[str] = []

    def forget(name: str) -> None:
        assert (replica._folder / name).is_dir()  # its name goes before its files
        dropped.append(name.partition("@")[0])

    replica = make(FromLibrary(Library(library)), max_bytes=2 * size + size // 2, forget=forget)
    in_use = replica.take("doc-0")
    for i in (1, 2):
        replica.give_back(replica.take(f"doc-{i}"))
    assert dropped == ["doc-1"] and replica.n_bytes == 2 * size  # not doc-0, although it is older
    replica.give_back(replica.take("doc-2"))
    replica.give_back(in_use)
    replica.give_back(replica.take("doc-3"))
    assert dropped == ["doc-1", "doc-0"] or dropped == ["doc-1", "doc-2"]
    assert {name.partition("@")[0] for name in names_on_disk(replica)} == {"doc-3", *{"doc-0", "doc-2"} - {*dropped}}
    replica.give_back(replica.take("doc-1"))  # it comes back
    assert replica.n_bytes <= 2 * size + size // 2


def test_files_stay_for_a_moment_after_the_last_request(tmp_path, make, at_once, monkeypatch):
    monkeypatch.setattr(replica_module, "_GRACE_S", 60.0)
    library = tmp_path / "library"
    replica = make(FromLibrary(Library(library)), max_bytes=1)
    for i in range(3):
        write(library, name=f"doc-{i}", seed=i)
        replica.give_back(replica.take(f"doc-{i}"))
    assert len(names_on_disk(replica)) == 3


def test_a_server_that_starts_again_exports_nothing_anew(tmp_path, make, at_once, monkeypatch):
    library = tmp_path / "library"
    for i in range(3):
        write(library, name=f"doc-{i}", seed=i)
    first = make(FromLibrary(Library(library)))
    kept = [first.take(f"doc-{i}") for i in (2, 0, 1)]
    with pytest.raises(ConfigError, match="another server uses"):
        make(FromLibrary(Library(library)))
    first.close()
    monkeypatch.setattr(replica_module, "export_adapter", None)
    again = make(FromLibrary(Library(library)), max_bytes=sum(one.n_bytes for one in kept))
    assert again.n_bytes == first.n_bytes and [*again._kept] == [one.name for one in kept]
    assert [again.take(one.name).number for one in kept] == [one.number for one in kept]
    again.close()
    monkeypatch.undo()
    assert not names_on_disk(make(FromLibrary(Library(library)), max_rank=8))  # of another rank


def test_many_threads_export_once(tmp_path, make, at_once, monkeypatch):
    library = tmp_path / "library"
    write(library, name="press")
    replica, exported = make(FromLibrary(Library(library))), []
    export = replica_module.export_adapter
    monkeypatch.setattr(replica_module, "export_adapter", lambda *a, **k: exported.append(1) or export(*a, **k))
    threads = [threading.Thread(target=lambda: replica.give_back(replica.take("press"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(exported) == 1 and next(iter(replica._kept.values())).n_users == 0


# ---- the rank


def test_a_rank_above_the_servers_is_compressed_where_that_loses_little(tmp_path, make, at_once, monkeypatch):
    def fading(n: int, seed: int = 0, rank: int = 2):
        """All chunks but the first two hardly say anything."""
        made = random_factors(n, seed, rank)
        scale = torch.tensor([1.0, 1.0] + [0.01] * (n - 2))[:, None, None, None]
        return {kind: (a, b * scale) for kind, (a, b) in made.items()}

    library = tmp_path / "library"
    write(library, 8, name="even")
    monkeypatch.setattr(adapters, "random_factors", fading)
    faint = write(library, 8, name="faint")
    assert faint.lora().rank == 16
    replica = make(FromLibrary(Library(library)), max_rank=8)
    kept = replica.take("faint")
    assert json.loads((kept.folder / "adapter_config.json").read_text())["r"] == 8
    lora, whole = LoRA(read_peft(kept.folder)), faint.lora().to(dtype=torch.float32)
    lost = sum((lora.delta(name) - whole.delta(name)).square().sum() for name in whole.names)
    assert 0 < (lost / sum(whole.delta(name).square().sum() for name in whole.names)).sqrt() < 0.05
    with pytest.raises(AdapterError, match=r"has the rank 16.* takes 8.*--max-lora-rank 16.*loracast serve --engine"):
        replica.take("even")
    assert "even" not in {name.partition("@")[0] for name in names_on_disk(replica)}
    assert make(FromLibrary(Library(library)), "wide").take("even").folder.is_dir()


# ---- the middleware


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Engine:
    """Loads LoRAs as vLLM's engine does, from their files."""

    def __init__(self):
        self.added: list[LoRARequest] = []
        self.refuses = False

    async def add_lora(self, request: LoRARequest) -> bool:
        if self.refuses:
            raise ValueError("expected target modules")
        read_peft(Path(request.lora_path))
        self.added.append(request)
        return True


@contextmanager
def server(middleware=LibraryMiddleware, max_rank=16, key="secret"):
    """An application with vLLM's state, a check of keys inside the middleware, and two endpoints that need the model."""
    app, engine = FastAPI(), Engine()
    models = types.SimpleNamespace(
        engine_client=engine, lora_requests={"fixed": LoRARequest("fixed", 1, "/nowhere")},
        is_base_model=lambda name: name == "base",
    )  # fmt: skip
    app.state.openai_serving_models = models
    lora = types.SimpleNamespace(max_lora_rank=max_rank) if max_rank else None
    app.state.vllm_config = types.SimpleNamespace(lora_config=lora)

    @app.middleware("http")
    async def check(request: Request, call_next):
        if request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await call_next(request)

    def found(name: str):
        if name == "base":
            return "base", 0
        request = models.lora_requests.get(name)
        return (None, None) if request is None else (request.lora_name, request.lora_int_id)

    @app.post("/v1/completions")
    async def complete(body: dict):
        name, number = found(body["model"])
        if name is None:
            return JSONResponse({"error": "no such model"}, 404)
        return {"model": name, "number": number, "prompt": body["prompt"]}

    @app.post("/v1/stream")
    async def stream(body: dict):
        name, _ = found(body["model"])
        folder = Path(models.lora_requests[name].lora_path)

        def tokens():
            for i in range(3):
                app.state.between(i)
                yield f"{folder.is_dir()}\n"

        return StreamingResponse(tokens())

    app.add_middleware(middleware)
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as client:
        client.state, client.engine, client.models = app.state, engine, models
        yield client
    inner = app.middleware_stack
    while not isinstance(inner, LibraryMiddleware):
        inner = inner.app
    if inner._replica is not None:
        inner._replica.close()


@pytest.fixture
def library(home, at_once, monkeypatch):
    """The library of this machine, and the modules of vLLM that the middleware imports."""
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest
    for module in (types.ModuleType("vllm"), types.ModuleType("vllm.lora"), request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return home / "adapters"


def ask(client, model, **options):
    return client.post("/v1/completions", json={"model": model, "prompt": "x\u00e9"}, **options)


def test_requests_name_adapters_and_versions(library):
    first = write(library, name="press", seed=1)
    with server() as client:
        assert ask(client, "press").json() == {
            "model": first.version, "number": lora_number(first.manifest.version), "prompt": "x\u00e9",
        }  # fmt: skip
        assert ask(client, first.version).json()["model"] == first.version
        assert ask(client, "base").json()["model"] == "base" and ask(client, "fixed").json()["number"] == 1
        assert ask(client, "nobody").status_code == 404
        assert (
            client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code
            == 422
        )
        second = write(library, name="press", seed=2, replace=True)
        assert ask(client, "press").json()["model"] == second.version
        assert ask(client, first.version).json()["model"] == first.version
        assert [request.lora_name for request in client.engine.added] == [first.version, second.version]


def test_the_store_of_the_environment(library, tmp_path, monkeypatch):
    other = tmp_path / "elsewhere"
    other.mkdir()
    Library(other).share(str(tmp_path / "there"))
    adapter = write(other, name="press")
    monkeypatch.setenv("LORACAST_STORE", str(tmp_path / "there"))
    with server() as client:
        assert ask(client, "press").json()["model"] == adapter.version
    assert not library.exists()


def test_nothing_is_fetched_without_a_key(library, home):
    write(library, name="press")
    with server() as client:
        assert ask(client, "press", headers={"Authorization": "Bearer other"}).status_code == 401
        assert not client.engine.added and not (home / "exports").exists()


def test_a_stream_keeps_its_files_and_what_was_dropped_is_loaded_again(library, monkeypatch):
    adapter = write(library, name="press", seed=1)
    write(library, name="lathe", seed=2)
    monkeypatch.setenv("LORACAST_REPLICA_BYTES", "1")
    with server() as client:

        def between(i: int) -> None:
            if i == 1:
                thread = threading.Thread(target=lambda: others.append(ask(client, "lathe").json()["model"]))
                thread.start()
                thread.join(20)

        others: list[str] = []
        client.state.between = between
        lines = client.post("/v1/stream", json={"model": "press"}).text.split()
        assert lines == ["True"] * 3 and others
        ask(client, "lathe")
        assert adapter.version not in client.models.lora_requests  # dropped, and vLLM knows it no longer
        assert ask(client, "press").json()["model"] == adapter.version
        assert [request.lora_name for request in client.engine.added].count(adapter.version) == 2


def test_errors_are_reported(library, monkeypatch):
    write(library, 8, name="wide")
    write(library, name="press")
    with server(max_rank=8) as client:
        refused = ask(client, "wide")
        assert refused.status_code == 400 and "--max-lora-rank 16" in refused.json()["error"]["message"]
        client.engine.refuses = True
        refused = ask(client, "press")
        assert refused.status_code == 400 and "expected target modules" in refused.json()["error"]["message"]
        client.engine.refuses = False
        assert ask(client, "press").status_code == 200
    monkeypatch.setenv("LORACAST_STORE", "/nowhere/at/all")
    with server() as client:
        assert ask(client, "press").status_code == 503
    monkeypatch.setenv("LORACAST_REPLICA_BYTES", "much")
    with server() as client:
        assert "LORACAST_REPLICA_BYTES" in ask(client, "press").json()["error"]["message"]
    with server(max_rank=None) as client:
        assert "--enable-lora" in ask(client, "press").json()["error"]["message"]
