-- == index: circle.idx_pipeline_node_runs_run_node_old
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_node_runs_run_node_old ON circle.pipeline_node_runs (run_id, node_id);

-- == pipeline_node_runs: replace the unique index on (run_id, node_id) by that of revision 007
DO $swap$
BEGIN
    IF (SELECT NOT indisunique FROM pg_index WHERE indexrelid = to_regclass('circle.idx_pipeline_node_runs_run_node')) THEN
        DROP INDEX IF EXISTS circle.idx_pipeline_node_runs_run_node_old;
    ELSE
        DROP INDEX IF EXISTS circle.idx_pipeline_node_runs_run_node;
        ALTER INDEX circle.idx_pipeline_node_runs_run_node_old RENAME TO idx_pipeline_node_runs_run_node;
    END IF;
END $swap$;

-- == pipeline_node_runs: drop checks and triggers
ALTER TABLE circle.pipeline_node_runs
    ALTER COLUMN status DROP NOT NULL, ALTER COLUMN retry_count DROP NOT NULL, ALTER COLUMN duration_ms DROP NOT NULL,
    DROP CONSTRAINT IF EXISTS tmp_pipeline_node_runs_not_null,
    DROP CONSTRAINT IF EXISTS ck_pipeline_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_before ON circle.pipeline_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_before_insert ON circle.pipeline_node_runs;
