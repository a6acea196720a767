"""Files, vector stores, adapters and jobs over HTTP, with the real `openai` client and a real server."""

from __future__ import annotations

import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch

import loracast
from loracast.cast.compact import compact
from loracast.errors import LoracastError
from loracast.library.adapter import factors_in_memory
from loracast.library.library import Library
from loracast.serving import state, vector_stores
from loracast.serving import state as uploads
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine
from loracast.serving.jobs import Jobs
from loracast.serving.settings import ServerSettings, keys_in
from servers import eventually, manual, served

READ, WRITE, ADMIN = (f"sk-{scope}-0123456789" for scope in ("read", "write", "admin"))


@pytest.fixture(scope="module")
def model(tiny_folder, tiny_hypernet_folder, hypernetwork, tmp_path_factory):
    library = tmp_path_factory.mktemp("serving") / "adapters"
    return loracast.load(
        tiny_folder, tiny_hypernet_folder, task_hypernetwork=hypernetwork, library=library, device="cpu"
    )


@pytest.fixture(scope="module")
def app(model):
    settings = ServerSettings(keys=keys_in(f"read:{READ},write:{WRITE},admin:{ADMIN}"))
    return create_app(model, LocalEngine(model.base), settings)


@pytest.fixture(scope="module")
def url(app):
    with served(app) as found:
        yield found


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=ADMIN, max_retries=0) as found:
        yield found


@pytest.fixture
def api(url):
    with httpx.Client(base_url=f"{url}/v1", headers={"Authorization": f"Bearer {ADMIN}"}) as found:
        yield found


def upload(client, data: bytes, name: str = "manual.md", **options):
    return client.files.create(file=(name, data), purpose="assistants", **options)


def learned(api, answer):
    """The job that a request was answered with, at its end."""
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return eventually(lambda: job if (job := api.get(answer.headers["location"][3:]).json())["ended_at"] else None)


def learn(api, data: bytes, name: str, **fields):
    job = learned(api, api.post("/adapters", files={"file": (f"{name}.md", data)}, data=fields))
    assert job["status"] == "completed", job
    return job


# ---- files


def test_files_come_back_as_they_went_in(client):
    data = bytes(range(256)) * 20
    kept = upload(client, data, "../../x/<b>Böse\r\n.md", expires_after={"anchor": "created_at", "seconds": 3600})
    assert (kept.object, kept.bytes, kept.purpose, kept.status) == ("file", len(data), "assistants", "processed")
    assert "/" not in kept.filename
    assert kept.filename.endswith(".md")
    assert kept.expires_at == kept.created_at + 3600
    assert client.files.retrieve(kept.id) == kept
    content = client.files.content(kept.id)
    assert content.read() == data
    assert content.response.headers["content-disposition"].startswith("attachment")
    assert content.response.headers["x-content-type-options"] == "nosniff"
    assert kept in list(client.files.list(purpose="assistants", limit=1))
    assert kept not in list(client.files.list(purpose="vision"))
    assert client.files.delete(kept.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(kept.id)


def test_a_file_that_expires_goes_with_its_adapter(client, model, monkeypatch, url):
    kept = upload(client, manual(50), expires_after={"anchor": "created_at", "seconds": 3600})
    store = client.vector_stores.create(file_ids=[kept.id])
    client.vector_stores.files.poll(kept.id, vector_store_id=store.id)
    name = next(one for one in model.library.names() if one.endswith(kept.id[-12:]))
    later = int(time.time()) + 3601
    for module in (state, uploads, vector_stores):
        monkeypatch.setattr(module, "now", lambda: later)
    learn_something = httpx.post(
        f"{url}/v1/adapters", files={"file": ("other.md", manual(51))}, headers={"Authorization": f"Bearer {ADMIN}"}
    )
    assert learn_something.status_code == 202  # after a job the server tidies up
    eventually(lambda: name not in model.library.names())
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(kept.id)
    eventually(lambda: client.vector_stores.retrieve(store.id).file_counts.total == 0)


# ---- vector stores


def test_a_program_for_file_search_prepares_its_store(client, model):
    store = client.vector_stores.create(
        name="Manuals", metadata={"owner": "kitchen"}, expires_after={"anchor": "last_active_at", "days": 7}
    )
    assert (store.name, store.status, store.file_counts.total) == ("Manuals", "completed", 0)
    assert store.expires_at == store.last_active_at + 7 * 86_400
    file = client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("coffee maker.md", manual(1, 3)), attributes={"year": 2024, "is_new": True}
    )
    assert (file.status, file.last_error) == ("completed", None)
    assert file.attributes == {"year": 2024, "is_new": True}
    assert file.chunking_strategy.static.max_chunk_size_tokens == 192
    store = client.vector_stores.retrieve(store.id)
    assert (store.status, store.file_counts.completed, store.file_counts.total) == ("completed", 1, 1)
    name = next(one for one in model.library.names() if one.startswith("coffee-maker-"))
    adapter = model.library.open(name)
    assert store.usage_bytes == file.usage_bytes == adapter.n_bytes
    content = list(client.vector_stores.files.content(file.id, vector_store_id=store.id))
    assert len(content) == adapter.manifest.n_chunks
    assert "K1-0" in content[0].text
    assert client.vector_stores.files.update(file.id, vector_store_id=store.id, attributes={"a": "b"}).attributes == {
        "a": "b"
    }
    renamed = client.vector_stores.update(store.id, name="Books", metadata=None)
    assert (renamed.name, renamed.metadata, renamed.expires_after.days) == ("Books", {}, 7)
    assert store.id in [one.id for one in client.vector_stores.list(limit=1)]


