"""Commands with a running server: found or not, the same output with and without it, and how a server ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from typer.testing import CliRunner

import loracast
from loracast.cli import app
from loracast.documents import Document
from loracast.library.library import Library
from loracast.library.save import save_lora
from loracast.serving import app as serving_run
from loracast.serving import client as discovery
from loracast.serving.app import create_app
from loracast.serving.client import HTTPClient, Loaded, NoServer, Refused, Running, source_key
from loracast.serving.engine import LocalEngine
from loracast.serving.resolve import served_name
from loracast.serving.settings import ServerSettings
from other_processes import Forked, loracast_command
from servers import eventually, served

ROOT = Path(__file__).parents[2]
TEXTS = {
    "kettle": "# Kettle\n\nThe kettle holds 1.7 litres of water and weighs 900 grams.\n\n## Warranty\n\n"
    "The warranty of the kettle is 24 months. Scale is removed with vinegar.",
    "museum": "# Museum\n\nThe museum opens at nine on Tuesday mornings. Nobody knew who had built the old bridge.",
}
MOVING = ("load_s", "first_token_s", "total_s", "learn_s", "folder")
"""What differs between two runs of a command."""


@pytest.fixture(scope="module")
def library(tiny_folder, tiny_hypernet_folder, tmp_path_factory) -> Path:
    """Two documents, in two versions the one, and a task."""
    folder = tmp_path_factory.mktemp("commands") / "library"
    model = loracast.load(tiny_folder, tiny_hypernet_folder, library=folder, device="cpu")
    for name, text in TEXTS.items():
        model.learn(Document.from_text(text, title=name.title()), name, max_chunk_tokens=24)
    lora = model.adapter("museum").lora()
    save_lora(lora, Library(folder), "shout", kind="task", title="Shout.", made_for=model.base.fingerprint)
    return folder


@pytest.fixture(scope="module")
def address(library, tiny_folder, tiny_hypernet_folder, hypernetwork):
    """A server of that library, without a file that tells of it."""
    model = loracast.load(
        tiny_folder, tiny_hypernet_folder, task_hypernetwork=hypernetwork, library=library, device="cpu"
    )
    settings = ServerSettings(max_adapters=3)
    with served(create_app(model, LocalEngine(model.base), settings)) as url:
        hypernetworks = {"document": source_key(tiny_hypernet_folder), "task": source_key(hypernetwork)}
        loaded = Loaded(str(library.resolve()), source_key(tiny_folder), hypernetworks, "", {"device": "cpu"})
        fingerprint = model.base.fingerprint.to_dict()
        yield Running(settings.instance, url, loaded, served_name(model.base), fingerprint)


@pytest.fixture
def running(address, home) -> Running:
    """The server, to be found."""
    address.write()
    return address


@pytest.fixture
def run(tiny_folder, tiny_hypernet_folder, library):
    """Runs a command on the library with the tiny base and hypernetwork."""
    options = ("--base", tiny_folder, "--hypernetwork", tiny_hypernet_folder, "--library", library, "--device", "cpu")

    def run(*arguments: object, **more):
        return CliRunner().invoke(app, [str(one) for one in (*arguments, *options)], **more)

    return run


def without_times(result) -> tuple[int, object, str]:
    """Exit code, output and errors of a command, without what differs between two runs."""
    try:
        out = {key: value for key, value in json.loads(result.stdout).items() if key not in MOVING}
    except (ValueError, AttributeError):
        out = re.sub(r"(, [\d.]+ kB)?(, [\d.]+ m?s)?\n", "\n", result.stdout)  # the file's size: its manifest has times
    return result.exit_code, out, result.stderr


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Bases that were loaded by a command."""
    loaded, load = [], loracast.answering.model.load
    monkeypatch.setattr(
        "loracast.answering.model.load", lambda *given, **options: loaded.append("") or load(*given, **options)
    )
    return loaded


