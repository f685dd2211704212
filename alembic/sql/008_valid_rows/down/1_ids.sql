-- == change the ids of runs and node runs to INTEGER where the tables are small
-- Refused before anything is changed, if an id is too large. A large table keeps BIGINT, in which older revisions work as well.
DO $integer$
DECLARE
    c record;
BEGIN
    IF (SELECT max(id) FROM circle.pipeline_runs) > 2147483647 OR (SELECT max(id) FROM circle.pipeline_node_runs) > 2147483647 THEN
        RAISE EXCEPTION 'ids of runs or node runs are larger than an INTEGER can hold; nothing was changed'
            USING ERRCODE = 'PL090', DETAIL = '["circle.pipeline_runs or circle.pipeline_node_runs: ids above 2147483647"]',
                  HINT = 'Purge the runs with large ids, or stay at this revision.';
    END IF;
    FOR c IN SELECT t.tab, t.col, t.seq
             FROM (VALUES ('circle.pipeline_node_runs'::regclass, 'run_id', NULL),
                          ('circle.pipeline_node_runs', 'id', pg_get_serial_sequence('circle.pipeline_node_runs', 'id')),
                          ('circle.pipeline_runs', 'id', pg_get_serial_sequence('circle.pipeline_runs', 'id'))) t (tab, col, seq)
             JOIN pg_attribute a ON a.attrelid = t.tab AND a.attname = t.col AND a.atttypid = 'bigint'::regtype
             WHERE pg_relation_size(t.tab) <= 8388608 LOOP
        BEGIN
            EXECUTE format('ALTER TABLE %s ALTER COLUMN %I TYPE integer', c.tab, c.col);
            IF c.seq IS NOT NULL THEN
                -- it may be ahead of the ids that are left
                EXECUTE format('SELECT setval(%L, coalesce(max(id), 1), max(id) IS NOT NULL) FROM %s
                                HAVING (SELECT last_value FROM %s) > 2147483647', c.seq, c.tab, c.seq);
                EXECUTE format('ALTER SEQUENCE %s AS integer', c.seq);
            END IF;
        EXCEPTION WHEN feature_not_supported THEN
            RAISE WARNING '%.% stays BIGINT: %', c.tab, c.col, SQLERRM;
        END;
    END LOOP;
END $integer$;
