CREATE TABLE record (
    seq         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id          text NOT NULL,
    sub         text NOT NULL,
    topic       text NOT NULL,
    name        text NOT NULL,
    state       smallint NOT NULL,
    attempt     integer NOT NULL DEFAULT 1,
    confirmed   boolean NOT NULL DEFAULT false,
    buried      boolean NOT NULL DEFAULT false,
    cancel      boolean NOT NULL DEFAULT false,
    copy        text,
    token       text,
    due         double precision NOT NULL,
    created_at  double precision NOT NULL,
    started_at  double precision,
    finished_at double precision,
    expires_at  double precision,
    result_ttl  double precision NOT NULL,
    purge_at    double precision,
    progress    text,
    result      bytea,
    failures    text NOT NULL DEFAULT '[]'
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01);
CREATE UNIQUE INDEX record_id ON record (id, sub);
CREATE INDEX record_sub ON record (sub, seq);
CREATE INDEX record_purge ON record (purge_at) WHERE purge_at IS NOT NULL;
CREATE INDEX record_unconfirmed ON record (created_at) WHERE NOT confirmed;

CREATE TABLE subscription (name text PRIMARY KEY, declared text NOT NULL);
CREATE TABLE queue (name text PRIMARY KEY);
CREATE TABLE meta (key text PRIMARY KEY, value bigint NOT NULL);
INSERT INTO meta VALUES ('topology', 0);

CREATE TABLE dedup (
    topic       text NOT NULL,
    key         text NOT NULL,
    id          text NOT NULL,
    fingerprint bytea NOT NULL,
    until       double precision NOT NULL,
    confirmed   boolean NOT NULL DEFAULT false,
    PRIMARY KEY (topic, key)
);
CREATE INDEX dedup_until ON dedup (until);
CREATE INDEX dedup_id ON dedup (id);
