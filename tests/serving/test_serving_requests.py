"""Bad and unlucky requests: what hardening asks of a server, each as a test, and that none of them costs a slot."""

from __future__ import annotations

import json
import logging
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import loracast
from adapters import refuse_writes
from loracast.base.generate import Sampling
from loracast.documents import Document
from loracast.library import storage
from loracast.library.store import SharedStore
from loracast.serving.app import create_app
from loracast.serving.engine import EngineStats, LocalEngine
from loracast.serving.generation import EngineBusy, EngineStopped, Ticket, Token
from loracast.serving.resolve import served_name
from loracast.serving.settings import ServerSettings
from other_processes import Forked
from servers import TEXTS, eventually, fill, in_process, served

pytestmark = pytest.mark.usefixtures("no_copying")

CHAT = "/v1/chat/completions"
SECRET = "The vault's number is 814277"


@pytest.fixture(scope="module")
def model(filled):
    """A model with a library that no test changes."""
    return filled


class ByHand:
    """An engine whose tokens the test gives."""

    takes_copy_bias = True
    window = 10_000

    def __init__(self):
        self.tickets: list[Ticket] = []
        self.refusal: Exception | None = None

    def submit(self, request):
        if self.refusal is not None:
            raise self.refusal
        self.tickets.append(Ticket(request))
        return self.tickets[-1]

    def stats(self):
        return EngineStats(n_slots=1)

    def drain(self, timeout_s):
        return True

    def close(self):
        for ticket in self.tickets:
            ticket.end(None, EngineStopped())


@pytest.fixture
def engine():
    return ByHand()


@pytest.fixture
def url(model, engine):
    with served(create_app(model, engine, ServerSettings(answer_timeout_s=20))) as url:
        yield url


def body(**fields) -> dict:
    return {"model": "manual", "messages": [{"role": "user", "content": "How long is the warranty?"}], **fields}


# ---- bodies


RAW = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"nonsense", b"[]", b"null", b'"text"', b"\xff\xfe", b"\x00", b"[" * 100 + b"]" * 100,
        b'{"a":' * 100 + b"1" + b"}" * 100, b"[" * 100_000, b'{"model": "manual", "model": 5}',
        *(json.dumps(body(**{name: value})).encode() for name in ("temperature", "top_p", "max_tokens", "seed", "n")
          for value in (float("nan"), float("inf"), -float("inf"), -1e308, 10**400, "1", True, [], {})),
        json.dumps(body(messages=[{"role": "user", "content": [[[[[["x"]]]]]]}])).encode(),
        json.dumps(body(messages="Hello")).encode(),
        json.dumps(body(model=None)).encode(),
        json.dumps(body(model=["manual"])).encode(),
        b'{"model": "manual", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused_with_openais_error(model, content):
    api = in_process(model, ByHand())
    for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = api.post(path, content=content, headers=RAW)
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"


IMAGE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "a.png"}}]


