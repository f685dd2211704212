-- Revision 011: columns of leases and retries, and the counters of runs.

-- == pipeline_runs: add queue, lease and idempotency key
-- A pending run with waits_until isn't claimed until a claim finds that this time has passed, and sets it to NULL.
ALTER TABLE circle.pipeline_runs
    ADD COLUMN IF NOT EXISTS failed_node VARCHAR(100),
    ADD COLUMN IF NOT EXISTS worker_id VARCHAR(255),
    ADD COLUMN IF NOT EXISTS claim_token BIGINT NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS claim_count INTEGER NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS lease_expires_at TIMESTAMPTZ,
    ADD COLUMN IF NOT EXISTS idempotency_key VARCHAR(255),
    ADD COLUMN IF NOT EXISTS lapsed_claims INTEGER NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS released_token BIGINT,
    -- squawk-ignore prefer-bigint-over-smallint
    ADD COLUMN IF NOT EXISTS priority SMALLINT NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS run_at TIMESTAMPTZ,
    ADD COLUMN IF NOT EXISTS waits_until TIMESTAMPTZ;
-- The key is checked for nothing, as the column is new and NULL.
-- squawk-ignore adding-foreign-key-constraint
ALTER TABLE circle.pipeline_runs ADD COLUMN IF NOT EXISTS resumed_from BIGINT REFERENCES circle.pipeline_runs (id) ON DELETE SET NULL;

-- == pipeline_node_runs: add the due time of retries, the successors that a completed node doesn't take, and where it was taken from
ALTER TABLE circle.pipeline_node_runs
    ADD COLUMN IF NOT EXISTS available_at TIMESTAMPTZ,
    ADD COLUMN IF NOT EXISTS untaken INTEGER[],
    ADD COLUMN IF NOT EXISTS taken_from BIGINT;

-- == pipeline_node_runs: leave room on each page for new versions of its rows, so that a transition changes no index
ALTER TABLE circle.pipeline_node_runs SET (fillfactor = 50);

-- == pipeline_runs: leave room on each page for new versions of its rows
ALTER TABLE circle.pipeline_runs SET (fillfactor = 70);

-- == pipeline_runs: add a check of leases, NOT VALID
-- It is merged with that of revision 008, as each CHECK costs time in every statement.
CREATE OR REPLACE FUNCTION circle.is_valid_run(p_status text, p_duration_seconds integer, p_created_at timestamptz,
                                               p_started_at timestamptz, p_completed_at timestamptz, p_claim_token bigint,
                                               p_claim_count integer, p_lapsed_claims integer, p_worker_id text,
                                               p_lease_expires_at timestamptz, p_run_at timestamptz, p_waits_until timestamptz)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN p_duration_seconds >= 0 AND (p_status = ANY ('{pending,running}')) = (p_completed_at IS NULL)
        AND p_completed_at >= p_started_at AND p_claim_token >= 0 AND p_claim_count >= 0 AND p_lapsed_claims >= 0
        AND circle.are_readable_times(
            least(p_created_at, p_started_at, p_completed_at, p_run_at, p_waits_until, p_lease_expires_at),
            greatest(p_created_at, p_started_at, p_completed_at, p_run_at, p_waits_until, p_lease_expires_at))
        AND (p_lease_expires_at IS NULL OR p_completed_at IS NULL AND p_worker_id IS NOT NULL);
END $$;
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                               AND conname = 'ck_pipeline_runs_leased') THEN
        ALTER TABLE circle.pipeline_runs ADD CONSTRAINT ck_pipeline_runs_leased CHECK (
            circle.is_valid_run(status, duration_seconds, created_at, started_at, completed_at, claim_token, claim_count,
                                lapsed_claims, worker_id, lease_expires_at, run_at, waits_until)) NOT VALID;
    END IF;
END $checks$;

-- == pipeline_runs: validate the check
ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT ck_pipeline_runs_leased;

-- == pipeline_runs: drop the check of revision 008, which the new one has in it
-- squawk-ignore ban-drop-constraint
ALTER TABLE circle.pipeline_runs DROP CONSTRAINT IF EXISTS ck_pipeline_runs;

-- == pipeline_node_runs: add a check of due times, NOT VALID
-- It is merged with that of revision 008, as that of runs is.
CREATE OR REPLACE FUNCTION circle.is_valid_node_run(p_node_type text, p_status text, p_retry_count integer, p_duration_ms integer,
                                                    p_started_at timestamptz, p_completed_at timestamptz, p_available_at timestamptz)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN p_node_type = ANY ('{trigger,agent,condition,action,parallel,delay}') AND p_retry_count >= 0 AND p_duration_ms >= 0
        AND (p_status = ANY ('{pending,running}')) = (p_completed_at IS NULL) AND p_completed_at >= p_started_at
        AND circle.are_readable_times(least(p_started_at, p_completed_at, p_available_at),
                                      greatest(p_started_at, p_completed_at, p_available_at));
