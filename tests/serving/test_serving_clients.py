"""Other clients of the API: LangChain, Open WebUI's requests as it sends them, and requests made from the schema."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import loracast
from loracast.base.generate import Sampling
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine
from loracast.serving.settings import ServerSettings, keys_in
from servers import fill, served

pytestmark = pytest.mark.usefixtures("no_copying")

WARRANTY = "How long is the warranty of the kettle?"
KEY = "sk-read-0123456789"


@pytest.fixture(scope="module")
def server(filled):
    """The model of a server that wants a key, and its URL."""
    app = create_app(filled, LocalEngine(filled.base), ServerSettings(keys=keys_in(f"read:{KEY}")))
    with served(app) as url:
        yield filled, url


def test_langchain_asks_and_streams(server):
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

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
    turns = [
        {"role": role, "content": turn.content}
        for role, turn in zip(("system", "user", "assistant", "user"), turns, strict=True)
    ]
    assert chat.invoke(turns).content == model.ask(turns, "manual", sampling=Sampling(12))
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


def test_the_curl_examples_of_the_docs_run(server):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (section,) = re.findall(r"^## The API\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL)
    examples = re.findall(r"^    (curl .*(?:\n {5,}.*)*)", section, re.MULTILINE)
    assert len(examples) >= 7
    for example in examples:
        command = example.replace("http://127.0.0.1:8000", server[1]).replace('"opposite"', '"shout"')
        command = command.replace("curl ", f"curl -sS -H 'Authorization: Bearer {KEY}' ", 1)
        done = subprocess.run(["bash", "-c", f"{command} --fail-with-body"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert done.stdout


@pytest.fixture(scope="module")
def schema(tiny_folder, tiny_hypernet_folder, tmp_path_factory):
    """The schema of an application whose answers are short."""
    import schemathesis

    folder = tmp_path_factory.mktemp("schema") / "library"
    model = loracast.load(tiny_folder, tiny_hypernet_folder, library=folder, device="cpu")
    fill(model)
    app = create_app(model, LocalEngine(model.base), ServerSettings(max_tokens=4, allowed_hosts=("testserver",)))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_requests_made_from_the_schema_break_nothing(schema):
    """Each route gets a few requests that fit the schema, and none of them makes the server fail."""
    n_routes = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path.endswith("/events"):  # goes on until its job has ended
            continue

        @settings(max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(case=operation.as_strategy())
        def check(case):
            answer = case.call()
            assert answer.status_code < 500, (case.method, case.path, answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        check()
        n_routes += 1
    assert n_routes > 20
