"""The specification of a task: a description, examples, or both; and the files that examples are read from.

The text that a hypernetwork or a model with the task in its prompt reads has the description first, then the examples.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracast.errors import ConfigError
from loracast.text import is_unicode

EXAMPLE_FORMAT = "Input: {input}\nOutput: {output}"
ARROW = "=>"
"""What stands between the input and the output of an example on one line."""
_TITLE_CHARACTERS = 60


@dataclass(frozen=True)
class Example:
    """An input and its right outputs, the preferred one first."""

    input: str
    outputs: tuple[str, ...]
    choices: tuple[str, ...] = ()  # of this example, the preferred output among them, if examples have their own


ExampleLike = Example | tuple[str, str] | Mapping[str, Any]
"""An example as the Python API takes it: an `Example`, (input, output), or a mapping with `input` and `output`."""


def with_description(description: str, text: str) -> str:
    """The user turn for a base with the task in its prompt: the description, then the input."""
    return f"{description}\n\n{text}"


@dataclass(frozen=True)
class TaskSpec:
    """How a task is specified: by a description, examples, or both."""

    description: str
    """"" where the examples alone specify the task."""
    examples: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if not is_unicode(self.description):
            raise ConfigError("the description of the task is not valid Unicode: give it in UTF-8")

    def text(self, example_format: str = EXAMPLE_FORMAT) -> str:
        """The text that is read: the description, then the examples."""
        shown = "\n".join(example_format.format(input=e.input, output=e.outputs[0]) for e in self.examples)
        return "\n\n".join(part for part in (self.description, shown) if part)

    def conversation(self, asked: str, system: str = "") -> list[dict[str, str]]:
        """Messages that end with an input: examples as turns before it, the description before the first input."""
        messages = [{"role": "system", "content": system}]
        for example in self.examples:
            messages.append({"role": "user", "content": example.input})
            messages.append({"role": "assistant", "content": example.outputs[0]})
        messages.append({"role": "user", "content": asked})
        if self.description:
            messages[1]["content"] = with_description(self.description, messages[1]["content"])
        return messages

    @property
    def title(self) -> str:
        """A line for people: the description, or the first example."""
        if self.description or not self.examples:
            return self.description
        first = self.examples[0]
        return " ".join(f"{first.input} {ARROW} {first.outputs[0]}".split())[:_TITLE_CHARACTERS]

    @property
    def sha256(self) -> str:
        """Hash of description and examples; of the description alone where there are no examples."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def as_spec(task: str | TaskSpec) -> TaskSpec:
    """A specification; a string is a description alone."""
    return TaskSpec(task) if isinstance(task, str) else task


def as_examples(given: Sequence[ExampleLike]) -> tuple[Example, ...]:
    """Examples as the Python API takes them. Raises ConfigError for one that is none, which it names by its number."""
    if isinstance(given, (str, Mapping)):
        raise ConfigError(f"the examples are a {type(given).__name__}: give a list of (input, output)")
    placed = ((f"example {number} is {str(one)[:80]!r}", one) for number, one in enumerate(given, 1))
    return _examples(placed, "give (input, output), both of them text")


def _examples(placed: Iterable[tuple[str, object]], remedy: str) -> tuple[Example, ...]:
    """Examples from rows or pairs, each behind its place. Raises ConfigError, which names the place and the remedy."""
    examples = []
    for place, given in placed:
        try:
            examples.append(given if isinstance(given, Example) else _example(given))
        except ValueError as error:
            raise ConfigError(f"{place}: {error}; {remedy}") from None
    return tuple(examples)


def _example(given: object) -> Example:
    """An example from (input, output) or a row with these two. Raises ValueError."""
    if isinstance(given, str):
        raise ValueError("it is one text")
    if not isinstance(given, Mapping):
        if not isinstance(given, Sequence) or len(given) != 2:
            raise ValueError("it is no pair")
        given = dict(zip(("input", "output"), given, strict=True))
    if missing := [key for key in ("input", "output") if key not in given]:
        raise ValueError(f"there is no {missing[0]!r}")
    outputs = texts_in(given["output"])
    if not outputs or not isinstance(given["input"], str):
        raise ValueError("an example needs an input and an output, both of them text")
    stripped = Example(given["input"].strip(), tuple(output.strip() for output in outputs))
    if not stripped.input or not all(stripped.outputs):
        raise ValueError("its input or output is empty")
    if not all(map(is_unicode, (stripped.input, *stripped.outputs))):
        raise ValueError("it is not valid Unicode")
    return stripped


def texts_in(texts: str | Sequence[str]) -> tuple[str, ...]:
    """One text or several as a tuple. Raises ValueError for anything else."""
    several = (texts,) if isinstance(texts, str) else texts
    if not isinstance(several, (list, tuple)) or not all(isinstance(text, str) for text in several):
        raise ValueError(f"{texts!r} is not text")
    return tuple(several)


