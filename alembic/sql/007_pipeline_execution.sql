-- Revision 007: execution settings, the status "timeout", and the runs of single nodes.

-- == upgrade: execution settings
ALTER TABLE circle.pipelines
    ADD COLUMN IF NOT EXISTS timeout_seconds INTEGER DEFAULT 3600,
    ADD COLUMN IF NOT EXISTS max_retries_per_node INTEGER DEFAULT 3,
    ADD COLUMN IF NOT EXISTS retry_backoff_base FLOAT DEFAULT 1.0,
    ADD COLUMN IF NOT EXISTS retry_backoff_max FLOAT DEFAULT 60.0;

-- == upgrade: duration of runs
ALTER TABLE circle.pipeline_runs ADD COLUMN IF NOT EXISTS duration_seconds INTEGER DEFAULT 0;

-- == upgrade: a status check with timeout, not validated yet
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

-- == upgrade: validate it beside the writers
DO $check$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                           AND conname = 'pipeline_runs_status_check_new') THEN
        ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT pipeline_runs_status_check_new;
    END IF;
END $check$;

-- == upgrade: put it in the place of the old one
DO $check$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                           AND conname = 'pipeline_runs_status_check_new') THEN
        ALTER TABLE circle.pipeline_runs DROP CONSTRAINT IF EXISTS pipeline_runs_status_check;
        ALTER TABLE circle.pipeline_runs RENAME CONSTRAINT pipeline_runs_status_check_new TO pipeline_runs_status_check;
    END IF;
END $check$;

-- == upgrade: node runs
CREATE TABLE IF NOT EXISTS circle.pipeline_node_runs (
    id SERIAL PRIMARY KEY,
    run_id INTEGER NOT NULL,
    node_id VARCHAR(100) NOT NULL,
    node_type VARCHAR(50) NOT NULL,
    status VARCHAR(50) DEFAULT 'pending'
        CHECK (status IN ('pending', 'running', 'completed', 'failed', 'skipped', 'cancelled')),
    input_data JSONB DEFAULT '{}',
    output_data JSONB DEFAULT '{}',
    error_message TEXT,
    retry_count INTEGER DEFAULT 0,
    started_at TIMESTAMPTZ,
    completed_at TIMESTAMPTZ,
    duration_ms INTEGER DEFAULT 0
);

-- == upgrade: node runs refer to their run; a step of its own, because it locks the table of runs
DO $key$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_node_runs'::regclass AND contype = 'f'
                                               AND confrelid = 'circle.pipeline_runs'::regclass) THEN
        ALTER TABLE circle.pipeline_node_runs ADD CONSTRAINT pipeline_node_runs_run_id_fkey
            FOREIGN KEY (run_id) REFERENCES circle.pipeline_runs (id) ON DELETE CASCADE NOT VALID;
    END IF;
END $key$;

-- == upgrade: validate that beside the writers
DO $key$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_node_runs'::regclass
                                           AND conname = 'pipeline_node_runs_run_id_fkey' AND NOT convalidated) THEN
        ALTER TABLE circle.pipeline_node_runs VALIDATE CONSTRAINT pipeline_node_runs_run_id_fkey;
    END IF;
END $key$;

-- == upgrade index: circle.idx_pipeline_node_runs_run_id
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_node_runs_run_id ON circle.pipeline_node_runs (run_id);

-- == upgrade index: circle.idx_pipeline_node_runs_run_node
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_node_runs_run_node ON circle.pipeline_node_runs (run_id, node_id);

-- == downgrade: node runs
DROP TABLE IF EXISTS circle.pipeline_node_runs;

-- == downgrade: from here on nobody writes timeout
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

-- == downgrade: runs that timed out become failed and keep their error message
DO $rows$
BEGIN
    LOOP
        UPDATE circle.pipeline_runs SET status = 'failed' WHERE id IN (
            SELECT id FROM circle.pipeline_runs WHERE status = 'timeout' ORDER BY id LIMIT 5000 FOR NO KEY UPDATE);
        EXIT WHEN NOT FOUND;
        COMMIT;
    END LOOP;
END $rows$;

-- == downgrade: validate the check of five beside the writers
DO $check$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                           AND conname = 'pipeline_runs_status_check_old') THEN
        ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT pipeline_runs_status_check_old;
    END IF;
END $check$;

-- == downgrade: put it in its place, drop the column
DO $check$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                           AND conname = 'pipeline_runs_status_check_old') THEN
        ALTER TABLE circle.pipeline_runs DROP CONSTRAINT IF EXISTS pipeline_runs_status_check;
        ALTER TABLE circle.pipeline_runs RENAME CONSTRAINT pipeline_runs_status_check_old TO pipeline_runs_status_check;
    END IF;
    ALTER TABLE circle.pipeline_runs DROP COLUMN IF EXISTS duration_seconds;
END $check$;

-- == downgrade: execution settings
ALTER TABLE circle.pipelines
    DROP COLUMN IF EXISTS timeout_seconds,
    DROP COLUMN IF EXISTS max_retries_per_node,
    DROP COLUMN IF EXISTS retry_backoff_base,
    DROP COLUMN IF EXISTS retry_backoff_max;
