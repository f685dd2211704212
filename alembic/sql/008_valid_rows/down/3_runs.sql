-- == pipeline_runs: drop checks and the trigger
ALTER TABLE circle.pipeline_runs
    ALTER COLUMN status DROP NOT NULL, ALTER COLUMN duration_seconds DROP NOT NULL,
    DROP CONSTRAINT IF EXISTS tmp_pipeline_runs_not_null,
    DROP CONSTRAINT IF EXISTS ck_pipeline_runs;
DROP TRIGGER IF EXISTS pipeline_runs_before ON circle.pipeline_runs;
