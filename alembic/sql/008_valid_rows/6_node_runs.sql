-- == pipeline_node_runs: add checks, NOT VALID
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_node_runs'::regclass
                                               AND conname = 'ck_pipeline_node_runs') THEN
        ALTER TABLE circle.pipeline_node_runs
            ADD CONSTRAINT ck_pipeline_node_runs CHECK (
                circle.is_valid_node_run(node_type, status, retry_count, duration_ms, started_at, completed_at)) NOT VALID,
            ADD CONSTRAINT tmp_pipeline_node_runs_not_null CHECK (
                status IS NOT NULL AND retry_count IS NOT NULL AND duration_ms IS NOT NULL) NOT VALID;
    END IF;
END $checks$;

-- == pipeline_node_runs: validate the checks
ALTER TABLE circle.pipeline_node_runs VALIDATE CONSTRAINT ck_pipeline_node_runs;
DO $checks$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_node_runs'::regclass
                                           AND conname = 'tmp_pipeline_node_runs_not_null') THEN
        ALTER TABLE circle.pipeline_node_runs VALIDATE CONSTRAINT tmp_pipeline_node_runs_not_null;
    END IF;
END $checks$;

-- == pipeline_node_runs: set NOT NULL, which a validated check proves without a scan
ALTER TABLE circle.pipeline_node_runs
    ALTER COLUMN status SET NOT NULL, ALTER COLUMN retry_count SET NOT NULL, ALTER COLUMN duration_ms SET NOT NULL;
-- A statement of its own, as in 4_pipelines.sql.
-- squawk-ignore ban-drop-constraint
ALTER TABLE circle.pipeline_node_runs DROP CONSTRAINT IF EXISTS tmp_pipeline_node_runs_not_null;

-- == index: circle.idx_pipeline_node_runs_run_node_new
CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_node_runs_run_node_new
    ON circle.pipeline_node_runs (run_id, node_id);

-- == pipeline_node_runs: replace the index on (run_id, node_id) by the unique one
DO $swap$
BEGIN
    IF (SELECT indisunique FROM pg_index WHERE indexrelid = to_regclass('circle.idx_pipeline_node_runs_run_node')) THEN
        DROP INDEX IF EXISTS circle.idx_pipeline_node_runs_run_node_new;
    ELSE
        DROP INDEX IF EXISTS circle.idx_pipeline_node_runs_run_node;
        ALTER INDEX circle.idx_pipeline_node_runs_run_node_new RENAME TO idx_pipeline_node_runs_run_node;
    END IF;
END $swap$;
