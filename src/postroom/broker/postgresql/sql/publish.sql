-- Storing messages. `batch` is a JSON array of them; bodies are in base64. `clock` is the time if it is not to be
-- the server's, `told` the time at the client: times in messages are by the clock of their producer.

CREATE FUNCTION fits(headers json, filter json) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT NOT EXISTS (
        SELECT FROM json_each_text(filter) AS wanted WHERE headers ->> wanted.key IS DISTINCT FROM wanted.value
    )
$$;

-- Answers that differ from "stored under its own id", and the subscriptions in which something may have become
-- ready. `joined`: the transaction is the caller's own and may last.
CREATE FUNCTION publish(batch json, joined boolean, clock float8, told float8, OUT answers json, OUT woken integer[])
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    moment float8 := instant(clock);
    shift float8 := moment - told;
    topics text[];
    keyed boolean;
    known integer;
    plain boolean;
    refused integer[] := '{}';
    replaced text[] := '{}';
    ids text[];
    subs integer[];
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        -- Whoever is answered was promised that it survives.
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    SELECT array_agg(DISTINCT m.topic), bool_or(m.idempotency_key IS NOT NULL) INTO topics, keyed
        FROM json_to_recordset(batch) AS m(topic text, idempotency_key text);
    SELECT count(*), bool_and(t.queue AND t.retention = 0) INTO known, plain FROM topic t WHERE t.name = ANY (topics);
    plain := plain AND NOT EXISTS (SELECT FROM route r WHERE r.topic = ANY (topics) AND r.filter IS NOT NULL);
    IF keyed OR known < cardinality(topics)
        OR EXISTS (SELECT FROM route r WHERE r.topic = ANY (topics) AND r.maximum IS NOT NULL)
    THEN
        SELECT a.answers, a.refused, a.replaced INTO answers, refused, replaced FROM admit(batch, joined, moment) AS a;
    END IF;

    IF plain IS NOT TRUE THEN
        -- Before the routes are read: whoever declares a subscription that begins with what is retained has locked
        -- the log, so a message is in the log it copies, or goes by the new route.
        PERFORM retain(batch, refused, moment);
    END IF;
    WITH fresh AS (
        INSERT INTO message (
            sub, lane, state, visible_at, due, priority, id, line, topic, name, body, headers, key, created_at,
            not_before, expires_at, result_ttl, idempotency_key, dedup_window
        )
        SELECT r.sub, CASE WHEN r.ordered AND m.key IS NOT NULL THEN 60 ELSE -m.priority END, 0,
            greatest(moment, m.not_before + shift), greatest(moment, m.not_before + shift), m.priority, m.id,
            CASE WHEN r.ordered THEN m.key END, m.topic, m.name, decode(m.body, 'base64'),
            CASE WHEN m.headers::text <> '{}' THEN m.headers END, m.key, m.created_at,
            m.not_before, m.expires_at + shift, m.result_ttl, m.idempotency_key, m.dedup_window
        FROM ROWS FROM (
            json_to_recordset(batch) AS (
                id text, topic text, name text, body text, headers json, key text, priority smallint,
                created_at float8, not_before float8, expires_at float8, idempotency_key text, dedup_window float8,
                result_ttl float8
            )
        ) WITH ORDINALITY AS m(
            id, topic, name, body, headers, key, priority, created_at, not_before, expires_at, idempotency_key,
            dedup_window, result_ttl, place
        )
        JOIN route r ON r.topic = m.topic
        WHERE m.place <> ALL (refused) AND (r.filter IS NULL OR fits(m.headers, r.filter))
        ORDER BY m.place
        ON CONFLICT (id, sub) DO NOTHING
        RETURNING message.id, message.sub
    )
    SELECT array_agg(fresh.id), array_agg(fresh.sub), array_agg(DISTINCT fresh.sub) INTO ids, subs, woken FROM fresh;
    -- What has ended already is no second message. Looked for now, for it may have ended a moment ago.
    DELETE FROM message m USING unnest(ids, subs) AS fresh(id, sub), record r
        WHERE r.id = fresh.id AND r.sub = fresh.sub AND m.id = r.id AND m.sub = r.sub;
    IF replaced <> '{}' THEN
        PERFORM displace(r.id, moment) FROM unnest(replaced) AS r(id);
    END IF;
    IF plain IS NOT TRUE THEN
        PERFORM note_unwanted(batch, refused, moment);
    END IF;
    IF joined AND woken IS NOT NULL THEN
        PERFORM pg_notify(current_schema(), array_to_string(woken, ','));
    END IF;
