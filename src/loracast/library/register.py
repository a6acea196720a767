"""The register of a library, one SQLite file: names, their versions, tags, notes, owners, and text to search in.

What belongs to an adapter stands in its own folder as well, from which a lost register can be made again (storage.py).
Its tables are made by `MIGRATIONS`, by which an older register gets those of this version too.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self
from unicodedata import normalize

from annotated_types import Predicate

from loracast.errors import AdapterError, NameTakenError, NoSuchAdapterError
from loracast.library.index import Phrases, match_scores
from loracast.library.manifest import MEMORY_SOURCE, NAME, VERSION, Manifest, utc_now
from loracast.text import is_unicode


@dataclass(frozen=True)
class Entry:
    """A name with one of its versions."""

    name: str
    version: str  # content hash
    kind: str
    title: str
    source: str | None
    source_sha256: str
    base: str
    hypernetwork: str
    ranks: dict[str, int]
    n_chunks: int
    n_tokens: int
    n_bytes: int
    created: str  # when the adapter was made; UTC, ISO 8601
    added: str  # when the name was given to it
    n_versions: int  # that the name has
    owner: str
    note: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """A chunk that holds the words of a search."""

    name: str
    version: str
    chunk: int
    heading: str
    snippet: str  # the surroundings of the words, each word between [ and ]


@dataclass(frozen=True)
class Match:
    """A chunk of a document that holds some of the phrases looked for."""

    name: str
    version: str
    n_chunks: int  # of the document
    chunk: int
    score: float  # BM25, on one scale for the whole library

    @property
    def reference(self) -> str:
        """`name@hash`, by which the document is opened."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class NameState:
    """All that is known of a name, as machines that share a library tell each other."""

    versions: tuple[tuple[Annotated[str, Predicate(VERSION.fullmatch)], str], ...] = ()
    """Content hash, and when it was added, of each version; the newest last. A name without versions is deleted."""
    owner: str = ""
    note: str = ""
    tags: tuple[Annotated[str, Predicate(NAME.fullmatch)], ...] = ()


MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE versions (
        id TEXT PRIMARY KEY, made_from TEXT NOT NULL, kind TEXT NOT NULL, title TEXT NOT NULL, source TEXT,
        source_sha256 TEXT NOT NULL, base TEXT NOT NULL, hypernetwork TEXT NOT NULL, ranks TEXT NOT NULL,
        n_chunks INTEGER NOT NULL, n_tokens INTEGER NOT NULL, n_bytes INTEGER NOT NULL, created TEXT NOT NULL
    );
    CREATE INDEX versions_by_making ON versions (made_from);
    CREATE TABLE names (name TEXT PRIMARY KEY, owner TEXT NOT NULL DEFAULT '', note TEXT NOT NULL DEFAULT '');
    CREATE TABLE namings (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL REFERENCES names (name) ON UPDATE CASCADE ON DELETE CASCADE,
        version TEXT NOT NULL REFERENCES versions (id),
        added TEXT NOT NULL
    );
    CREATE INDEX namings_by_name ON namings (name, number);
    CREATE INDEX namings_by_version ON namings (version);
    CREATE TABLE tags (
        name TEXT NOT NULL REFERENCES names (name) ON UPDATE CASCADE ON DELETE CASCADE, tag TEXT NOT NULL,
        PRIMARY KEY (name, tag)
    );
    CREATE INDEX tags_by_tag ON tags (tag);
    CREATE VIRTUAL TABLE texts USING fts5 (heading, text, tokenize = 'porter unicode61');
    CREATE TABLE texts_of (
        version TEXT PRIMARY KEY REFERENCES versions (id) ON DELETE CASCADE, first INTEGER NOT NULL, last INTEGER NOT
        NULL
    );
    CREATE INDEX texts_of_by_first ON texts_of (first);
    CREATE TABLE unsettled (id TEXT PRIMARY KEY);
    """,
    "CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);",
    """
    ALTER TABLE namings RENAME TO aliases;
    DROP INDEX namings_by_name;
    DROP INDEX namings_by_version;
    CREATE INDEX aliases_by_name ON aliases (name, number);
    CREATE INDEX aliases_by_version ON aliases (version);
    ALTER TABLE unsettled RENAME TO unrecovered;
    ALTER TABLE versions RENAME COLUMN made_from TO cache_key;
    DROP INDEX versions_by_making;
    CREATE INDEX versions_by_cache_key ON versions (cache_key);
    """,
    """
    CREATE VIRTUAL TABLE name_words USING fts5 (name, tokenize = 'porter unicode61');
    INSERT INTO name_words (rowid, name) SELECT number, name FROM aliases;
    CREATE TRIGGER name_words_in AFTER INSERT ON aliases BEGIN
        INSERT INTO name_words (rowid, name) VALUES (new.number, new.name);
    END;
    CREATE TRIGGER name_words_out AFTER DELETE ON aliases BEGIN
        DELETE FROM name_words WHERE rowid = old.number;
    END;
    CREATE TRIGGER name_words_renamed AFTER UPDATE OF name ON aliases BEGIN
        UPDATE name_words SET name = new.name WHERE rowid = new.number;
    END;
    """,
    "CREATE TABLE name_numbers (name TEXT PRIMARY KEY, number INTEGER NOT NULL);",
)
"""Script k brings the schema from version k to k + 1. Append; never change one that was released."""


def schema_version(database: sqlite3.Connection) -> int:
    """How many of the scripts a register has seen."""
    (found,) = database.execute("PRAGMA user_version").fetchone()
    return found


def migrate(database: sqlite3.Connection, scripts: Sequence[str]) -> None:
    """Bring the schema up to date: run the scripts that the file has not seen, inside the open transaction."""
    for number in range(schema_version(database), len(scripts)):
        statement = ""
        for piece in scripts[number].split(";"):
            statement += piece + ";"
            if sqlite3.complete_statement(statement):  # a trigger has semicolons inside
                database.execute(statement)
                statement = ""
        database.execute(f"PRAGMA user_version = {number + 1}")


FILE = "register.sqlite"
_WAIT_S = 30.0  # for another process to finish its write


_JOINED = "aliases JOIN names ON names.name = aliases.name JOIN versions ON versions.id = aliases.version"
_ENTRY = f"""
    SELECT names.name, versions.id, kind, title, source, source_sha256, base, hypernetwork, ranks, n_chunks, n_tokens,
        n_bytes, created, added,
        (SELECT count(DISTINCT version) FROM aliases WHERE name = names.name), owner, note,
        (SELECT json_group_array(tag) FROM (SELECT tag FROM tags WHERE name = names.name ORDER BY tag))
    FROM {_JOINED}
