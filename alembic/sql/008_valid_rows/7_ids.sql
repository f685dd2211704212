-- == change the ids of runs and node runs to BIGINT where the tables are small
-- 2,000 calls a second use up the ids of an INTEGER in five months. A column of a large table is left as it is, because the change
-- rewrites the table under an exclusive lock; doctor reports how far its ids have come.
DO $bigint$
DECLARE
    c record;
BEGIN
    FOR c IN SELECT t.tab, t.col, t.seq, pg_relation_size(t.tab) > 8388608 AS large
             FROM (VALUES ('circle.pipeline_runs'::regclass, 'id', pg_get_serial_sequence('circle.pipeline_runs', 'id')),
                          ('circle.pipeline_node_runs', 'id', pg_get_serial_sequence('circle.pipeline_node_runs', 'id')),
                          ('circle.pipeline_node_runs', 'run_id', NULL)) t (tab, col, seq)
             JOIN pg_attribute a ON a.attrelid = t.tab AND a.attname = t.col AND a.atttypid <> 'bigint'::regtype LOOP
        IF c.large THEN
            RAISE WARNING '%.% stays INTEGER: the table is too large to be rewritten under a lock', c.tab, c.col;
        ELSE
            BEGIN
                EXECUTE format('ALTER TABLE %s ALTER COLUMN %I TYPE bigint', c.tab, c.col);
                IF c.seq IS NOT NULL THEN
                    EXECUTE format('ALTER SEQUENCE %s AS bigint', c.seq);
                END IF;
            EXCEPTION WHEN feature_not_supported THEN
                RAISE WARNING '%.% stays INTEGER: %', c.tab, c.col, SQLERRM;   -- a view of the host shows it
            END;
        END IF;
    END LOOP;
END $bigint$;