def test_a_program_for_file_search_works_unchanged(client, model):
    store, other = client.vector_stores.create(), client.vector_stores.create()
    for number in (80, 81, 82):
        file = (f"k{number}.md", manual(number, 3))
        client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=file, attributes={"number": number})
    client.vector_stores.files.upload_and_poll(vector_store_id=other.id, file=("k83.md", manual(83, 3)))
    base = next(one.id for one in client.models.list() if one.parent is None)
    question = "How long is the warranty of the K82-1?"

    def answered(*stores, **options):
        tool = {"type": "file_search", "vector_store_ids": [one.id for one in stores], **options}
        return client.responses.create(
            model=base, input=question, tools=[tool], max_output_tokens=12, include=["file_search_call.results"]
        )

    def alone(**options):
        return client.responses.create(model=base, input=question, max_output_tokens=12, **options).output_text

    search, message = answered(store, other).output
    assert (search.type, search.status, search.queries) == ("file_search_call", "completed", [question])
    cited = message.content[0].annotations
    assert {(one.type, one.filename) for one in cited} == {("file_citation", "k82.md")}
    assert client.files.retrieve(cited[0].file_id).filename == "k82.md"
    assert "K82-1 is 92 months" in search.results[0].text
    assert search.results[0].attributes == {"number": 82}
    name = next(one for one in model.library.names() if one.endswith(cited[0].file_id[-12:]))
    text = message.content[0].text
    assert text == alone(extra_body={"adapters": [{"id": name}]}) != alone()

    with client.responses.stream(
        model=base, input=question, max_output_tokens=12,
        tools=[{"type": "file_search", "vector_store_ids": [store.id]}],
    ) as stream:  # fmt: skip
        events = list(stream)
    streamed = events[-1].response
    assert streamed.output_text == text
    assert [one.file_id for one in streamed.output[-1].content[0].annotations] == [one.file_id for one in cited]
    assert "response.file_search_call.completed" in {event.type for event in events}
    filters = {"type": "ne", "key": "number", "value": 82}
    assert "k82.md" not in {one.filename for one in answered(store, filters=filters).output[-1].content[0].annotations}
    assert len(answered(store, max_num_results=1).output[0].results) == 1
    client.vector_stores.files.delete(cited[0].file_id, vector_store_id=store.id)
    gone = answered(store)
    assert "k82.md" not in {one.filename for one in gone.output[-1].content[0].annotations}
    assert gone.output_text != text
    with pytest.raises(openai.NotFoundError):
        client.responses.create(
            model=base, input=question, tools=[{"type": "file_search", "vector_store_ids": ["vs_nothing"]}]
        )


def test_a_response_may_leave_its_stores_alone_and_is_strict_where_no_file_fits(client, model):
    store = client.vector_stores.create()
    tool = {"type": "file_search", "vector_store_ids": [store.id]}
    base = next(one.id for one in client.models.list() if one.parent is None)

    def answered(**options):
        question = "How long is the warranty of the K86-1?"
        return client.responses.create(model=base, input=question, tools=[tool], max_output_tokens=12, **options)

    assert answered(extra_body={"strict": True}).output_text == "The document does not say."
    client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("k86.md", manual(86, 3)))
    searched, plain = answered(), answered(tool_choice="none")
    assert [one.type for one in searched.output] == ["file_search_call", "message"]
    assert [one.type for one in plain.output] == ["message"] and plain.tool_choice == "none"
    assert plain.output_text != searched.output_text and not plain.output[0].content[0].annotations


