"""The tables, and how a file of an older version becomes one of this version."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from postroom.errors import ConfigurationError

APPLICATION_ID = 0x506F7374
"""``Post`` in ASCII: tells a Postroom file from any other SQLite database."""

# What a row of ``message`` is. Waiting ones are ready, delayed or blocked behind their key: ``visible_at`` says which.
WAITING, LEASED, SUCCEEDED, DEAD, CANCELLED, EXPIRED = range(6)

LEASED_LANES = 100
"""Added to the lane of a row while it is leased: what waits and what runs lie apart in the one index."""

_V1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO meta VALUES ('topology', 0);

CREATE TABLE topic (name TEXT PRIMARY KEY, queue INTEGER NOT NULL, retention REAL NOT NULL) WITHOUT ROWID;

CREATE TABLE subscription (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    name    TEXT NOT NULL UNIQUE,
    pattern TEXT NOT NULL,
    filter  TEXT,                        -- JSON object of header values, or NULL
    ordered INTEGER NOT NULL,
    maximum INTEGER,                     -- unsettled messages above which publishes are refused
    live    INTEGER NOT NULL DEFAULT 0   -- unsettled messages, kept so that no publish has to count
);

-- One row for each copy of a message: first its place in the queue, later its record.
CREATE TABLE message (
    seq         INTEGER PRIMARY KEY,     -- publish order
    sub         INTEGER NOT NULL,
    lane        INTEGER NOT NULL,        -- minus the priority (the lowest is served first), 100 more while leased
    visible_at  REAL,                    -- the one visibility column: ready, delayed, leased (NULL: not to be claimed)
    due         REAL NOT NULL,           -- what visible_at becomes when nothing is before it in its line
    lease       INTEGER NOT NULL DEFAULT 0,
    state       INTEGER NOT NULL,
    id          TEXT NOT NULL,
    line        TEXT,                    -- its key while unsettled in an ordered subscription
    failures    INTEGER NOT NULL DEFAULT 0,
    suspect     INTEGER NOT NULL DEFAULT 0,
    cancel      INTEGER NOT NULL DEFAULT 0,
    redriven    INTEGER NOT NULL DEFAULT 0,
    topic       TEXT NOT NULL,
    name        TEXT NOT NULL,
    body        BLOB,
    headers     TEXT,
    key         TEXT,
    created_at  REAL NOT NULL,
    not_before  REAL,
    expires_at  REAL,
    result_ttl  REAL NOT NULL,
    idempotency_key TEXT,
    dedup_window    REAL NOT NULL,
    started_at  REAL,
    finished_at REAL,
    purge_at    REAL,
    result      BLOB,
    progress    TEXT
);
CREATE INDEX message_ready ON message (sub, lane, visible_at) WHERE visible_at IS NOT NULL;
CREATE UNIQUE INDEX message_id ON message (id, sub);
CREATE INDEX message_suspect ON message (sub, lane, visible_at) WHERE suspect = 1 AND visible_at IS NOT NULL;
CREATE INDEX message_line ON message (sub, line, seq) WHERE line IS NOT NULL;
CREATE INDEX message_head ON message (sub, line) WHERE line IS NOT NULL AND visible_at IS NOT NULL;
CREATE INDEX message_expiry ON message (expires_at) WHERE expires_at IS NOT NULL AND state = 0;
CREATE INDEX message_dead ON message (sub, finished_at, seq) WHERE state = 3;
CREATE INDEX message_purge ON message (purge_at) WHERE purge_at IS NOT NULL;

CREATE TABLE failure (
    seq        INTEGER NOT NULL,
    number     INTEGER NOT NULL,
    failure    TEXT NOT NULL,            -- JSON
    PRIMARY KEY (seq, number)
) WITHOUT ROWID;

-- What topics retain for late subscriptions and replay.
CREATE TABLE log (
    seq          INTEGER PRIMARY KEY,
    topic        TEXT NOT NULL,
    published_at REAL NOT NULL,
    purge_at     REAL NOT NULL,
    message      BLOB NOT NULL           -- JSON
);
CREATE INDEX log_topic ON log (topic, published_at);
CREATE INDEX log_purge ON log (purge_at);

CREATE TABLE dedup (
    topic       TEXT NOT NULL,
    key         TEXT NOT NULL,
    id          TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    until       REAL NOT NULL,
    PRIMARY KEY (topic, key)
) WITHOUT ROWID;
CREATE INDEX dedup_until ON dedup (until);

-- Processes that claim messages: each holds a lock on its file while it lives.
CREATE TABLE holder (id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT NOT NULL, worker TEXT NOT NULL);
"""

MIGRATIONS: Sequence[str] = (_V1,)
"""Statement by statement from an empty file to this version; only ever appended to."""


def prepare(
    connection: sqlite3.Connection, path: str, migrations: Sequence[str] = MIGRATIONS, application: int = APPLICATION_ID
) -> None:
    """Create or migrate, in one transaction. Raises ``ConfigurationError`` for a file that is not ours or too new.

    Several processes may do this at once: the version is read again under the write lock.
    """
    if _version(connection) == len(migrations) and _application(connection) == application:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        check(connection, path, migrations, application)
        version = _version(connection)
        for migration in migrations[version:]:
            # Not executescript: it would commit, and a crash leave half a migration.
            for statement in migration.split(";"):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {application}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def check(
    connection: sqlite3.Connection, path: str, migrations: Sequence[str] = MIGRATIONS, application: int = APPLICATION_ID
) -> None:
    """Only reads. Raises ``ConfigurationError`` for a file that is not ours or too new."""
    version, known = _version(connection), len(migrations)
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if _application(connection) != application and (version or (tables and tables[0])):
        raise ConfigurationError(f"{path} is a SQLite database, but not of this kind; give Postroom a file of its own")
    if version > known:
        raise ConfigurationError(
            f"{path} was written by a newer Postroom (schema {version}, this one knows {known}); upgrade Postroom"
        )


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _application(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA application_id").fetchone()[0])
