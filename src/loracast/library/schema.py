"""The tables of a library's register, and how a register of an older loracast gets those of this one.

Changes are numbered scripts that are only ever appended.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

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
    """
    CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
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
    """
    CREATE TABLE name_numbers (name TEXT PRIMARY KEY, number INTEGER NOT NULL);
    """,
)
"""Script k brings the schema from version k to k + 1. Append; never change one that was released."""


def version(database: sqlite3.Connection) -> int:
    """How many of the scripts a register has seen."""
    (found,) = database.execute("PRAGMA user_version").fetchone()
    return found


def migrate(database: sqlite3.Connection, scripts: Sequence[str] | None = None) -> None:
    """Bring the schema up to date: run the scripts that the file has not seen, inside the open transaction.

    Args:
        scripts: those of another file than a register; `MIGRATIONS` if None.
    """
    scripts = MIGRATIONS if scripts is None else scripts
    for number in range(version(database), len(scripts)):
        statement = ""
        for piece in scripts[number].split(";"):
            statement += piece + ";"
            if sqlite3.complete_statement(statement):  # a trigger has semicolons inside
                database.execute(statement)
                statement = ""
        database.execute(f"PRAGMA user_version = {number + 1}")
