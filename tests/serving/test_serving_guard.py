"""What the server refuses before a route sees it: hosts, origins, keys, sizes, types; and which errors it answers with."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from loracast.errors import ConfigError
from loracast.serving.app import create_app
from loracast.serving.settings import ServerSettings, granted, keys_in, keys_in_file

READ, WRITE, ADMIN = (f"sk-{scope}-0123456789" for scope in ("read", "write", "admin"))
KEYS = keys_in(f"read:{READ},write:{WRITE},admin:{ADMIN}")


class NoEngine:
    """An engine that nobody asks."""

    def drain(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass


def client(model, **settings) -> TestClient:
    return TestClient(create_app(model, NoEngine(), ServerSettings(**settings)), base_url="http://127.0.0.1:8000")


def test_a_server_lives_and_is_ready_until_it_stops(model):
    with client(model) as api:
        assert api.get("/health").json()["status"] == api.get("/ready").json()["status"] == "ok"
        api.app.state.service.is_draining = True
        assert api.get("/health").status_code == 200
        assert api.get("/ready").status_code == 503


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:9", "[::1]:8000", "192.168.1.5", "ask.lan"])
def test_addresses_and_own_names_are_hosts(model, host):
    assert client(model, allowed_hosts=("ask.lan",)).get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", ""])
def test_another_host_is_refused(model, host):
    answer = client(model).get("/health", headers={"Host": host})
    assert answer.status_code == 421
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_page_of_another_origin_may_not_write(model):
    api, body = client(model, cors_origins=("https://chat.example",)), {"json": {}}
    assert api.post("/v1/nothing", headers={"Origin": "http://evil.example"}, **body).status_code == 403
    assert api.post("/v1/nothing", headers={"Origin": "null"}, **body).status_code == 403
    for origin in ("http://127.0.0.1:8000", "https://chat.example"):
        assert api.post("/v1/nothing", headers={"Origin": origin}, **body).status_code == 404


def test_cross_origin_reading_is_closed_unless_an_origin_is_named(model):
    preflight = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client(model).options("/health", headers=preflight).headers
    opened = client(model, cors_origins=("https://chat.example",), keys=KEYS).options("/health", headers=preflight)
    assert opened.headers["access-control-allow-origin"] == "https://chat.example"
    # OpenAI's client for JavaScript sends such headers, and a page may read why it was refused.
    api = client(model, cors_origins=("https://chat.example",), keys=KEYS)
    preflight["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
    assert api.options("/v1/models", headers=preflight).status_code == 200
    refused = api.get("/v1/models", headers={"Origin": "https://chat.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://chat.example"
    assert "access-control-allow-origin" not in api.get("/v1/models", headers={"Origin": "http://evil.example"}).headers


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong-key-0123456789", f"Basic {READ}", READ, "Bearer ", "Bearer \xff"]
)
def test_without_a_known_key_nothing_is_reported(model, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
        answer = client(model, keys=KEYS).get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_keys_have_the_scope_that_they_were_given():
    assert [granted(KEYS, f"Bearer {key}") for key in (READ, WRITE, ADMIN)] == ["read", "write", "admin"]


def test_a_key_is_in_no_representation():
    assert READ not in repr(KEYS)


@pytest.mark.parametrize("text", ["root:0123456789abcdef", "read:short", "read", "read:0123456789 abcdef"])
def test_a_bad_key_is_refused_without_repeating_it(text):
    with pytest.raises(ConfigError) as error:
        keys_in(text)
    assert text.partition(":")[2] not in str(error.value) or not text.partition(":")[2]


def test_a_file_of_keys_must_be_private(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# for the office\nread:{READ}\n\nadmin:{ADMIN}\n")
    file.chmod(0o600)
    assert keys_in_file(file) == (KEYS[0], KEYS[2])
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys_in_file(file)
    with pytest.raises(ConfigError, match="cannot read"):
        keys_in_file(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "myhost"])
def test_an_address_that_others_reach_demands_a_key(host):
    with pytest.raises(ConfigError, match="set a key"):
        ServerSettings(host=host)
    assert not ServerSettings(host=host, keys=KEYS).is_loopback


def test_a_body_that_is_too_long_is_refused_whether_it_says_its_length_or_not(model):
    api = client(model, max_body_bytes=100)
    json = {"Content-Type": "application/json"}
    assert api.post("/v1/nothing", content=b"x" * 101, headers=json).status_code == 413


def test_a_body_of_another_type_is_refused(model):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json-not"):
        answer = client(model).post("/v1/nothing", content=b"{}", headers={"Content-Type": kind})
        assert answer.status_code == 415
    assert client(model).post("/v1/nothing", content=b"{}").status_code == 415


def test_an_unknown_path_and_a_wrong_method_are_answered_as_openai_does(model):
    for answer in (client(model).get("/v1/nothing"), client(model).post("/health", json={})):
        assert answer.status_code in (404, 405)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_an_error_that_nobody_foresaw_tells_and_logs_no_text(model, caplog):
    app = create_app(model, NoEngine(), ServerSettings())

    @app.get("/v1/broken")
    async def broken() -> None:
        raise RuntimeError("the secret text of a document")

    answer = TestClient(app, base_url="http://localhost").get("/v1/broken")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "RuntimeError in broken" in caplog.text
    assert "secret" not in caplog.text + answer.text
