"""How a base is loaded, from the command line: its type, device map and quantization, and the base of an adapter."""

import json

import pytest
from typer.testing import CliRunner

from commands import every_command, options_of
from loracast.cli import app
from loracast.cli.options import BaseChoice

HOW = {"--device", "--device-map", "--dtype", "--quantize"}


@pytest.fixture
def run(home, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments), "--library", str(tmp_path / "library")])

    return run


@pytest.fixture
def note(tmp_path):
    path = tmp_path / "note.md"
    path.write_text("# Lamp\n\nThe lamp on the desk was made in the north, and its code is 4711.")
    return path


def test_commands_that_load_a_base_take_all_of_these_options():
    takes = {" ".join(path): HOW & set().union(*options_of(command)) for path, command in every_command()}
    some = {
        command for command, options in takes.items() if options and command not in ("plan", "train labels")
    }  # load none
    assert {takes[command] == HOW for command in some} == {True}
    assert {"learn", "task", "ask", "chat", "serve", "sync", "train doc", "eval qa", "eval tasks"} <= some


def test_the_options_reach_the_base(run, note, tiny_folder, tiny_hypernet_folder, monkeypatch):
    seen = []
    original = __import__("loracast.answering.model", fromlist=["load_base"]).load_base

    def load_base(source, **options):
        base = original(source, **options)
        seen.append((options, str(base.model.dtype)))
        return base

    monkeypatch.setattr("loracast.answering.model.load_base", load_base)
    how = ("--dtype", "float16", "--device-map", "cpu")
    done = run("learn", note, "--base", tiny_folder, "--hypernetwork", tiny_hypernet_folder, *how)
    assert done.exit_code == 0, done.output
    (options, dtype) = seen[0]
    assert (options["device_map"], options["device"], dtype) == ("cpu", None, "torch.float16")
    for wrong, said in (
        (("--dtype", "int8"), "'int8' is no type of weights"),
        (("--quantize", "3bit"), "8bit or 4bit, and not to '3bit'"),
        (("--device-map", "auto", "--device", "cpu"), "device and device_map: give one of them"),
    ):
        refused = run("ask", "Why?", "--base", tiny_folder, *wrong)
        assert refused.exit_code == 1 and said in refused.stderr, refused.output


def test_an_adapter_finds_its_base_from_any_folder(run, note, tiny_folder, tiny_hypernet_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    done = run("learn", note, "--base", tiny_folder.name, "--hypernetwork", tiny_hypernet_folder, "--device", "cpu")
    assert done.exit_code == 0, done.output
    monkeypatch.chdir(tmp_path)
    asked = run("ask", "What is the code of the lamp?", "-a", "note", "--device", "cpu", "--json", "--max-tokens", 4)
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["base"] == str(tiny_folder)


def test_how_says_nothing_by_default():
    assert set(BaseChoice().how.values()) == {None}


def test_the_output_matrix_gets_rows_that_lie_side_by_side(base):
    """Torch would copy the matrix for each row of the last tokens, which a slice leaves apart."""
    import torch

    seen = []
    handle = base.model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    try:
        with torch.no_grad():
            last = base.model(ids, logits_to_keep=1).logits
            all_of_them = base.model(ids).logits
    finally:
        handle.remove()
    assert [x.stride() for x in seen] == [(48, 48, 1), (4 * 48, 48, 1)]
    torch.testing.assert_close(last, all_of_them[:, -1:])
