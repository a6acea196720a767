"""Uploads and jobs of a server: bounded, cancelled, put off, and not lost to a kill at any moment."""

from __future__ import annotations

import io
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from adapters import write
from loracast.errors import DocumentError, NameTakenError
from loracast.library.index import read_chunks
from loracast.library.library import Library
from loracast.serving.errors import ApiError
from loracast.serving.jobs import Jobs
from loracast.serving.learning import Learning
from loracast.serving.settings import ServerSettings
from loracast.serving.state import INTERNAL, Paging, State, Uploads
from other_processes import Forked
from servers import eventually, manual


def start(model, **settings) -> Learning:
    learning = Learning(model, ServerSettings(**settings))
    learning.jobs.start()
    return learning


def are_done(jobs: Jobs) -> bool:
    """Whether no job waits or runs."""
    return all(job.has_ended for job in jobs.page(Paging(limit=100))[0])


def ended(jobs: Jobs, id: str):
    return eventually(lambda: job if (job := jobs.find(id)).has_ended else None)


def learn(learning: Learning, data: bytes, name: str, **options):
    return learning.learn(io.BytesIO(data), f"{name}.md", None, **{"tags": (), "replace": False, **options})


# ---- uploads


def test_an_upload_is_kept_under_an_id_of_the_servers_making(tmp_path):
    uploads = Uploads(State(Library(tmp_path)), 10_000)
    kept = uploads.add(io.BytesIO(b"some text"), "../../etc/pass\x00wd\n.md", "assistants")
    assert (kept.filename, kept.n_bytes) == ("passwd.md", 9)
    assert uploads.find(kept.id) == kept
    assert uploads.path(kept.id).read_bytes() == b"some text"
    assert [path.name for path in (tmp_path / "serving" / "files").iterdir()] == [kept.id]
    for id in ("../state.sqlite", "file-" + "0" * 24, "", kept.id + "\0"):
        with pytest.raises(ApiError, match="no file"):
            uploads.find(id)


def test_uploads_are_bounded_together_and_a_refused_one_leaves_nothing(tmp_path):
    uploads = Uploads(State(Library(tmp_path)), 10)
    uploads.add(io.BytesIO(b"12345678"), "a.md", "assistants")
    with pytest.raises(ApiError, match="2 are left") as refused:
        uploads.add(io.BytesIO(b"123"), "b.md", "assistants")
    assert refused.value.status == 413
    assert len(list((tmp_path / "serving" / "files").iterdir())) == 1
    uploads.add(io.BytesIO(b"12"), "c.md", "assistants")


def test_uploads_at_the_same_time_are_bounded_together(tmp_path):
    uploads = Uploads(State(Library(tmp_path)), 10)

    class Slow(io.BytesIO):
        def read(self, *size):
            if not self.tell():
                uploads.add(io.BytesIO(b"12345678"), "a.md", "assistants")
            return super().read(*size)

    with pytest.raises(ApiError, match="2 are left"):
        uploads.add(Slow(b"1234"), "b.md", "assistants")
    assert len(list((tmp_path / "serving" / "files").iterdir())) == 1


def test_pages_of_a_list_cover_it_once_in_either_order(tmp_path):
    uploads = Uploads(State(Library(tmp_path)), 1000)
    ids = [uploads.add(io.BytesIO(b"."), f"{i}.md", "assistants").id for i in range(5)]
    uploads.add(io.BytesIO(b"."), "internal", INTERNAL)
    for order, wanted in (("asc", ids), ("desc", ids[::-1])):
        seen, after = [], None
        while True:
            page, has_more = uploads.page(Paging(after=after, limit=2, order=order))
            seen += [one.id for one in page]
            if not has_more:
                break
            after = seen[-1]
        assert seen == wanted
        page, has_more = uploads.page(Paging(before=wanted[4], limit=2, order=order))
        assert [one.id for one in page] == wanted[2:4]
        assert has_more
    with pytest.raises(ApiError):
        uploads.page(Paging(after="file-elsewhere"))


# ---- jobs without a model


