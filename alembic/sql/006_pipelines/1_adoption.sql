-- Revision 006: the pipelines and runs of GatheRing, adopted if present, created if absent.

-- == refuse existing tables that differ from the expected ones
DO $adopt$
DECLARE
    differences jsonb;
BEGIN
    WITH expected (tab, col, typ, required, since) AS (VALUES
        ('pipelines', 'id', 'integer', true, 6),
        ('pipelines', 'name', 'character varying(255)', true, 6),
        ('pipelines', 'description', 'text', false, 6),
        ('pipelines', 'status', 'character varying(50)', false, 6),
        ('pipelines', 'nodes', 'jsonb', false, 6),
        ('pipelines', 'edges', 'jsonb', false, 6),
        ('pipelines', 'created_at', 'timestamp with time zone', false, 6),
        ('pipelines', 'updated_at', 'timestamp with time zone', false, 6),
        ('pipelines', 'last_run', 'timestamp with time zone', false, 6),
        ('pipelines', 'run_count', 'integer', false, 6),
        ('pipelines', 'success_count', 'integer', false, 6),
        ('pipelines', 'error_count', 'integer', false, 6),
        ('pipelines', 'timeout_seconds', 'integer', false, 7),
        ('pipelines', 'max_retries_per_node', 'integer', false, 7),
        ('pipelines', 'retry_backoff_base', 'double precision', false, 7),
        ('pipelines', 'retry_backoff_max', 'double precision', false, 7),
        ('pipeline_runs', 'id', 'integer', true, 6),
        ('pipeline_runs', 'pipeline_id', 'integer', true, 6),
        ('pipeline_runs', 'status', 'character varying(50)', false, 6),
        ('pipeline_runs', 'started_at', 'timestamp with time zone', false, 6),
        ('pipeline_runs', 'completed_at', 'timestamp with time zone', false, 6),
        ('pipeline_runs', 'current_node', 'character varying(100)', false, 6),
        ('pipeline_runs', 'logs', 'jsonb', false, 6),
        ('pipeline_runs', 'trigger_data', 'jsonb', false, 6),
        ('pipeline_runs', 'error_message', 'text', false, 6),
        ('pipeline_runs', 'created_at', 'timestamp with time zone', false, 6),
        ('pipeline_runs', 'duration_seconds', 'integer', false, 7),
        ('pipeline_node_runs', 'id', 'integer', true, 7),
        ('pipeline_node_runs', 'run_id', 'integer', true, 7),
        ('pipeline_node_runs', 'node_id', 'character varying(100)', true, 7),
        ('pipeline_node_runs', 'node_type', 'character varying(50)', true, 7),
        ('pipeline_node_runs', 'status', 'character varying(50)', false, 7),
        ('pipeline_node_runs', 'input_data', 'jsonb', false, 7),
        ('pipeline_node_runs', 'output_data', 'jsonb', false, 7),
        ('pipeline_node_runs', 'error_message', 'text', false, 7),
        ('pipeline_node_runs', 'retry_count', 'integer', false, 7),
        ('pipeline_node_runs', 'started_at', 'timestamp with time zone', false, 7),
        ('pipeline_node_runs', 'completed_at', 'timestamp with time zone', false, 7),
        ('pipeline_node_runs', 'duration_ms', 'integer', false, 7)
    ), present AS (
        SELECT c.oid, c.relname::text AS tab, c.relkind FROM pg_class c
        WHERE c.relnamespace = to_regnamespace('circle')
          AND c.relname IN ('pipelines', 'pipeline_runs', 'pipeline_node_runs')
    ), found AS (
        SELECT p.tab, a.attname::text AS col, format_type(a.atttypid, a.atttypmod) AS typ, a.attnotnull AS required,
               a.atthasdef OR a.attidentity <> '' AS has_default
        FROM present p JOIN pg_attribute a ON a.attrelid = p.oid AND a.attnum > 0 AND NOT a.attisdropped
    ), -- the revision that adds a column adds it where it is missing; so only existing ones have to match
    columns AS (
        SELECT format('%s.%s: %s', coalesce(e.tab, f.tab), coalesce(e.col, f.col), CASE
            WHEN f.col IS NULL THEN format('column is missing (%s expected)', e.typ)
            WHEN e.col IS NULL THEN 'unknown column is NOT NULL and has no default'
            WHEN f.typ <> e.typ THEN format('type is %s, %s expected', f.typ, e.typ)
            ELSE 'NULL is allowed, NOT NULL expected' END) AS difference
        FROM expected e FULL JOIN found f ON f.tab = e.tab AND f.col = e.col
        WHERE (f.col IS NULL AND (e.since = 6 OR e.tab = 'pipeline_node_runs')
               AND e.tab IN (SELECT tab FROM present))
           OR (e.col IS NULL AND f.required AND NOT f.has_default)
           OR f.typ <> e.typ
           OR (e.required AND NOT f.required)
    ), expected_checks (tab, vals, also) AS (VALUES
        ('pipelines', ARRAY['active', 'draft', 'paused'], NULL),
        ('pipeline_runs', ARRAY['cancelled', 'completed', 'failed', 'pending', 'running'],
         ARRAY['cancelled', 'completed', 'failed', 'pending', 'running', 'timeout']),
        ('pipeline_node_runs', ARRAY['cancelled', 'completed', 'failed', 'pending', 'running', 'skipped'], NULL)
    ), found_checks AS (
        SELECT p.tab, c.conname, pg_get_constraintdef(c.oid) AS def,
               ARRAY(SELECT m[1] FROM regexp_matches(pg_get_constraintdef(c.oid), '''([^'']*)''', 'g') m ORDER BY 1) AS vals
        FROM present p JOIN pg_constraint c ON c.conrelid = p.oid AND c.contype = 'c'
        WHERE c.conname = p.tab || '_status_check'
    ), checks AS (
        SELECT format('%s.status: CHECK %s_status_check is %s, the values %s expected', e.tab, e.tab,
                      coalesce(f.def, 'missing'), array_to_string(e.vals, ', ')) AS difference
        FROM expected_checks e LEFT JOIN found_checks f ON f.tab = e.tab
        WHERE e.tab IN (SELECT tab FROM present) AND (f.def IS NULL
          -- the literals may be in any order, but the check must consist of nothing else
          OR regexp_replace(f.def, '''[^'']*''::character varying(, )?', '', 'g')
             <> 'CHECK (((status)::text = ANY ((ARRAY[])::text[])))'
          OR (f.vals <> e.vals AND f.vals IS DISTINCT FROM e.also))
    ), keys AS (
        SELECT format('%s: PRIMARY KEY (id) is missing', p.tab) AS difference FROM present p
        WHERE NOT EXISTS (SELECT FROM pg_constraint c
                          WHERE c.conrelid = p.oid AND c.contype = 'p' AND pg_get_constraintdef(c.oid) = 'PRIMARY KEY (id)')
        UNION ALL
        SELECT format('%s.%s: FOREIGN KEY to %s ON DELETE CASCADE is missing', e.tab, e.col, e.target)
        FROM (VALUES ('pipeline_runs', 'pipeline_id', 'pipelines'), ('pipeline_node_runs', 'run_id', 'pipeline_runs'))
             AS e (tab, col, target)
        JOIN present p ON p.tab = e.tab
        WHERE NOT EXISTS (
            SELECT FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid AND c.conkey = ARRAY[a.attnum]
            WHERE c.conrelid = p.oid AND c.contype = 'f' AND c.confdeltype = 'c' AND a.attname = e.col
              AND c.confrelid = to_regclass('circle.' || e.target))
        UNION ALL
        SELECT format('%s: is not an ordinary table', p.tab) FROM present p WHERE p.relkind <> 'r'
    )
    SELECT jsonb_agg(difference ORDER BY difference) INTO differences FROM (
        SELECT difference FROM columns UNION ALL SELECT difference FROM checks UNION ALL SELECT difference FROM keys) d;
    IF differences IS NOT NULL THEN
        RAISE EXCEPTION 'existing tables in schema circle differ from the expected ones; nothing was changed'
            USING ERRCODE = 'PL090', DETAIL = differences::text;
    END IF;
END $adopt$;
