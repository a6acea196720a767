"""Outlines, memories and styles on a server, with OpenAI's own client."""

from __future__ import annotations

import openai
import pytest

import loracast
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine
from loracast.serving.settings import ServerSettings
from servers import fill, served


@pytest.fixture(scope="module")
def server(tiny_folder, tiny_hypernet_folder, tmp_path_factory):
    """The model of a server, and OpenAI's client of it."""
    folder = tmp_path_factory.mktemp("served") / "library"
    model = loracast.load(tiny_folder, tiny_hypernet_folder, library=folder, device="cpu")
    fill(model)
    with served(create_app(model, LocalEngine(model.base), ServerSettings(max_tokens=256))) as url:
        yield model, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def chat(client, model, said, **options):
    messages = [{"role": "user", "content": said}]
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 12, **options})


def test_a_question_about_the_whole_document_is_answered_from_its_outline(server):
    model, client = server
    told = model.ask("What is this document about?", "manual")
    assert "no model was asked" in told
    answer = chat(client, "manual", "What is this document about?", n=2)
    assert [choice.message.content for choice in answer.choices] == [told, told]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == 0
    pieces = chat(client, "manual", "What is this document about?", stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == told