_HELP = f'a line is {{"input": ..., "output": ...}}, a row of CSV with these two columns, or input {ARROW} output'
_DELIMITERS = "\t,;"
_INPUTS = frozenset({"text", "sentence", "question", "prompt", "source", "instruction", "review", "message"})
_OUTPUTS = frozenset({"label", "answer", "target", "completion", "response", "class", "category", "sentiment"})


def read_examples(path: str | Path) -> tuple[Example, ...]:
    """Read examples from a file, or from standard input if the path is "-".

    A file holds JSONL rows with `input` and `output` or a JSON array of them (or of pairs), CSV with these two columns
    (or two columns without names), or lines `input => output`. It is in UTF-8.

    Raises:
        ConfigError: the file cannot be read or holds none, or a line is no example: it is named, with what it shall be.
    """
    label = "standard input" if str(path) == "-" else str(path)
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"cannot read the examples in {label}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the examples in {label}: {error}; give a text file in UTF-8") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # other separators of lines may stand within an example
    lines = [(f"{label}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"there is no example in {label}: {_HELP}")
    suffix, (place, first) = Path(path).suffix.lower(), lines[0]
    if suffix not in (".csv", ".tsv"):
        # The input of a line with an arrow may begin as JSON does.
        begins_as_json = first.lstrip().startswith(("{", "["))
        is_json = begins_as_json and (ARROW not in first or _parsed(first) is not None or _parsed(text) is not None)
        if suffix in (".json", ".jsonl") or is_json:
            return _examples(_from_json(text, lines, label), _HELP)
        if ARROW in first:
            return _examples(_from_arrows(lines), _HELP)
        if all("->" in line for _, line in lines):
            raise _fault(place, f"write {ARROW} in place of ->")
    return _examples(_from_table(text, first, label), _HELP)


def _fault(place: str, reason: str) -> ConfigError:
    return ConfigError(f"{place}: {reason}; {_HELP}")


def _parsed(text: str) -> Any:
    """A text as JSON; None where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _from_json(text: str, lines: Sequence[tuple[str, str]], label: str) -> Iterator[tuple[str, object]]:
    """A JSON array of rows or pairs, or such a row or pair a line."""
    whole = _parsed(text)
    if isinstance(whole, list) and not all(isinstance(one, str) for one in whole):
        yield from ((f"{label}, item {number}", one) for number, one in enumerate(whole, 1))
        return
    for place, line in lines:
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise _fault(place, str(error)) from None


def _from_arrows(lines: Sequence[tuple[str, str]]) -> Iterator[tuple[str, object]]:
    """The first arrow of a line stands between input and output."""
    for place, line in lines:
        if ARROW not in line:
            raise _fault(place, f"there is no {ARROW}")
        yield place, line.split(ARROW, 1)


def _from_table(text: str, first_line: str, label: str) -> Iterator[tuple[str, object]]:
    """Rows of CSV under a header that names the columns, or two columns without a header."""
    rows = _rows(text, first_line, label)
    place, header = rows[0]
    names = [cell.strip().lower() for cell in header]
    columns = [0, 1]
    if "input" in names and "output" in names:
        columns = [names.index("input"), names.index("output")]
        rows = rows[1:]
        if not rows:
            raise _fault(place, "there is a header and no row below it")
    elif len(names) != 2:
        raise _fault(
            place, f"there are {len(names)} columns and none are called input and output: name them in the first row"
        )
    elif names[0] in _INPUTS and names[1] in _OUTPUTS:
        raise _fault(place, f"the columns are called {names[0]} and {names[1]}: call them input and output")
    for place, row in rows:
        if len(row) <= max(columns) or any(cell.strip() for cell in row[len(names) :]):
            reason = f"it has {len(row)} columns, the first row has {len(names)}"
            raise _fault(place, f"{reason}: put a cell with the sign between columns in quotation marks")
        yield place, [row[column] for column in columns]


def _rows(text: str, first_line: str, label: str) -> list[tuple[str, list[str]]]:
    """The rows of a table that are not empty, each behind its place.

    The delimiter is the first one under which all rows have as many cells as the first one, and at least two; if there
    is none, the first one that the first row has.
    """
    unequal: list[list[tuple[str, list[str]]] | ConfigError] = []
    for delimiter in [sign for sign in _DELIMITERS if sign in first_line] or [","]:
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        try:
            rows = [(f"{label}, line {reader.line_num}", row) for row in reader if any(map(str.strip, row))]
        except csv.Error as error:
            place = f"{label}, line {reader.line_num}"
            unequal.append(_fault(place, f"{error}: is a quotation mark never closed?"))
            continue
        widths = {len(row) for _, row in rows}
        if len(widths) == 1 and widths != {1}:
            return rows
        unequal.append(rows)
    if isinstance(unequal[0], ConfigError):
        raise unequal[0]
    return unequal[0]
