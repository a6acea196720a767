"""Other clients of the API: LangChain, Open WebUI's requests as it sends them, and requests made from the schema."""

from __future__ import annotations

import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

import loracast
from loracast.base.generate import Sampling
from loracast.serving.app import create_app
from loracast.serving.auth import keys_in
from loracast.serving.engine import LocalEngine
from loracast.serving.settings import ServerSettings
from servers import fill, served

WARRANTY = "How long is the warranty of the kettle?"
KEY = "sk-read-0123456789"


@pytest.fixture(scope="module")
def server(tiny_folder, tiny_hypernet_folder, tmp_path_factory):
    """The model of a server that wants a key, and its URL."""
    folder = tmp_path_factory.mktemp("served") / "library"
    model = loracast.load(tiny_folder, tiny_hypernet_folder, library=folder, device="cpu")
    fill(model)
    app = create_app(model, LocalEngine(model.base), ServerSettings(keys=keys_in(f"read:{KEY}")))
    with served(app) as url:
        yield model, url


def test_langchain_asks_and_streams(server):
    model, url = server
    chat = ChatOpenAI(model="manual", base_url=f"{url}/v1", api_key=KEY, max_tokens=12, max_retries=0)
    wanted = model.ask(WARRANTY, "manual", sampling=Sampling(12))
    answer = chat.invoke(WARRANTY)
    assert answer.content == wanted
    assert answer.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.content for chunk in chat.stream(WARRANTY)) == wanted
    turns = [
        SystemMessage("Be brief."),
        HumanMessage(WARRANTY),
        AIMessage(wanted),
        HumanMessage("Who built the bridge?"),
    ]
    told = [
        {"role": role, "content": turn.content}
        for role, turn in zip(("system", "user", "assistant", "user"), turns, strict=True)
    ]
    assert chat.invoke(turns).content == model.ask(told, "manual", sampling=Sampling(12))
    both = chat.bind(extra_body={"adapters": [{"id": "shout"}]}).invoke(WARRANTY)
    assert both.content == model.ask(WARRANTY, ["manual", "shout"], sampling=Sampling(12))


OPEN_WEBUI = {
    "Authorization": f"Bearer {KEY}",
    "Content-Type": "application/json",
    "X-OpenWebUI-User-Name": "Ada",
    "X-OpenWebUI-User-Id": "1",
    "X-OpenWebUI-User-Email": "ada@example.org",
    "X-OpenWebUI-User-Role": "admin",
}
"""Headers that Open WebUI sends to a connection (its backend/open_webui/routers/openai.py)."""


def test_open_webui_lists_models_and_chats(server):
    model, url = server
    listed = httpx.get(f"{url}/v1/models", headers=OPEN_WEBUI).json()
    assert listed["object"] == "list"
    assert {"manual", "museum", "shout"} < {one["id"] for one in listed["data"]}
    assert all(isinstance(one["owned_by"], str) and isinstance(one["created"], int) for one in listed["data"])
    body = {"stream": True, "model": "manual", "messages": [{"role": "user", "content": WARRANTY}], "max_tokens": 12,
            "stream_options": {"include_usage": True}}  # fmt: skip
    given = httpx.post(f"{url}/v1/chat/completions", headers=OPEN_WEBUI, content=json.dumps(body))
    assert given.headers["content-type"].startswith("text/event-stream")
    chunks = [json.loads(line[6:]) for line in given.text.splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text == model.ask(WARRANTY, "manual", sampling=Sampling(12))
    assert given.text.endswith("data: [DONE]\n\n")


@pytest.fixture(scope="module")
def schema(tiny_folder, tiny_hypernet_folder, tmp_path_factory):
    """The schema of an application whose answers are short."""
    folder = tmp_path_factory.mktemp("schema") / "library"
    model = loracast.load(tiny_folder, tiny_hypernet_folder, library=folder, device="cpu")
    fill(model)
    app = create_app(model, LocalEngine(model.base), ServerSettings(max_tokens=4))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


requests = schemathesis.pytest.from_fixture("schema")


@requests.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
def test_requests_made_from_the_schema_break_nothing(case):
    if case.path.endswith("/events"):  # goes on until its job has ended
        return
    answer = case.call(headers={"Host": "127.0.0.1"})
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