# ---- the same with and without a server


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "How long is the warranty of the kettle?", "-a", "kettle"),
        ("ask", "How long is the warranty of the kettle?", "-a", "kettle", "--json"),
        ("ask", "When does the museum open?", "--all"),
        ("ask", "When does the museum open?", "--all", "-a", "shout", "--json"),
        ("ask", "Why do birds sing at dawn?", "-a", "kettle", "-a", "museum"),
        ("ask", "Why do birds sing at dawn?", "-a", "kettle", "--always", "--route", "all", "--json"),
        ("ask", "Why do birds sing at dawn?", "--all"),
        ("ask", "Why do birds sing at dawn?", "-a", "kettle", "--strict", "--json"),
        ("ask", "How long is the warranty of the kettle?", "--all", "--strict"),
        ("ask", "Hello", "--system", "Be kind.", "--max-tokens", "3", "--json"),
        ("ask", "Hello", "--temperature", "1.5", "--top-p", "0.9", "--seed", "7", "--json"),
        ("ask", "What is this document about?", "-a", "museum"),
        ("chat", "-a", "kettle"),
        ("chat", "--all", "--max-tokens", "4"),
    ],
)
def test_a_server_changes_nothing_that_is_printed(run, running, loads, arguments):
    said = "How long is the warranty?\n/use museum\nAnd when does it open?\n/use nobody\n/list\n/drop kettle\nHello\n"
    options = {"input": said} if arguments[0] == "chat" else {}
    if "--max-tokens" not in arguments:
        arguments += ("--max-tokens", "16")
    through = run(*arguments, **options)
    assert through.exit_code == 0 and not loads, through.output
    alone = run(*arguments, "--local", **options)
    assert len(loads) == 1
    assert without_times(through) == without_times(alone)


@pytest.mark.parametrize(
    ("said", "is_asked", "arguments"),
    [
        ("no adapter is called 'nobody'; there are: kettle", False, ("ask", "Hello", "-a", "nobody")),
        ("a strict answer comes from documents", True, ("ask", "Hello", "--strict")),
        ("'../../etc' cannot name an adapter", False, ("ask", "Hello", "-a", "../../etc")),
        ("'0000' is none of its versions", False, ("ask", "Hello", "-a", "kettle@0000")),
        ("there is no document called nothing-*", False, ("ask", "Hello", "-a", "nothing-*")),
        ("there is no document with the tag 'nothing'", False, ("ask", "Hello", "--tag", "nothing")),
        ("give a number (--route 2), not all", True, ("ask", "Hello", "--all", "--route", "all")),
        ("tokens", True, ("ask", "the kettle holds " * 400)),
        ("no adapter is called 'nobody'; there are: kettle", False, ("chat", "-a", "nobody")),
        ("/no/such/file.pdf does not exist", False, ("learn", "/no/such/file.pdf")),
        ("empty.md holds only white space", True, ("learn", "EMPTY")),
        ("there is an adapter called 'kettle' already", True, ("learn", "OTHER", "--name", "kettle")),
        ("'../x' cannot name an adapter", True, ("learn", "OTHER", "--name", "../x")),
    ],
)
def test_errors_are_the_same_too(run, running, tmp_path, monkeypatch, said, is_asked, arguments):
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "other.md").write_text("# Other\n\nThe lamp is lit at nine.\n")
    files = {"EMPTY": tmp_path / "empty.md", "OTHER": tmp_path / "other.md"}
    arguments = [files.get(one, one) for one in arguments]
    exchange, asked = HTTPClient._exchange, []
    monkeypatch.setattr(HTTPClient, "_exchange", lambda *what, **how: asked.append(what[2]) or exchange(*what, **how))
    through = run(*arguments)
    assert bool(set(asked) - {"/health"}) == is_asked
    assert through.exit_code == 1 and through.stderr.startswith("error: ") and said in through.stderr
    assert without_times(through) == without_times(run(*arguments, "--local"))


