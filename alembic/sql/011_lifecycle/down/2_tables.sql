-- == pipeline_runs: move the entries of logs into the column
DO $fold$
BEGIN
    IF to_regclass('circle.pipeline_run_logs') IS NOT NULL THEN
        UPDATE circle.pipeline_runs r SET logs = l.entries
        FROM (SELECT t.run_id, CASE WHEN jsonb_typeof(p.logs) = 'array' THEN p.logs WHEN p.logs IS NULL THEN '[]' ELSE jsonb_build_array(p.logs) END
                               || jsonb_agg(t.entry ORDER BY t.id) AS entries
              FROM circle.pipeline_run_logs t JOIN circle.pipeline_runs p ON p.id = t.run_id GROUP BY t.run_id, p.logs) l
        WHERE r.id = l.run_id;
        DROP TABLE circle.pipeline_run_logs;
    END IF;
END $fold$;

-- == drop tags, the history of claims and the time of sweeps
DROP TABLE IF EXISTS circle.pipeline_run_tags, circle.pipeline_run_history, circle.pipeline_sweep;

-- == drop views and counters
DROP VIEW IF EXISTS circle.startable_node_runs, circle.pending_node_runs;
DO $fold$
BEGIN
    IF to_regclass('circle.pipeline_counters') IS NOT NULL THEN
        UPDATE circle.pipelines p SET run_count = least(p.run_count + c.run_count, 2147483647),
            success_count = least(p.success_count + c.success_count, 2147483647),
            error_count = least(p.error_count + c.error_count, 2147483647), last_run = greatest(p.last_run, c.last_run)
        FROM (SELECT pipeline_id, sum(run_count) AS run_count, sum(success_count) AS success_count,
                     sum(error_count) AS error_count, max(last_run) AS last_run
              FROM circle.pipeline_counters GROUP BY pipeline_id) c
        WHERE p.id = c.pipeline_id;
        DROP TABLE circle.pipeline_counters;
    END IF;
END $fold$;

-- == pipeline_node_runs: add the check of revision 008, NOT VALID
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_node_runs'::regclass
                                               AND conname = 'ck_pipeline_node_runs') THEN
        ALTER TABLE circle.pipeline_node_runs ADD CONSTRAINT ck_pipeline_node_runs CHECK (
            circle.is_valid_node_run(node_type, status, retry_count, duration_ms, started_at, completed_at)) NOT VALID;
    END IF;
END $checks$;

-- == pipeline_node_runs: validate the check
ALTER TABLE circle.pipeline_node_runs VALIDATE CONSTRAINT ck_pipeline_node_runs;

-- == pipeline_node_runs: drop the check of due times, the due time of retries, the successors that aren't taken, and the index
ALTER TABLE circle.pipeline_node_runs DROP CONSTRAINT IF EXISTS ck_pipeline_node_runs_due;
DROP INDEX IF EXISTS circle.idx_pipeline_node_runs_run_position;
ALTER TABLE circle.pipeline_node_runs DROP COLUMN IF EXISTS available_at, DROP COLUMN IF EXISTS untaken,
    DROP COLUMN IF EXISTS taken_from;

-- == pipeline_runs: add the check of revision 008, NOT VALID
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass AND conname = 'ck_pipeline_runs') THEN
        ALTER TABLE circle.pipeline_runs ADD CONSTRAINT ck_pipeline_runs CHECK (
            circle.is_valid_run(status, duration_seconds, created_at, started_at, completed_at)) NOT VALID;
    END IF;
END $checks$;

-- == pipeline_runs: validate the check
ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT ck_pipeline_runs;

-- == pipeline_runs: drop the check of leases, indexes and columns
ALTER TABLE circle.pipeline_runs DROP CONSTRAINT IF EXISTS ck_pipeline_runs_leased;
DROP INDEX IF EXISTS circle.idx_pipeline_runs_queue, circle.idx_pipeline_runs_waiting, circle.idx_pipeline_runs_running,
    circle.idx_pipeline_runs_history, circle.idx_pipeline_runs_status_history, circle.idx_pipeline_runs_completed_at;
-- The functions that return a run depend on the table alone, not on its columns.
ALTER TABLE circle.pipeline_runs
    DROP COLUMN IF EXISTS failed_node, DROP COLUMN IF EXISTS worker_id, DROP COLUMN IF EXISTS claim_token,
    DROP COLUMN IF EXISTS claim_count, DROP COLUMN IF EXISTS lease_expires_at, DROP COLUMN IF EXISTS idempotency_key,
    DROP COLUMN IF EXISTS lapsed_claims, DROP COLUMN IF EXISTS resumed_from, DROP COLUMN IF EXISTS released_token, DROP COLUMN IF EXISTS priority,
    DROP COLUMN IF EXISTS run_at, DROP COLUMN IF EXISTS waits_until;

-- == pipeline_node_runs: reset fillfactor
ALTER TABLE circle.pipeline_node_runs RESET (fillfactor);

-- == pipeline_runs: reset fillfactor
ALTER TABLE circle.pipeline_runs RESET (fillfactor);
