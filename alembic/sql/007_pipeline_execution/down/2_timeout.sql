-- == pipeline_runs: add a status check without timeout, NOT VALID
DO $check$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint
                   WHERE conrelid = 'circle.pipeline_runs'::regclass
                     AND (conname = 'pipeline_runs_status_check_old'
                          OR (conname = 'pipeline_runs_status_check'
                              AND pg_get_constraintdef(oid) NOT LIKE '%''timeout''%'))) THEN
        ALTER TABLE circle.pipeline_runs ADD CONSTRAINT pipeline_runs_status_check_old
            CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')) NOT VALID;
    END IF;
END $check$;

-- == pipeline_runs: turn timeout into failed, 5000 rows at a time
DO $rows$
BEGIN
    LOOP
        UPDATE circle.pipeline_runs SET status = 'failed' WHERE id IN (
            SELECT id FROM circle.pipeline_runs WHERE status = 'timeout' ORDER BY id LIMIT 5000 FOR NO KEY UPDATE);
        EXIT WHEN NOT FOUND;
        COMMIT;
    END LOOP;
END $rows$;

-- == pipeline_runs: validate the status check without timeout
DO $check$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                           AND conname = 'pipeline_runs_status_check_old') THEN
        ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT pipeline_runs_status_check_old;
    END IF;
END $check$;

-- == pipeline_runs: replace the status check, drop duration_seconds
DO $check$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                           AND conname = 'pipeline_runs_status_check_old') THEN
        ALTER TABLE circle.pipeline_runs DROP CONSTRAINT IF EXISTS pipeline_runs_status_check;
        ALTER TABLE circle.pipeline_runs RENAME CONSTRAINT pipeline_runs_status_check_old TO pipeline_runs_status_check;
    END IF;
    ALTER TABLE circle.pipeline_runs DROP COLUMN IF EXISTS duration_seconds;
END $check$;