def test_what_the_server_refuses_is_answered_without_it(run, running, library, loads):
    """It adds up three adapters at most."""
    names = [option for name in ("kettle", "museum", "shout", "*") for option in ("-a", name)]
    through = run("ask", "How long is the warranty?", *names, "--json")
    assert through.exit_code == 0 and len(loads) == 1
    assert set(json.loads(through.stdout)["adapters"]) >= {"kettle", "museum", "shout"}


def test_learn_goes_through_the_server_and_prints_the_same(run, running, library, tmp_path, loads):
    file = tmp_path / "Lantern of Hall 4.md"
    file.write_text("# Lantern\n\nThe amber lantern of hall 4 has the code 4711. It is lit at nine.\n")
    through = run("learn", file, "--chunk-tokens", "24", "-s", "int8", "--json")
    assert through.exit_code == 0 and not loads, through.output
    learned = Library(library).open("lantern-of-hall-4")
    assert learned.manifest.storage == "int8" and learned.manifest.max_chunk_tokens == 24
    alone = run("learn", file, "--chunk-tokens", "24", "-s", "int8", "--json", "--local", "--replace")
    assert without_times(through) == without_times(alone)
    with file.open("a") as more:
        more.write("One more lantern.\n")
    assert "--replace" in run("learn", file).stderr
    again = run("learn", file, "--replace")
    assert again.exit_code == 0 and again.stdout.startswith("learned lantern-of-hall-4 (Lantern)\n")


def test_a_task_is_cast_through_the_server_and_prints_the_same(
    running, library, tiny_folder, hypernetwork, tmp_path, monkeypatch
):
    def task(description: str, *more: str, library=library):
        options = ("--base", tiny_folder, "--hypernetwork", hypernetwork, "--library", library)
        return CliRunner().invoke(app, ["task", description, *more, *map(str, options)])

    alone = task("Turn words around.", "--name", "turn", library=tmp_path / "library")
    assert alone.exit_code == 0, alone.output
    monkeypatch.setattr("loracast.cast.load.load_caster", None)  # the command itself cannot cast from here on
    through = task("Turn words around.", "--name", "turn")
    code, said, faults = without_times(alone)
    assert without_times(through) == (code, said.replace(str(tmp_path / "library"), str(library)), faults)
    version = Library(tmp_path / "library").open("turn").manifest.version
    assert Library(library).open("turn").manifest.version == version
    assert task("Answer in capitals.").stdout.startswith("cast answer-in-capitals (Answer in capitals.)\n")
    refused = task("Say it twice.", "--name", "turn")
    assert refused.exit_code == 1 and "--replace" in refused.stderr


def test_a_folder_is_learned_through_the_server(run, running, library, tmp_path, loads):
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"hall-{i}.md").write_text(f"# Hall {i}\n\nIts code is {4000 + i}.\n")
    (tmp_path / "texts" / "empty.md").write_text(" ")
    result = run("learn", tmp_path / "texts")
    assert result.exit_code == 1 and "empty.md" in result.stderr and "3 learned, 0 unchanged, 1 failed" in result.stdout
    assert not loads and {"hall-0", "hall-1", "hall-2"} <= set(Library(library).names())


# ---- which server


def test_a_server_is_used_only_where_it_has_loaded_the_same(running, tiny_folder, tmp_path):
    same = replace(running.loaded, how={})
    assert discovery.find(same) == running
    others = {
        "library": str(tmp_path), "base": "other", "hypernetworks": {"document": "other"},
        "chat_template": "{{ x }}", "how": {"quantize": "4bit"}, "version": "0.0.1",
    }  # fmt: skip
    for key, value in others.items():
        assert discovery.find(replace(same, **{key: value})) is None, key
    for_tasks = {"task": same.hypernetworks["task"]}
    assert discovery.find(replace(same, hypernetworks=for_tasks)) == running  # the document's does not matter to a task
    assert running.path.exists()