def test_a_page_goes_on_after_a_file_whose_status_changed(client):
    store = client.vector_stores.create()
    for number in (87, 88):
        client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=(f"k{number}.md", manual(number, 3)))
    newest, oldest = client.vector_stores.files.list(store.id)
    assert [one.id for one in client.vector_stores.files.list(store.id, filter="failed", after=newest.id)] == []
    assert [one.id for one in client.vector_stores.files.list(store.id, after=newest.id)] == [oldest.id]


def test_the_outline_of_a_file_answers_and_cites_it(client):
    store = client.vector_stores.create()
    client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("k84.md", manual(84, 3)))
    base = next(one.id for one in client.models.list() if one.parent is None)
    tool = {"type": "file_search", "vector_store_ids": [store.id]}
    search, message = client.responses.create(
        model=base, input="List its sections.", tools=[tool], include=["file_search_call.results"]
    ).output
    (part,) = message.content
    assert "Sections: Part 1; Part 2." in part.text
    assert [(one.type, one.filename) for one in part.annotations] == [("file_citation", "k84.md")]
    assert [(one.filename, one.text) for one in search.results] == [("k84.md", part.text)]


def test_a_batch_counts_what_failed_and_says_why(client):
    store = client.vector_stores.create()
    files = [("one.md", manual(2)), ("two.md", manual(3)), ("bad.pdf", b"%PDF-1.7 nothing")]
    batch = client.vector_stores.file_batches.upload_and_poll(store.id, files=[(n, io.BytesIO(d)) for n, d in files])
    assert batch.status == "completed"
    counts = batch.file_counts
    assert (counts.completed, counts.failed, counts.total) == (2, 1, 3)
    failed = list(client.vector_stores.files.list(store.id, filter="failed"))
    assert [one.last_error.code for one in failed] == ["invalid_file"]
    assert "bad.pdf" in failed[0].last_error.message
    in_batch = list(client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store.id, limit=2))
    assert len(in_batch) == 3
    assert client.vector_stores.retrieve(store.id).file_counts.failed == 1


def test_a_batch_is_cancelled(client, model):
    store = client.vector_stores.create()
    ids = [upload(client, manual(60 + i, 30)).id for i in range(3)]
    batch = client.vector_stores.file_batches.create(store.id, file_ids=ids)
    assert batch.status == "in_progress"
    client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id)
    batch = client.vector_stores.file_batches.poll(batch.id, vector_store_id=store.id)
    assert batch.status == "cancelled"
    assert batch.file_counts.cancelled >= 2
    again = client.vector_stores.files.create_and_poll(ids[-1], vector_store_id=store.id)  # it may be attached anew
    assert again.status == "completed"


def test_search_finds_the_chunk_of_the_right_file(client):
    store = client.vector_stores.create()
    for number, year in ((4, 2023), (5, 2024)):
        file = upload(client, manual(number, 3), f"k{number}.md")
        client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id, attributes={"year": year})

    def found(query, **options):
        return list(client.vector_stores.search(store.id, query=query, **options))

    best = found("How long is the warranty of the K5-2?")
    assert best[0].filename == "k5.md"
    assert "K5-2 is 25 months" in best[0].content[0].text
    assert best[0].attributes == {"year": 2024}
    assert all(0 <= one.score <= 1 for one in best)
    assert [one.score for one in best] == sorted((one.score for one in best), reverse=True)
    assert len(found("warranty", max_num_results=3)) == 3
    only = {"type": "and", "filters": [{"type": "lt", "key": "year", "value": 2024},
                                       {"type": "in", "key": "year", "value": [2023, 2020]}]}  # fmt: skip
    assert {one.filename for one in found("warranty of the K5-2", filters=only)} == {"k4.md"}
    assert found("warranty", filters={"type": "eq", "key": "colour", "value": "red"}) == []
    assert found("zebra crossing") == []
    several = found(["service line K4-1", "service line K5-1"])
    assert {one.filename for one in several[:2]} == {"k4.md", "k5.md"}
    assert len(several) == len({(one.file_id, one.content[0].text) for one in several})
    scored = found("warranty of the K5-2")
    enough = [one for one in scored if one.score >= 0.5]
    assert 0 < len(enough) < len(scored)
    assert found("warranty of the K5-2", ranking_options={"score_threshold": 0.5}) == enough


