"""Generated tables: every format is read as users' files are, questions mean one cell, and splits are disjoint."""

import csv
import io
import itertools
import random
import re
from collections import Counter
from functools import cache

import pytest

from loracast.answering.answers import NOT_SAID
from loracast.documents import read_document
from loracast.lab.data.facts import Split, expand, pick_alternatives
from loracast.lab.data.tables import FORMS, MAX_ROWS, MIN_ROWS, Form, TableDocument, load_themes, make_table

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
THEMES, PHRASES = load_themes()


@cache
def tables(split: Split) -> list[TableDocument]:
    """Small tables of a split, made once for all tests."""
    return [make_table(random.Random(f"0/{i}"), split, 5 + i % 20) for i in range(120)]


def read_csv(table: TableDocument) -> list[dict[str, str]]:
    """The rows of a table in CSV with a header, by Python's own reader."""
    delimiter = "\t" if table.form == "tsv" else ";" if ";" in table.source.split("\n")[0] else ","
    return list(csv.DictReader(io.StringIO(table.source), delimiter=delimiter))


def cells_of(row: dict[str, str], column: str) -> list[str]:
    """The cells of a row in the columns of that name, which may have a unit behind it: one, or none."""
    return [
        cell for name, cell in row.items() if re.fullmatch(rf"{re.escape(column)}( [([].+[)\]]| in \S+|, \S+)?", name)
    ]


def has_header(table: TableDocument) -> bool:
    return any(fact.attribute.startswith("missing column") for fact in table.facts)


@cache
def with_headers() -> list[tuple[TableDocument, list[dict[str, str]]]]:
    drawn = [table for split in SPLITS for table in tables(split) if table.form in ("csv", "tsv") and has_header(table)]
    assert len(drawn) > 50
    return [(table, read_csv(table)) for table in drawn]


def test_there_is_enough_content_and_wordings_have_their_slots() -> None:
    themes = Counter(theme.split for theme in THEMES)
    assert themes["train"] >= 10 and min(themes["dev"], themes["test"]) >= 5
    rng = random.Random(0)
    for theme in THEMES:
        assert len(theme.columns) == 9 and theme.columns[0].by
        for column in theme.columns:
            assert all(text.count("{row}") == 1 and text.endswith("?") for text in column.ask)
            assert all(text.count("{v}") == 1 for text in column.by)
            assert "{" not in expand(rng, pick_alternatives(rng, column.value))
            assert not re.match(r"\d", "".join(column.names))


@pytest.mark.parametrize(("one", "other"), itertools.combinations(SPLITS, 2))
def test_splits_share_no_theme_wording_line_or_key(one: Split, other: Split) -> None:
    def everything(split: Split) -> tuple[set[str], ...]:
        themes, phrases = [theme for theme in THEMES if theme.split == split], PHRASES[split]
        asks = {text for theme in themes for column in theme.columns for text in column.ask}
        ways = {text for theme in themes for column in theme.columns for text in column.by} - {"{v}", "the {v}"}
        names = {" ".join(column.names[0] for column in theme.columns) for theme in themes}
        lines = {*phrases.units, *phrases.ask, *phrases.above, *phrases.below}
        titles = {title for theme in themes for title in theme.titles}
        keys = {fact.subject for table in tables(split) for fact in table.facts if fact.kind == "span"}
        return asks, ways, names, lines, titles, keys

    for mine, its in zip(everything(one), everything(other), strict=True):
        assert mine and not mine & its


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_as_a_users_file_is(form: Form) -> None:
    for seed in range(2 if form == "html" else 12):  # HTML is parsed in another process, which takes a while
        table = make_table(random.Random(seed), "train", 8, form=form)
        read = read_document(io.BytesIO(table.source.encode()), file_name=table.file_name)
        assert (read.text, read.rows) == (table.text, table.rows)
        assert len(table.rows) == 8
        again = table.as_document()
        assert (again.text, again.rows, again.title) == (read.text, read.rows, table.title)


@pytest.mark.parametrize("split", SPLITS)
def test_every_statement_holds_its_answer_once_in_the_text(split: Split) -> None:
    for table in tables(split):
        assert any(fact.kind == "span" for fact in table.facts)
        assert len({fact.question for fact in table.facts}) == len(table.facts)
        for fact in (*table.facts, *table.unasked):
            if fact.kind == "span":
                assert table.text.count(fact.statement) == 1 and fact.subject in fact.statement
                assert fact.statement[fact.value_at :].startswith(fact.answer)
                assert fact.answer.lower() not in fact.question.lower()


def test_the_answer_is_the_cell_of_the_row_that_the_question_names() -> None:
    n_named_otherwise = 0
    for table, rows in with_headers():
        for fact in table.facts:
            if fact.kind == "span":
                (row,) = (row for row in rows if fact.subject in row.values())
                assert cells_of(row, fact.attribute) == [fact.answer]
                others = {cell for other in rows if other is not row for cell in other.values()}
                assert any(cell in fact.question for cell in row.values() if cell and cell not in others)
                n_named_otherwise += fact.subject not in fact.question
    assert n_named_otherwise > 50


def test_what_is_missing_is_not_in_the_table() -> None:
    whys: Counter[str] = Counter()
    for table, rows in with_headers():
        for fact in (fact for fact in table.facts if fact.kind == "not said"):
            why, _, column = fact.attribute.partition(": ")
            whys[why] += 1
            assert fact.answer == NOT_SAID
            if why == "missing row":
                assert fact.subject not in table.source
            else:
                (row,) = (row for row in rows if fact.subject in row.values())
                assert cells_of(row, column) == ([] if why == "missing column" else [""])
    assert len(whys) == 3 and min(whys.values()) > 20


def test_values_without_a_header_are_asked_for_only_where_they_say_what_they_are() -> None:
    clear = {name for theme in THEMES for column in theme.columns if column.is_clear for name in column.names}
    unclear = {name for theme in THEMES for column in theme.columns if not column.is_clear for name in column.names}
    bare = [table for table in tables("train") if table.form == "csv" and not has_header(table)]
    asked = {fact.attribute for table in bare for fact in table.facts if fact.kind == "span"}
    assert asked and not asked & (unclear - clear)


def test_sizes_reach_from_few_rows_to_many() -> None:
    sizes = [len(make_table(random.Random(seed), "dev", form="csv").rows) for seed in range(25)]
    assert MIN_ROWS <= min(sizes) < 20 and 100 < max(sizes) <= MAX_ROWS
    assert make_table(random.Random(0), "dev", 7) == make_table(random.Random(0), "dev", 7)
