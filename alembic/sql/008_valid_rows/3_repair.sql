-- == pipelines: replace NULLs by defaults
UPDATE circle.pipelines SET
    status = coalesce(status, 'draft'), nodes = coalesce(nodes, '[]'), edges = coalesce(edges, '[]'),
    run_count = coalesce(run_count, 0), success_count = coalesce(success_count, 0), error_count = coalesce(error_count, 0),
    max_retries_per_node = coalesce(max_retries_per_node, 3),
    retry_backoff_base = coalesce(retry_backoff_base, 1.0), retry_backoff_max = coalesce(retry_backoff_max, 60.0)
WHERE num_nulls(status, nodes, edges, run_count, success_count, error_count, max_retries_per_node, retry_backoff_base,
                retry_backoff_max) > 0;

-- == pipeline_runs: repair rows, 5000 at a time
DO $rows$
DECLARE
    low bigint := 0;
    high bigint;
BEGIN
    LOOP
        SELECT max(id) INTO high FROM (SELECT id FROM circle.pipeline_runs WHERE id > low ORDER BY id LIMIT 5000) b;
        EXIT WHEN high IS NULL;
        UPDATE circle.pipeline_runs SET
            status = coalesce(status, CASE WHEN completed_at IS NOT NULL THEN 'failed'
                                           WHEN started_at IS NOT NULL THEN 'running' ELSE 'pending' END),
            completed_at = CASE WHEN status NOT IN ('pending', 'running')
                                THEN coalesce(completed_at, started_at, created_at) ELSE completed_at END,
            duration_seconds = coalesce(duration_seconds, 0)
        WHERE id > low AND id <= high
          AND (status IS NULL OR duration_seconds IS NULL
               OR (completed_at IS NULL AND status NOT IN ('pending', 'running')));
        COMMIT;
        low := high;
    END LOOP;
END $rows$;

-- == pipeline_node_runs: repair rows, 5000 at a time
DO $rows$
DECLARE
    low bigint := 0;
    high bigint;
BEGIN
    LOOP
        SELECT max(id) INTO high FROM (SELECT id FROM circle.pipeline_node_runs WHERE id > low ORDER BY id LIMIT 5000) b;
        EXIT WHEN high IS NULL;
        UPDATE circle.pipeline_node_runs n SET
            status = coalesce(n.status, CASE WHEN n.completed_at IS NOT NULL THEN 'failed'
                                             WHEN n.started_at IS NOT NULL THEN 'running' ELSE 'pending' END),
            completed_at = CASE WHEN n.status NOT IN ('pending', 'running')
                                THEN coalesce(n.completed_at, n.started_at, r.completed_at, r.started_at, r.created_at)
                                ELSE n.completed_at END,
            retry_count = coalesce(n.retry_count, 0),
            duration_ms = coalesce(n.duration_ms, 0)
        FROM circle.pipeline_runs r
        WHERE r.id = n.run_id AND n.id > low AND n.id <= high
          AND (n.status IS NULL OR n.retry_count IS NULL OR n.duration_ms IS NULL
               OR (n.completed_at IS NULL AND n.status NOT IN ('pending', 'running')));
        COMMIT;
        low := high;
    END LOOP;
END $rows$;