class Makers:
    """A maker whose jobs wait until they are let go; what it makes is a random adapter."""

    def __init__(self, library: Path):
        self.library, self.begun, self.may_go = library, threading.Event(), threading.Event()
        self.order: list[str] = []

    def __call__(self, job, progress):
        self.order.append(job.adapter)
        for done in range(3):
            progress(done, 3)
            self.begun.set()  # after that look at whether the job is cancelled
            if "error" in job.work:
                raise {"bug": RuntimeError("a secret text"), "file": DocumentError("x.md is empty: fill it")}[
                    job.work["error"]
                ]
            assert self.may_go.wait(30)
        return write(self.library, name=job.adapter, seed=len(set(self.order)))


@pytest.fixture
def makers(tmp_path):
    return Makers(tmp_path)


@pytest.fixture
def jobs(tmp_path, makers):
    found = Jobs(State(Library(tmp_path)), makers, lambda: None, 4)
    yield found
    makers.may_go.set()
    found.close()


def test_a_full_queue_refuses_and_says_when_to_come_back(jobs, makers):
    jobs.start()
    for i in range(4):
        jobs.add("document", f"doc-{i}", {})
    with pytest.raises(ApiError) as refused:
        jobs.add("document", "doc-4", {})
    assert refused.value.status == 429
    assert int(refused.value.headers["Retry-After"]) > 0
    makers.may_go.set()
    eventually(lambda: are_done(jobs))
    assert makers.order == ["doc-0", "doc-1", "doc-2", "doc-3"]
    assert Library(makers.library).names() == makers.order


def test_two_jobs_never_make_one_name_at_once(jobs):
    jobs.add("document", "doc", {})
    with pytest.raises(NameTakenError):
        jobs.add("document", "doc", {})


def test_uploads_that_may_replace_each_other_take_turns_and_the_last_one_stays(model):
    learning = Learning(model, ServerSettings())
    jobs = [learn(learning, manual(number), "doc", replace=True) for number in (1, 2, 3)]
    with pytest.raises(NameTakenError):
        learn(learning, manual(4), "doc")
    learning.jobs.start()
    made = [ended(learning.jobs, job.id) for job in jobs]
    assert [job.status for job in made] == ["completed"] * 3
    assert [entry.version for entry in model.library.versions("doc")] == [job.version for job in made][::-1]
    assert "555-0003" in read_chunks(model.library.open("doc").index)[0].text
    learning.jobs.close()


def test_what_fails_in_a_job_is_its_error_and_the_next_one_goes_on(jobs, makers, caplog):
    makers.may_go.set()
    bug, file, good = (jobs.add("document", f"doc-{i}", {"error": kind} if kind else {}).id
                       for i, kind in enumerate(("bug", "file", "")))  # fmt: skip
    jobs.start()
    assert ended(jobs, good).status == "completed"
    assert jobs.find(file).error == {"code": "invalid_file", "message": "x.md is empty: fill it"}
    job_found = jobs.find(bug)
    assert (job_found.status, job_found.error["code"]) == ("failed", "server_error")
    assert "secret" not in job_found.error["message"] + caplog.text
    assert "RuntimeError" in caplog.text


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_soon(jobs, makers):
    first, second = jobs.add("document", "doc-1", {}), jobs.add("document", "doc-2", {})
    jobs.start()
    assert makers.begun.wait(30)
    assert jobs.cancel(second.id).status == "cancelled"
    assert jobs.cancel(first.id).status == "running"
    makers.may_go.set()
    assert ended(jobs, first.id).status == "cancelled"
    assert makers.order == ["doc-1"]
    assert Library(makers.library).names() == []
    assert jobs.cancel(first.id).revision == jobs.find(first.id).revision  # nothing changes any more


def test_a_server_that_stops_puts_its_job_off(tmp_path, jobs, makers):
    job = jobs.add("document", "doc", {})
    jobs.start()
    assert makers.begun.wait(30)
    closing = threading.Thread(target=jobs.close)
    closing.start()
    makers.may_go.set()
    closing.join(30)
    assert jobs.find(job.id).status == "queued"
    again = Jobs(State(Library(tmp_path)), makers, lambda: None, 4)
    again.start()
    assert ended(again, job.id).status == "completed"
    again.close()