def test_a_hypernetwork_that_was_trained_further_is_another(tmp_path):
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "model.safetensors").write_bytes(b"1")
    before = source_key(tmp_path / "h")
    os.utime(tmp_path / "h" / "model.safetensors", ns=(1, 10**9))
    assert source_key(tmp_path / "h") != before
    assert source_key(None) == source_key("smollm2-135m-instruct") == "" and source_key("me/other") == "me/other"


def test_files_of_servers_that_are_gone_are_removed(address, home):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = replace(address, instance="gone", pid=ended.pid)
    another = replace(address, instance="another")  # a new server on the old one's port
    closed = replace(address, instance="closed", url="http://127.0.0.1:9")
    for server in (gone, another, closed, address):
        server.write()
    broken = gone.path.with_name("broken.json")
    broken.write_text("{")
    broken.chmod(0o600)
    assert discovery.running(Library(address.loaded.library)) == [address]
    assert sorted(gone.path.parent.iterdir()) == [address.path]


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_only_its_user_may_read_a_servers_file_and_others_are_not_believed(running):
    assert running.path.stat().st_mode & 0o777 == 0o600 and running.path.parent.stat().st_mode & 0o777 == 0o700
    running.path.chmod(0o666)
    assert discovery.find(running.loaded) is None


def test_the_key_is_shown_to_nobody_else(address, home):
    """Another program on the port of a server that is gone gets no request with the key."""
    import http.server
    import threading

    seen = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"instance": "mine"}')

        def log_message(self, *about):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        stolen = replace(address, url=f"http://127.0.0.1:{other.server_port}", key="admin-secret", instance="theirs")
        stolen.write()
        assert discovery.find(stolen.loaded) is None
    assert len(seen) == 1 and "admin-secret" not in str(seen) and not stolen.path.exists()


def test_errors_of_the_connection_name_the_remedy():
    with pytest.raises(NoServer, match="--local"):
        HTTPClient("http://127.0.0.1:9").get("/v1/models")


def test_a_refusal_tells_what_the_server_says(address):
    with pytest.raises(Refused, match="does not exist") as caught:
        HTTPClient(address.url).post(
            "/v1/chat/completions", {"model": "x", "messages": [{"role": "user", "content": "?"}]}
        )
    assert caught.value.status == 404 and caught.value.code == "model_not_found"


def test_a_question_to_a_server_imports_nothing_heavy(running, library, tiny_folder, tiny_hypernet_folder):
    code = (
        "import sys; from loracast.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "heavy = ('torch', 'transformers', 'numpy', 'tokenizers', 'fastapi', 'httpx', 'uvicorn'); "
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    options = ["--base", tiny_folder, "--hypernetwork", tiny_hypernet_folder, "--library", library]
    question = ["ask", "How long is the warranty of the kettle?", "--all", "--json", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code, *question], capture_output=True, text=True, env=environment)
    assert done.stderr.strip().splitlines()[-1] == "[]" and json.loads(done.stdout)["answer"]


def test_clients_close_idle_connections_before_the_server_does(monkeypatch):
    """A server that closes a connection while a client sends its next request on it gives no answer."""
    kept: list[int] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: kept.append(self.config.timeout_keep_alive))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        serving_run.run(FastAPI(), ServerSettings(), sock)
    expiry = httpx.Limits().keepalive_expiry
    assert expiry is not None and kept[0] > expiry + 1


# ---- servers in processes of their own


@pytest.fixture
def words(tiny_folder, tiny_hypernet_folder, library, home) -> tuple[str, ...]:
    """The options of a command that loads the tiny models."""
    options = ("--base", tiny_folder, "--hypernetwork", tiny_hypernet_folder, "--device", "cpu", "--library", library)
    return tuple(map(str, options))


