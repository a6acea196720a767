"""The specification of a task, a description, examples, or both; and files of examples that people give.

The text that a hypernetwork or a model with the task in its prompt reads has the description first, then the examples.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from loracast.data.tasks import Example, example_from, with_description
from loracast.errors import ConfigError

T = TypeVar("T")

DEFAULT_STYLE = "labelled"
STYLES: dict[str, str] = {
    DEFAULT_STYLE: "Input: {input}\nOutput: {output}",
    "arrow": "{input} -> {output}",
    "double_arrow": "{input} => {output}",
    "question": "Q: {input}\nA: {output}",
    "example": "Example: {input}\nAnswer: {output}",
    "quoted": '"{input}" becomes "{output}".',
}
"""By name, how an example is written; people write them in many ways, so training reads all of them."""
_ARROW = "=>"
_TITLE_CHARACTERS = 60
_HELP = f'a line is {{"input": ..., "output": ...}}, a row of CSV with these two columns, or input {_ARROW} output'

ExampleLike = Example | tuple[str, str] | Mapping[str, Any]
"""An example as the Python API takes it: an `Example`, (input, output), or a mapping with `input` and `output`."""


@dataclass(frozen=True)
class TaskSpec:
    """How a task is specified: by a description, examples, or both."""

    description: str
    """"" where the examples alone specify the task."""
    examples: tuple[Example, ...] = ()

    def text(self, style: str = DEFAULT_STYLE) -> str:
        """The text that is read: the description, then the examples."""
        shown = "\n".join(STYLES[style].format(input=e.input, output=e.outputs[0]) for e in self.examples)
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
        return " ".join(f"{first.input} {_ARROW} {first.outputs[0]}".split())[:_TITLE_CHARACTERS]

    @property
    def sha256(self) -> str:
        """Hash of description and examples; of the description alone where there are no examples."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def as_spec(task: str | TaskSpec) -> TaskSpec:
    """A specification; a string is a description alone."""
    return TaskSpec(task) if isinstance(task, str) else task


def as_examples(given: Sequence[ExampleLike]) -> tuple[Example, ...]:
    """Examples as the Python API takes them. Raises ConfigError for one that is none, which it names by its number."""
    examples = []
    for number, one in enumerate(given, 1):
        try:
            if isinstance(one, Example):
                examples.append(one)
            elif isinstance(one, Mapping):
                examples.append(_from_row(one))
            else:
                input, output = one
                examples.append(_from_row({"input": input, "output": output}))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"example {number} is {str(one)[:80]!r}: {_reason(error)}; give (input, output), both of them text"
            ) from None
    return tuple(examples)


def read_examples(path: str | Path) -> tuple[Example, ...]:
    """Read examples from a file, or from standard input if the path is "-".

    A file holds JSONL rows with `input` and `output`, CSV with these two columns (or two columns without names), or
    lines `input => output`.

    Raises:
        ConfigError: the file cannot be read or holds none, or a line is no example: it is named, with what it shall be.
    """
    label = "standard input" if str(path) == "-" else str(path)
    try:
        text = sys.stdin.read() if str(path) == "-" else Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the examples in {label}: {error}; give a text file in UTF-8") from error
    first = next((line for line in text.splitlines() if line.strip()), None)
    if first is None:
        raise ConfigError(f"there is no example in {label}: {_HELP}")
    is_table = Path(path).suffix.lower() in (".csv", ".tsv")
    if is_table or (_ARROW not in first and not first.lstrip().startswith("{")):
        return _from_table(text, label)
    read = _from_json if first.lstrip().startswith("{") else _from_arrow
    lines = enumerate(text.splitlines(), 1)
    return tuple(_checked(label, number, read, line) for number, line in lines if line.strip())


def _checked(label: str, number: int, read: Callable[[T], Example], given: T) -> Example:
    try:
        return read(given)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{label}, line {number}: {_reason(error)}; {_HELP}") from None


def _reason(error: Exception) -> str:
    return f"there is no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


def _from_json(line: str) -> Example:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    return _from_row(row)


def _from_arrow(line: str) -> Example:
    input, arrow, output = line.partition(_ARROW)
    if not arrow:
        raise ValueError(f"there is no {_ARROW}")
    return _from_row({"input": input, "output": output})


def _from_table(text: str, label: str) -> tuple[Example, ...]:
    """Rows of CSV or TSV under a header that names the columns, or two columns without a header."""
    first = text.lstrip("\r\n").splitlines()[0]
    rows = csv.reader(io.StringIO(text), delimiter="\t" if "\t" in first else ",", strict=True)
    columns: tuple[int, int] | None = None
    examples: list[Example] = []
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                names = [cell.strip().lower() for cell in row]
                is_header = "input" in names and "output" in names
                columns = (names.index("input"), names.index("output")) if is_header else (0, 1)
                if is_header:
                    continue
                if len(row) != 2:
                    raise ConfigError(
                        f"{label}, line {rows.line_num}: there are {len(row)} columns and none are called input and "
                        f"output: name them in the first row; {_HELP}"
                    )
            examples.append(_checked(label, rows.line_num, partial(_from_cells, columns), row))
    except csv.Error as error:
        raise ConfigError(f"{label}, line {rows.line_num}: {error}: is a quotation mark never closed?") from None
    if not examples:
        raise ConfigError(f"{label} has a header and no row below it: {_HELP}")
    return tuple(examples)


def _from_cells(columns: tuple[int, int], row: Sequence[str]) -> Example:
    if len(row) <= max(columns):
        raise ValueError(f"it has {len(row)} columns")
    return _from_row({"input": row[columns[0]], "output": row[columns[1]]})


def _from_row(row: Mapping[str, Any]) -> Example:
    example = example_from({"input": row["input"], "output": row["output"]})
    stripped = Example(example.input.strip(), tuple(output.strip() for output in example.outputs))
    if not stripped.input or not all(stripped.outputs):
        raise ValueError("its input or output is empty")
    return stripped