def test_one_of_two_servers_on_a_library_works(tmp_path, jobs, makers):
    other = Jobs(State(Library(tmp_path)), makers, lambda: None, 4)
    jobs.start()
    first = jobs.add("document", "doc-1", {})
    assert makers.begun.wait(30)
    other.start()
    second = other.add("document", "doc-2", {})
    assert jobs.find(first.id).status == "running"  # the other one does not take it for a dead server's
    makers.may_go.set()
    assert ended(jobs, second.id).status == "completed"
    jobs.close()
    assert ended(other, other.add("document", "doc-3", {}).id).status == "completed"
    other.close()


def test_a_job_that_kills_the_server_is_given_up(tmp_path, jobs, makers):
    job = jobs.add("document", "doc", {})
    for _ in range(10):
        assert jobs._claim().id == job.id
        jobs._requeue()  # as a server that starts after a kill
    assert jobs._claim() is None
    assert jobs.find(job.id).status == "failed"
    assert "died" in jobs.find(job.id).error["message"]


def test_a_disk_that_is_full_for_a_while_loses_no_job(jobs, makers, monkeypatch):
    makers.may_go.set()
    note, n_failures = jobs._end, 0

    def full(*args, **figures):
        nonlocal n_failures
        n_failures += 1
        if n_failures <= 2:
            raise OSError("disk full")
        note(*args, **figures)

    monkeypatch.setattr(jobs, "_end", full)
    job = jobs.add("document", "doc", {})
    jobs.start()
    assert ended(jobs, job.id).status == "completed"
    assert n_failures == 3


# ---- with a model


def test_a_document_becomes_an_adapter_with_progress_and_tags(model):
    learning = start(model)
    data = manual(7, 3)
    job = learn(learning, data, "The Manual", tags=("kitchen",))
    job = ended(learning.jobs, job.id)
    assert (job.status, job.adapter, job.error) == ("completed", "the-manual", None)
    adapter = model.library.open("the-manual")
    assert job.done == job.total == adapter.manifest.n_chunks
    assert job.version == adapter.manifest.version
    assert adapter.manifest.source == "The Manual.md"
    assert model.library.entries(tag="kitchen")[0][0].name == "the-manual"
    eventually(
        lambda: not any((model.library.folder / "serving" / "files").iterdir())
    )  # its bytes are no longer needed
    again = ended(learning.jobs, learn(learning, data, "The Manual").id)  # uploaded twice
    assert (again.status, again.version) == ("completed", job.version)
    with pytest.raises(NameTakenError):
        learn(learning, manual(8), "The Manual")
    newer = ended(learning.jobs, learn(learning, manual(8), "The Manual", replace=True).id)
    assert model.library.open("the-manual").manifest.version == newer.version != job.version
    learning.jobs.close()


def test_the_name_of_a_job_that_cannot_begin_takes_no_room(model):
    learning = Learning(model, ServerSettings(max_queued_jobs=1))
    learn(learning, manual(1), "one")
    with pytest.raises(ApiError):
        learn(learning, manual(2), "two")
    with pytest.raises(Exception, match="cannot name"):
        learning.learn(io.BytesIO(b"x"), "a.md", "../up", tags=(), replace=False)
    assert len(list((model.library.folder / "serving" / "files").iterdir())) == 1


BAD = {
    "empty.md": b"", "white.txt": b" \n\t ", "nothing.pdf": b"", "broken.pdf": b"%PDF-1.7\n1 0 obj <<",
    "archive.zip": b"PK\x03\x04garbage", "picture.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "page.pdf": b"<html>404</html>",
}  # fmt: skip


def test_files_that_cannot_be_read_fail_with_a_reason_and_the_worker_lives(model):
    learning = start(model)
    jobs = [learning.learn(io.BytesIO(data), file, None, tags=(), replace=False) for file, data in BAD.items()]
    good = learn(learning, manual(3), "good")
    assert ended(learning.jobs, good.id).status == "completed"
    for job in jobs:
        job_found = learning.jobs.find(job.id)
        assert job_found.status == "failed"
        assert job_found.error["code"] in ("invalid_file", "unsupported_file")
        assert len(job_found.error["message"]) > 20
        assert str(model.library) not in job_found.error["message"]
    assert model.library.names() == ["good"]
    learning.jobs.close()