END
$$;

-- Unknown topics, idempotency keys and limits: what they mean for each message. `refused` are the places in the
-- batch of those that are not to be stored, `replaced` the ids of those that another of the batch replaces.
CREATE FUNCTION admit(
    batch json, joined boolean, moment float8, OUT answers json, OUT refused integer[], OUT replaced text[]
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    given jsonb := '{}';
    rooms jsonb := '{}';
    makes_way jsonb := '{}';  -- ids of what was replaced, by the places of what replaces it
    turned_away text[] := '{}';
    print bytea;
    latest text;  -- the last that took its key
    first record;
    m record;
    r record;
BEGIN
    replaced := '{}';
    -- In one order everywhere: two batches with the same keys must not wait for each other.
    FOR m IN
        SELECT b.* FROM ROWS FROM (
            json_to_recordset(batch) AS (
                id text, topic text, name text, body text, idempotency_key text, dedup_window float8, "unique" text,
                replace boolean
            )
        ) WITH ORDINALITY AS b(id, topic, name, body, idempotency_key, dedup_window, how, replace, place)
        WHERE b.idempotency_key IS NOT NULL AND EXISTS (SELECT FROM topic t WHERE t.name = b.topic)
        ORDER BY b.topic, b.idempotency_key, b.place
    LOOP
        print := sha256(convert_to(m.name, 'UTF8') || '\x00'::bytea || decode(m.body, 'base64'));
        INSERT INTO dedup AS known VALUES (
            m.topic, m.idempotency_key, m.id, print,
            CASE WHEN m.how IS NULL THEN moment + m.dedup_window ELSE 'Infinity' END
        )
            ON CONFLICT (topic, key) DO UPDATE
            SET id = excluded.id, fingerprint = excluded.fingerprint, until = excluded.until
            WHERE known.until <= moment;
        IF NOT FOUND THEN
            SELECT d.id, d.fingerprint = print AS same INTO first FROM dedup d
                WHERE d.topic = m.topic AND d.key = m.idempotency_key;
            IF m.replace AND first.id <> m.id THEN
                IF m.id = ANY (replaced) OR EXISTS (SELECT FROM message k WHERE k.id = m.id)
                    OR EXISTS (SELECT FROM record k WHERE k.id = m.id)
                THEN
                    -- Published before: what came after it keeps the key.
                    given := given || jsonb_build_object(m.place, jsonb_build_object('id', m.id));
                    CONTINUE;
                END IF;
                IF first.id = latest THEN
                    replaced := replaced || latest;
                    makes_way := makes_way || jsonb_build_object(m.place, latest);
                ELSIF displace(first.id, moment) THEN
                    makes_way := makes_way || jsonb_build_object(m.place, first.id);
                END IF;
            ELSIF m.how IS NULL OR first.id = latest OR holds(first.id, m.how, moment) THEN
                given := given || jsonb_build_object(
                    m.place,
                    jsonb_build_object('id', first.id, 'refusal', CASE WHEN NOT first.same THEN 'conflict' END)
                );
                CONTINUE;
            END IF;
            UPDATE dedup d SET id = m.id, fingerprint = print, until = 'Infinity'
                WHERE d.topic = m.topic AND d.key = m.idempotency_key;
        END IF;
        latest := m.id;
    END LOOP;
    FOR m IN
        SELECT b.place, b.id, b.topic, b.headers, b.idempotency_key,
            EXISTS (SELECT FROM topic t WHERE t.name = b.topic) AS known
        FROM ROWS FROM (json_to_recordset(batch) AS (id text, topic text, headers json, idempotency_key text))
            WITH ORDINALITY AS b(id, topic, headers, idempotency_key, place)
        ORDER BY b.place
    LOOP
        CONTINUE WHEN given ? m.place::text;
        IF NOT m.known THEN
            given := given || jsonb_build_object(m.place, jsonb_build_object('refusal', 'topic'));
            CONTINUE;
        END IF;
        -- It takes the room of what it replaces.
        CONTINUE WHEN makes_way ? m.place::text AND makes_way ->> m.place::text <> ALL (turned_away);
        FOR r IN
            SELECT l.sub, l.name, l.maximum FROM route l WHERE l.topic = m.topic AND l.maximum IS NOT NULL
                AND (l.filter IS NULL OR fits(m.headers, l.filter)) ORDER BY l.sub
        LOOP
            IF NOT rooms ? r.sub::text THEN
                rooms := rooms || jsonb_build_object(r.sub, r.maximum - occupied(r.sub, r.maximum, joined, moment));
            END IF;
            IF (rooms ->> r.sub::text)::integer <= 0 THEN
                given := given || jsonb_build_object(
                    m.place, jsonb_build_object('refusal', 'full', 'name', r.name, 'maximum', r.maximum)
                );
                -- Nothing was stored under its key.
                DELETE FROM dedup d WHERE d.topic = m.topic AND d.key = m.idempotency_key AND d.id = m.id;
                turned_away := turned_away || m.id;
                EXIT;
            END IF;
        END LOOP;
        CONTINUE WHEN given ? m.place::text;
        FOR r IN
            SELECT l.sub FROM route l WHERE l.topic = m.topic AND l.maximum IS NOT NULL
                AND (l.filter IS NULL OR fits(m.headers, l.filter))
        LOOP
            rooms := jsonb_set(rooms, ARRAY[r.sub::text], to_jsonb((rooms ->> r.sub::text)::integer - 1));
        END LOOP;
    END LOOP;
    answers := given::json;
    refused := ARRAY(SELECT jsonb_object_keys(given)::integer);
END
$$;

-- How many unsettled messages a subscription holds, counted up to `most`.
CREATE FUNCTION occupied(the_sub integer, most integer, joined boolean, moment float8) RETURNS integer
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    IF NOT joined THEN
        -- Publishers take turns, so that two do not both find the last place free. Whoever brings a transaction of
        -- his own does not: it may last, and all others would wait.
        PERFORM FROM subscription s WHERE s.id = the_sub FOR NO KEY UPDATE;
        PERFORM expire(the_sub, most, moment);
    END IF;
    RETURN (
        SELECT count(*) FROM (
            SELECT FROM message m WHERE m.sub = the_sub AND m.visible_at IS NOT NULL
            UNION ALL
            SELECT FROM message m WHERE m.sub = the_sub AND m.line IS NOT NULL AND m.visible_at IS NULL
            LIMIT most
        ) AS counted
    );
END
$$;

-- What topics retain.
CREATE FUNCTION retain(batch json, refused integer[], moment float8) RETURNS void LANGUAGE sql AS $$
    INSERT INTO log (topic, published_at, purge_at, message)
    SELECT t.name, moment, moment + t.retention, m.whole
    FROM json_array_elements(batch) WITH ORDINALITY AS m(whole, place)
    JOIN topic t ON t.name = m.whole ->> 'topic'
    WHERE t.retention > 0 AND m.place <> ALL (refused)
    ORDER BY m.place
$$;

-- A record of what nobody wanted: its id was given out.
CREATE FUNCTION note_unwanted(batch json, refused integer[], moment float8) RETURNS void LANGUAGE sql AS $$
    INSERT INTO record (seq, sub, state, attempt, id, topic, name, created_at, finished_at, purge_at)
    SELECT nextval(pg_get_serial_sequence('message', 'seq')), 0, 2, 1, m.id, m.topic, m.name, m.created_at, moment,
        moment + CASE WHEN t.retention > 0 THEN t.retention ELSE m.result_ttl END
    FROM ROWS FROM (
        json_to_recordset(batch)
            AS (id text, topic text, name text, headers json, created_at float8, result_ttl float8)
    ) WITH ORDINALITY AS m(id, topic, name, headers, created_at, result_ttl, place)
    JOIN topic t ON t.name = m.topic
    WHERE m.place <> ALL (refused) AND NOT EXISTS (
        SELECT FROM route r WHERE r.topic = m.topic AND (r.filter IS NULL OR fits(m.headers, r.filter))
    )
    ON CONFLICT DO NOTHING
$$;