def test_a_file_of_two_stores_is_cast_once_and_goes_with_the_last(client, model, api):
    file = upload(client, manual(6), "shared.md")
    stores = [client.vector_stores.create(file_ids=[file.id]) for _ in range(2)]
    for store in stores:
        assert client.vector_stores.files.poll(file.id, vector_store_id=store.id).status == "completed"

    def there():
        return [name for name in model.library.names() if name.startswith("shared-")]

    assert len(there()) == 1
    assert client.vector_stores.delete(stores[0].id).deleted
    assert len(there()) == 1
    assert client.vector_stores.files.delete(file.id, vector_store_id=stores[1].id).deleted
    assert there() == []
    assert client.files.retrieve(file.id).id == file.id  # only the file's own deletion deletes it
    again = client.vector_stores.files.create_and_poll(file.id, vector_store_id=stores[1].id)
    assert again.status == "completed"
    client.files.delete(file.id)
    assert there() == []
    assert client.vector_stores.retrieve(stores[1].id).file_counts.total == 0


def test_a_store_that_has_expired_answers_no_more(client, model, monkeypatch):
    file = upload(client, manual(7), "brief.md")
    store = client.vector_stores.create(file_ids=[file.id], expires_after={"anchor": "last_active_at", "days": 1})
    client.vector_stores.files.poll(file.id, vector_store_id=store.id)
    later = int(time.time()) + 86_401
    monkeypatch.setattr(vector_stores, "now", lambda: later)
    assert client.vector_stores.retrieve(store.id).status == "expired"
    with pytest.raises(openai.BadRequestError, match="expired"):
        client.vector_stores.search(store.id, query="warranty")
    with pytest.raises(openai.BadRequestError, match="expired"):
        client.vector_stores.files.create(store.id, file_id=file.id)


def test_an_adapter_that_is_deleted_is_missing_in_its_store(client, api, model):
    file = upload(client, manual(8), "lost.md")
    store = client.vector_stores.create(file_ids=[file.id])
    client.vector_stores.files.poll(file.id, vector_store_id=store.id)
    name = next(one for one in model.library.names() if one.startswith("lost-"))
    assert api.patch(f"/adapters/{name}", json={"name": "found"}).status_code == 200
    assert [one.filename for one in client.vector_stores.search(store.id, query="warranty")] == ["lost.md"]
    assert api.delete("/adapters/found").json()["deleted"]
    missing = client.vector_stores.files.retrieve(file.id, vector_store_id=store.id)
    assert (missing.status, missing.last_error.code) == ("failed", "server_error")
    assert list(client.vector_stores.search(store.id, query="warranty")) == []
    assert client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id).status == "completed"


def test_others_write_while_the_adapters_of_a_store_go(client, model, monkeypatch):
    files = [upload(client, manual(11, i + 1), f"gone-{i}.md") for i in range(4)]
    store = client.vector_stores.create(file_ids=[file.id for file in files])
    for file in files:
        assert client.vector_stores.files.poll(file.id, vector_store_id=store.id).status == "completed"
    took: list[float] = []
    pauses: list[float] = []
    is_paused, goes_on = threading.Event(), threading.Event()

    remove = Library.remove

    def timed(library, reference):
        began = time.monotonic()
        remove(library, reference)
        took.append(time.monotonic() - began)

    def pause(seconds):
        pauses.append(seconds)
        is_paused.set()
        assert goes_on.wait(30)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=pause)
    monkeypatch.setattr("loracast.serving.vector_stores.time", clock)
    monkeypatch.setattr(Library, "remove", timed)
    with ThreadPoolExecutor(1) as threads:
        deleted = threads.submit(client.vector_stores.delete, store.id)
        assert is_paused.wait(30)
        client.vector_stores.create()
        assert len(took) == 1 and not deleted.done()
        goes_on.set()
        assert deleted.result().deleted
    assert len(pauses) == len(files) and all(pause >= s for pause, s in zip(pauses, took, strict=True))
    assert not any(name.startswith("gone-") for name in model.library.names())


