-- What people and programs ask beside the flow of messages.

-- Cancels every copy that waits, and asks those that run to stop. The answer for each copy.
CREATE FUNCTION cancel(the_id text, clock float8) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    moment float8 := instant(clock);
    the_sub integer;
    m record;
BEGIN
    FOR the_sub IN SELECT k.sub FROM message k WHERE k.id = the_id ORDER BY k.sub LOOP
        PERFORM turn(the_sub);
        SELECT k.ctid, k.state, k.expires_at INTO m FROM message k
            WHERE k.id = the_id AND k.sub = the_sub FOR UPDATE;
        CONTINUE WHEN NOT FOUND;
        IF m.state = 0 THEN
            PERFORM advance(the_sub, remember(ARRAY[m.ctid], 4, moment));
            RETURN NEXT 'cancelled';
        ELSIF m.state = 1 THEN
            UPDATE message k SET cancel = true WHERE k.ctid = m.ctid;
            RETURN NEXT 'requested';
        ELSE
            RETURN NEXT 'finished';
        END IF;
    END LOOP;
    RETURN QUERY SELECT 'finished' FROM record r WHERE r.id = the_id AND r.purge_at > moment;
END
$$;

-- Dead letters back into their subscription. The ids of those that were dead until now.
CREATE FUNCTION redrive(the_sub integer, ids text[], clock float8) RETURNS SETOF text LANGUAGE sql AS $$
    UPDATE message m SET state = 0, failed = 0, cancel = false, redriven = m.redriven + 1, dead_at = NULL,
        expires_at = NULL, due = instant(clock),
        visible_at = instant(clock),
        line = CASE WHEN s.ordered THEN m.key END,
        lane = CASE WHEN s.ordered AND m.key IS NOT NULL THEN 60 ELSE -m.priority END
    FROM subscription s
    WHERE s.id = the_sub AND m.sub = the_sub AND m.id = ANY (ids) AND m.state = 3
    RETURNING m.id
$$;

-- Deletes dead letters. The ids of those that were.
CREATE FUNCTION discard(the_sub integer, ids text[]) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    gone text[];
BEGIN
    WITH deleted AS (
        DELETE FROM message m WHERE m.sub = the_sub AND m.id = ANY (ids) AND m.state = 3 RETURNING m.id
    )
    SELECT array_agg(d.id) INTO gone FROM deleted d;
    PERFORM free_keys(gone);
    RETURN QUERY SELECT unnest(gone);
END
$$;

-- Ends some of what waits, none of it newer than `up_to`. How many; 0 when it is done.
CREATE FUNCTION purge(the_sub integer, up_to bigint, most integer, clock float8) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    moment float8 := instant(clock);
    ended tid[];
    lines text[];
BEGIN
    PERFORM turn(the_sub);
    ended := ARRAY(
        SELECT m.ctid FROM message m WHERE m.sub = the_sub AND m.line IS NOT NULL AND m.state = 0 AND m.seq <= up_to
            LIMIT most FOR UPDATE SKIP LOCKED
    );
    IF ended = '{}' THEN
        ended := ARRAY(
            SELECT m.ctid FROM message m WHERE m.sub = the_sub AND m.visible_at IS NOT NULL AND m.lane < 100
                AND m.state = 0 AND m.seq <= up_to LIMIT most FOR UPDATE SKIP LOCKED
        );
    END IF;
    lines := remember(ended, 4, moment);
    -- Something newer of that key may have come meanwhile.
    PERFORM advance(the_sub, lines);
    RETURN cardinality(ended);
END
$$;

