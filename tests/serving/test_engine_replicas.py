"""The engine on several vLLM servers: each LoRA has its own, and another one where that is gone."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from types import SimpleNamespace

import openai
import pytest
from test_vllm_engine import QUESTIONS, chat, random_lora, request

from fake_vllm import FakeVllm
from loracast.base.generate import Sampling
from loracast.errors import ConfigError
from loracast.serving.app import create_app, make_engine
from loracast.serving.generation import EngineFailed, GenerationRequest
from loracast.serving.settings import ServerSettings
from loracast.serving.vllm import in_order
from servers import served

pytestmark = pytest.mark.usefixtures("no_copying")


def end(server: FakeVllm) -> None:
    server.goes_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def vllms(tiny_folder):
    servers = [FakeVllm(tiny_folder).start() for _ in range(3)]
    yield servers
    for server in servers:
        end(server)


@pytest.fixture
def engine(filled, vllms, home):
    made = make_engine(filled.base, ServerSettings(engine=", ".join(server.url for server in vllms)))
    yield made
    made.close()


def ask(engine, base, keys, n_tokens=2) -> dict[str, str]:
    lora = random_lora(base, 2)
    tickets = [engine.submit(GenerationRequest([5, 6, 7], lora, key, Sampling(n_tokens))) for key in keys]
    return {key: ticket.text() for key, ticket in zip(keys, tickets, strict=True)}


def n_asked(server: FakeVllm) -> int:
    return sum(what == "completions" and name != "base" for what, name in server.calls)


def test_loras_are_spread_evenly_and_their_next_servers_too():
    urls = [f"http://127.0.0.1:{8000 + i}" for i in range(3)]
    servers = [SimpleNamespace(client=SimpleNamespace(url=url), down_until=0.0) for url in urls]
    keyed = [GenerationRequest([5, 6, 7], None, f"key {i}") for i in range(600)]
    unkeyed = [GenerationRequest([5, 6, i], None, None) for i in range(600)]
    for asked in (keyed, unkeyed):
        orders = Counter(tuple(one.client.url for one in in_order(servers, request)) for request in asked)
        assert orders.keys() == {*permutations(urls)} and all(70 < n < 130 for n in orders.values())


def test_a_lora_is_loaded_by_one_server(filled, engine, vllms):
    keys = [f"key {i}" for i in range(12)]
    ask(engine, filled.base, keys * 2)
    assert sum(len(server.ids) for server in vllms) == 12
    assert engine.stats().n_adapters_in_memory == 12
    assert engine.stats().n_generated_tokens == 48


def test_answers_are_those_of_ask(filled, engine):
    for question in QUESTIONS:
        assert engine.submit(request(filled, question=question)).text() == filled.ask(
            question, "manual", sampling=Sampling(8)
        )


def test_where_a_server_is_gone_its_loras_alone_move(filled, engine, vllms):
    keys = [f"key {i}" for i in range(12)]
    before = ask(engine, filled.base, keys)
    gone, *others = sorted(vllms, key=lambda server: -len(server.ids))
    stayed = [{*server.ids} for server in others]
    end(gone)
    assert ask(engine, filled.base, keys) == before
    assert all(ids <= {*server.ids} for ids, server in zip(stayed, others, strict=True))
    assert sum(len(server.ids) for server in others) == 12


def test_a_server_that_fails_before_the_first_token_loses_no_request_and_one_that_fails_later_does(
    filled, engine, vllms
):
    ticket = engine.submit(request(filled))
    expected = ticket.text()
    (own,) = [server for server in vllms if server.ids]
    own.dies_after = 0
    assert engine.submit(request(filled)).text() == expected and sum(n_asked(server) for server in vllms) == 3
    for server in vllms:
        server.dies_after = 2
    ticket = engine.submit(request(filled))
    with pytest.raises(EngineFailed):
        ticket.text()
    assert ticket.n_tokens == 2


def test_where_all_are_gone_the_answer_is_503(filled, engine, vllms):
    with served(create_app(filled, engine, ServerSettings(answer_timeout_s=20))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert chat(client, "manual").choices
        for server in vllms:
            end(server)
        for name in ("manual", "tiny-base0"):
            with pytest.raises(openai.InternalServerError, match="vLLM server") as refused:
                chat(client, name)
            assert refused.value.status_code == 503


def test_all_must_be_there_at_the_start(filled, vllms, home):
    with pytest.raises((EngineFailed, ConfigError), match=r"http://127\.0\.0\.1:9"):
        make_engine(filled.base, ServerSettings(engine=f"{vllms[0].url},http://127.0.0.1:9"))
    assert not [path for path in home.glob("exports/*/*") if path.is_dir()]
