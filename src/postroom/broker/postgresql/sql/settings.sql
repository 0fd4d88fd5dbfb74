-- The planner's guesses are wrong for tables that are empty one moment and full the next: every plan here goes by an
-- index, whatever the statistics say, and none is worth compiling.
DO $$
DECLARE
    made regprocedure;
BEGIN
    FOR made IN SELECT p.oid FROM pg_proc p WHERE p.pronamespace = current_schema()::regnamespace LOOP
        IF (SELECT proname FROM pg_proc WHERE oid = made) IN (
            'publish', 'claim', 'settle', 'extend', 'pause', 'cancel', 'redrive', 'discard', 'purge', 'replay', 'stats',
            'tidy', 'turn', 'free_keys'
        ) THEN
            EXECUTE format('ALTER FUNCTION %s SET search_path FROM CURRENT', made);
            EXECUTE format('ALTER FUNCTION %s SET plan_cache_mode = force_generic_plan', made);
            EXECUTE format('ALTER FUNCTION %s SET enable_seqscan = off', made);
            EXECUTE format('ALTER FUNCTION %s SET enable_bitmapscan = off', made);
            EXECUTE format('ALTER FUNCTION %s SET enable_hashjoin = off', made);
            EXECUTE format('ALTER FUNCTION %s SET enable_mergejoin = off', made);
            EXECUTE format('ALTER FUNCTION %s SET jit = off', made);
        END IF;
    END LOOP;
END
$$;
