"""The pages of the docs and the command line agree: every option is described, and every option that is named exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from commands import every_command, options_of
from loracast.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")} - {ROOT / "CHANGELOG.md"})
"""Without the notebook and the changelog, whose commands are those of the day."""
OPTION = re.compile(r"(?<![\w-])(?:--[a-z][\w-]*|-[a-zA-Z](?![\w-]))")


@cache
def commands() -> dict[tuple[str, ...], list[set[str]]]:
    """Options of every command, by its words; those of the program itself under no word."""
    found = {words: options_of(command) for words, command in every_command()}
    return {(): options_of(typer.main.get_command(app)), **found}


def sections() -> dict[str, str]:
    """The text about each command in docs/command-line.md; under "" what stands before and after all commands."""
    page = (ROOT / "docs" / "command-line.md").read_text()
    found = {"": ""}
    for part in re.split(r"^(?=###? )", page, flags=re.MULTILINE):
        name = re.match(r"### `loracast ([\w-]+)`\n", part)
        found[name[1] if name else ""] = found.get(name[1] if name else "", "") + part
    return found


def rows(section: str) -> Iterator[tuple[set[str], list[str]]]:
    """The options of each row of a table `| option | commands | meaning |`, and the subcommands that have them."""
    for options, of in re.findall(r"^\| (`-.*?) \| (.*?) \| .* \|$", section, re.MULTILINE):
        yield set(OPTION.findall(options)), re.findall(r"[\w-]+", of)


def test_the_page_of_the_command_line_has_every_command_in_order():
    assert list(sections())[1:] == list(typer.main.get_command(app).commands)


def test_every_option_of_every_command_is_on_the_page():
    said = sections()
    for words, options in commands().items():
        section = said[words[0] if words else ""]
        if len(words) == 2:
            described = {option for named, of in rows(section) if words[1] in of for option in named}
        else:
            like = re.search(r"options are those of `loracast (\w+)`", section)
            described = set(OPTION.findall(section + (said[like[1]] if like else "")))
        described |= set(OPTION.findall(said[""]))
        missing = [names for names in options if not names & described]
        assert not missing, f"docs/command-line.md says nothing of {missing} of `loracast {' '.join(words)}`"


def test_a_table_of_options_names_only_commands_that_have_them():
    for group in ("train", "eval"):
        every = {words[1]: set().union(*options) for words, options in commands().items() if words[:1] == (group,)}
        table = list(rows(sections()[group]))
        assert table
        for options, of in table:
            without = [name for name in of if not options <= every[name]]
            assert not without, (options, without)


def mentions(text: str) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """The words and options of each `loracast ...` in code: in a line of its own, with those that go on, or in backticks."""
    text = re.sub(r"\\\n\s*", " ", text)
    text = re.sub(r"\n {5,}(?=\[?--)", " ", text)
    lines = re.findall(r"^ {4}(?:\$ )?(?:[\w./-]+ [^`\n]*\| ?)?loracast (.*)", text, re.MULTILINE)
    for said in [*lines, *re.findall(r"`loracast ([^`]*)`", text)]:
        said = re.sub(r"'[^']*'|\"[^\"]*\"", "TEXT", said)
        said = re.split(r"\s#|[|;]|\\n", said)[0]
        words = re.match(r"(?:[a-z][\w-]* ?){0,2}", said)[0].split()
        yield tuple(words), set(OPTION.findall(said))


def check(text: str) -> None:
    """Fail where a text names a command or an option that does not exist."""
    groups = {words[0] for words in commands() if len(words) == 2}
    for words, options in mentions(text):
        command = words[: 2 if words[:1] and words[0] in groups else 1]
        has = [set().union(*of) for known, of in commands().items() if known[: len(command)] == command]
        assert has, f"there is no `loracast {' '.join(command)}`"
        unknown = options - set().union(*has) - {"--help"}
        assert not unknown, f"`loracast {' '.join(command)}` has no {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_that_a_page_names_exists(page):
    check(page.read_text())


def test_every_command_and_option_that_the_code_names_exists():
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "recipes").glob("*.toml")]:
        check("".join(f"`{said}`" for said in re.findall(r"`(loracast [a-z-]+[^`]*)`", file.read_text())))


@pytest.mark.parametrize(
    "text",
    [
        "see `loracast nonsense`",
        "see `loracast ask --rows`",
        "    $ loracast learn a.pdf \\\n        --rows 3\n",
        "    cat a | loracast eval qa -x",
    ],
)
def test_a_command_or_option_that_does_not_exist_is_found(text):
    with pytest.raises(AssertionError, match=r"there is no|has no"):
        check(text)
