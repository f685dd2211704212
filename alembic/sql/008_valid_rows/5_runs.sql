-- == pipeline_runs: add checks, NOT VALID
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                               AND conname = 'ck_pipeline_runs') THEN
        ALTER TABLE circle.pipeline_runs
            ADD CONSTRAINT ck_pipeline_runs CHECK (
                circle.is_valid_run(status, duration_seconds, created_at, started_at, completed_at)) NOT VALID,
            ADD CONSTRAINT tmp_pipeline_runs_not_null CHECK (
                status IS NOT NULL AND duration_seconds IS NOT NULL) NOT VALID;
    END IF;
END $checks$;

-- == pipeline_runs: validate the checks
ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT ck_pipeline_runs;
DO $checks$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                           AND conname = 'tmp_pipeline_runs_not_null') THEN
        ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT tmp_pipeline_runs_not_null;
    END IF;
END $checks$;

-- == pipeline_runs: set NOT NULL, which a validated check proves without a scan
ALTER TABLE circle.pipeline_runs
    ALTER COLUMN status SET NOT NULL, ALTER COLUMN duration_seconds SET NOT NULL;
-- A statement of its own, as in 4_pipelines.sql.
-- squawk-ignore ban-drop-constraint
ALTER TABLE circle.pipeline_runs DROP CONSTRAINT IF EXISTS tmp_pipeline_runs_not_null;
