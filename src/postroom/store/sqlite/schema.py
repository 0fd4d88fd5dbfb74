"""The tables of the store."""

from __future__ import annotations

from collections.abc import Sequence

APPLICATION_ID = 0x506F5374
"""``PoSt`` in ASCII: a store is no broker, nor the other way round."""

_V1 = """
CREATE TABLE record (
    seq         INTEGER PRIMARY KEY,     -- publish order
    id          TEXT NOT NULL,
    sub         TEXT NOT NULL,           -- '' for an event nobody wanted
    topic       TEXT NOT NULL,
    name        TEXT NOT NULL,
    state       INTEGER NOT NULL,
    attempt     INTEGER NOT NULL DEFAULT 1,
    confirmed   INTEGER NOT NULL DEFAULT 0, -- the broker is known to have it
    buried      INTEGER NOT NULL DEFAULT 0, -- the broker is known to have it among its dead letters
    cancel      INTEGER NOT NULL DEFAULT 0, -- asked to stop while it runs
    copy        TEXT,                    -- the publish whose copy was delivered first
    token       TEXT,                    -- the holder's, also after the end
    due         REAL NOT NULL,           -- when it may start, while it waits
    created_at  REAL NOT NULL,
    started_at  REAL,
    finished_at REAL,
    expires_at  REAL,
    result_ttl  REAL NOT NULL,
    purge_at    REAL,
    progress    TEXT,
    result      BLOB,
    failures    TEXT NOT NULL DEFAULT '[]'
);
CREATE UNIQUE INDEX record_id ON record (id, sub);
CREATE INDEX record_sub ON record (sub, seq);
CREATE INDEX record_purge ON record (purge_at) WHERE purge_at IS NOT NULL;
CREATE INDEX record_active ON record (state, seq) WHERE state IN (1, 3);
CREATE INDEX record_unconfirmed ON record (created_at) WHERE confirmed = 0;

-- Who gets a message: as declared through this store.
CREATE TABLE subscription (name TEXT PRIMARY KEY, declared TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE queue (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO meta VALUES ('topology', 0);

CREATE TABLE dedup (
    topic       TEXT NOT NULL,
    key         TEXT NOT NULL,
    id          TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    until       REAL NOT NULL,
    confirmed   INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (topic, key)
) WITHOUT ROWID;
CREATE INDEX dedup_until ON dedup (until);
CREATE INDEX dedup_id ON dedup (id);
"""

MIGRATIONS: Sequence[str] = (_V1,)
"""Only ever appended to."""