@pytest.mark.parametrize(
    ("path", "given", "param", "shown"),
    [
        (CHAT, {"messages": [{"role": "user", "content": IMAGE}]}, "messages.0.content.1.type", "Input should be 'text'"),
        (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages.0.content", "List should have at least 1 item"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "Field required"),
        (CHAT, {"messages": [{"role": "user", "content": "A", "x": 1}]}, "messages.0.x", "unrecognized request argument"),
        ("/v1/completions", {"prompt": [[1, "a"]]}, "prompt.0.1", "Input should be a valid integer"),
        ("/v1/completions", {"prompt": ["a"] * 129}, "prompt", "List should have at most 128 items"),
        ("/v1/responses", {"input": [{"role": "user", "content": IMAGE}]}, "input.0.content.1.type", "Input should be"),
        ("/v1/responses", {"input": [{"type": "function_call"}]}, "input.0.role", "Field required"),
    ],
)  # fmt: skip
def test_the_fault_that_is_told_is_that_of_the_type_that_was_meant(model, path, given, param, shown):
    error = in_process(model, ByHand()).post(path, json={"model": "manual", **given}).json()["error"]
    assert error["param"] == param and shown in error["message"]


@pytest.mark.parametrize("name", ["../x", "..%2f..%2fetc%2fpasswd", "%2e%2e", "/etc/passwd", "%F0%9F%99%82", pytest.param("a" * 10_000, id="long"),
                                  "%00", "%ff", "nothing"])  # fmt: skip
@pytest.mark.parametrize(
    "path", ["/v1/models/", "/v1/adapters/", "/v1/files/", "/v1/vector_stores/", "/v1/jobs/", "/page/"]
)
def test_no_path_of_a_request_reaches_a_file(model, path, name):
    api = in_process(model, ByHand())
    answer = api.get(f"http://127.0.0.1:8000{path}{name}")
    assert answer.status_code in (400, 404), answer.text
    assert "root:" not in answer.text


def test_a_long_body_without_a_length_is_cut_off(model, url):
    def pieces():
        yield b'{"model": "'
        for _ in range(100):
            yield b"x" * 65_536

    answer = httpx.post(f"{url}{CHAT}", content=pieces(), headers=RAW, timeout=30)
    assert answer.status_code == 413


def test_a_body_that_comes_too_slowly_is_given_up(model):
    with served(create_app(model, ByHand(), ServerSettings(body_timeout_s=0.2))) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{{"
            connection.sendall(head.encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


# ---- full, late, broken


def test_a_full_queue_is_429_with_the_time_to_wait(url, engine):
    engine.refusal = EngineBusy(256, 2.3)
    answer = httpx.post(f"{url}{CHAT}", json=body())
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "3")
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    engine.refusal = EngineStopped()
    assert httpx.post(f"{url}{CHAT}", json=body()).status_code == 503


def test_where_one_of_several_answers_finds_no_place_the_others_leave(url, engine):
    submit = engine.submit

    def second_is_refused(request):
        if engine.tickets:
            raise EngineBusy(1, 1.0)
        return submit(request)

    engine.submit = second_is_refused
    assert httpx.post(f"{url}{CHAT}", json=body(n=2)).status_code == 429
    assert engine.tickets[0].has_ended


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_that_takes_too_long_is_ended(model, is_streamed):
    with served(create_app(model, LocalEngine(model.base), ServerSettings(answer_timeout_s=0.05))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError) as error:
            given = client.chat.completions.create(**body(max_tokens=400, stream=is_streamed))
            list(given)
        assert "longer than 0.05 s" in str(error.value)


def test_an_answer_that_is_late_before_it_is_queued_is_not_generated(model, monkeypatch):
    local, tickets, prepare = LocalEngine(model.base), [], model.prepare
    submit = local.submit
    monkeypatch.setattr(local, "submit", lambda request: tickets.append(submit(request)) or tickets[-1])
    monkeypatch.setattr(model, "prepare", lambda *args, **options: (time.sleep(0.3), prepare(*args, **options))[1])
    with served(create_app(model, local, ServerSettings(answer_timeout_s=0.05))) as url:
        assert httpx.post(f"{url}{CHAT}", json=body(max_tokens=400), timeout=60).status_code == 408
    assert sum(ticket.n_tokens for ticket in tickets) < 50


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_frees_its_slot(url, engine, path, is_streamed):
    bodies = {
        CHAT: body(n=2),
        "/v1/completions": {"model": "manual", "prompt": ["The lamp", "The kettle"]},
        "/v1/responses": {"model": "manual", "input": "How long is the warranty?"},
    }
    n_answers = 1 if path == "/v1/responses" else 2
    connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("POST", path, json.dumps({**bodies[path], "stream": is_streamed}), RAW)
    eventually(lambda: len(engine.tickets) == n_answers)
    assert not any(ticket.has_ended for ticket in engine.tickets)
    if is_streamed:
        engine.tickets[0].put(Token(5, "The"))
        with connection.getresponse() as answer:
            assert answer.read1(100)
    connection.close()
    eventually(lambda: all(ticket.has_ended for ticket in engine.tickets))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_engine_that_fails_is_an_error_without_a_word_of_it(url, engine, is_streamed, caplog):
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{url}{CHAT}", json=body(stream=is_streamed), timeout=20)
        eventually(lambda: engine.tickets)
        engine.tickets[0].put(Token(5, "The"))
        engine.tickets[0].end(None, RuntimeError(SECRET))
        shown = answer.result()
    assert shown.status_code == (200 if is_streamed else 500)
    assert "server_error" in shown.text and SECRET not in shown.text + caplog.text
    assert "RuntimeError" in caplog.text


def test_nothing_that_was_said_or_learned_is_logged(model, caplog):
    caplog.set_level(logging.DEBUG)
    api = in_process(model)
    asked = body(messages=[{"role": "user", "content": SECRET}], max_tokens=4)
    for fields in ({}, {"stream": True}, {"nonsense": SECRET}, {"temperature": SECRET}, {"model": "none"}):
        api.post(CHAT, json={**asked, **fields})
    api.post("/v1/completions", json={"model": "manual", "prompt": SECRET, "max_tokens": 2})
    api.post("/v1/responses", json={"model": "manual", "input": [{"role": "user", "content": SECRET, "x": 1}]})
    ours = "".join(
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))
    )
    assert SECRET not in ours and "warranty" not in ours.lower()


# ---- many at once, and the end


def test_each_of_many_at_once_gets_the_answer_of_its_own_adapter(model):
    names = ["manual", "museum", "shout", "manual+shout", model.base.name.rpartition("/")[2]]
    question = "When does the museum open, and how long is the warranty?"
    chosen = {name: () if name == names[-1] else name.split("+") for name in names}
    wanted = {name: model.ask(question, chosen[name], sampling=Sampling(12)) for name in names}
    asked = body(messages=[{"role": "user", "content": question}], max_tokens=12)
    with served(create_app(model, LocalEngine(model.base), ServerSettings())) as url, ThreadPoolExecutor(10) as pool:

        def ask(name):
            return httpx.post(f"{url}{CHAT}", json={**asked, "model": name}, timeout=60).json()

        given = [(name, pool.submit(ask, name)) for name in names * 4]
        for name, answer in given:
            assert answer.result()["choices"][0]["message"]["content"] == wanted[name]


def test_two_servers_answer_from_one_library(model):
    answers = []
    for _ in range(2):
        with served(create_app(model, LocalEngine(model.base), ServerSettings())) as url:
            answers.append(httpx.post(f"{url}{CHAT}", json=body(max_tokens=8), timeout=30).json())
    assert answers[0]["choices"] == answers[1]["choices"]


def test_a_prompt_that_is_too_long_is_refused_before_it_is_routed(model, monkeypatch):
    api, routed = in_process(model, ByHand()), []
    monkeypatch.setattr("loracast.answering.model.route_adapters", lambda *what: routed.append(what) or [])
    long = "How long is the warranty? " * 10_000
    for path, asked in (
        (CHAT, body(messages=[{"role": "user", "content": long}])),
        ("/v1/completions", {"model": "manual", "prompt": long}),
    ):
        answer = api.post(path, json=asked)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert routed == []


def test_no_request_waits_for_the_names_of_a_slow_store(tiny_folder, tiny_hypernet_folder, tmp_path, monkeypatch):
    one, two = (
        loracast.load(tiny_folder, tiny_hypernet_folder, library=tmp_path / name, device="cpu") for name in "ab"
    )
    for model in (one, two):
        model.library.share(str(tmp_path / "there"))
    for model, name in ((one, "manual"), (two, "museum")):
        model.learn(Document.from_text(TEXTS[name]), name, max_chunk_tokens=24)
    monkeypatch.setattr(storage, "REFRESH_S", 0.05)
    newest, is_waiting, goes_on = SharedStore.newest, threading.Event(), threading.Event()

    def slowly(store, names=None):
        if names is None:
            is_waiting.set()
            assert goes_on.wait(60)
        return newest(store, names)

    def listed() -> set[str]:
        return {model["id"] for model in httpx.get(f"{url}/v1/models", timeout=20).json()["data"]}

    app = create_app(one, LocalEngine(one.base), ServerSettings())
    monkeypatch.setattr(SharedStore, "newest", slowly)
    with served(app) as url:
        assert is_waiting.wait(30)
        assert {"manual"} == listed() & {"manual", "museum"}
        assert httpx.post(f"{url}{CHAT}", json=body(max_tokens=4), timeout=20).status_code == 200
        goes_on.set()
        eventually(lambda: {"manual", "museum"} <= listed())


def test_a_library_that_cannot_be_written_still_answers(tiny_folder, tiny_hypernet_folder, tmp_path, monkeypatch):
    model = loracast.load(tiny_folder, tiny_hypernet_folder, library=tmp_path / "library", device="cpu")
    fill(model)
    wanted = model.ask("How long is the warranty?", "manual", sampling=Sampling(8))
    app = create_app(model, LocalEngine(model.base), ServerSettings())
    refuse_writes(monkeypatch, model.library.folder)
    with pytest.raises(PermissionError):
        (model.library.folder / "file").touch()
    with served(app) as url:
        answer = httpx.post(f"{url}{CHAT}", json=body(max_tokens=8), timeout=30)
    assert answer.json()["choices"][0]["message"]["content"] == wanted, answer.text


def serve_slowly(base: str, hypernetwork: str, library: str) -> None:
    """Serve a base whose forward passes take 20 ms, and print the port."""
    from loracast.serving.app import run

    model = loracast.load(base, hypernetwork, library=library, device="cpu")
    model.copy_bias = lambda prepared: None  # which would end its answers early
    model.base.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    settings = ServerSettings(port=0)
    with settings.bound() as sock:
        port = sock.getsockname()[1]
        run(create_app(model, LocalEngine(model.base), settings), settings, sock, lambda: print(port, flush=True))


def test_sigterm_lets_running_answers_finish_and_ends_the_server(model, tiny_folder, tiny_hypernet_folder, tmp_path):
    server = Forked(tmp_path, serve_slowly, str(tiny_folder), str(tiny_hypernet_folder), str(model.library))
    (port,) = server.lines(1)
    url = f"http://127.0.0.1:{port}"
    with httpx.stream("POST", f"{url}{CHAT}", json=body(max_tokens=60, stream=True), timeout=60) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if '"content":"' in line)
        server.send_signal(signal.SIGTERM)
        given = list(lines)
    assert '"finish_reason":"length"' in given[-4] and given[-2:] == ["data: [DONE]", ""]
    server.wait(30)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


