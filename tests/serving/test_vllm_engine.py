"""The vLLM engine against a server that behaves as vLLM does: the local engine's answers, or an error."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch

from fake_vllm import FakeVllm, started_as_vllm
from loracast.base.generate import Sampling
from loracast.errors import AdapterError, ConfigError, LoracastError
from loracast.lora.algebra import LoRA
from loracast.lora.factors import Factors
from loracast.serving import vllm_server
from loracast.serving.app import create_app, make_engine
from loracast.serving.engine import LocalEngine
from loracast.serving.generation import EngineBusy, EngineConfig, EngineFailed, EngineStopped, GenerationRequest
from loracast.serving.settings import ServerSettings
from loracast.serving.vllm import LoadedLoRAs, VllmClient
from loracast.serving.vllm_server import vllm_engine
from other_processes import ForkedProgram, run_module
from servers import eventually, served
from tiny import make_model, make_tokenizer

pytestmark = pytest.mark.usefixtures("no_copying")

QUESTIONS = ["How long is the warranty of the kettle?", "How much water does the kettle hold?", "When does it begin?"]


@pytest.fixture
def vllm(tiny_folder):
    server = FakeVllm(tiny_folder).start()
    yield server
    server.goes_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def engine(filled, vllm, home):
    made = vllm_engine(vllm.url, filled.base)
    yield made
    made.close()


@pytest.fixture
def client(filled, engine):
    with served(create_app(filled, engine, ServerSettings(answer_timeout_s=20))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def request(model, adapter="manual", question=QUESTIONS[0], n_tokens=8, **options) -> GenerationRequest:
    from loracast.reading.routing import routing_key

    prepared = model.prepare(question, adapter)
    key = routing_key(prepared.routed)
    lora = None if key is None else lambda: model.lora_of(prepared.routed)
    return GenerationRequest(prepared.prompt, lora, key, Sampling(n_tokens), **options)


def chat(client, model, question=QUESTIONS[0], **options):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 12, **options})


def folders(home) -> list[Path]:
    return [path for path in home.glob("exports/*/*") if path.is_dir()]


def random_lora(base, rank: int, scale: float = 0.1) -> LoRA:
    free = torch.Generator().manual_seed(rank)
    return LoRA(
        {
            name: Factors(torch.randn(rank, m.in_features, generator=free), scale * torch.randn(m.out_features, rank, generator=free))
            for name, m in base.model.named_modules()
            if name.endswith("o_proj")
        }
    )  # fmt: skip


# ---- the same answers


def test_through_http_answers_are_those_of_ask(filled, client, vllm):
    for question in QUESTIONS:
        for name, chosen in (("manual", "manual"), ("manual+shout", ["manual", "shout"]), ("tiny-base0", ())):
            said = chat(client, name, question).choices[0].message.content
            assert said == filled.ask(question, chosen, sampling=Sampling(12)), (name, question)
    streamed = chat(client, "manual", stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in streamed) == filled.ask(
        QUESTIONS[0], "manual", sampling=Sampling(12)
    )
    assert all(call != "completions" or name == "base" or name in vllm.ids for call, name in vllm.calls)


def test_tokens_probabilities_and_ends_are_those_of_the_local_engine(filled, engine):
    local = LocalEngine(filled.base)
    word = local.submit(request(filled, n_tokens=60)).text().split()[1]
    for options in (
        {"n_logprobs": 3},
        {"n_logprobs": 0, "n_tokens": 60},
        {"stop": (word,)},
        {"strips": False},
        {"n_tokens": 60},
    ):
        for adapter in ("manual", ()):
            here, there = (e.submit(request(filled, adapter, **options)) for e in (local, engine))
            assert (there.text(), there.finish, there.n_tokens) == (here.text(), here.finish, here.n_tokens)
            for mine, theirs in zip(there, here, strict=True):
                assert (mine.id, mine.text) == (theirs.id, theirs.text)
                assert (mine.logprob is None) == (theirs.logprob is None)
                assert mine.logprob is None or mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert [i for i, _ in mine.top_logprobs] == [i for i, _ in theirs.top_logprobs]
    local.close()


def test_the_prompts_tokens_that_the_server_knew_are_reported(filled, engine):
    ticket = engine.submit(request(filled))
    ticket.text()
    eventually(lambda: not engine.stats().n_running)
    stats = engine.stats()
    assert ticket.n_cached_tokens == 3 == stats.n_cached_tokens
    assert (stats.n_prompt_tokens, stats.n_generated_tokens) == (ticket.n_prompt_tokens, ticket.n_tokens)
    assert stats.n_adapters_in_memory == 1 and stats.adapter_bytes > 0


# ---- LoRAs on the server


def test_a_lora_is_loaded_once_for_requests_that_come_together(filled, engine, vllm):
    with ThreadPoolExecutor(8) as threads:
        texts = {ticket.text() for ticket in threads.map(lambda _: engine.submit(request(filled)), range(8))}
    assert len(texts) == 1
    assert [call for call, name in vllm.calls if name].count("load_lora_adapter") == 1


def test_loras_that_were_used_least_recently_are_unloaded_and_those_in_use_are_not(filled, vllm, tmp_path):
    loras = LoadedLoRAs(filled.base, VllmClient(vllm.url), tmp_path, max_loaded=2)
    held = [loras.take(f"key {i}", lambda i=i: random_lora(filled.base, 1 + i)) for i in range(4)]
    assert {one.name for one in held} == set(vllm.ids) and len({*vllm.ids.values()}) == 4  # all of them are in use
    for one in held:
        loras.give_back(one)
    assert {one.name for one in held[2:]} == set(vllm.ids)
    assert {path.name for path in tmp_path.iterdir()} == set(vllm.ids) and len(loras) == 2
    again = loras.take("key 2", lambda: pytest.fail("it is loaded"))
    assert again is held[2]
    loras.give_back(again)
    loras.give_back(loras.take("key 5", lambda: random_lora(filled.base, 1)))
    assert held[2].name in vllm.ids and held[3].name not in vllm.ids
    loras.close()
    assert not vllm.ids and not [*tmp_path.iterdir()] and not loras.n_bytes


def test_a_lora_that_is_asked_for_while_it_is_unloaded_is_loaded_again(filled, vllm, tmp_path, monkeypatch):
    client = VllmClient(vllm.url)
    loras = LoadedLoRAs(filled.base, client, tmp_path, max_loaded=0)
    begins, may_end = threading.Event(), threading.Event()

    def slowly(name, unload=client.unload):
        begins.set()
        assert may_end.wait(20)
        unload(name)

    first = loras.take("key", lambda: random_lora(filled.base, 2))
    monkeypatch.setattr(client, "unload", slowly)
    with ThreadPoolExecutor(2) as threads:
        given = threads.submit(loras.give_back, first)
        assert begins.wait(20)
        asked = threads.submit(loras.take, "key", lambda: random_lora(filled.base, 2))
        eventually(lambda: first.n_users or asked.done())
        may_end.set()
        again = asked.result()
        given.result()
    assert {*vllm.ids} == {again.name} == {path.name for path in tmp_path.iterdir()} and len(loras) == 1
    loras.give_back(again)
    assert not vllm.ids and not [*tmp_path.iterdir()] and not len(loras)


def test_a_rank_that_the_server_does_not_take_is_compressed_where_little_is_lost(filled, vllm, engine):
    vllm.max_lora_rank = 8
    lora = random_lora(filled.base, 8)
    twice = LoRA({name: Factors(a.repeat(2, 1), b.repeat(1, 2) / 2) for name, (a, b) in lora.factors.items()})
    prompt = filled.base.chat.prompt("Hello there")
    same, halves = (GenerationRequest(prompt, one, None, Sampling(8)) for one in (lora, twice))
    assert engine.submit(halves).text() == engine.submit(same).text()
    with pytest.raises(AdapterError, match=r"rank 16, and the vLLM server takes 8.*--max-lora-rank 16"):
        engine.submit(GenerationRequest(prompt, random_lora(filled.base, 16), None, Sampling(8)))


def test_what_is_left_of_a_killed_engine_is_unloaded(filled, vllm, home, tmp_path):
    client = VllmClient(vllm.url)
    loras = LoadedLoRAs(filled.base, client, tmp_path / "gone")
    loras.take("key", lambda: random_lora(filled.base, 2))
    client.load("someone-elses", next(iter((tmp_path / "gone").iterdir())))
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    vllm_engine(vllm.url, filled.base).close()
    assert [*vllm.ids] == ["someone-elses"]


# ---- failures


def test_a_server_that_is_gone_is_503_and_never_the_base(filled, client, vllm):
    chat(client, "manual")
    vllm.shutdown()
    vllm.server_close()
    for name in ("manual", "museum", "tiny-base0"):
        with pytest.raises(openai.InternalServerError, match=r"does not answer") as error:
            chat(client, name)
        assert error.value.status_code == 503
    with pytest.raises(openai.APIError, match="does not answer"):
        [*chat(client, "manual", stream=True)]


def test_an_answer_that_breaks_off_is_an_error(filled, engine, vllm):
    vllm.dies_after = 2
    ticket = engine.submit(request(filled))
    with pytest.raises(EngineFailed):
        ticket.text()
    assert ticket.n_tokens <= 2 and ticket.finish is None
    vllm.dies_after = None
    assert engine.submit(request(filled)).text()


def test_a_server_that_was_started_anew_gets_the_loras_again(filled, engine, vllm):
    before = engine.submit(request(filled)).text()
    vllm.forget()
    assert engine.submit(request(filled)).text() == before
    assert [call for call, name in vllm.calls if name].count("load_lora_adapter") == 2


def test_a_lora_that_cannot_be_read_is_an_error_and_is_tried_again(filled, engine):
    def fails():
        raise AdapterError("damaged")

    broken = GenerationRequest([5, 6, 7], fails, "key", Sampling(4))
    for _ in range(2):
        with pytest.raises(AdapterError, match="damaged"):
            engine.submit(broken)
    engine.submit(GenerationRequest([5, 6, 7], random_lora(filled.base, 2), "key", Sampling(4))).text()
    with pytest.raises(AdapterError, match="no such linear module"):
        engine.submit(GenerationRequest([5], LoRA({"x": Factors(torch.ones(1, 2), torch.ones(2, 1))})))


def test_requests_that_do_not_fit_are_refused(filled, engine):
    assert engine.window == 256
    ticket = engine.submit(GenerationRequest([5, 6], sampling=Sampling(4, no_repeat_ngram_size=2)))
    with pytest.raises(ConfigError, match="no_repeat_ngram_size"):
        ticket.text()


def test_servers_that_cannot_be_used_are_told_at_the_start(filled, vllm, home, tmp_path):
    with pytest.raises(EngineFailed, match="does not answer"):
        vllm_engine("http://127.0.0.1:9", filled.base)
    with pytest.raises(ConfigError, match="neither a URL"):
        vllm_engine("localhost", filled.base)
    vllm.allows_updates = False
    with pytest.raises(ConfigError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        vllm_engine(vllm.url, filled.base)
    make_model(seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    other = FakeVllm(tmp_path / "other").start()
    with pytest.raises(ConfigError, match="another base"):
        vllm_engine(other.url, filled.base)
    other.shutdown()
    assert not [*home.glob("exports/.loracast-vllm-*")]


# ---- cancelling, a full queue, the end


def test_a_cancelled_answer_ends_at_once_and_is_dropped_by_the_server(filled, engine, vllm):
    vllm.goes_on.clear()
    ticket = engine.submit(request(filled, n_tokens=100))
    next(iter(ticket))
    ticket.cancel()
    assert len([*ticket]) == 1 and ticket.finish is None
    vllm.goes_on.set()
    eventually(lambda: vllm.n_left == 1 and not engine.stats().n_running)


def test_a_full_queue_is_refused_and_a_stopping_engine_too(filled, vllm, home):
    engine = vllm_engine(vllm.url, filled.base, EngineConfig(n_slots=1, max_queued=1))
    vllm.goes_on.clear()
    running, waiting = (engine.submit(request(filled)) for _ in range(2))
    next(iter(running))
    with pytest.raises(EngineBusy):
        engine.submit(request(filled))
    assert (engine.stats().n_running, engine.stats().n_queued) == (1, 1)
    assert not engine.drain(0.05)
    with pytest.raises(EngineStopped):
        engine.submit(request(filled))
    vllm.goes_on.set()
    assert engine.drain(20) and running.finish and waiting.finish
    engine.close()
    assert not vllm.ids and not folders(home)


def test_closing_ends_what_runs(filled, vllm, engine):
    vllm.goes_on.clear()
    ticket = engine.submit(request(filled))
    engine.close()
    with pytest.raises(EngineStopped):
        ticket.text()


# ---- a server of its own


def test_a_server_is_started_with_a_key_of_its_own_and_ended(filled, home, tmp_path, monkeypatch):
    started_as_vllm(tmp_path, monkeypatch)

    def fork(command, env, **options):  # a new Python would take five seconds to import torch
        assert command[:2] == [sys.executable, "-m"]
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            return ForkedProgram(tmp_path, run_module, *command[2:])

    popen = SimpleNamespace(Popen=fork, DEVNULL=None, TimeoutExpired=AssertionError)
    monkeypatch.setattr(vllm_server, "subprocess", popen)
    engine = make_engine(filled.base, ServerSettings(engine=sys.executable))
    client = engine.servers[0].client
    assert engine.submit(request(filled)).text() == filled.ask(QUESTIONS[0], "manual", sampling=Sampling(8))
    with pytest.raises(LoracastError, match="Unauthorized"):
        VllmClient(client.url)
    engine.close()
    with pytest.raises(EngineFailed):
        VllmClient(client.url)
    assert not [*home.glob("exports/.loracast-vllm-*")]


def test_a_server_that_does_not_start_says_why(filled, home, tmp_path, monkeypatch):
    started_as_vllm(tmp_path, monkeypatch, "raise SystemExit('no memory for keys and values')")
    with pytest.raises(LoracastError, match=r"(?s)did not start.*no memory for keys and values"):
        vllm_engine("vllm", filled.base)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not end a child with its parent")
def test_a_server_ends_with_a_process_that_is_killed(tmp_path, monkeypatch):
    started_as_vllm(
        tmp_path,
        monkeypatch,
        f"import os, time; print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w')); time.sleep(60)",
    )
    code = (
        "import sys, types; from pathlib import Path; from loracast.serving import vllm_server\n"
        "base = types.SimpleNamespace(name='x', model=types.SimpleNamespace(dtype='torch.float32'))\n"
        f"vllm_server._started(sys.executable, base, vllm_server.EngineConfig(), Path({str(tmp_path)!r})).__enter__()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    pid = int(eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    eventually(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
