-- Handing out and settling. In an ordered subscription all that changes who is first in its line takes turns, under
-- an advisory lock that is held to the end of the transaction; publishers do not: what they add is placed by the next
-- claim.

-- Takes the turn where turns are taken. NULL if there is no such subscription.
CREATE FUNCTION turn(the_sub integer) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    in_order boolean := (SELECT s.ordered FROM subscription s WHERE s.id = the_sub);
BEGIN
    IF in_order THEN
        PERFORM pg_advisory_xact_lock(hashtext(current_schema()), the_sub);
    END IF;
    RETURN in_order;
END
$$;

-- Moves rows, locked by the caller, from what is kept to what is remembered. Their lines.
CREATE FUNCTION remember(ended tid[], how integer, moment float8) RETURNS text[] LANGUAGE sql AS $$
    WITH gone AS (
        DELETE FROM message m WHERE m.ctid = ANY (ended)
        RETURNING m.seq, m.sub, m.failed, m.id, m.topic, m.name, m.created_at, m.started_at, m.expires_at,
            m.result_ttl, m.failures, m.line, m.idempotency_key
    ), kept AS (
        INSERT INTO record (
            seq, sub, state, attempt, id, topic, name, created_at, started_at, finished_at, expires_at, purge_at,
            failures
        )
        SELECT g.seq, g.sub, how, g.failed + 1, g.id, g.topic, g.name, g.created_at, g.started_at, moment,
            g.expires_at, moment + g.result_ttl, g.failures
        -- What has a key leaves a record in any case: the key goes with it.
        FROM gone g WHERE g.result_ttl > 0 OR g.idempotency_key IS NOT NULL
        ON CONFLICT DO NOTHING
    )
    SELECT coalesce(array_agg(DISTINCT g.line) FILTER (WHERE g.line IS NOT NULL), '{}') FROM gone g
$$;