def test_an_adapter_that_could_not_be_removed_goes_later(app, client, model, monkeypatch):
    def fails(library, reference):
        raise LoracastError("the store cannot be reached")

    store = client.vector_stores.create()
    client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("stuck.md", manual(12)))
    with monkeypatch.context() as patch:
        patch.setattr(Library, "remove", fails)
        assert client.vector_stores.delete(store.id).deleted
        assert any(name.startswith("stuck-") for name in model.library.names())
    app.state.service.learning.tidy()
    assert not any(name.startswith("stuck-") for name in model.library.names())


def removed(library, name):
    library.remove(name)


def renamed(library, name):
    library.rename(name, f"{name}-renamed")


def compacted(library, name):
    compact(library, name, "text")
    library.collect_garbage(keep=1)


@pytest.mark.parametrize("change", [removed, renamed, compacted])
def test_a_file_that_lost_its_adapter_on_the_command_line_is_failed_until_it_is_attached_again(client, model, change):
    file = upload(client, manual(10), f"{change.__name__}.md")
    store = client.vector_stores.create()
    attach = partial(client.vector_stores.files.create_and_poll, file.id, vector_store_id=store.id)
    assert attach().status == "completed"

    def searched() -> list[str]:
        return [one.filename for one in client.vector_stores.search(store.id, query="warranty of the K10-0")]

    def answered() -> set[str]:
        tool = {"type": "file_search", "vector_store_ids": [store.id]}
        base = next(one.id for one in client.models.list() if one.parent is None)
        asked = {"model": base, "input": "How long is the warranty of the K10-0?", "max_output_tokens": 4}
        message = client.responses.create(**asked, tools=[tool]).output[-1]
        return {one.filename for one in message.content[0].annotations}

    change(model.library, next(one for one in model.library.names() if one.endswith(file.id[-12:])))
    assert answered() == set() and searched() == []
    assert client.vector_stores.retrieve(store.id).file_counts.failed == 1
    missing = client.vector_stores.files.retrieve(file.id, vector_store_id=store.id)
    assert missing.status == "failed" and "attach the file again" in missing.last_error.message
    with pytest.raises(openai.ConflictError):
        client.vector_stores.files.content(file.id, vector_store_id=store.id)
    assert attach().status == "completed"
    assert answered() == {file.filename} == {*searched()}
    assert list(client.vector_stores.files.content(file.id, vector_store_id=store.id))


@pytest.mark.parametrize("size, used", [(100, 100), (4096, 192)])
def test_chunks_are_as_long_as_the_hypernetwork_is_good_for(client, size, used):
    file = upload(client, manual(9, 2))
    strategy = {"type": "static", "static": {"max_chunk_size_tokens": size, "chunk_overlap_tokens": 50}}
    store = client.vector_stores.create()
    attached = client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id, chunking_strategy=strategy)
    assert attached.chunking_strategy.static.max_chunk_size_tokens == used


# ---- adapters


def test_the_library_over_http(api, model):
    learn(api, manual(20, 3), "dish-washer", tags="kitchen,new")
    job = learned(api, api.post("/adapters", json={"description": "Answer in French.", "name": "french"}))
    assert (job["kind"], job["adapter"], job["status"]) == ("task", "french", "completed")
    found = api.get("/adapters", params={"q": "washer"}).json()
    assert (found["total"], found["data"][0]["name"], found["data"][0]["tags"]) == (
        1,
        "dish-washer",
        ["kitchen", "new"],
    )
    assert [one["name"] for one in api.get("/adapters", params={"tag": "kitchen"}).json()["data"]] == ["dish-washer"]
    page = api.get("/adapters", params={"limit": 1}).json()
    assert (len(page["data"]), page["has_more"]) == (1, True)
    one = api.get("/adapters/french").json()
    assert (one["kind"], one["manifest"]["title"]) == ("task", "Answer in French.")
    version = api.get("/adapters/dish-washer").json()["version"]
    assert api.get(f"/adapters/dish-washer@{version[:12]}").json()["version"] == version
    chunks = api.get("/adapters/dish-washer/chunks").json()
    assert chunks["total"] == model.library.open("dish-washer").manifest.n_chunks == len(chunks["data"])
    assert "K20-0 is 20 months" in chunks["data"][0]["text"]
    changed = api.patch("/adapters/dish-washer", json={"name": "washer", "tags": ["new"], "note": "in the cellar"})
    assert {key: changed.json()[key] for key in ("name", "tags", "note")} == {
        "name": "washer", "tags": ["new"], "note": "in the cellar",
    }  # fmt: skip
    assert api.get("/adapters/dish-washer").status_code == 404
    assert api.patch("/adapters/washer", json={"name": "french"}).status_code == 409
    assert api.patch("/adapters/washer", json={"name": "other", "tags": ["Not A Tag"]}).status_code == 400
    assert api.get("/adapters/washer").status_code == 200
    assert api.post("/adapters", json={"description": "Answer in German.", "name": "french"}).status_code == 409
    assert api.delete("/adapters/washer").status_code == 200
    assert api.get("/adapters/washer/chunks").status_code == 404


