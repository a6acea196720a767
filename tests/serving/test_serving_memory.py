"""Outlines, memories and styles on a server, with OpenAI's own client."""

from __future__ import annotations

import io
import time

import openai
import pytest

from loracast.base.generate import Sampling
from loracast.cast.memory import Forgotten, Memory
from loracast.cli.client import ServedMemory
from loracast.serving.app import create_app
from loracast.serving.client import HTTPClient
from loracast.serving.engine import LocalEngine
from loracast.serving.settings import ServerSettings, keys_in
from servers import eventually, in_process, served


@pytest.fixture(scope="module")
def server(filled):
    """The model of a server, and OpenAI's client of it."""
    with served(create_app(filled, LocalEngine(filled.base), ServerSettings(max_tokens=256))) as url:
        yield filled, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def chat(client, model, said, **options):
    messages = [{"role": "user", "content": said}]
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 12, **options})


def test_a_question_about_the_whole_document_is_answered_from_its_outline(server):
    model, client = server
    outlined = model.ask("What is this document about?", "manual")
    assert "no model was asked" in outlined
    answer = chat(client, "manual", "What is this document about?", n=2)
    assert [choice.message.content for choice in answer.choices] == [outlined, outlined]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == 0
    (source,) = answer.loracast["sources"]
    assert (source["adapter"], source["title"], source["chunk"], source["start"]) == ("manual", "Manual", None, 0)
    (cited,) = answer.choices[0].message.annotations
    assert (cited.file_id, cited.chunk, cited.index) == (model.adapter("manual").version, None, len(outlined))
    pieces = chat(client, "manual", "What is this document about?", stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == outlined


# ---- a memory


def remembered(model, n: int, name: str = "me") -> list[str]:
    return eventually(lambda: len(found := model.memory(name).messages()) == n and found)


def test_what_is_said_goes_into_the_memory_that_a_request_names(server):
    model, client = server
    base = client.models.list().data[0].id
    chat(client, base, "My dog is called Bella.")
    chat(client, base, "My kettle is called Bella.", extra_body={"memory": "me"})
    assert remembered(model, 1) == ["My kettle is called Bella."]
    question = "What is my kettle called?"
    with_memory = chat(client, base, question, extra_body={"memory": "me"})
    [used] = with_memory.loracast["adapters"]
    assert used["id"] == model.adapter("me").version and used["is_used"] and used["chunks"] == [0]
    assert with_memory.choices[0].message.content == model.ask(question, "me", sampling=Sampling(12))
    assert chat(client, base, question).loracast["adapters"] == []
    named_too = chat(client, "me", question, extra_body={"memory": "me"})
    assert named_too.choices[0].message.content == with_memory.choices[0].message.content
    pieces = chat(client, "manual", "My lamp is red.", stream=True, extra_body={"memory": "me"})
    assert len(list(pieces)) > 1
    assert remembered(model, 2) == ["My kettle is called Bella.", "My lamp is red."]


def test_a_response_has_a_memory_and_a_style(server):
    model, client = server
    base, question = client.models.list().data[0].id, "What is my boat called?"

    def respond(said, **fields):
        return client.responses.create(model=base, input=said, max_output_tokens=16, extra_body=fields)

    respond("My boat is called Tern.", memory="sailor")
    assert remembered(model, 1, "sailor") == ["My boat is called Tern."]
    answer = respond(question, memory="sailor")
    assert [one["id"] for one in answer.loracast["adapters"]] == [model.adapter("sailor").version]
    assert answer.output_text == model.ask(question, "sailor", sampling=Sampling(16))
    events = client.responses.create(
        model="manual", input="My lamp is red.", max_output_tokens=16, stream=True, extra_body={"memory": "sailor"}
    )
    assert [event.type for event in events][-1] in ("response.completed", "response.incomplete")
    assert remembered(model, 2, "sailor") == ["My boat is called Tern.", "My lamp is red."]
    assert respond(question, user="ann").to_dict()["user"] == "ann"
    with pytest.raises(openai.BadRequestError, match="user"):
        respond(question, user=["ann"])
    styled = respond(question, style="shout")
    assert styled.output_text == model.ask(question, "shout", sampling=Sampling(16))


def test_a_message_is_taken_out_over_http(server):
    model, client = server
    model.memory("you").remember("My cat is grey.")
    model.memory("you").remember("My bird is blue.")
    listed = client.get("/memories/you", cast_to=object)
    assert listed == {"object": "list", "data": ["My cat is grey.", "My bird is blue."]}
    outlined = client.delete("/memories/you/1", cast_to=object)
    assert outlined == {
        "name": "you", "deleted": True, "message": "My cat is grey.", "versions_removed": 2, "still_in": [],
    }  # fmt: skip
    assert model.memory("you").messages() == ["My bird is blue."]
    with pytest.raises(openai.NotFoundError, match="no message 2"):
        client.delete("/memories/you/2", cast_to=object)
    with pytest.raises(openai.BadRequestError, match="'manual' is an adapter that no chat has made"):
        client.get("/memories/manual", cast_to=object)
    with pytest.raises(openai.BadRequestError, match="no chat has made"):
        chat(client, "manual", "My cat is grey.", extra_body={"memory": "manual"})


def test_a_memory_takes_a_key_that_may_write(model):
    keys = keys_in("read:aaaaaaaaaaaaaaaaaaaa,write:bbbbbbbbbbbbbbbbbbbb")
    client = in_process(model, keys=keys)

    def ask(key: str, **fields) -> int:
        body = {"model": client.get("/v1/models", headers=key_of(key)).json()["data"][0]["id"], "max_tokens": 2}
        body["messages"] = [{"role": "user", "content": "My cat is grey."}]
        return client.post("/v1/chat/completions", json={**body, **fields}, headers=key_of(key)).status_code

    with client:
        assert ask("a") == 200 and ask("a", memory="me") == 403 and ask("b", memory="me") == 200
        body = {"model": "any", "input": "My cat is grey.", "memory": "me"}
        assert client.post("/v1/responses", json=body, headers=key_of("a")).status_code == 403
        assert client.get("/v1/memories/me", headers=key_of("a")).status_code == 403
        assert remembered(model, 1) == ["My cat is grey."]
        for key, status in (("a", 403), ("b", 200)):
            assert ask(key, adapters=[{"id": "me"}]) == status
            assert client.get("/v1/adapters/me/chunks", headers=key_of(key)).status_code == status
            assert client.get("/v1/adapters/me/export?to=peft", headers=key_of(key)).status_code in (status, 400)
            question = {"question": "What colour is my cat?", "adapters": ["me"]}
            assert client.post("/v1/adapters/route", json=question, headers=key_of(key)).status_code == status
            asked = {**question, "adapters": ["*"]}
            assert "grey" not in client.post("/v1/adapters/route", json=asked, headers=key_of(key)).text


def test_a_question_waits_for_what_was_just_said(server, monkeypatch):
    _, client = server
    remember = Memory.remember
    monkeypatch.setattr(Memory, "remember", lambda self, message: (time.sleep(0.5), remember(self, message))[1])
    base = client.models.list().data[0].id
    chat(client, base, "My horse is called Bella.", extra_body={"memory": "rider"})
    answer = chat(client, base, "What is my horse called?", extra_body={"memory": "rider"})
    assert [one["is_used"] for one in answer.loracast["adapters"]] == [True]


def key_of(letter: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {20 * letter}"}


def test_chat_keeps_a_memory_on_a_server(server):
    model, client = server
    memory = ServedMemory(HTTPClient(str(client.base_url).removesuffix("/v1/")), "them")
    assert memory.messages() == []
    memory.remember("My kettle is grey. Is yours?")
    assert memory.messages() == model.memory("them").messages() == ["My kettle is grey."]
    assert memory.forget(1) == Forgotten("My kettle is grey.", 1, ())
    assert memory.messages() == []


def test_a_style_is_a_task_that_goes_along(server):
    model, client = server
    question = "How long is the warranty of the kettle?"
    styled = chat(client, "manual", question, extra_body={"style": "shout"})
    assert styled.choices[0].message.content == model.ask(question, ["manual", "shout"], sampling=Sampling(12))
    assert [one["id"].partition("@")[0] for one in styled.loracast["adapters"]] == ["manual", "shout"]
    with pytest.raises(openai.BadRequestError, match="'museum' is of kind document"):
        chat(client, "manual", question, extra_body={"style": "museum"})
    with pytest.raises(openai.NotFoundError):
        chat(client, "manual", question, extra_body={"style": "whisper"})


def test_a_citation_names_the_version_that_it_comes_from(server):
    model, client = server
    versions = []
    for day in ("Monday", "Tuesday"):
        duty = io.BytesIO(f"The library is open on {day}. Anna has the keys of the library.".encode())
        versions.append(model.learn(duty, "duty", replace=bool(versions)).version)
    given = client.responses.create(
        model="+".join(versions), input="On which day is the library open?", max_output_tokens=4
    )
    cited = given.output[-1].content[0].annotations
    assert {one.file_id for one in cited} == set(versions)
    assert {f"duty@{source['version'][:12]}" for source in given.loracast["sources"]} == set(versions)
