-- Revision 008: rows are complete and consistent. Rows are repaired where no guess is needed, else reported.

-- == refuse rows that can't be repaired without guessing
DO $report$
DECLARE
    findings jsonb;
BEGIN
    WITH bad AS (
        SELECT 'pipelines' AS tab, p.id::bigint AS id, f.what FROM circle.pipelines p CROSS JOIN LATERAL (VALUES
            ('timeout_seconds is negative', p.timeout_seconds < 0),
            ('max_retries_per_node is negative', p.max_retries_per_node < 0),
            ('retry_backoff_base or retry_backoff_max is not between 0 and 31536000',
             p.retry_backoff_base NOT BETWEEN 0 AND 31536000 OR p.retry_backoff_max NOT BETWEEN 0 AND 31536000),
            ('a counter is negative', least(p.run_count, p.success_count, p.error_count) < 0),
            ('a timestamp is before 0001-01-02 or after 9999-12-30',
             least(p.created_at, p.updated_at, p.last_run) < '0001-01-02 00:00:00+00'
             OR greatest(p.created_at, p.updated_at, p.last_run) >= '9999-12-31 00:00:00+00')) f (what, wrong)
        WHERE f.wrong
        UNION ALL
        SELECT 'pipeline_runs', r.id, f.what FROM circle.pipeline_runs r CROSS JOIN LATERAL (VALUES
            ('status is NULL, and completed_at without an error doesn''t show which it was',
             r.status IS NULL AND r.completed_at IS NOT NULL AND r.error_message IS NULL),
            ('completed_at is set, but the run is ' || r.status,
             r.status IN ('pending', 'running') AND r.completed_at IS NOT NULL),
            ('completed_at is before started_at', r.completed_at < r.started_at),
            ('duration_seconds is negative', r.duration_seconds < 0),
            ('the status is terminal, but no timestamp shows since when',
             r.status NOT IN ('pending', 'running') AND coalesce(r.completed_at, r.started_at, r.created_at) IS NULL),
            ('a timestamp is before 0001-01-02 or after 9999-12-30',
             least(r.created_at, r.started_at, r.completed_at) < '0001-01-02 00:00:00+00'
             OR greatest(r.created_at, r.started_at, r.completed_at) >= '9999-12-31 00:00:00+00')) f (what, wrong)
        WHERE f.wrong
        UNION ALL
        SELECT 'pipeline_node_runs', n.id, f.what
        FROM circle.pipeline_node_runs n CROSS JOIN LATERAL (VALUES
            ('status is NULL, and completed_at without an error doesn''t show which it was',
             n.status IS NULL AND n.completed_at IS NOT NULL AND n.error_message IS NULL),
            ('completed_at is set, but the node run is ' || n.status,
             n.status IN ('pending', 'running') AND n.completed_at IS NOT NULL),
            ('completed_at is before started_at', n.completed_at < n.started_at),
            ('retry_count or duration_ms is negative', least(n.retry_count, n.duration_ms) < 0),
            ('node_type is unknown',
             n.node_type NOT IN ('trigger', 'agent', 'condition', 'action', 'parallel', 'delay')),
            ('the status is terminal, but no timestamp shows since when',
             n.status NOT IN ('pending', 'running')
             -- no join, which would write a big table to temporary files on the disk that commits wait for
             AND coalesce(n.completed_at, n.started_at, (SELECT coalesce(r.completed_at, r.started_at, r.created_at)
                                                         FROM circle.pipeline_runs r WHERE r.id = n.run_id)) IS NULL),
            ('a timestamp is before 0001-01-02 or after 9999-12-30',
             least(n.started_at, n.completed_at) < '0001-01-02 00:00:00+00'
             OR greatest(n.started_at, n.completed_at) >= '9999-12-31 00:00:00+00')) f (what, wrong)
        WHERE f.wrong
        UNION ALL
        SELECT 'pipeline_node_runs', max(n.id), format('node %s occurs more than once in run %s', n.node_id, n.run_id)
        FROM circle.pipeline_node_runs n GROUP BY n.run_id, n.node_id HAVING count(*) > 1
    )
    SELECT jsonb_agg(format('circle.%s id %s: %s', tab, id, what) ORDER BY tab, id) INTO findings
    FROM (SELECT * FROM bad ORDER BY tab, id LIMIT 100) b;
    IF findings IS NOT NULL THEN
        RAISE EXCEPTION 'rows can''t be repaired without guessing; nothing was changed'
            USING ERRCODE = 'PL090', DETAIL = findings::text,
                  HINT = 'Correct or delete these rows, then run the upgrade again. At most 100 are shown.';
    END IF;
END $report$;