def test_a_task_comes_with_examples(api, model):
    examples = [{"input": "hot", "output": "cold"}, {"input": "big", "output": "small"}]
    body = {"description": "Say the opposite.", "examples": examples, "name": "opposite"}
    assert learned(api, api.post("/adapters", json=body))["status"] == "completed"
    assert model.library.open("opposite").manifest.n_examples == 2
    alone = learned(api, api.post("/adapters", json={"examples": examples}))
    assert (alone["adapter"], alone["status"]) == ("hot-cold", "completed")
    for bad in (
        {},
        {"description": " "},
        {"examples": [{"input": "hot"}]},
        {"examples": [{"input": "", "output": "x"}]},
    ):
        assert api.post("/adapters", json=bad).status_code == 400


def test_a_route_says_what_the_model_takes(api, model):
    learn(api, manual(21, 4), "toaster")
    question = "How long is the warranty of the K21-2?"
    shown = api.post("/adapters/route", json={"question": question, "adapters": ["toaster"]}).json()["adapters"][0]
    (_, route), = model.prepare(question, "toaster").routed  # fmt: skip
    assert [one["chunk"] for one in shown["chunks"]] == list(route.chunks)
    assert [one["weight"] for one in shown["chunks"]] == list(route.weights)
    best = shown["chunks"][0]
    assert "K21-2 is 41 months" in best["text"]
    heaviest = max(best["sentences"], key=lambda one: one["weight"])
    assert "K21-2 is 41 months" in best["text"][heaviest["start"] : heaviest["end"]]
    nothing = api.post(
        "/adapters/route", json={"question": "What is the capital of France?", "adapters": ["toaster"]}
    ).json()
    assert nothing["adapters"][0]["is_used"] is False
    assert api.post("/adapters/route", json={"question": "?", "adapters": ["nobody"]}).status_code == 404


def test_adapters_are_added_up(api, model):
    learn(api, manual(22), "one")
    learn(api, manual(23), "two")
    parts = [{"id": "one", "scale": 0.5}, {"id": "two"}]
    job = learned(api, api.post("/adapters/combine", json={"parts": parts, "name": "sum"}))
    assert (job["status"], job["kind"]) == ("completed", "combination")
    one, two, both = (model.library.open(name).lora() for name in ("one", "two", "sum"))
    for name in both.names:
        wanted = 0.5 * one.delta(name) + two.delta(name)
        assert torch.allclose(both.delta(name), wanted, atol=0.02 * wanted.abs().max())


def test_an_export_is_what_peft_reads(api, model, tmp_path):
    from loracast.lora.algebra import LoRA
    from loracast.lora.inject import linear_shapes
    from loracast.lora.peft_format import read_peft

    learn(api, manual(24, 2), "kettle")
    answer = api.get("/adapters/kettle/export", params={"to": "peft"})
    assert answer.headers["content-disposition"] == 'attachment; filename="kettle-peft.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    read = LoRA(read_peft(tmp_path, linear_shapes(model.base.model)))
    kept = model.library.open("kettle").lora(dense=False)
    for name in kept.names:
        assert torch.allclose(read.delta(name), kept.delta(name), atol=0.02 * kept.delta(name).abs().max())
    assert api.get("/adapters/kettle/export", params={"to": "pickle"}).status_code == 400
    small = api.get("/adapters/kettle/export", params={"to": "peft", "rank": 2})
    with zipfile.ZipFile(io.BytesIO(small.content)) as archive:
        archive.extractall(tmp_path / "small")
    ranks = {
        pair.rank for pair in LoRA(read_peft(tmp_path / "small", linear_shapes(model.base.model))).factors.values()
    }
    assert ranks == {2}
    each = api.get("/adapters/kettle/export", params={"to": "peft", "each_chunk": True})
    with zipfile.ZipFile(io.BytesIO(each.content)) as archive:
        names = archive.namelist()
    n_chunks = model.library.open("kettle").manifest.n_chunks
    assert n_chunks > 1 and sum(name.endswith("adapter_model.safetensors") for name in names) == n_chunks
    gguf = zipfile.ZipFile(io.BytesIO(api.get("/adapters/kettle/export", params={"to": "gguf"}).content))
    assert [name for name in gguf.namelist() if name.endswith(".gguf")]