END $$;
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_node_runs'::regclass
                                               AND conname = 'ck_pipeline_node_runs_due') THEN
        ALTER TABLE circle.pipeline_node_runs ADD CONSTRAINT ck_pipeline_node_runs_due CHECK (
            circle.is_valid_node_run(node_type, status, retry_count, duration_ms, started_at, completed_at, available_at)) NOT VALID;
    END IF;
END $checks$;

-- == pipeline_node_runs: validate the check
ALTER TABLE circle.pipeline_node_runs VALIDATE CONSTRAINT ck_pipeline_node_runs_due;

-- == pipeline_node_runs: drop the check of revision 008, which the new one has in it
-- squawk-ignore ban-drop-constraint
ALTER TABLE circle.pipeline_node_runs DROP CONSTRAINT IF EXISTS ck_pipeline_node_runs;

-- == create pipeline_counters
-- How many runs of a pipeline have each status, and what is to be added to its columns run_count, success_count, error_count and
-- last_run: the sum of its rows. Each change inserts a row, so that transactions that change runs never wait for one another; now and
-- then one of them adds up the rows that are there. No foreign key, because its check would cost more than the row.
CREATE TABLE IF NOT EXISTS circle.pipeline_counters (
    pipeline_id INTEGER NOT NULL,
    id BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY,
    pending BIGINT NOT NULL DEFAULT 0,
    running BIGINT NOT NULL DEFAULT 0,
    completed BIGINT NOT NULL DEFAULT 0,
    failed BIGINT NOT NULL DEFAULT 0,
    cancelled BIGINT NOT NULL DEFAULT 0,
    timeout BIGINT NOT NULL DEFAULT 0,
    run_count BIGINT NOT NULL DEFAULT 0,
    success_count BIGINT NOT NULL DEFAULT 0,
    error_count BIGINT NOT NULL DEFAULT 0,
    leases_lost BIGINT NOT NULL DEFAULT 0,
    last_run TIMESTAMPTZ,
    PRIMARY KEY (pipeline_id, id)
);

-- == create pipeline_run_tags
CREATE TABLE IF NOT EXISTS circle.pipeline_run_tags (
    run_id BIGINT NOT NULL REFERENCES circle.pipeline_runs (id) ON DELETE CASCADE,
    key VARCHAR(100) NOT NULL,
    value VARCHAR(255) NOT NULL,
    PRIMARY KEY (run_id, key)
);
CREATE INDEX IF NOT EXISTS idx_pipeline_run_tags_value ON circle.pipeline_run_tags (key, value, run_id);

-- == create pipeline_run_logs
-- What append_log writes; the column logs of pipeline_runs is that of raw writers.
CREATE TABLE IF NOT EXISTS circle.pipeline_run_logs (
    run_id BIGINT NOT NULL REFERENCES circle.pipeline_runs (id) ON DELETE CASCADE,
    id BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY,
    entry JSONB NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, id),
    CONSTRAINT ck_pipeline_run_logs CHECK ((circle.nested_too_deep(entry) OR circle.number_too_large(entry)) IS NOT TRUE
                                           AND circle.are_readable_times(created_at, created_at))
);

-- == create pipeline_run_history
-- Who took and gave up a run, and who cancelled it: a row for each claim, release, recovery, cancellation and resumption, none for a
-- node. token is that of the claim which the row is about.
CREATE TABLE IF NOT EXISTS circle.pipeline_run_history (
    run_id BIGINT NOT NULL REFERENCES circle.pipeline_runs (id) ON DELETE CASCADE,
    id BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY,
    at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    kind VARCHAR(20) NOT NULL,
    worker_id VARCHAR(255),
    token BIGINT,
    reason TEXT,
    PRIMARY KEY (run_id, id),
    CONSTRAINT ck_pipeline_run_history CHECK (kind IN ('claimed', 'released', 'recovered', 'cancelled', 'resumed')
                                              AND circle.are_readable_times(at, at))
);

-- == create pipeline_sweep
-- One row, which the first sweep inserts: the next one doesn't begin before next_at.
CREATE TABLE IF NOT EXISTS circle.pipeline_sweep (
    id BOOLEAN NOT NULL DEFAULT true PRIMARY KEY,
    next_at TIMESTAMPTZ NOT NULL DEFAULT '2000-01-01 00:00:00+00',
    CONSTRAINT ck_pipeline_sweep CHECK (id)
);
