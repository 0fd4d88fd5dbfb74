-- Unique messages: as long as the first with a key waits or runs, it holds the key.

CREATE FUNCTION holds(the_id text, how text, moment float8) RETURNS boolean LANGUAGE sql AS $$
    SELECT EXISTS (
        SELECT FROM message m WHERE m.id = the_id AND (
            m.state = 1 AND how = 'until_done'
            OR m.state = 0 AND (m.failed = 0 OR how = 'until_done') AND (m.expires_at IS NULL OR m.expires_at > moment)
        )
    )
$$;

-- Cancels what is to be replaced, if it still waits for its first start. Whether it did.
CREATE FUNCTION displace(the_id text, moment float8) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    displaced boolean := false;
    the_sub integer;
    ended tid[];
BEGIN
    FOR the_sub IN SELECT m.sub FROM message m WHERE m.id = the_id ORDER BY m.sub LOOP
        PERFORM turn(the_sub);
        ended := ARRAY(
            SELECT m.ctid FROM message m WHERE m.id = the_id AND m.sub = the_sub AND m.state = 0 AND m.failed = 0
                AND (m.expires_at IS NULL OR m.expires_at > moment) FOR UPDATE
        );
        IF ended <> '{}' THEN
            PERFORM advance(the_sub, remember(ended, 4, moment));
            displaced := true;
        END IF;
    END LOOP;
    RETURN displaced;
END
$$;

-- Keys held by unique messages have no window: they go with the last that is left of what held them. One that another
-- transaction is just using is left to it.
CREATE FUNCTION free_keys(ids text[]) RETURNS void LANGUAGE sql AS $$
    DELETE FROM dedup WHERE ctid = ANY (ARRAY(
        SELECT d.ctid FROM dedup d WHERE d.id = ANY (ids) AND d.until = 'Infinity'
            AND NOT EXISTS (SELECT FROM message m WHERE m.id = d.id) FOR UPDATE SKIP LOCKED
    ))
$$;