# ---- figures


def test_metrics_count_what_was_done(model):
    api = in_process(model)
    tokens = [api.post(CHAT, json=body(max_tokens=n)).json()["usage"]["completion_tokens"] for n in (4, 6)]
    api.post(CHAT, json=body(model="none"))
    api.get("/nothing")
    families = text_string_to_metric_families(api.get("/metrics").text)
    found = {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}
    assert found["loracast_generated_tokens_total",] == sum(tokens) == 10
    assert found["loracast_first_token_seconds_count",] == found["loracast_answer_seconds_count",] == 2
    assert found["loracast_requests_total", *sorted((CHAT, "200"))] == 2
    assert found["loracast_requests_total", *sorted((CHAT, "404"))] == 1
    assert found["loracast_requests_total", *sorted(("none", "404"))] == 1
    for name in ("queued_requests", "running_requests", "adapters_in_memory", "prompt_tokens_saved_total",
                 "prefix_cache_hits_total", "engine_steps_total", "decoded_rows_total"):  # fmt: skip
        assert (f"loracast_{name}",) in found


# ---- LoRAs of other tools, as vLLM loads them


@pytest.fixture
def loras(model, tmp_path):
    """A folder of LoRAs in PEFT's format: `mine`, and one that is broken."""
    folder = tmp_path / "loras"
    model.adapter("museum").lora().save_pretrained(folder / "mine")
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    (folder / "link").symlink_to("/etc")
    return folder