@pytest.fixture
def start(words, tmp_path):
    """Starts a server in the foreground; it and what it tells of itself, once commands find it."""
    started = []

    def start(*arguments: str) -> tuple[Forked, Running]:
        process = Forked(tmp_path, loracast_command, "serve", "--port", "0", *arguments, *words)
        started.append(process)
        server = eventually(lambda: discovery.of_process(process.pid) or not process.has_not_ended, 120)
        assert server is not True, process.err
        return process, server

    yield start
    for process in started:
        if process.has_not_ended:
            process.send_signal(signal.SIGTERM)
        process.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_a_server_and_its_file(start, run, library, loads, number, code):
    process, server = start()
    assert run("ask", "Hello", "--max-tokens", "2").exit_code == 0 and not loads
    (listed,) = json.loads(run("serve", "--status", "--json").stdout)["servers"]
    assert listed["pid"] == process.pid and "key" not in listed
    answer = server.client().stream(
        "/v1/chat/completions",
        {"model": server.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100, "stream": True},
    )
    next(answer)
    began = time.monotonic()
    process.send_signal(number)
    if number == signal.SIGTERM:
        assert list(answer)[-1]["loracast"]  # it is finished first
    assert process.wait(30) == code and "Traceback" not in process.err
    assert f"page   {server.url}/\nAPI    {server.url}/v1\n" in process.err
    assert time.monotonic() - began < (1.5 if number == signal.SIGINT else 30)
    assert not server.path.exists()
    assert run("ask", "Hello", "--max-tokens", "2").exit_code == 0 and len(loads) == 1