@pytest.mark.parametrize("asked", ["bytes=0-9", "bytes=999999999-", "bytes=x-y", "nonsense", "bytes="])
def test_nothing_stays_of_an_export_whatever_range_is_asked_for(api, monkeypatch, tmp_path, asked):
    learn(api, manual(25), "blender")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    answer = api.get("/adapters/blender/export", params={"to": "peft"}, headers={"Range": asked})
    assert [*tmp_path.iterdir()] == []
    assert answer.status_code == 200 and zipfile.ZipFile(io.BytesIO(answer.content)).testzip() is None


# ---- jobs


def events(api, id: str, **headers) -> Iterator[tuple[int, dict]]:
    """The events of a job as they come, up to the end of the stream: the id of each, and the job that it holds."""
    with api.stream("GET", f"/jobs/{id}/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("id: "):
                event = int(line[4:])
            if line.startswith("data: "):
                yield event, json.loads(line[6:])


def test_events_tell_the_progress_and_go_on_where_a_client_left(api, monkeypatch):
    heard, note = threading.Semaphore(0), Jobs._progress

    def note_and_wait(jobs, *progress):
        """The job goes on when the client has heard of it: a fast machine would end it between two events."""
        note(jobs, *progress)
        assert heard.acquire(timeout=60)

    monkeypatch.setattr(Jobs, "_progress", note_and_wait)
    monkeypatch.setattr("loracast.base.forward.TOKENS_PER_BATCH", 600)
    job = api.post("/adapters", files={"file": ("long.md", manual(30, 20))}).json()
    ids, jobs = [], []
    for id, one in events(api, job["id"]):
        ids.append(id)
        jobs.append(one)
        heard.release()
    assert ids == sorted(set(ids))
    assert [one["done"] for one in jobs] == sorted(one["done"] for one in jobs)
    assert len({one["done"] for one in jobs}) > 2
    assert jobs[-1] == api.get(f"/jobs/{job['id']}").json()
    assert jobs[-1]["status"] == "completed"
    assert jobs[-1]["done"] == jobs[-1]["total"] >= 20
    assert [id for id, _ in events(api, job["id"], **{"Last-Event-ID": str(ids[-2])})] == ids[-1:]
    seen = api.get(f"/jobs/{job['id']}/events", headers={"Last-Event-ID": str(ids[-1])})
    assert seen.status_code == 204
    assert api.get("/jobs", params={"limit": 1}).json()["data"][0]["id"] == job["id"]


def test_a_job_is_cancelled_over_http(api, model):
    long = api.post("/adapters", files={"file": ("very-long.md", manual(31, 60))}).json()
    api.post(f"/jobs/{long['id']}/cancel")
    assert [*events(api, long["id"])][-1][1]["status"] == "cancelled"
    assert "very-long" not in model.library.names()


# ---- what is refused


def test_each_route_needs_its_scope(url):
    wanted = {
        READ: [("GET", "/files"), ("GET", "/vector_stores"), ("GET", "/adapters"), ("GET", "/jobs")],
        WRITE: [("POST", "/vector_stores"), ("PATCH", "/adapters/a"), ("POST", "/adapters")],
        ADMIN: [("DELETE", "/files/a"), ("DELETE", "/vector_stores/a"), ("DELETE", "/adapters/a")],
    }
    keys = list(wanted)
    for i, (key, routes) in enumerate(wanted.items()):
        for method, path in routes:
            for other in keys:
                answer = httpx.request(
                    method, f"{url}/v1{path}", headers={"Authorization": f"Bearer {other}"}, json={} if i else None
                )
                assert (answer.status_code == 403) == (keys.index(other) < keys.index(key)), (method, path, other)


BAD_REQUESTS = [
    ("POST", "/vector_stores", {"json": {"file_ids": ["file-nothing"]}}, 404),
    ("POST", "/vector_stores", {"json": {"name": 3}}, 400),
    ("POST", "/vector_stores", {"json": {"unknown": 3}}, 400),
    ("POST", "/vector_stores", {"json": {"metadata": {str(i): "x" for i in range(17)}}}, 400),
    ("POST", "/vector_stores", {"json": {"expires_after": {"anchor": "last_active_at", "days": 0}}}, 400),
    ("POST", "/vector_stores/x/search", {"json": {"query": "a"}}, 404),
    ("GET", "/vector_stores?limit=0", {}, 400),
    ("GET", "/vector_stores?after=vs_none", {}, 404),
    ("GET", "/vector_stores/%2e%2e%2fetc", {}, 404),
    ("GET", "/files/..%2Fstate.sqlite", {}, 404),
    ("GET", "/files/..%2F..%2Fstate.sqlite/content", {}, 404),
    ("POST", "/files", {"files": {"file": ("a.md", b"x")}, "data": {"purpose": "mischief"}}, 400),
    ("POST", "/files", {"files": {"file": ("a.md", b"x")}}, 400),
    ("POST", "/files", {"json": {"purpose": "assistants"}}, 400),
    ("POST", "/adapters", {"json": {"description": ""}}, 400),
    ("POST", "/adapters", {"json": {"description": "x", "name": "../up"}}, 400),
    ("POST", "/adapters", {"json": {"description": "x" * 5000}}, 400),
    ("POST", "/adapters", {"content": b"{nonsense", "headers": {"Content-Type": "application/json"}}, 400),
    ("POST", "/adapters", {"content": b"[[[[" * 9999, "headers": {"Content-Type": "application/json"}}, 400),
    ("POST", "/adapters", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
    ("POST", "/adapters", {"files": {"file": ("a.md", b"x")}, "data": {"name": "Ümläut 🙂"}}, 400),
    ("POST", "/adapters", {"files": {"file": ("a.md", b"x")}, "data": {"tags": "bad tag"}}, 400),
    ("POST", "/adapters", {"files": {"other": ("a.md", b"x")}}, 400),
    ("POST", "/adapters/combine", {"json": {"parts": [{"id": "a", "scale": 1e9}], "name": "b"}}, 400),
    ("POST", "/adapters/combine", {"json": {"parts": [{"id": "nobody"}], "name": "b"}}, 404),
    ("POST", "/adapters/route", {"json": {"question": "a", "route": 10**12}}, 400),
    ("GET", "/adapters/" + "x" * 10_000, {}, 400),
    ("GET", "/adapters/a@zzzz", {}, 400),
    ("GET", "/jobs/job-nothing/events", {}, 404),
]


@pytest.mark.parametrize("method, path, request_, status", BAD_REQUESTS)
def test_bad_requests_are_refused_with_openais_body(api, method, path, request_, status):
    answer = api.request(method, path, **request_)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert len(answer.text) < 1000


# ---- deleting while it is used


def test_an_answer_goes_on_while_its_adapter_is_replaced_and_deleted(api, model):
    from loracast.base.generate import Sampling
    from loracast.serving.generation import GenerationRequest

    learn(api, manual(40, 2), "used")
    prepared = model.prepare("How long is the warranty of the K40-1?", "used", always=True)
    lora = model.lora_of(prepared.routed)
    ask = GenerationRequest(prepared.prompt, lora, sampling=Sampling(max_new_tokens=60))
    engine = LocalEngine(model.base)
    undisturbed = engine.submit(ask).text()
    opened = prepared.routed[0][0]
    before = opened.lora([0]).delta(lora.names[0]).clone()
    ticket = engine.submit(ask)
    first = next(iter(ticket))
    learn(api, manual(41), "used", replace="true")
    assert model.library.open("used").version != opened.version
    assert api.delete("/adapters/used").status_code == 200
    assert api.get("/adapters/used").status_code == 404 and not opened.folder.exists()
    assert ticket.text() == undisturbed
    assert undisturbed.startswith(first.text)
    # Its files, which are mapped, stay readable for who opened them before.
    opened.kept = factors_in_memory()
    assert torch.equal(opened.lora([0]).delta(lora.names[0]), before)
    engine.close()
