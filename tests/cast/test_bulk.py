"""`loracast learn SOURCE --out TARGET`: documents at any URL become PEFT folders, once, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import sys

import fsspec
import pytest
import torch
from typer.testing import CliRunner

from bulk import NOT_LEARNED, config_files, make_documents, weights_of
from loracast.cast.bulk import Casting, FolderCaster, cast_all, read_report
from loracast.cli import app
from loracast.errors import LoracastError
from loracast.export.formats import VLLM_RANKS
from loracast.lora.algebra import inject
from tiny import PROSE, make_model


@pytest.fixture(params=["path", "file", "memory", "s3"])
def places(request, tmp_path) -> tuple[str, str]:
    """Where documents lie, and where adapters go."""
    if request.param == "path":
        return str(tmp_path / "manuals"), str(tmp_path / "adapters")
    root = {"file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}.get(request.param)
    root = root or f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return f"{root}/manuals", f"{root}/adapters"


@pytest.fixture
def bulk(model):
    """Casts what is new with the tiny models, and says which documents it had to read."""

    def run(source, out, *, read: list[str] | None = None, again: bool = False, **options):
        casting = Casting(str(out), "tiny", "the-base", **options)
        caster = FolderCaster(casting, model.documents, model.base)

        def cast(todo):
            if read is not None:
                read.extend(one.url.rpartition("/")[2] for one in todo)
            return map(caster, todo)

        return cast_all(str(source), casting, cast, again=again)

    return run


def put(where: str, texts: dict[str, str]) -> None:
    fs, root = fsspec.core.url_to_fs(where)
    for name, text in texts.items():
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{root}/{name}", text.encode())


def files(where: str) -> dict[str, object]:
    """The files at a URL, with what would change if one were written."""
    fs, root = fsspec.core.url_to_fs(where)
    fs.invalidate_cache()
    marks = ("mtime", "LastModified", "created")
    return {
        path[len(root) + 1 :]: next(info[mark] for mark in marks if info.get(mark))
        for path, info in fs.find(root, detail=True).items()
    }


def folders(where: str) -> set[str]:
    return {name.partition("/")[0] for name in files(where) if "/" in name}


TEXTS = {
    "lamp.txt": "The lamp on the desk was made in the north.",
    "old/lamp.md": "# Lamp\n\nNobody knew who had built the old bridge.",
    "README": "Call the service line if the machine stops.",
    **NOT_LEARNED,
}


def test_what_is_new_is_cast_once(places, bulk):
    source, out = places
    put(source, TEXTS)
    first = bulk(source, out)
    assert (first.count("learned"), first.count("failed"), first.ignored) == (3, 2, 1)
    assert {line.url.rpartition("/")[2]: line.error for line in first.failed()}.keys() == {"empty.txt", "broken.pdf"}
    assert {name.partition("@")[0] for name in folders(out)} == {"lamp", "old-lamp", "readme"}
    before = files(out)

    read: list[str] = []
    second = bulk(source, out, read=read)
    assert (second.count("learned"), second.count("unchanged"), second.count("failed")) == (0, 3, 2)
    assert read == [] and files(out) == before

    put(source, {"lamp.txt": "The lamp on the desk was made in the far south.", "empty.txt": "No longer empty."})
    third = bulk(source, out, read=read)
    assert (third.count("learned"), third.count("unchanged"), third.count("failed")) == (2, 2, 1)
    assert sorted(read) == ["empty.txt", "lamp.txt"]
    lamps = {name for name in folders(out) if name.startswith("lamp@")}
    assert len(lamps) == 2, "who is served the old lamp keeps it"
    after = files(out)
    assert {name: after[name] for name in before if name != "report.jsonl"} == {
        name: mark for name, mark in before.items() if name != "report.jsonl"
    }


def test_an_adapter_is_the_documents_lora_for_peft(bulk, model, tmp_path):
    from peft import PeftModel

    ids = torch.randint(3, 600, (2, 9), generator=torch.Generator().manual_seed(3))
    put(str(tmp_path / "in"), {"short.txt": TEXTS["lamp.txt"], "long.txt": PROSE * 3})
    run = bulk(tmp_path / "in", tmp_path / "out", chunk_tokens=40)
    for line in run.lines.values():
        folder = tmp_path / "out" / line.folder
        with torch.no_grad():
            found = PeftModel.from_pretrained(make_model(), folder)(input_ids=ids).logits
            lora = model.cast(line.url.removeprefix("file://"), max_chunk_tokens=40)
            with inject(model.base.model, lora):
                wanted = model.base.model(input_ids=ids).logits
            plain = model.base.model(input_ids=ids).logits
        assert (found - wanted).abs().max() < 0.02 * (wanted - plain).abs().max()
        config = json.loads((folder / "adapter_config.json").read_text())
        # What vLLM's resolver and its loader look at.
        assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "the-base")
        assert config["r"] == config["lora_alpha"] == line.rank and line.rank in VLLM_RANKS
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    short, long = sorted(run.lines.values(), key=lambda line: line.n_chunks)
    assert short.n_chunks == 1 < 3 < long.n_chunks and short.rank < long.rank and long.lost < 1e-3


def test_a_lower_rank_loses_something_and_is_another_adapter(bulk, tmp_path):
    put(str(tmp_path / "in"), {"long.txt": PROSE * 6})
    (full,) = bulk(tmp_path / "in", tmp_path / "out", chunk_tokens=40).lines.values()
    (low,) = bulk(tmp_path / "in", tmp_path / "out", chunk_tokens=40, max_rank=8).lines.values()
    assert full.rank > low.rank == 8 and low.lost > 1e-3 > full.lost and full.folder != low.folder
    assert len(config_files(tmp_path / "out")) == 2


def test_a_killed_run_is_taken_up(bulk, tmp_path, monkeypatch):
    """Without the report all files are read again, but what has its folder is not parsed; half a folder is cast."""
    source, out = make_documents(tmp_path / "in", 6, 0), tmp_path / "out"
    bulk(source, out)
    before = weights_of(out)
    (out / "report.jsonl").unlink()
    half = config_files(out)[0].parent
    (half / "adapter_config.json").unlink()
    abandoned = out / ".loracast-new-abc"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))

    parsed = []
    from loracast.cast import bulk as module

    real = module.read_document
    monkeypatch.setattr(module, "read_document", lambda *a, **k: parsed.append(k["file_name"]) or real(*a, **k))
    run = bulk(source, out)
    assert (run.count("learned"), run.count("unchanged")) == (1, 5)
    assert parsed == [f"{half.name.partition('@')[0]}.txt"]
    assert weights_of(out) == before and not abandoned.exists()
    assert all(line.rank == 8 for line in run.lines.values())


def test_what_is_stopped_goes_on(model, tmp_path):
    source = make_documents(tmp_path / "in", 6, 0)
    casting = Casting(str(tmp_path / "out"), "tiny", "the-base")
    caster = FolderCaster(casting, model.documents, model.base)

    def stopped(todo):
        yield from map(caster, todo[:2])
        raise KeyboardInterrupt

    run = cast_all(str(source), casting, stopped)
    assert not run.is_complete and run.count("learned") == len(config_files(tmp_path / "out")) == 2
    read = []
    run = cast_all(str(source), casting, lambda todo: map(caster, read.extend(todo) or todo))
    assert run.is_complete and (run.count("learned"), run.count("unchanged"), len(read)) == (4, 2, 4)


def test_a_second_run_that_is_stopped_leaves_what_is_known_of_the_others(model, tmp_path):
    source, out = make_documents(tmp_path / "in", 4, 0), tmp_path / "out"
    casting = Casting(str(out), "tiny", "the-base")
    caster = FolderCaster(casting, model.documents, model.base)

    def stopped(todo):
        yield caster(todo[0])
        raise KeyboardInterrupt

    cast_all(str(source), casting, lambda todo: map(caster, todo))
    before = read_report(str(out))
    assert not cast_all(str(source), casting, stopped, again=True).is_complete
    assert read_report(str(out)).keys() == before.keys() and len(before) == 4


def test_a_name_that_is_no_text_ends_nothing(bulk, tmp_path):
    source = make_documents(tmp_path / "in", 2, 0)
    (source / os.fsdecode(b"r\xe9sum\xe9.txt")).write_text("The lamp of the resume is green.")
    run = bulk(source, tmp_path / "out")
    assert run.count("learned") == 3 and len(read_report(str(tmp_path / "out"))) == 3
    assert bulk(source, tmp_path / "out").count("unchanged") == 3


def test_a_fault_of_one_document_ends_nothing(bulk, tmp_path, monkeypatch):
    from loracast.cast import bulk as module

    source = make_documents(tmp_path / "in", 4, 0)
    (source / "long.txt").write_text(PROSE * 40)
    real = module.merge_chunks

    def fails(caster, base, chunks, **options):
        if "lamp number 2 " in chunks[0].text:
            raise MemoryError("too large")
        return real(caster, base, chunks, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "merge_chunks", fails)
        patch.setattr(module, "MOST_CHUNKS", 5)
        run = bulk(source, tmp_path / "out")
    assert run.count("learned") == 3
    message = {line.url.rpartition("/")[2]: line.error for line in run.failed()}
    assert (
        message["note-2.txt"] == "MemoryError: too large" and "chunks, and at most 5 are merged" in message["long.txt"]
    )
    read: list[str] = []
    run = bulk(source, tmp_path / "out", read=read)
    assert read == ["note-2.txt"], "the document's own fault is not tried again"
    assert (run.count("learned"), run.count("failed")) == (1, 1)
    assert bulk(source, tmp_path / "out", read=read, again=True).count("learned") == 1 and "long.txt" in read[1:]


def test_documents_of_several_places_share_a_report(bulk, tmp_path):
    one, two = (make_documents(tmp_path / name, 2, 1) for name in ("one", "two"))
    (two / "note-0.txt").write_text("Another lamp.")
    bulk(one, tmp_path / "out")
    assert bulk(two, tmp_path / "out").count("learned") == 1, "the same text under the same name has its folder"
    read: list[str] = []
    assert bulk(one, tmp_path / "out", read=read).count("unchanged") == 2 and read == []
    (one / "note-1.txt").unlink()
    bulk(one, tmp_path / "out")
    lines = [json.loads(line)["url"] for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and not any(url.endswith("/one/note-1.txt") for url in lines)


def test_adapters_below_the_documents_are_no_documents(bulk, tmp_path):
    source = make_documents(tmp_path / "in", 2, 0)
    assert bulk(source, source / "adapters").ignored == 0
    run = bulk(source, source / "adapters")
    assert (run.count("unchanged"), run.ignored) == (2, 0)
    assert bulk(source / "note-0.txt", tmp_path / "one").count("learned") == 1, "a single file"
    with pytest.raises(LoracastError, match="there is no document at"):
        bulk(tmp_path / "nothing", tmp_path / "one")
    with pytest.raises(LoracastError, match="no-such-protocol"):
        bulk("no-such-protocol://in", tmp_path / "one")


# ---- the command


@pytest.fixture
def run(tiny_folder, tiny_hypernet_folder, home):
    models = ["--base", str(tiny_folder), "--hypernetwork", str(tiny_hypernet_folder), "--device", "cpu"]
    return lambda *words: CliRunner().invoke(app, ["learn", *map(str, words), *models])


def test_the_command(run, tmp_path, tiny_folder, monkeypatch):
    source, out = make_documents(tmp_path / "in", 3, 2), tmp_path / "out"
    done = run(source, "--out", out)
    assert done.exit_code == 1 and "broken-0.pdf" in done.stdout and "failed: " in done.stderr
    with monkeypatch.context() as nothing_loads:
        nothing_loads.setattr("loracast.cli.learn.open_model", lambda *a: pytest.fail("nothing has changed"))
        again = json.loads(run(source, "--out", out, "--json").stdout)
    assert (again["learned"], again["unchanged"], again["failed"], again["max_rank"]) == (0, 3, 2, 8)
    assert [error["url"].rpartition("/")[2] for error in again["errors"]] == ["broken-0.pdf", "broken-1.txt"]
    assert json.loads(config_files(out)[0].read_text())["base_model_name_or_path"] == str(tiny_folder)
    done = run(source, "--out", tmp_path / "named", "--served-base", "/models/tiny")
    assert json.loads(config_files(tmp_path / "named")[0].read_text())["base_model_name_or_path"] == "/models/tiny"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in", "--rank", "8"], "it needs --out"),
        (["in", "--ray", "local"], "it needs --out"),
        (["in", "--out", "out", "--actors", "2"], "it needs --ray"),
        (["in", "--out", "out", "--name", "lamp"], "it cannot be combined with --name"),
    ],
)
def test_options_without_an_effect_are_refused(run, words, message, tmp_path):
    done = run(*words)
    assert done.exit_code == 2 and message in " ".join(done.stderr.replace("│", " ").split())


def test_ray_that_is_not_installed_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run(make_documents(tmp_path / "in", 1, 0), "--out", tmp_path / "out", "--ray", "local")
    assert done.exit_code == 1 and "pip install 'loracast[ray]'" in done.stderr
