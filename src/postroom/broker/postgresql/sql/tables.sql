-- The time: the server's, for all processes the same, unless another is given.
CREATE FUNCTION instant(clock float8) RETURNS float8 LANGUAGE sql STABLE AS $$
    SELECT coalesce(clock, extract(epoch FROM clock_timestamp())::float8)
$$;

-- What is declared.

CREATE TABLE topic (
    name      text COLLATE "C" PRIMARY KEY,
    queue     boolean NOT NULL,
    retention double precision NOT NULL
);

CREATE TABLE subscription (
    id      integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name    text COLLATE "C" NOT NULL UNIQUE,
    pattern text NOT NULL,
    filter  json,                -- header values, or NULL
    ordered boolean NOT NULL,
    maximum integer              -- unsettled messages above which publishes are refused
);

-- Which subscriptions each topic leads to: patterns are matched when they are declared, not at every publish.
CREATE TABLE route (
    topic   text COLLATE "C" NOT NULL,
    sub     integer NOT NULL,
    name    text NOT NULL,
    filter  json,
    ordered boolean NOT NULL,
    maximum integer,
    PRIMARY KEY (topic, sub)
);

-- What is kept: a row for each copy of a message that waits, runs or is dead.

CREATE SEQUENCE lease;

CREATE TABLE message (
    seq         bigint GENERATED ALWAYS AS IDENTITY,  -- publish order
    sub         integer NOT NULL,
    lane        smallint NOT NULL,   -- -9 to 0: minus the priority; 41 to 50: the same of suspects; 60: to be placed
                                     -- behind its key; 100: leased
    state       smallint NOT NULL,   -- 0 waiting, 1 leased, 3 dead
    visible_at  double precision,    -- the one visibility column: ready, delayed, leased (NULL: not to be claimed)
    due         double precision NOT NULL,  -- what visible_at becomes when nothing is before it in its line
    lease       bigint NOT NULL DEFAULT 0,
    priority    smallint NOT NULL,
    failed      integer NOT NULL DEFAULT 0, -- failures counted since it was published or redriven
    redriven    integer NOT NULL DEFAULT 0,
    suspect     boolean NOT NULL DEFAULT false,
    cancel      boolean NOT NULL DEFAULT false,
    id          text COLLATE "C" NOT NULL,
    line        text,                -- its key while unsettled in an ordered subscription
    topic       text NOT NULL,
    name        text NOT NULL,
    body        bytea NOT NULL,
    headers     json,
    key         text,
    created_at  double precision NOT NULL,
    not_before  double precision,
    expires_at  double precision,
    result_ttl  double precision NOT NULL,
    idempotency_key text,
    dedup_window    double precision NOT NULL,
    started_at  double precision,
    dead_at     double precision,
    worker      text,                -- who holds it
    settled     bigint,              -- the lease under which it was given back, or died: asked again, it was so
    progress    text,                -- JSON
    failures    text[]               -- JSON, oldest first
) WITH (
    -- Every row changes twice and goes: what is dead must be found early, and without pauses.
    fillfactor = 80,
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0.05
);
CREATE UNIQUE INDEX message_id ON message (id, sub);
CREATE INDEX message_ready ON message (sub, lane, visible_at, seq) WHERE visible_at IS NOT NULL;
CREATE INDEX message_line ON message (sub, line, seq) WHERE line IS NOT NULL;
CREATE INDEX message_head ON message (sub, line) WHERE line IS NOT NULL AND visible_at IS NOT NULL;
CREATE INDEX message_expiry ON message (sub, expires_at) WHERE expires_at IS NOT NULL AND state = 0;
CREATE INDEX message_dead ON message (sub, dead_at, seq) WHERE state = 3;

-- What is remembered: a row for each copy that has ended, until purge_at. Apart from the others, so that these
-- stay small whatever was done before.

CREATE TABLE record (
    seq         bigint NOT NULL,
    sub         integer NOT NULL,    -- 0: nobody wanted it
    state       smallint NOT NULL,   -- 2 succeeded, 4 cancelled, 5 expired
    attempt     integer NOT NULL,
    id          text COLLATE "C" NOT NULL,
    topic       text NOT NULL,
    name        text NOT NULL,
    created_at  double precision NOT NULL,
    started_at  double precision,
    finished_at double precision NOT NULL,
    expires_at  double precision,
    purge_at    double precision NOT NULL,
    lease       bigint,              -- under which it was acknowledged: asked again, it still was
    result      bytea,
    failures    text[],
    PRIMARY KEY (id, sub)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.02);
CREATE INDEX record_newest ON record (sub, seq);
CREATE INDEX record_purge ON record (purge_at);

-- What topics retain for late subscriptions and replay.
CREATE TABLE log (
    seq          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic        text COLLATE "C" NOT NULL,
    published_at double precision NOT NULL,
    purge_at     double precision NOT NULL,
    message      json NOT NULL
);
CREATE INDEX log_topic ON log (topic, seq);
CREATE INDEX log_purge ON log (purge_at);

CREATE TABLE dedup (
    topic       text COLLATE "C" NOT NULL,
    key         text NOT NULL,
    id          text NOT NULL,
    fingerprint bytea NOT NULL,
    until       double precision NOT NULL,  -- infinite: as long as the message holds it
    PRIMARY KEY (topic, key)
);
CREATE INDEX dedup_until ON dedup (until);
CREATE INDEX dedup_held ON dedup (id) WHERE until = 'Infinity';
