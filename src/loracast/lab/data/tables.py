"""Draw tables with questions for their cells, written as files in every format that has tables and read as users' are.

`content/tables.toml` has the themes, such as staff or trains, each of one split, with columns and questions for them. A
question names a row by its key or by another cell that no other row has ("the person in room B212"), and asks for a
column; some ask for a row or a column that the table does not have, or for an empty cell. Columns of one kind, such as
two phone numbers, make the column matter. The same rng state gives the same table in every process.
"""

from __future__ import annotations

import csv
import html
import io
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, get_args

from pydantic import Field, TypeAdapter

from loracast.answering.answers import NOT_SAID
from loracast.documents.clean import normalise
from loracast.documents.file_types import Limits
from loracast.documents.html import parse as parse_html
from loracast.documents.tables import ROW, name_rows, named_row, parse_csv, take_marks
from loracast.errors import DocumentError
from loracast.lab.data.everyday import EverydayDocument, EverydayFact
from loracast.lab.data.facts import Split, expand, fill, make_entity, pick_alternatives
from loracast.lab.data.rows import read_content

Form = Literal["csv", "tsv", "md", "html", "records", "aligned"]
"""How a table is written; records are blocks of lines "Name: value", and aligned columns stand apart by spaces."""
FORMS: tuple[Form, ...] = get_args(Form)
Missing = Literal["missing row", "missing column", "empty cell"]
"""Why a question is not answered: the first words of its fact's attribute."""

MIN_ROWS, MAX_ROWS = 5, 300
MIN_COLUMNS, MAX_COLUMNS = 3, 8
MAX_ASKED = 12  # questions for cells
MAX_MISSING = 2  # questions of each kind that is not answered
P_HEADER = 0.8
P_UNIT_IN_HEADER = 0.6  # of a table: its header has the units, and not its cells
P_EMPTY = 0.08  # of a cell, in half of the tables
P_KEY_FIRST = 0.8
P_BY_KEY = 0.5  # of a question: it names the row by its key
P_GENERIC = 0.2  # of a question: it names the column as the header does


@dataclass(frozen=True)
class Column:
    """A column of a theme; `ask` and `by` are wordings."""

    names: Sequence[str]
    value: str  # pattern
    ask: Sequence[str]  # for its cell in {row}
    by: Sequence[str] = ()  # how a row is named through its value {v}; none if it does not say which row is meant
    unit: str = ""
    is_clear: bool = Field(default=False, alias="clear")  # whether a value says what it is where there is no header


@dataclass(frozen=True)
class Theme:
    """What a table is about; its first column is the key."""

    name: str
    split: Split
    titles: Sequence[str]
    columns: Sequence[Column]


@dataclass(frozen=True)
class Phrases:
    """What all tables of a split share: units in headers, questions by a column's name, lines around the table."""

    units: Sequence[str]
    ask: Sequence[str]
    above: Sequence[str]
    below: Sequence[str]


@dataclass(frozen=True)
class TableDocument(EverydayDocument):
    """A table as it was read, with questions; `source` is the file that was written."""

    form: Form = "csv"
    source: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.title}.{'txt' if self.form in ('records', 'aligned') else self.form}"


@cache
def load_themes() -> tuple[Sequence[Theme], Mapping[Split, Phrases]]:
    """Read the themes of all splits and the phrases of each, once."""
    content = dict(read_content("tables"))
    themes = TypeAdapter(list[Theme], config={"extra": "forbid"}).validate_python(content.pop("theme"))
    return themes, TypeAdapter(dict[Split, Phrases]).validate_python(content)


def make_table(
    rng: random.Random, split: Split, n_rows: int | None = None, *, theme: str | None = None, form: Form | None = None
) -> TableDocument:
    """Draw a table of a theme in a form, or of any, with its questions.

    Args:
        n_rows: how many rows; 5 to 300 if None, small ones as often as large ones.
    """
    themes, phrases = load_themes()
    chosen = rng.choice([one for one in themes if one.split == split and theme in (None, one.name)])
    while True:
        n = n_rows or round(math.exp(rng.uniform(math.log(MIN_ROWS), math.log(MAX_ROWS))))
        drawn: Form = rng.choice(FORMS) if form is None else form
        if document := _Draft(rng, chosen, phrases[split], n, drawn).finish():
            return document