def test_combining_is_a_job_with_the_versions_of_when_it_was_asked_for(model):
    learning = Learning(model, ServerSettings())
    old = model.learn(io.BytesIO(manual(1)), "one").manifest.version
    model.learn(io.BytesIO(manual(2)), "two")
    job = learning.combine([("one", 1.0), ("two", -0.5)], "both", tags=("mix",), replace=False)
    model.learn(io.BytesIO(manual(9)), "one", replace=True)
    learning.jobs.start()
    assert ended(learning.jobs, job.id).status == "completed"
    made = model.library.open("both")
    name = made.manifest.target.modules[0].name
    wanted = model.library.open(f"one@{old}").lora().delta(name)
    wanted = wanted - 0.5 * model.library.open("two").lora().delta(name)
    assert (made.lora().delta(name) - wanted).abs().max() < 0.02 * wanted.abs().max()
    learning.jobs.close()


# ---- killed


def serve(base: str, hypernetwork: str, library: str, first: str) -> None:
    """Learn three documents from a number on, and keep an upload with each; prints a line for what was answered."""
    import loracast

    model = loracast.load(base, hypernetwork, library=library, device="cpu")
    learning = start(model)
    for number in range(int(first), int(first) + 3):
        data = io.BytesIO(manual(number, 4))
        job = learning.learn(data, f"doc-{number}.md", None, tags=("kept",), replace=False)
        kept = learning.uploads.add(io.BytesIO(manual(number)), f"{number}.md", "assistants")
        print(job.id, job.adapter, kept.id, flush=True)
    eventually(lambda: are_done(learning.jobs), 60)
    print("idle", flush=True)
    learning.jobs.close()


def test_what_was_answered_survives_a_kill_at_any_moment(model, tiny_folder, tiny_hypernet_folder, tmp_path):
    """A server is killed again and again, at times from early in an upload to late in learning; the last one ends."""
    where = (str(tiny_folder), str(tiny_hypernet_folder), str(model.library))
    answered: list[list[str]] = []
    for i, n_lines in enumerate((1, 2, 3, 3)):
        server = Forked(tmp_path, serve, *where, str(10 * i))
        assert len(server.lines(n_lines)) == n_lines
        if i == 2:
            eventually(lambda: model.library.names())
        server.send_signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        # what it said before it died counts
        answered += [
            line.split() for line in server.out.splitlines(True) if line.count(" ") == 2 and line.endswith("\n")
        ]
    learning = Learning(model, ServerSettings())
    unfinished = [id for id, _, _ in answered if not learning.jobs.find(id).has_ended]
    assert unfinished  # otherwise this shows nothing
    learning.jobs.start()
    for id, name, upload in answered:
        assert ended(learning.jobs, id).status == "completed"
        number = int(name.removeprefix("doc-"))
        assert f"K{number}-0" in model.library.open(name).index.read_bytes().decode("utf-8", "ignore")
        assert learning.uploads.path(learning.uploads.find(upload).id).read_bytes() == manual(number)
    eventually(lambda: are_done(learning.jobs))
    learning.jobs.close()
    assert model.library.verify() == []
    assert {name for _, name, _ in answered} <= {entry.name for entry in model.library.entries(tag="kept")[0]}


def test_learning_gives_way_to_who_else_needs_the_base(model, monkeypatch):
    """While a long document is learned, another thread gets the base again and again."""
    monkeypatch.setattr("loracast.base.forward.TOKENS_PER_BATCH", 256)
    learning = start(model)
    job = learn(learning, manual(1, 40), "long")
    seen = set()
    while not (now := learning.jobs.find(job.id)).has_ended:
        with model.base.lock:
            seen.add(now.done)
    learning.jobs.close()
    assert learning.jobs.find(job.id).status == "completed"
    assert len(seen) > 5


def test_a_document_that_is_larger_than_allowed_fails(model):
    learning = start(model)
    learning._settings = replace(learning._settings, max_upload_bytes=100)
    job_found = ended(learning.jobs, learn(learning, manual(1, 2), "large").id)
    assert job_found.status == "failed"
    assert "larger than" in job_found.error["message"]
    learning.jobs.close()
