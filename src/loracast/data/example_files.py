"""Read files of examples of a task: JSON, CSV, or lines `input => output`."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loracast.data.task_examples import ARROW, as_example, reason
from loracast.data.tasks import Example
from loracast.errors import ConfigError

_HELP = f'a line is {{"input": ..., "output": ...}}, a row of CSV with these two columns, or input {ARROW} output'
_DELIMITERS = "\t,;"
_INPUTS = frozenset({"text", "sentence", "question", "prompt", "source", "instruction", "review", "message"})
_OUTPUTS = frozenset({"label", "answer", "target", "completion", "response", "class", "category", "sentiment"})

Lines = Sequence[tuple[int, str]]
"""The lines of a file that are not blank, each with its number."""


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
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"there is no example in {label}: {_HELP}")
    suffix, first = Path(path).suffix.lower(), lines[0][1]
    if suffix not in (".csv", ".tsv"):
        if suffix in (".json", ".jsonl") or _is_json(text, first):
            return tuple(_from_json(text, lines, label))
        if ARROW in first:
            return tuple(_from_arrows(lines, label))
        if all("->" in line for _, line in lines):
            raise ConfigError(f"{label}, line 1: write {ARROW} in place of ->; {_HELP}")
    return tuple(_from_table(text, first, label))


def _example(where: str, given: object) -> Example:
    try:
        return as_example(given)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where}: {reason(error)}; {_HELP}") from None


def _is_json(text: str, first: str) -> bool:
    """Whether a text that begins as JSON does is meant as JSON; the input of an arrow line may begin so too."""
    if not first.lstrip().startswith(("{", "[")):
        return False
    return ARROW not in first or _parsed(first) is not None or _parsed(text) is not None


def _parsed(text: str) -> Any:
    """A text as JSON; None where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _from_json(text: str, lines: Lines, label: str) -> Iterator[Example]:
    """A JSON array of rows or pairs, or such a row or pair a line."""
    whole = _parsed(text)
    if isinstance(whole, list) and not all(isinstance(one, str) for one in whole):
        for number, one in enumerate(whole, 1):
            yield _example(f"{label}, item {number}", one)
        return
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{label}, line {number}: {error}; {_HELP}") from None
        yield _example(f"{label}, line {number}", row)


def _from_arrows(lines: Lines, label: str) -> Iterator[Example]:
    """The first arrow of a line stands between input and output."""
    for number, line in lines:
        input, arrow, output = line.partition(ARROW)
        if not arrow:
            raise ConfigError(f"{label}, line {number}: there is no {ARROW}; {_HELP}")
        yield _example(f"{label}, line {number}", (input, output))


def _from_table(text: str, first_line: str, label: str) -> Iterator[Example]:
    """Rows of CSV under a header that names the columns, or two columns without a header."""
    numbered = _rows(text, first_line, label)
    first, header = numbered[0]
    names = [cell.strip().lower() for cell in header]
    where = f"{label}, line {first}: "
    if "input" in names and "output" in names:
        columns = (names.index("input"), names.index("output"))
        numbered = numbered[1:]
        if not numbered:
            raise ConfigError(f"{label} has a header and no row below it: {_HELP}")
    elif len(names) == 2 and names[0] in _INPUTS and names[1] in _OUTPUTS:
        raise ConfigError(f"{where}the columns are called {names[0]} and {names[1]}: call them input and output")
    elif len(names) != 2:
        raise ConfigError(
            f"{where}there are {len(names)} columns and none are called input and output: name them in the first row; "
            f"{_HELP}"
        )
    else:
        columns = (0, 1)
    for number, row in numbered:
        if len(row) <= max(columns) or any(cell.strip() for cell in row[len(names) :]):
            raise ConfigError(
                f"{label}, line {number}: it has {len(row)} columns, the first row has {len(names)}: put a cell with "
                f"the sign between columns in quotation marks; {_HELP}"
            )
        yield _example(f"{label}, line {number}", (row[columns[0]], row[columns[1]]))


def _rows(text: str, first: str, label: str) -> list[tuple[int, list[str]]]:
    """The rows of a table that are not empty, each with its line.

    The delimiter is the first one under which all rows have as many cells as the first one, and at least two; if there
    is none, the first one that the first row has.
    """
    unequal: list[list[tuple[int, list[str]]] | ConfigError] = []
    for delimiter in [sign for sign in _DELIMITERS if sign in first] or [","]:
        rows = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        try:
            found = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)]
        except csv.Error as error:
            unequal.append(ConfigError(f"{label}, line {rows.line_num}: {error}: is a quotation mark never closed?"))
            continue
        widths = {len(row) for _, row in found}
        if len(widths) == 1 and widths != {1}:
            return found
        unequal.append(found)
    if isinstance(unequal[0], ConfigError):
        raise unequal[0]
    return unequal[0]