class _Draft:
    """A table that is being drawn. `named` are the columns that questions may mean: without a header the clear ones."""

    def __init__(self, rng: random.Random, theme: Theme, phrases: Phrases, n_rows: int, form: Form):
        self.rng, self.theme, self.phrases, self.form = rng, theme, phrases, form
        self.key, *others = theme.columns
        n_columns = rng.randint(MIN_COLUMNS, min(MAX_COLUMNS, len(theme.columns) - 1))
        self.columns = [self.key, *rng.sample(others, n_columns - 1)]
        if rng.random() >= P_KEY_FIRST:
            rng.shuffle(self.columns)
        self.has_header = form == "records" or rng.random() < P_HEADER
        self.has_units = self.has_header and rng.random() < P_UNIT_IN_HEADER
        self.names = [rng.choice(column.names) for column in theme.columns]
        self.unit_form = rng.choice(phrases.units)
        *self.keys, self.absent = self.distinct_keys(n_rows + 1)
        p_empty = rng.choice((0.0, P_EMPTY))
        self.rows = [[self.cell(column, key, p_empty) for column in self.columns] for key in self.keys]
        self.named = [i for i, column in enumerate(self.columns) if self.has_header or column.is_clear]
        self.times = Counter(cell for row in self.rows for cell in row)

    def name(self, column: Column) -> str:
        return self.names[self.theme.columns.index(column)]

    @cached_property
    def header(self) -> list[str]:
        if not self.has_header:
            return [""] * len(self.columns)
        pairs = [(self.name(column), column.unit if self.has_units else "") for column in self.columns]
        return [self.unit_form.format(name=name, unit=unit) if unit else name for name, unit in pairs]

    def distinct_keys(self, n: int) -> list[str]:
        """Keys none of which is a part of another one."""
        keys: dict[str, str] = {}
        while len(keys) < n:
            key = make_entity(self.rng, pick_alternatives(self.rng, self.key.value), self.theme.split)
            if not any(key.lower() in other or other in key.lower() for other in keys):
                keys[key.lower()] = key
        return list(keys.values())

    def cell(self, column: Column, key: str, p_empty: float) -> str:
        if column is self.key:
            return key
        return "" if self.rng.random() < p_empty else self.value(column)

    def value(self, column: Column) -> str:
        drawn = expand(self.rng, pick_alternatives(self.rng, column.value))
        return f"{drawn} {column.unit}" if column.unit and not self.has_units else drawn

    def finish(self) -> TableDocument | None:
        """Write the table, read it, and ask; None where a row is not read as one, such as a first row of words."""
        title = self.rng.choice(self.theme.titles)
        source = self.write()
        try:
            text, places = take_marks(_read(source, self.form))
        except DocumentError:
            return None
        statements = [self.statement(row) for row in self.rows]
        if any(text.count(one) != 1 for one in statements) or any(sum(map(bool, row)) < 2 for row in self.rows):
            return None
        cells = [(i, j) for i, row in enumerate(self.rows) for j in self.named if row[j]]
        self.rng.shuffle(cells)
        facts: list[EverydayFact] = []
        unasked: list[EverydayFact] = []
        for i, j in cells:
            ways = list(self.ways(i, j)) if len(facts) < MAX_ASKED else []
            is_by_key = self.rng.random() < P_BY_KEY or not ways
            row = self.row_by(self.key, self.keys[i]) if is_by_key else self.rng.choice(ways)
            question, answer = self.question(self.columns[j], row), self.rows[i][j]
            if (is_by_key and self.columns[j] is self.key) or answer.lower() in question.lower():
                continue
            at = self.offsets(self.rows[i], statements[i])[j]
            fact = EverydayFact("span", self.keys[i], self.name(self.columns[j]), question, answer, statements[i], at)
            (facts if len(facts) < MAX_ASKED else unasked).append(fact)
        if not facts:
            return None  # no column is clear without a header
        facts += self.ask_missing(text)
        return TableDocument(
            f"table: {self.theme.name}", title, text, tuple(facts), tuple(unasked), places, self.form, source
        )

    def ways(self, i: int, j: int) -> Iterator[str]:
        """How a row may be named by cells that no other row has, other than the one that is asked for and the key."""
        for k in self.named:
            column, cell = self.columns[k], self.rows[i][k]
            if k != j and column is not self.key and column.by and cell and self.times[cell] == 1:
                yield self.row_by(column, cell)

    def row_by(self, column: Column, cell: str) -> str:
        return self.rng.choice(column.by).replace("{v}", cell)

    def question(self, column: Column, row: str) -> str:
        name = self.name(column)
        if self.has_header and self.rng.random() < P_GENERIC:
            return fill(self.rng.choice(self.phrases.ask), column=name, row=row)
        return fill(self.rng.choice(column.ask), row=row)

    def ask_missing(self, text: str) -> Iterator[EverydayFact]:
        """Questions that the table does not answer."""
        rng = self.rng
        shown = [self.columns[j] for j in self.named if self.columns[j] is not self.key]
        hidden = [column for column in self.theme.columns if column not in self.columns] if self.has_header else []
        empty = [(i, j) for i, row in enumerate(self.rows) for j in self.named if not row[j] and self.has_header]
        if shown and self.absent.lower() not in text.lower():
            yield self.missing("missing row", rng.choice(shown), self.absent, self.row_by(self.key, self.absent))
        if by := [column for column in shown if column.by]:
            value = self.value(column := rng.choice(by))
            if value.lower() not in text.lower():
                yield self.missing("missing row", self.key, value, self.row_by(column, value))
        for column in rng.sample(hidden, min(MAX_MISSING, len(hidden))):
            yield self.missing("missing column", column, key := rng.choice(self.keys), self.row_by(self.key, key))
        for i, j in rng.sample(empty, min(MAX_MISSING, len(empty))):
            yield self.missing("empty cell", self.columns[j], self.keys[i], self.row_by(self.key, self.keys[i]))

    def missing(self, why: Missing, column: Column, subject: str, row: str) -> EverydayFact:
        attribute = f"{why}: {self.name(column)}"
        return EverydayFact("not said", subject, attribute, self.question(column, row), NOT_SAID)

    def write(self) -> str:
        """The file."""
        rng, header = self.rng, self.header
        rows = [header, *self.rows] if self.has_header else self.rows
        if self.form in ("csv", "tsv"):
            file = io.StringIO()
            delimiter = "\t" if self.form == "tsv" else rng.choice(",;")
            csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
            return file.getvalue()
        above, below = (
            [expand(rng, rng.choice(lines))] if rng.random() < 0.5 else []
            for lines in (self.phrases.above, self.phrases.below)
        )
        if self.form == "html":
            tags = ["th"] * self.has_header + ["td"] * len(self.rows)
            cells = (
                "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                for tag, row in zip(tags, rows, strict=True)
            )
            lines = [f"<tr>{row}</tr>" for row in cells]
            above, below = ([f"<p>{line}</p>" for line in some] for some in (above, below))
            return "\n".join(["<!DOCTYPE html>", "<body>", *above, "<table>", *lines, "</table>", *below, "</body>"])
        if self.form == "md":
            blocks = ["\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *self.rows))]
        elif self.form == "records":
            blocks = [
                "\n".join(f"{name}: {cell}" for name, cell in zip(header, row, strict=True) if cell)
                for row in self.rows
            ]
        else:
            widths = [max(map(len, column)) + 2 for column in zip(header, *self.rows, strict=True)]
            blocks = ["\n".join("".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
        return "\n\n".join([*above, *blocks, *below]) + "\n"

    def statement(self, row: Sequence[str]) -> str:
        """A row as it stands in the text that was read."""
        return named_row(self.header, row).removeprefix(ROW)

    def offsets(self, row: Sequence[str], statement: str) -> list[int]:
        """Where a row's statement has its cells, in order; an empty cell has its place after the one before."""
        at, found = 0, []
        for i, (name, cell) in enumerate(zip(self.header, row, strict=True)):
            before = f"{name}: " if name else ": " if row[0] else ""
            if i == 0:  # what the row is about
                before = f"{name} " if name else ""
            if cell:
                at = statement.index(before + cell, at) + len(before)
            found.append(at)
            at += len(cell)
        return found


def _read(source: str, form: Form) -> str:
    """The text of a file as `read_document` reads it, with the marks of its rows; in this process, which is quick."""
    if form == "html":
        return parse_html(source.encode(), "the table", Limits()).text
    if form in ("csv", "tsv"):
        return normalise(parse_csv(source, "the table", "\t" if form == "tsv" else None).text)
    return name_rows(normalise(source))
