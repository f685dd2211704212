-- Revision 007: the status timeout and the duration of a run.

-- == pipeline_runs: add duration_seconds
ALTER TABLE circle.pipeline_runs ADD COLUMN IF NOT EXISTS duration_seconds INTEGER DEFAULT 0;

-- == pipeline_runs: add a status check that includes timeout, NOT VALID
DO $check$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint
                   WHERE conrelid = 'circle.pipeline_runs'::regclass
                     AND (conname = 'pipeline_runs_status_check_new'
                          OR (conname = 'pipeline_runs_status_check'
                              AND pg_get_constraintdef(oid) LIKE '%''timeout''%'))) THEN
        ALTER TABLE circle.pipeline_runs ADD CONSTRAINT pipeline_runs_status_check_new
            CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled', 'timeout')) NOT VALID;
    END IF;
END $check$;

-- == pipeline_runs: validate the new status check
DO $check$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                           AND conname = 'pipeline_runs_status_check_new') THEN
        ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT pipeline_runs_status_check_new;
    END IF;
END $check$;

-- == pipeline_runs: replace the old status check by the new one
DO $check$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                           AND conname = 'pipeline_runs_status_check_new') THEN
        ALTER TABLE circle.pipeline_runs DROP CONSTRAINT IF EXISTS pipeline_runs_status_check;
        ALTER TABLE circle.pipeline_runs RENAME CONSTRAINT pipeline_runs_status_check_new TO pipeline_runs_status_check;
    END IF;
END $check$;