"""
_OF_NEWEST = "SELECT {} FROM aliases WHERE number IN (SELECT max(number) FROM aliases GROUP BY name)"
_NEWEST = "number = (SELECT max(number) FROM aliases AS n WHERE n.name = names.name)"


class Register:
    """An open register. Whoever changes it holds the write lock until `writing` commits."""

    def __init__(self, database: sqlite3.Connection):
        self._db = database

    # ---- looking

    def entries(
        self, *, like: str = "", tag: str = "", owner: str = "", kind: str = "", limit: int = -1, offset: int = 0
    ) -> tuple[list[Entry], int]:
        """A page of names with their newest versions, in alphabetical order, and how many names match in all.

        Args:
            like: only those with this in their name, title or note, in any case.
            limit: at most so many; -1 for all.
        """
        pattern = "%" + re.sub(r"([\\%_])", r"\\\1", like) + "%" if like else ""
        where = rf"""
            {_NEWEST} AND :owner IN ('', owner) AND :kind IN ('', kind)
            AND (:tag = '' OR EXISTS (SELECT 1 FROM tags WHERE tags.name = names.name AND tag = :tag))
            AND (:like = '' OR names.name LIKE :like ESCAPE '\' OR title LIKE :like ESCAPE '\'
                OR note LIKE :like ESCAPE '\')
        """
        given = {"like": pattern, "tag": tag, "owner": owner, "kind": kind, "limit": limit, "offset": offset}
        page = self._db.execute(f"{_ENTRY} WHERE {where} ORDER BY names.name LIMIT :limit OFFSET :offset", given)
        is_part = like or tag or owner or kind
        count = f"SELECT count(*) FROM {_JOINED} WHERE {where}" if is_part else "SELECT count(*) FROM names"
        return [_entry(row) for row in page], self._db.execute(count, given).fetchone()[0]

    def names(self) -> list[str]:
        return [name for (name,) in self._db.execute("SELECT name FROM names ORDER BY name")]

    def newest(self, name: str) -> Entry | None:
        row = self._db.execute(f"{_ENTRY} WHERE names.name = ? AND {_NEWEST}", (name,)).fetchone()
        return None if row is None else _entry(row)

    def versions_of(self, name: str) -> list[Entry]:
        """The versions of a name, each once, newest first."""
        query = f"{_ENTRY} WHERE names.name = ? GROUP BY versions.id ORDER BY max(number) DESC"
        return [_entry(row) for row in self._db.execute(query, (name,))]

    def named(self, names: Sequence[str]) -> set[tuple[str, str]]:
        """Those of some names that there are, each with the hashes of its versions."""
        query = "SELECT name, version FROM aliases WHERE name IN (SELECT value FROM json_each(?))"
        return set(self._db.execute(query, (json.dumps(names),)))

    def has_version(self, version: str) -> bool:
        return self._one("SELECT count(*) FROM versions WHERE id = ?", version) > 0

    def cached(self, cache_key: str) -> str | None:
        """The newest version that was cast from the same source in the same way (`Manifest.cache_keys`)."""
        return self._one("SELECT id FROM versions WHERE cache_key = ? ORDER BY rowid DESC", cache_key)

    def all_versions(self) -> list[str]:
        return [version for (version,) in self._db.execute("SELECT id FROM versions ORDER BY id")]

    def unrecovered(self) -> list[str]:
        return [version for (version,) in self._db.execute("SELECT id FROM unrecovered ORDER BY id")]

    def search(self, words: str, limit: int) -> list[Hit]:
        """The chunks of newest versions that hold all these words, best first."""
        wanted = " ".join(f'"{word}"' for word in re.findall(r"\w+", normalize("NFC", words)))
        if not wanted:
            raise AdapterError("there is no word to search for")
        rows = self._db.execute(
            f"""
            SELECT names.name, aliases.version, texts.rowid - first, heading, snippet(texts, 1, '[', ']', '...', 16)
            FROM texts
            JOIN texts_of ON texts_of.first = (SELECT max(first) FROM texts_of WHERE first <= texts.rowid)
            JOIN aliases ON aliases.version = texts_of.version JOIN names ON names.name = aliases.name
            WHERE texts MATCH ? AND {_NEWEST} ORDER BY bm25(texts, 0.5, 1.0), names.name LIMIT ?
            """,
            (wanted, limit),
        )
        return [Hit(*row) for row in rows]

    def best_chunks(
        self, phrases: Phrases, k: int, patterns: Sequence[str] = ("*",), tag: str = "", without: Collection[str] = ()
    ) -> list[Match]:
        """The k chunks of documents' newest versions that match some weighted phrases best, best first.

        A chunk's text and heading, which begins with the document's title, count, and the name of its adapter. The
        rarity of a word is counted over the documents of the whole library, each in its newest version.

        Args:
            patterns: only documents whose name fits one of these, as in a shell.
            tag: only documents with this tag.
            without: versions that are left out.
        """
        n_rows = self._one("SELECT coalesce(sum(last - first + 1), 0) FROM texts_of")
        spans = self._db.execute(
            f"SELECT first, last + 1 FROM texts_of WHERE version IN ({_OF_NEWEST.format('version')})"
        )
        documents = [range(*span) for span in sorted(spans)]
        scores = match_scores(self._db, "texts", "bm25(texts, 0.5, 1.0)", n_rows, phrases, documents)
        n_names = self._one("SELECT count(*) FROM aliases")
        newest = [range(number, number + 1) for (number,) in sorted(self._db.execute(_OF_NEWEST.format("number")))]
        of_names = match_scores(self._db, "name_words", "bm25(name_words)", n_names, phrases, newest)
        for number, score in of_names.items():
            span = "SELECT first, last FROM texts_of JOIN aliases USING (version) WHERE number = ?"
            for first, last in self._db.execute(span, (number,)):
                scores |= {row: scores[row] + score for row in range(first, last + 1) if row in scores}
                scores.setdefault(first, score)  # where only the name matches, the beginning says what a document is
        meant, values = _meant(patterns, tag)
        query = f"""
            SELECT names.name, versions.id, n_chunks, ? - first
            FROM {_JOINED} JOIN texts_of ON texts_of.version = versions.id
            WHERE texts_of.first = (SELECT max(first) FROM texts_of WHERE first <= ?) AND {meant}
            ORDER BY names.name LIMIT 1
        """
        found: list[Match] = []
        for row in sorted(scores, key=lambda row: (-scores[row], row)):
            if len(found) == k:
                break
            owner = self._db.execute(query, (row, row, *values)).fetchone()
            if owner is not None and (match := Match(*(*owner, scores[row]))).version not in without:
                found.append(match)
        return found

    def has_documents(self, patterns: Sequence[str], tag: str = "") -> bool:
        """Whether there is a document that `best_chunks` may find."""
        meant, values = _meant(patterns, tag)
        return self._one(f"SELECT 1 FROM {_JOINED} WHERE {meant} LIMIT 1", *values) is not None

    def setting(self, key: str) -> str | None:
        return self._one("SELECT value FROM settings WHERE key = ?", key)

    def state(self, name: str) -> NameState:
        """All that is known of a name; the empty state where there is none."""
        row = self._db.execute("SELECT owner, note FROM names WHERE name = ?", (name,)).fetchone()
        if row is None:
            return NameState()
        versions = self._db.execute("SELECT version, added FROM aliases WHERE name = ? ORDER BY number", (name,))
        tags = self._db.execute("SELECT tag FROM tags WHERE name = ? ORDER BY tag", (name,))
        return NameState(tuple(versions), row[0], row[1], tuple(tag for (tag,) in tags))

    def numbers(self) -> dict[str, int]:
        """How many changes of each name, deleted ones included, this register has taken in from a shared store."""
        return dict(self._db.execute("SELECT name, number FROM name_numbers"))

    def problems(self) -> list[str]:
        """What SQLite finds wrong in the file."""
        found = [row[0] for row in self._db.execute("PRAGMA integrity_check") if row[0] != "ok"]
        return found + [f"a row of {row[0]} points nowhere" for row in self._db.execute("PRAGMA foreign_key_check")]

    def is_current(self) -> bool:
        """Whether the schema is this version's."""
        return schema_version(self._db) == len(MIGRATIONS)

    # ---- changing

    def add_version(self, manifest: Manifest, n_bytes: int, texts: Sequence[tuple[str, str]]) -> None:
        """Enter an adapter, unless it is there already. `texts`: heading and text of each chunk."""
        m, version = manifest, manifest.version
        self.recover(version)
        if self.has_version(version):
            return
        self._db.execute(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (version, m.cache_keys()[0], m.kind, m.title, m.source, m.source_sha256, m.made_for.base, m.hypernetwork,
             json.dumps(m.ranks), m.n_chunks, m.n_tokens, n_bytes, m.created),
        )  # fmt: skip
        if texts:
            first = self._one("SELECT coalesce(max(last), 0) + 1 FROM texts_of")
            rows = ((first + i, heading, text) for i, (heading, text) in enumerate(texts))
            self._db.executemany("INSERT INTO texts (rowid, heading, text) VALUES (?, ?, ?)", rows)
            self._db.execute("INSERT INTO texts_of VALUES (?, ?, ?)", (version, first, first + len(texts) - 1))

    def name_version(self, name: str, version: str, replace: bool = True) -> None:
        """Make a version the newest of a name, which is created if need be.

        Raises NameTakenError where the name has another version, which is not to be replaced.
        """
        newest = self.newest(name)
        if newest is not None and newest.version == version:
            return
        if newest is not None and not replace:
            raise taken(name)
        self._db.execute("INSERT OR IGNORE INTO names (name) VALUES (?)", (name,))
        self._db.execute("INSERT INTO aliases (name, version, added) VALUES (?, ?, ?)", (name, version, utc_now()))

    def check_is_there(self, name: str) -> None:
        """Raise NoSuchAdapterError for a name that another process or machine has removed just now."""
        if self.newest(name) is None:
            raise NoSuchAdapterError(f"no adapter is called {name!r} any more")

    def drop(self, name: str, version: str | None = None) -> None:
        """Delete a name, or take one version from it, and the name itself with its last one."""
        self._db.execute("DELETE FROM aliases WHERE name = ? AND version = coalesce(?, version)", (name, version))
        self._db.execute("DELETE FROM names WHERE name = ? AND name NOT IN (SELECT name FROM aliases)", (name,))

    def drop_older(self, keep: int) -> None:
        """Take from each name all but its newest `keep` versions."""
        for name in self.names():
            for entry in self.versions_of(name)[keep:]:
                self.drop(name, entry.version)

    def drop_unnamed(self) -> None:
        """Delete the rows of versions without a name; they are listed as unrecovered until their folders are gone."""
        rows = self._db.execute("SELECT id FROM versions WHERE id NOT IN (SELECT version FROM aliases)").fetchall()
        for (version,) in rows:
            span = self._db.execute("SELECT first, last FROM texts_of WHERE version = ?", (version,)).fetchone()
            if span is not None:
                self._db.execute("DELETE FROM texts WHERE rowid BETWEEN ? AND ?", span)
            self.mark_unrecovered(version)
            self._db.execute("DELETE FROM versions WHERE id = ?", (version,))

    def mark_unrecovered(self, version: str) -> None:
        """Note that a version's folder is on its way in or out: `LibraryStorage.recover` deletes it without a row."""
        self._db.execute("INSERT OR IGNORE INTO unrecovered VALUES (?)", (version,))

    def recover(self, version: str) -> None:
        self._db.execute("DELETE FROM unrecovered WHERE id = ?", (version,))

    def vacuum(self) -> None:
        """Rewrite the file without what was deleted from it; not inside `writing`."""
        self._db.execute("INSERT INTO texts (texts) VALUES ('optimize')")  # the index keeps words of deleted rows
        self._db.execute("VACUUM")

    def rename(self, name: str, new: str) -> None:
        """Give a name another one. Raises AdapterError where that is taken, or the name is gone."""
        self.check_is_there(name)
        if self.newest(new) is not None:
            raise NameTakenError(f"there is an adapter called {new!r} already")
        self._db.execute("UPDATE names SET name = ? WHERE name = ?", (new, name))

    def describe(
        self, name: str, owner: str | None, note: str | None, tags: Sequence[str], untag: Sequence[str]
    ) -> None:
        """Change a name's owner and note (None keeps them), and add and remove tags."""
        self.check_is_there(name)
        for column, value in (("owner", owner), ("note", note)):
            if value is not None:
                if not is_unicode(value):
                    raise AdapterError(f"the {column} is not valid Unicode; write it in UTF-8")
                self._db.execute(f"UPDATE names SET {column} = ? WHERE name = ?", (value, name))
        self._db.executemany("INSERT OR IGNORE INTO tags VALUES (?, ?)", [(name, tag) for tag in tags])
        self._db.executemany("DELETE FROM tags WHERE name = ? AND tag = ?", [(name, tag) for tag in untag])

    def set_state(self, name: str, state: NameState) -> None:
        """Put a state in the place of all that is known of a name. Its versions have rows already."""
        self.drop(name)
        if state.versions:
            self._db.execute("INSERT INTO names VALUES (?, ?, ?)", (name, state.owner, state.note))
            rows = [(name, version, added) for version, added in state.versions]
            self._db.executemany("INSERT INTO aliases (name, version, added) VALUES (?, ?, ?)", rows)
            self._db.executemany("INSERT INTO tags VALUES (?, ?)", [(name, tag) for tag in state.tags])

    def set_number(self, name: str, number: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO name_numbers VALUES (?, ?)", (name, number))

    def forget_numbers(self) -> None:
        self._db.execute("DELETE FROM name_numbers")

    def set(self, key: str, value: str | None) -> None:
        """Keep a setting of the library; None forgets it."""
        self._db.execute("DELETE FROM settings WHERE key = ?", (key,))
        if value is not None:
            self._db.execute("INSERT INTO settings VALUES (?, ?)", (key, value))

    def _one(self, query: str, *values: Any) -> Any:
        """The first column of the first row; None where there is no row."""
        row = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]

    @classmethod
    @contextmanager
    def reading(cls, file: Path) -> Iterator[Self]:
        """The register in a file that is there, for reading."""
        # "rw" where possible: SQLite then rolls back what a killed process left half-done.
        with _connected(file, "rw" if os.access(file, os.W_OK) else "ro") as database:
            yield cls(database)

    @classmethod
    @contextmanager
    def writing(cls, file: Path, mode: str = "rwc") -> Iterator[Self]:
        """The register in a file under the write lock, created or migrated if need be; an error undoes everything.

        With the mode `memory` it is an empty one in memory, whatever the file holds.
        """
        with _connected(file, mode) as database, database:  # the second commits or rolls back
            database.execute("BEGIN IMMEDIATE")
            migrate(database, MIGRATIONS)
            yield cls(database)


@contextmanager
def _connected(file: Path, mode: str) -> Iterator[sqlite3.Connection]:
    try:
        uri = f"{file.resolve().as_uri()}?mode={mode}"
        with closing(sqlite3.connect(uri, uri=True, timeout=_WAIT_S, isolation_level=None)) as database:
            database.execute("PRAGMA foreign_keys = ON")
            if (version := schema_version(database)) > len(MIGRATIONS):
                raise AdapterError(f"{file} was written by a newer loracast (its schema is {version}); update loracast")
            yield database
    except sqlite3.DatabaseError as error:
        said = str(error)
        if "locked" in said:
            raise AdapterError(f"another process is writing to the library {file.parent}; try again") from error
        if "not a database" in said or "malformed" in said:
            raise AdapterError(
                f"{file} is damaged ({said}): move it away, and it is made again from the adapters, without their "
                "tags, notes and owners"
            ) from error
        raise AdapterError(f"{file} cannot be used: {said}") from error


def taken(name: str) -> NameTakenError:
    """The error for a name that means another adapter."""
    return NameTakenError(
        f"there is an adapter called {name!r} already; choose another name, or replace it (--replace)"
    )


def _entry(row: tuple[Any, ...]) -> Entry:
    values = list(row)
    values[8] = json.loads(values[8])
    values[-1] = tuple(json.loads(values[-1]))
    return Entry(*values)


def _meant(patterns: Sequence[str], tag: str) -> tuple[str, tuple[str, str, str]]:
    """The condition for newest versions of documents with a name that fits a pattern and with a tag, and its values.

    A chat's memory is left out: what someone said is asked only by its name.
    """
    fits = "EXISTS (SELECT 1 FROM json_each(?) AS pattern WHERE names.name GLOB pattern.value)"
    tagged = "(? = '' OR EXISTS (SELECT 1 FROM tags WHERE tags.name = names.name AND tag = ?))"
    is_learned = f"kind = 'document' AND source IS NOT '{MEMORY_SOURCE}'"
    return f"{is_learned} AND {fits} AND {tagged} AND {_NEWEST}", (json.dumps(patterns), tag, tag)