-- Retained messages of these topics once more, from `after` on in the log, to one subscription: those that have not
-- ended yet are left alone. How many, and where to go on; `last` is NULL at the end.
CREATE FUNCTION replay(
    the_sub integer, topics text[], since float8, after bigint, most integer, clock float8,
    OUT count integer, OUT last bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    moment float8 := instant(clock);
    s subscription;
    m record;
    seen record;
    history text[];
BEGIN
    count := 0;
    SELECT * INTO s FROM subscription k WHERE k.id = the_sub;
    FOR m IN
        SELECT l.seq AS place, l.published_at, l.message, b.* FROM log l, json_to_record(l.message) AS b(
            id text, topic text, name text, body text, headers json, key text, priority smallint, created_at float8,
            expires_at float8, idempotency_key text, dedup_window float8, result_ttl float8
        )
        WHERE l.topic = ANY (topics) AND l.seq > after AND l.purge_at > moment ORDER BY l.seq LIMIT most
    LOOP
        last := m.place;
        CONTINUE WHEN m.published_at < since OR m.expires_at <= moment;
        CONTINUE WHEN s.filter IS NOT NULL AND NOT fits(m.headers, s.filter);
        history := NULL;
        SELECT k.ctid, k.state, k.failures INTO seen FROM message k
            WHERE k.id = m.id AND k.sub = the_sub FOR UPDATE;
        IF FOUND THEN
            CONTINUE WHEN seen.state <> 3;
            history := seen.failures;
            DELETE FROM message k WHERE k.ctid = seen.ctid;
        END IF;
        DELETE FROM record r WHERE r.id = m.id AND r.sub = 0;
        DELETE FROM record r WHERE r.id = m.id AND r.sub = the_sub RETURNING r.failures INTO seen;
        IF FOUND THEN
            history := seen.failures;
        END IF;
        INSERT INTO message (
            sub, lane, state, visible_at, due, priority, id, line, topic, name, body, headers, key, created_at,
            expires_at, result_ttl, idempotency_key, dedup_window, failures
        ) VALUES (
            the_sub, CASE WHEN s.ordered AND m.key IS NOT NULL THEN 60 ELSE -m.priority END, 0, moment, moment,
            m.priority, m.id, CASE WHEN s.ordered THEN m.key END, m.topic, m.name, decode(m.body, 'base64'),
            CASE WHEN m.headers::text <> '{}' THEN m.headers END, m.key, m.created_at, m.expires_at, m.result_ttl,
            m.idempotency_key, m.dedup_window, history
        ) ON CONFLICT DO NOTHING;
        count := count + 1;
    END LOOP;
END
$$;

-- Every subscription in numbers.
CREATE FUNCTION stats(clock float8) RETURNS TABLE (
    name text, pattern text, queue boolean, ready bigint, delayed bigint, running bigint, dead bigint, oldest float8
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    moment float8 := instant(clock);
    s record;
BEGIN
    FOR s IN SELECT k.id FROM subscription k WHERE k.ordered ORDER BY k.id LOOP
        -- What was published into lines is ready or delayed only once it has its place.
        IF EXISTS (SELECT FROM message m WHERE m.sub = s.id AND m.lane = 60 AND m.visible_at IS NOT NULL) THEN
            PERFORM turn(s.id), place(s.id);
        END IF;
    END LOOP;
    RETURN QUERY
    SELECT k.name, k.pattern, coalesce(t.queue, false), f.ready, f.delayed + b.behind, f.running, d.dead,
        moment - o.due
    FROM subscription k
    LEFT JOIN topic t ON t.name = k.pattern
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE m.lane < 100 AND m.visible_at <= moment) AS ready,
            count(*) FILTER (WHERE m.lane < 100 AND m.visible_at > moment) AS delayed,
            count(*) FILTER (WHERE m.lane = 100) AS running
        FROM message m WHERE m.sub = k.id AND m.visible_at IS NOT NULL
    ) AS f
    CROSS JOIN LATERAL (
        SELECT count(*) AS behind FROM message m WHERE m.sub = k.id AND m.line IS NOT NULL AND m.visible_at IS NULL
    ) AS b
    CROSS JOIN LATERAL (SELECT count(*) AS dead FROM message m WHERE m.sub = k.id AND m.state = 3) AS d
    CROSS JOIN LATERAL (
        SELECT min(first.due) AS due FROM (
            SELECT m.due FROM message m WHERE m.sub = k.id AND m.lane < 100 AND m.visible_at <= moment
                AND m.state = 0 LIMIT 100
        ) AS first
    ) AS o
    ORDER BY k.name;
END
$$;

-- Removes some of what has ended long enough ago, and ends what has expired. How many rows.
CREATE FUNCTION tidy(most integer, clock float8) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    moment float8 := instant(clock);
    total integer;
    count integer;
    gone text[];
BEGIN
    SELECT coalesce(sum(expire(s.id, most, moment)), 0) INTO total FROM subscription s;
    -- What another process is just removing need not be waited for.
    WITH deleted AS (
        DELETE FROM record WHERE ctid = ANY (ARRAY(
            SELECT r.ctid FROM record r WHERE r.purge_at <= moment LIMIT most FOR UPDATE SKIP LOCKED
        ))
        RETURNING record.id
    )
    SELECT coalesce(array_agg(d.id), '{}') INTO gone FROM deleted d;
    PERFORM free_keys(gone);
    total := total + cardinality(gone);
    DELETE FROM log WHERE ctid = ANY (ARRAY(
        SELECT l.ctid FROM log l WHERE l.purge_at <= moment LIMIT most FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS count = ROW_COUNT;
    total := total + count;
    DELETE FROM dedup WHERE ctid = ANY (ARRAY(
        SELECT d.ctid FROM dedup d WHERE d.until <= moment LIMIT most FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS count = ROW_COUNT;
    RETURN total + count;
END
$$;