@pytest.fixture
def program(words):
    """Runs `python -m loracast` with a command's words."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def program(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "loracast", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return program


def test_an_idle_server_ends_by_itself(start, library, tmp_path):
    socket_file = tmp_path / "s.sock"
    process, server = start("--unix-socket", str(socket_file), "--idle-s", "1")
    assert server.url == f"unix:{socket_file}" and socket_file.stat().st_mode & 0o777 == 0o600
    asked = {"model": server.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    began = time.monotonic()
    for _ in range(4):  # each keeps it for another second
        time.sleep(0.5)
        assert server.client().post("/v1/chat/completions", asked)["choices"]
    assert process.wait(30) == 0 and time.monotonic() - began > 2.9
    assert not socket_file.exists() and not server.path.exists() and "Traceback" not in process.err


def test_a_killed_servers_socket_is_removed(start, library, tmp_path):
    process, server = start("--unix-socket", str(tmp_path / "s.sock"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "s.sock").exists() and server.path.exists()
    assert discovery.running(Library(library)) == []
    assert not (tmp_path / "s.sock").exists() and not server.path.exists()


def test_a_socket_that_cannot_be_listened_on(run, tmp_path):
    result = run("serve", "--unix-socket", tmp_path / "none" / "s.sock")
    assert result.exit_code == 1 and "cannot listen on the Unix socket" in result.stderr


@pytest.fixture
def in_terminal(words):
    """Runs `python -m loracast` in a terminal; its exit code and what it shows."""
    pty = pytest.importorskip("pty")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment = {key: value for key, value in environment.items() if key not in ("CI", "LORACAST_SERVER")}

    def in_terminal(*arguments: str, **more: str) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        command, streams = [sys.executable, "-m", "loracast", *arguments], dict.fromkeys(("stdout", "stderr"), theirs)
        done = subprocess.run(command, env=environment | more, stdin=subprocess.DEVNULL, timeout=120, **streams)
        os.close(theirs)
        with open(ours, "rb", buffering=0) as shown:
            pieces = []
            with suppress(OSError):  # Linux says EIO where a terminal's other end is closed
                while piece := shown.read(4096):
                    pieces.append(piece)
        return done.returncode, b"".join(pieces).decode()

    return in_terminal


def test_ask_in_terminal(in_terminal, program, words, library):
    """The first question leaves a server behind, which answers the next one; a pipe leaves none."""
    ask = ("ask", "How long is the warranty of the kettle?", "-a", "kettle", "--max-tokens", "8", *words)
    alone = program(*ask)
    assert alone.returncode == 0 and discovery.running(Library(library)) == [], alone.stderr
    try:
        code, first = in_terminal(*ask)
        assert code == 0 and "the base stays loaded until 10 minutes after" in first and "loracast stop" in first, first
        (server,) = discovery.running(Library(library))
        assert server.url.startswith("unix:")
        code, second = in_terminal(*ask)
        assert code == 0 and "stays loaded" not in second and alone.stdout.strip() in second
        assert discovery.running(Library(library)) == [server]
    finally:
        stopped = program("stop", "--library", str(library))
    assert stopped.stdout == f"stopped {server.url}\n"
    assert not list(server.path.parent.glob("*.sock"))


def test_no_server_stays_where_it_is_not_wanted(in_terminal, words, library):
    ask = ("ask", "Hello", "--max-tokens", "2", *words)
    for arguments, more in (((), {"CI": "true"}), ((), {"LORACAST_SERVER": "off"}), (("--local",), {})):
        code, shown = in_terminal(*ask, *arguments, **more)
        assert code == 0 and "stays loaded" not in shown and discovery.running(Library(library)) == [], shown


def test_a_server_in_the_background_and_its_end(program, words, library):
    begun = program("serve", "--background", "--port", "0", *words)
    assert begun.returncode == 0 and "page " in begun.stderr, begun.stderr
    stopped = program("stop", "--library", str(library))
    assert stopped.returncode == 0 and stopped.stdout.startswith("stopped http://127.0.0.1:")
    again = program("stop", "--library", str(library))
    assert again.returncode == 1 and "no server of the library" in again.stderr


def test_a_server_that_cannot_start_says_why(program, words, run):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        here, behind = run("serve", "--port", port), program("serve", "--port", port, "--background", *words)
    for code, said in ((here.exit_code, here.stderr), (behind.returncode, behind.stderr)):
        assert code == 1 and said.count("\n") == 1, said
        assert said.startswith("error: cannot listen on 127.0.0.1") and "--port" in said
    open_to_all = run("serve", "--host", "0.0.0.0")
    assert open_to_all.exit_code == 1 and "set a key" in open_to_all.stderr


def test_a_server_with_keys_lets_its_users_commands_in(start, run, tmp_path, loads, monkeypatch):
    (tmp_path / "keys").write_text("read:0123456789abcdef\n")
    (tmp_path / "keys").chmod(0o600)
    monkeypatch.setenv("LORACAST_API_KEYS", "write:fedcba9876543210")
    _, server = start("--keys", str(tmp_path / "keys"))
    with pytest.raises(Refused):
        HTTPClient(server.url).get("/v1/models")
    for key in ("0123456789abcdef", "fedcba9876543210"):  # of the file, and of the variable
        assert HTTPClient(server.url, key).get("/v1/models")["data"]
    assert run("ask", "Hello", "--max-tokens", "2").exit_code == 0 and not loads


def test_watched_folders_are_learned_and_forgotten(start, library, tmp_path):
    folders = [tmp_path / "invoices", tmp_path / "letters"]
    for folder in folders:
        folder.mkdir()
        (folder / f"{folder.name}.txt").write_text(f"The {folder.name} are in the drawer.")
    before = Library(library).names()
    missing = tmp_path / "missing"
    process, server = start(*(word for folder in (*folders, missing) for word in ("--watch", str(folder))))
    assert f"there is no folder {missing} yet" in " ".join(process.err.split())
    eventually(lambda: Library(library).names() == sorted([*before, "invoices", "letters"]))
    watched = server.client().get("/v1/server")["watched"]
    assert [one["folder"] for one in watched] == ["invoices", "letters", "missing"]
    for folder in folders:
        (folder / f"{folder.name}.txt").unlink()
    eventually(lambda: Library(library).names() == before)
