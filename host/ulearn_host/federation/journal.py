"""The journal of a job: one SQLite file, which a host killed at any moment finds again as its last transaction left it.

Write-ahead log, synchronous = FULL: a transaction that has returned survives a power cut, one that has not leaves no
trace. The lock is exclusive and ends with the process, so that two hosts never write one journal. It holds the boards'
secrets, and is readable by its owner alone.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ulearn_host.errors import UserError

VERSION = 1
Row = sqlite3.Row

_SCHEMA = """
CREATE TABLE job (
    one INTEGER PRIMARY KEY CHECK (one = 1), text TEXT NOT NULL, plan BLOB NOT NULL, created REAL NOT NULL
);
CREATE TABLE boards (
    board TEXT PRIMARY KEY, secret BLOB NOT NULL, link TEXT NOT NULL, enrolled REAL NOT NULL,
    quality REAL NOT NULL DEFAULT 1, seen REAL, facts BLOB,
    bytes_up INTEGER NOT NULL DEFAULT 0, bytes_down INTEGER NOT NULL DEFAULT 0, refused INTEGER NOT NULL DEFAULT 0,
    asked INTEGER NOT NULL DEFAULT 0, asked_round INTEGER NOT NULL DEFAULT 0, in_time INTEGER NOT NULL DEFAULT 0,
    done INTEGER NOT NULL DEFAULT 0, committed INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY, state TEXT NOT NULL, before BLOB NOT NULL, after BLOB, began REAL NOT NULL, opened REAL,
    deadline REAL, ended REAL, asked INTEGER NOT NULL DEFAULT 0, late INTEGER NOT NULL DEFAULT 0, refused INTEGER NOT
    NULL DEFAULT 0, bytes_up INTEGER NOT NULL DEFAULT 0, bytes_down INTEGER NOT NULL DEFAULT 0, reason TEXT
);
CREATE TABLE tasks (
    kind INTEGER NOT NULL, round INTEGER NOT NULL, board TEXT NOT NULL, nonce BLOB UNIQUE, base BLOB NOT NULL, body
    BLOB, opened REAL, samples INTEGER NOT NULL DEFAULT 0, sent REAL, answered REAL, outcome TEXT,
    PRIMARY KEY (kind, round, board)
) WITHOUT ROWID;
CREATE INDEX tasks_by_board ON tasks (board, round);
CREATE TABLE updates (
    round INTEGER NOT NULL, board TEXT NOT NULL, entered INTEGER NOT NULL, sha256 BLOB NOT NULL, samples INTEGER NOT
    NULL, quality REAL NOT NULL, stale INTEGER NOT NULL, received REAL NOT NULL, body BLOB NOT NULL,
    UNIQUE (round, board), UNIQUE (entered, board)
);
CREATE INDEX updates_by_board ON updates (board, sha256);
CREATE TABLE models (
    round INTEGER PRIMARY KEY, base BLOB NOT NULL, parent BLOB, difference BLOB, blob BLOB NOT NULL
);
CREATE INDEX models_by_base ON models (base);
CREATE TABLE server (round INTEGER PRIMARY KEY, state BLOB NOT NULL, residual BLOB NOT NULL);
CREATE TABLE evaluations (
    round INTEGER PRIMARY KEY, base BLOB NOT NULL, opened REAL NOT NULL, deadline REAL NOT NULL, closed REAL,
    accuracy REAL, loss REAL, reported INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE reports (
    round INTEGER NOT NULL, board TEXT NOT NULL, body BLOB NOT NULL, received REAL NOT NULL, PRIMARY KEY (round, board)
) WITHOUT ROWID;
CREATE TABLE audit (n INTEGER PRIMARY KEY, time REAL NOT NULL, event TEXT NOT NULL, board TEXT, text TEXT NOT NULL);
CREATE INDEX audit_by_event ON audit (event, n);
"""


class JournalError(UserError):
    """The disk takes no more: what was to be written down was not, and did not happen."""


class Journal:
    """An open journal. Reads are plain queries, changes happen within `transaction`."""

    def __init__(self, path: Path) -> None:
        """Open or begin the file. Raises UserError when it is none of ours, newer, damaged or in use."""
        self.path = path
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._connection = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = Row
        try:
            self._open()
        except sqlite3.Error as fault:
            self._connection.close()
            raise UserError(f"{path}: {_said(fault)}") from None
        except UserError:
            self._connection.close()
            raise

    def _open(self) -> None:
        """Settings, then the tables."""
        for setting in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._connection.execute(f"PRAGMA {setting}")
        self._connection.execute("PRAGMA journal_size_limit = 4194304")
        self._connection.execute("BEGIN IMMEDIATE")
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in _SCHEMA.split(";\n"):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {VERSION}")
        elif version != VERSION:
            self._connection.execute("ROLLBACK")
            raise UserError(f"{self.path}: journal version {version}, expected {VERSION}; use the ulearn that wrote it")
        self._connection.execute("COMMIT")

    def close(self) -> None:
        """Give the file back."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside happen together and last when this returns, or none does. Raises JournalError for a
        disk that takes no more."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as fault:
            raise JournalError(f"{self.path}: {_said(fault)}; nothing was changed") from None

    def run(self, sql: str, *values: Any) -> None:
        """One statement of a transaction."""
        assert self._connection.in_transaction, "a change outside a transaction"
        self._connection.execute(sql, values)

    def insert(self, table: str, **values: Any) -> None:
        """One row."""
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        self.run(f"INSERT INTO {table} ({names}) VALUES ({marks})", *values.values())

    def rows(self, sql: str, *values: Any) -> list[Row]:
        """All rows of a query."""
        return self._connection.execute(sql, values).fetchall()

    def each(self, sql: str, *values: Any) -> Iterator[Row]:
        """The rows one by one: the bodies of a round need not be in memory together."""
        yield from self._connection.execute(sql, values)

    def row(self, sql: str, *values: Any) -> Row | None:
        """The first row, or None."""
        found: Row | None = self._connection.execute(sql, values).fetchone()
        return found

    def value(self, sql: str, *values: Any) -> Any:
        """The first value of the first row, or None."""
        found = self._connection.execute(sql, values).fetchone()
        return found[0] if found else None

    def trace(self, call: Any) -> None:
        """Have call(statement) told of every statement before it is carried out; None ends it."""
        self._connection.set_trace_callback(call)


def _said(fault: sqlite3.Error) -> str:
    """SQLite's words, and what to do about the usual ones."""
    text = str(fault)
    if "locked" in text or "busy" in text:
        return "in use by another process; end that one first"
    if "not a database" in text or "malformed" in text:
        return f"{text}; expected a journal of ulearn, take another folder or a copy from before"
    return text