def test_a_lora_is_loaded_and_unloaded_as_vllm_does(tiny_folder, tiny_hypernet_folder, tmp_path, loras, model):
    own = loracast.load(tiny_folder, tiny_hypernet_folder, library=tmp_path / "library", device="cpu")
    fill(own)
    api = in_process(own, lora_folder=loras)

    def load(**fields):
        return api.post("/v1/load_lora_adapter", json={"lora_name": "sql", "lora_path": "mine", **fields})

    def unload(name):
        return api.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def answer():
        return api.post(CHAT, json=body(model="sql", max_tokens=8)).json()["choices"][0]["message"]["content"]

    for path in ("mine", str(loras / "mine")):
        given = load(lora_path=path)
        assert (given.status_code, given.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
        assert answer() == own.ask("How long is the warranty?", "shout", sampling=Sampling(8))
        assert "has already been loaded" in load(lora_path=path).json()["error"]["message"]
        assert load(load_inplace=True).status_code == 200
        assert unload("sql").text == "Success: LoRA adapter 'sql' removed successfully."
        assert unload("sql").status_code == 404
        assert api.post(CHAT, json=body(model="sql")).status_code == 404
    for path in ("/etc", "..", ".", "", "../loras/mine", "link", "mine/", str(loras), "a" * 10_000, "mine\x00"):
        assert load(lora_path=path).status_code == 404
    for fields in ({"lora_path": "broken"}, {"lora_name": "../x"}, {"lora_name": ""}, {"lora_name": "manual"},
                   {"lora_name": "manual", "load_inplace": True}):  # fmt: skip
        assert load(**fields).status_code == 400
    assert unload("manual").status_code == 400
    assert api.post(CHAT, json=body(max_tokens=2)).status_code == 200


def test_adapters_are_set_by_number_as_llama_cpp_does(tiny_folder, tiny_hypernet_folder, tmp_path):
    own = loracast.load(tiny_folder, tiny_hypernet_folder, library=tmp_path / "library", device="cpu")
    fill(own)
    api = in_process(own)

    def answer(**fields):
        given = api.post(CHAT, json=body(model=served_name(own.base), max_tokens=8, **fields))
        return given.json()["choices"][0]["message"]["content"] if given.status_code == 200 else given.status_code

    def listed():
        return {one["path"]: (one["id"], one["scale"]) for one in api.get("/lora-adapters").json()}

    plain, shout = (
        own.ask("How long is the warranty?", sampling=Sampling(8)),
        answer(adapters=[{"id": "shout", "scale": 2}]),
    )
    assert plain != shout and listed() == {"manual": (0, 0.0), "museum": (1, 0.0), "shout": (2, 0.0)}
    assert answer() == plain and answer(lora=[{"id": 2, "scale": 2.0}]) == shout
    assert api.post("/lora-adapters", json=[{"id": 2, "scale": 2.0}]).json() == {"success": True}
    assert answer() == shout and listed()["shout"] == (2, 2.0)
    assert answer(lora=[]) == plain == answer(lora=[{"id": 2, "scale": 0.0}])
    assert answer(adapters=[{"id": "manual"}]) == own.ask("How long is the warranty?", "manual", sampling=Sampling(8))
    own.library.remove("manual")
    own.learn(Document.from_text(TEXTS["manual"]), "another", max_chunk_tokens=24)
    assert listed() == {"museum": (1, 0.0), "shout": (2, 2.0), "another": (3, 0.0)}
    for wrong in ([{"id": 0}], [{"id": 7}], [{"id": -1}], [{"id": 2, "scale": 99}]):
        assert api.post("/lora-adapters", json=wrong).status_code == 400 == answer(lora=wrong)
    assert api.post("/lora-adapters", json=[]).status_code == 200 and answer() == plain


def test_of_loras_that_are_loaded_under_one_name_at_once_one_wins(
    tiny_folder, tiny_hypernet_folder, tmp_path, loras, model
):
    own = loracast.load(tiny_folder, tiny_hypernet_folder, library=tmp_path / "library", device="cpu")
    lora, several = model.adapter("museum").lora(), [1, 2, 3, 4]
    for scale in several:
        lora.scale(scale).save_pretrained(loras / f"mine-{scale}")

    def load(url, scale):
        body = {"lora_name": "sql", "lora_path": f"mine-{scale}"}
        return httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=30).status_code

    with served(create_app(own, ByHand(), ServerSettings(lora_folder=loras))) as url, ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(partial(load, url), several))
    won, *others = sorted(codes)
    assert won == 200 and set(others) <= {400, 409}
    found = own.adapter("sql")
    assert found.manifest.kind == "imported"
    wanted = {name: norm * several[codes.index(200)] for name, norm in lora.norms().items()}
    assert found.lora().norms() == pytest.approx(wanted, rel=0.01)