-- Lets the first message of each line be claimed, if none of it is running; and only the first. In one's turn.
CREATE FUNCTION advance(the_sub integer, lines text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    the_line text;
    head bigint;
BEGIN
    FOREACH the_line IN ARRAY lines LOOP
        CONTINUE WHEN EXISTS (
            SELECT FROM message m WHERE m.sub = the_sub AND m.line = the_line AND m.visible_at IS NOT NULL
                AND m.state = 1
        );
        SELECT m.seq INTO head FROM message m
            WHERE m.sub = the_sub AND m.line = the_line AND m.lane <> 60 ORDER BY m.seq LIMIT 1;
        UPDATE message m SET visible_at = NULL
            WHERE m.sub = the_sub AND m.line = the_line AND m.visible_at IS NOT NULL AND m.lane <> 60 AND m.seq <> head;
        UPDATE message m SET visible_at = m.due
            WHERE m.sub = the_sub AND m.line = the_line AND m.seq = head AND m.visible_at IS NULL;
    END LOOP;
END
$$;

-- Puts what was published into its lines. In one's turn.
CREATE FUNCTION place(the_sub integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    lines text[];
BEGIN
    WITH placed AS (
        UPDATE message m SET lane = CASE WHEN m.suspect THEN 50 ELSE 0 END - m.priority, visible_at = NULL
        WHERE m.sub = the_sub AND m.lane = 60 AND m.visible_at IS NOT NULL
        RETURNING m.line
    )
    SELECT array_agg(DISTINCT p.line) INTO lines FROM placed p;
    IF lines IS NOT NULL THEN
        PERFORM advance(the_sub, lines);
    END IF;
END
$$;

-- Ends what waits past its expiry; in an ordered subscription in one's turn. How many.
CREATE FUNCTION expire(the_sub integer, most integer, moment float8) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    ended tid[];
    lines text[];
BEGIN
    IF NOT EXISTS (
        SELECT FROM message m WHERE m.sub = the_sub AND m.expires_at <= moment AND m.expires_at IS NOT NULL
            AND m.state = 0
    ) THEN
        RETURN 0;
    END IF;
    PERFORM turn(the_sub);
    ended := ARRAY(
        SELECT m.ctid FROM message m WHERE m.sub = the_sub AND m.expires_at <= moment AND m.expires_at IS NOT NULL
            AND m.state = 0 ORDER BY m.expires_at LIMIT most FOR UPDATE SKIP LOCKED
    );
    lines := remember(ended, 5, moment);
    PERFORM advance(the_sub, lines);
    RETURN cardinality(ended);
END
$$;

-- Returns what dead or frozen holders had. All of it counts, for nobody can tell what they had started; what was to be
-- cancelled ends.
CREATE FUNCTION take_back(the_sub integer, moment float8) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    ended tid[];
BEGIN
    WITH back AS (
        UPDATE message m SET state = 0, lane = 50 - m.priority, visible_at = 0, due = moment, lease = 0,
            failed = m.failed + 1, suspect = true, progress = NULL,
            failures = array_append(m.failures, json_build_object(
                'attempt', m.failed + 1, 'reason', 'worker_lost',
                'message', 'its worker died, or froze past its lease, while it had it', 'worker', m.worker,
                'started_at', m.started_at, 'failed_at', moment
            )::text)
        WHERE m.ctid = ANY (ARRAY(
            SELECT l.ctid FROM message l WHERE l.sub = the_sub AND l.lane = 100 AND l.visible_at <= moment
                ORDER BY l.visible_at LIMIT 500 FOR UPDATE SKIP LOCKED
        ))
        RETURNING m.ctid, m.cancel
    )
    SELECT array_agg(b.ctid) INTO ended FROM back b WHERE b.cancel;
    IF ended IS NOT NULL THEN
        PERFORM advance(the_sub, remember(ended, 4, moment));
    END IF;
END
$$;

-- Leases up to `most` ready messages for `seconds`: of suspects at most one, and none while the caller's `held` one
-- is still his under `held_lease`.
CREATE FUNCTION claim(
    the_sub integer, most integer, seconds float8, holder text, held text, held_lease bigint, clock float8
) RETURNS TABLE (
    lease bigint, failed integer, suspect boolean, line text, id text, topic text, name text, body bytea,
    headers json, key text, priority smallint, created_at float8, not_before float8, expires_at float8,
    result_ttl float8, idempotency_key text, dedup_window float8
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    in_order boolean := turn(the_sub);
    moment float8 := instant(clock);
    token bigint;
    suspects smallint;
    the_lane smallint := -100;
    room integer := most;
    count integer;
BEGIN
    IF in_order IS NULL THEN
        RAISE EXCEPTION 'no such subscription' USING ERRCODE = 'PR404';
    END IF;
    IF EXISTS (SELECT FROM message m WHERE m.sub = the_sub AND m.lane = 100 AND m.visible_at <= moment) THEN
        PERFORM take_back(the_sub, moment);
    END IF;
    IF in_order THEN
        PERFORM place(the_sub);
    END IF;
    PERFORM expire(the_sub, 500, moment);
    -- Asked only now: what the caller held may just have been taken back from it.
    IF held IS NULL
        OR NOT EXISTS (SELECT FROM message m WHERE m.id = held AND m.sub = the_sub AND m.lease = held_lease)
    THEN
        suspects := (
            SELECT min(m.lane) FROM message m WHERE m.sub = the_sub AND m.lane BETWEEN 41 AND 50
                AND m.visible_at <= moment
        );
    END IF;
    WHILE room > 0 LOOP
        the_lane := (
            SELECT m.lane FROM message m WHERE m.sub = the_sub AND m.lane > the_lane AND m.lane <= 0
                AND m.visible_at IS NOT NULL ORDER BY m.lane LIMIT 1
        );
        IF suspects IS NOT NULL AND (the_lane IS NULL OR suspects - 50 <= the_lane) THEN
            token := coalesce(token, nextval('lease'));
            RETURN QUERY SELECT * FROM take(the_sub, suspects, 1, token, moment, seconds, holder);
            GET DIAGNOSTICS count = ROW_COUNT;
            room := room - count;
            suspects := NULL;
        END IF;
        EXIT WHEN the_lane IS NULL OR room <= 0;
        token := coalesce(token, nextval('lease'));
        RETURN QUERY SELECT * FROM take(the_sub, the_lane, room, token, moment, seconds, holder);
        GET DIAGNOSTICS count = ROW_COUNT;
        room := room - count;
    END LOOP;
END
$$;

-- Leases what is ready in one lane, the longest ready first.
CREATE FUNCTION take(
    the_sub integer, the_lane smallint, most integer, token bigint, moment float8, seconds float8, holder text
) RETURNS TABLE (
    lease bigint, failed integer, suspect boolean, line text, id text, topic text, name text, body bytea,
    headers json, key text, priority smallint, created_at float8, not_before float8, expires_at float8,
    result_ttl float8, idempotency_key text, dedup_window float8
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH picked AS MATERIALIZED (
        SELECT m.ctid, m.visible_at, m.seq FROM message m
        WHERE m.sub = the_sub AND m.lane = the_lane AND m.visible_at <= moment
            AND (m.expires_at IS NULL OR m.expires_at > moment)
        ORDER BY m.visible_at, m.seq LIMIT most FOR UPDATE SKIP LOCKED
    ), taken AS (
        UPDATE message m SET state = 1, lane = 100, visible_at = moment + seconds, lease = token, started_at = moment,
            worker = holder
        FROM picked p WHERE m.ctid = p.ctid
        RETURNING m.failed, m.suspect, m.line, m.id, m.topic, m.name, m.body, m.headers, m.key, m.priority,
            m.created_at, m.not_before, m.expires_at, m.result_ttl, m.idempotency_key, m.dedup_window,
            p.visible_at AS ready_at, m.seq
    )
    SELECT token, t.failed, t.suspect, t.line, t.id, t.topic, t.name, t.body, t.headers, t.key, t.priority,
        t.created_at, t.not_before, t.expires_at, t.result_ttl, t.idempotency_key, t.dedup_window
    FROM taken t ORDER BY t.ready_at, t.seq;
END
$$;

-- Seconds until a claim may find something: 0 if there is something now, NULL if nothing is to come by time alone.
CREATE FUNCTION pause(the_sub integer, may_have_suspect boolean, clock float8) RETURNS float8
LANGUAGE plpgsql AS $$
DECLARE
    moment float8 := instant(clock);
    the_lane smallint := -100;
    soonest float8;
    next float8;
BEGIN
    LOOP
        the_lane := (
            SELECT m.lane FROM message m WHERE m.sub = the_sub AND m.lane > the_lane AND m.visible_at IS NOT NULL
                ORDER BY m.lane LIMIT 1
        );
        EXIT WHEN the_lane IS NULL;
        CONTINUE WHEN the_lane BETWEEN 41 AND 50 AND NOT may_have_suspect;
        next := (
            SELECT m.visible_at FROM message m WHERE m.sub = the_sub AND m.lane = the_lane
                AND m.visible_at IS NOT NULL ORDER BY m.visible_at LIMIT 1
        );
        soonest := least(soonest, CASE WHEN the_lane = 60 THEN 0 ELSE next END);
    END LOOP;
    RETURN greatest(0, soonest - moment);
END
$$;

-- Performs outcomes of deliveries, each fenced by its lease. `acks`: objects of place, id, lease and result (base64);
-- `others`: of place, id, lease, verb, delay, suspect and failure (JSON text). The places of those that were held.
CREATE FUNCTION settle(the_sub integer, acks json, others json, clock float8) RETURNS integer[]
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    in_order boolean := turn(the_sub);
    moment float8 := instant(clock);
    done integer[];
    lines text[];
    more record;
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    WITH gone AS (
        DELETE FROM message m
        USING json_to_recordset(acks) AS a(place integer, id text, lease bigint, result text)
        WHERE m.id = a.id AND m.sub = the_sub AND m.lease = a.lease
        RETURNING m.seq, m.failed, m.id, m.topic, m.name, m.created_at, m.started_at, m.expires_at, m.result_ttl,
            m.lease, m.failures, m.line, m.idempotency_key, a.place, a.result
    ), kept AS (
        INSERT INTO record (
            seq, sub, state, attempt, id, topic, name, created_at, started_at, finished_at, expires_at, purge_at,
            lease, result, failures
        )
        SELECT g.seq, the_sub, 2, g.failed + 1, g.id, g.topic, g.name, g.created_at, g.started_at, moment,
            g.expires_at, moment + g.result_ttl, g.lease, decode(g.result, 'base64'), g.failures
        FROM gone g WHERE g.result_ttl > 0 OR g.idempotency_key IS NOT NULL
        ON CONFLICT DO NOTHING
    )
    SELECT coalesce(array_agg(g.place), '{}'), coalesce(array_agg(DISTINCT g.line), '{}') INTO done, lines
        FROM gone g;
    IF cardinality(done) < json_array_length(acks) THEN
        -- Acknowledged before, by a call whose answer was lost.
        done := done || ARRAY(
            SELECT a.place FROM json_to_recordset(acks) AS a(place integer, id text, lease bigint), record r
            WHERE r.id = a.id AND r.sub = the_sub AND r.lease = a.lease AND a.place <> ALL (done)
        );
    END IF;
    IF others IS NOT NULL THEN
        -- Names of their own: a column called done would be taken for what was acknowledged.
        SELECT done || o.held, lines || o.freed INTO done, lines FROM settle_others(the_sub, others, moment) AS o;
    END IF;
    IF in_order THEN
        PERFORM advance(the_sub, array_remove(lines, NULL));
    END IF;
    RETURN done;
END
$$;

CREATE FUNCTION settle_others(the_sub integer, others json, moment float8, OUT held integer[], OUT freed text[])
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    o record;
    m record;
    the_row tid;
    verb text;
BEGIN
    held := '{}';
    freed := '{}';
    FOR o IN
        SELECT * FROM json_to_recordset(others) AS o(
            place integer, id text, lease bigint, verb text, delay float8, suspect boolean, failure text
        )
    LOOP
        SELECT k.ctid, k.cancel, k.line INTO m FROM message k
            WHERE k.id = o.id AND k.sub = the_sub AND k.lease = o.lease FOR UPDATE;
        IF NOT FOUND THEN
            IF EXISTS (SELECT FROM message k WHERE k.id = o.id AND k.sub = the_sub AND k.settled = o.lease) THEN
                -- Settled before, by a call whose answer was lost.
                held := held || o.place;
            END IF;
            CONTINUE;
        END IF;
        -- It would run again although its cancellation was confirmed to somebody.
        verb := CASE WHEN m.cancel AND o.verb IN ('retry', 'release') THEN 'cancel' ELSE o.verb END;
        IF verb = 'retry' THEN
            UPDATE message k SET state = 0, lane = CASE WHEN o.suspect THEN 50 ELSE 0 END - k.priority,
                visible_at = moment + o.delay, due = moment + o.delay, lease = 0, settled = k.lease,
                failed = k.failed + 1, suspect = o.suspect, progress = NULL, failures = array_append(k.failures, o.failure)
            WHERE k.ctid = m.ctid;
        ELSIF verb = 'release' THEN
            UPDATE message k SET state = 0, lane = CASE WHEN k.suspect THEN 50 ELSE 0 END - k.priority,
                visible_at = CASE WHEN o.delay > 0 THEN moment + o.delay ELSE 0 END, due = moment + o.delay,
                lease = 0, settled = k.lease, progress = NULL
            WHERE k.ctid = m.ctid;
        ELSIF verb = 'dead' THEN
            UPDATE message k SET state = 3, lane = 0, visible_at = NULL, lease = 0, settled = k.lease, line = NULL,
                suspect = false, failed = k.failed + 1, dead_at = moment, progress = NULL,
                failures = array_append(k.failures, o.failure)
            WHERE k.ctid = m.ctid;
        ELSE
            the_row := m.ctid;
            IF o.failure IS NOT NULL THEN
                UPDATE message k SET failures = array_append(k.failures, o.failure) WHERE k.ctid = the_row
                    RETURNING k.ctid INTO the_row;
            END IF;
            PERFORM remember(ARRAY[the_row], 4, moment);
        END IF;
        held := held || o.place;
        freed := freed || m.line;
    END LOOP;
END
$$;

-- Renews leases, given as two lists, for `seconds`. The ids of those that are still held.
CREATE FUNCTION extend(the_sub integer, ids text[], leases bigint[], seconds float8, clock float8) RETURNS SETOF text
LANGUAGE sql AS $$
    UPDATE message m
    SET visible_at = instant(clock) + seconds
    FROM unnest(ids, leases) AS held(id, lease)
    WHERE m.id = held.id AND m.sub = the_sub AND m.lease = held.lease
    RETURNING m.id
$$;
