-- Revision 008: nothing half-filled can be stored. Rows are repaired where no guess is needed, else reported.

-- == upgrade: report what can't be repaired without guessing
DO $report$
DECLARE
    findings jsonb;
BEGIN
    WITH bad AS (
        SELECT 'pipelines' AS tab, p.id::bigint AS id, f.what FROM circle.pipelines p CROSS JOIN LATERAL (VALUES
            ('timeout_seconds is negative', p.timeout_seconds < 0),
            ('max_retries_per_node is negative', p.max_retries_per_node < 0),
            ('retry_backoff_base or retry_backoff_max is not between 0 and 31536000',
             p.retry_backoff_base NOT BETWEEN 0 AND 31536000 OR p.retry_backoff_max NOT BETWEEN 0 AND 31536000),
            ('a counter is negative', least(p.run_count, p.success_count, p.error_count) < 0),
            ('a timestamp is infinite',
             NOT (isfinite(p.created_at) AND isfinite(p.updated_at) AND isfinite(p.last_run)))) f (what, wrong)
        WHERE f.wrong
        UNION ALL
        SELECT 'pipeline_runs', r.id, f.what FROM circle.pipeline_runs r CROSS JOIN LATERAL (VALUES
            ('status is NULL, and completed_at without an error tells nothing of it',
             r.status IS NULL AND r.completed_at IS NOT NULL AND r.error_message IS NULL),
            ('completed_at is set, but the run is ' || r.status,
             r.status IN ('pending', 'running') AND r.completed_at IS NOT NULL),
            ('completed_at is before started_at', r.completed_at < r.started_at),
            ('duration_seconds is negative', r.duration_seconds < 0),
            ('it is over, but no timestamp tells when',
             r.status NOT IN ('pending', 'running') AND coalesce(r.completed_at, r.started_at, r.created_at) IS NULL),
            ('a timestamp is infinite',
             NOT (isfinite(r.created_at) AND isfinite(r.started_at) AND isfinite(r.completed_at)))) f (what, wrong)
        WHERE f.wrong
        UNION ALL
        SELECT 'pipeline_node_runs', n.id, f.what
        FROM circle.pipeline_node_runs n CROSS JOIN LATERAL (VALUES
            ('status is NULL, and completed_at without an error tells nothing of it',
             n.status IS NULL AND n.completed_at IS NOT NULL AND n.error_message IS NULL),
            ('completed_at is set, but the node run is ' || n.status,
             n.status IN ('pending', 'running') AND n.completed_at IS NOT NULL),
            ('completed_at is before started_at', n.completed_at < n.started_at),
            ('retry_count or duration_ms is negative', least(n.retry_count, n.duration_ms) < 0),
            ('node_type is unknown',
             n.node_type NOT IN ('trigger', 'agent', 'condition', 'action', 'parallel', 'delay')),
            ('it is over, but no timestamp tells when',
             n.status NOT IN ('pending', 'running')
             -- no join: a big table would be written to temporary files, and writers' commits wait for the same disk
             AND coalesce(n.completed_at, n.started_at, (SELECT coalesce(r.completed_at, r.started_at, r.created_at)
                                                         FROM circle.pipeline_runs r WHERE r.id = n.run_id)) IS NULL),
            ('a timestamp is infinite', NOT (isfinite(n.started_at) AND isfinite(n.completed_at)))) f (what, wrong)
        WHERE f.wrong
        UNION ALL
        SELECT 'pipeline_node_runs', max(n.id), format('node %s stands more than once in run %s', n.node_id, n.run_id)
        FROM circle.pipeline_node_runs n GROUP BY n.run_id, n.node_id HAVING count(*) > 1
    )
    SELECT jsonb_agg(format('circle.%s id %s: %s', tab, id, what) ORDER BY tab, id) INTO findings
    FROM (SELECT * FROM bad ORDER BY tab, id LIMIT 100) b;
    IF findings IS NOT NULL THEN
        RAISE EXCEPTION 'rows can''t be repaired without guessing; nothing was changed'
            USING ERRCODE = 'PL090', DETAIL = findings::text,
                  HINT = 'Mend or delete these rows, then run the upgrade again. At most 100 are shown.';
    END IF;
END $report$;

-- == upgrade: fill what writers leave out (replaced by the guard of revision 009)
CREATE OR REPLACE FUNCTION circle.pipeline_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status NOT IN ('pending', 'running') THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        IF coalesce(NEW.duration_seconds, 0) = 0 THEN
            NEW.duration_seconds := least(coalesce(extract(epoch FROM NEW.completed_at - NEW.started_at), 0), 2147483647)::integer;
        END IF;
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status NOT IN ('pending', 'running') THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
    END IF;
    RETURN NEW;
END $$;

-- == upgrade: on runs
CREATE OR REPLACE TRIGGER pipeline_runs_before BEFORE INSERT OR UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_runs_before();
ALTER TABLE circle.pipeline_runs ENABLE ALWAYS TRIGGER pipeline_runs_before;

-- == upgrade: and on node runs
CREATE OR REPLACE TRIGGER pipeline_node_runs_before BEFORE UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_node_runs_before();
CREATE OR REPLACE TRIGGER pipeline_node_runs_before_insert BEFORE INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status <> 'pending') EXECUTE FUNCTION circle.pipeline_node_runs_before();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_before,
                                      ENABLE ALWAYS TRIGGER pipeline_node_runs_before_insert;

-- == upgrade: repair pipelines
UPDATE circle.pipelines SET
    status = coalesce(status, 'draft'), nodes = coalesce(nodes, '[]'), edges = coalesce(edges, '[]'),
    run_count = coalesce(run_count, 0), success_count = coalesce(success_count, 0), error_count = coalesce(error_count, 0),
    max_retries_per_node = coalesce(max_retries_per_node, 3),
    retry_backoff_base = coalesce(retry_backoff_base, 1.0), retry_backoff_max = coalesce(retry_backoff_max, 60.0)
WHERE num_nulls(status, nodes, edges, run_count, success_count, error_count, max_retries_per_node, retry_backoff_base,
                retry_backoff_max) > 0;

-- == upgrade: repair runs, a few thousand at a time
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

-- == upgrade: repair node runs, a few thousand at a time
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

-- == upgrade: checks on pipelines, not validated yet
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipelines'::regclass
                                               AND conname = 'ck_pipelines_timestamps_finite') THEN
        ALTER TABLE circle.pipelines
            ADD CONSTRAINT ck_pipelines_timeout CHECK (timeout_seconds >= 0) NOT VALID,
            ADD CONSTRAINT ck_pipelines_retries CHECK (max_retries_per_node >= 0) NOT VALID,
            ADD CONSTRAINT ck_pipelines_backoff CHECK (
                retry_backoff_base >= 0 AND retry_backoff_base <= 31536000
                AND retry_backoff_max >= 0 AND retry_backoff_max <= 31536000) NOT VALID,
            ADD CONSTRAINT ck_pipelines_counters CHECK (
                run_count >= 0 AND success_count >= 0 AND error_count >= 0) NOT VALID,
            ADD CONSTRAINT ck_pipelines_timestamps_finite CHECK (
                isfinite(created_at) AND isfinite(updated_at) AND isfinite(last_run)) NOT VALID,
            ADD CONSTRAINT tmp_pipelines_not_null CHECK (
                status IS NOT NULL AND nodes IS NOT NULL AND edges IS NOT NULL AND run_count IS NOT NULL
                AND success_count IS NOT NULL AND error_count IS NOT NULL AND max_retries_per_node IS NOT NULL
                AND retry_backoff_base IS NOT NULL AND retry_backoff_max IS NOT NULL) NOT VALID;
    END IF;
END $checks$;

-- == upgrade: validate them beside the writers
ALTER TABLE circle.pipelines
    VALIDATE CONSTRAINT ck_pipelines_timeout,
    VALIDATE CONSTRAINT ck_pipelines_retries,
    VALIDATE CONSTRAINT ck_pipelines_backoff,
    VALIDATE CONSTRAINT ck_pipelines_counters,
    VALIDATE CONSTRAINT ck_pipelines_timestamps_finite;
DO $checks$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipelines'::regclass
                                           AND conname = 'tmp_pipelines_not_null') THEN
        ALTER TABLE circle.pipelines VALIDATE CONSTRAINT tmp_pipelines_not_null;
    END IF;
END $checks$;

-- == upgrade: NOT NULL needs no scan where a validated check proves it
ALTER TABLE circle.pipelines
    ALTER COLUMN status SET NOT NULL, ALTER COLUMN nodes SET NOT NULL, ALTER COLUMN edges SET NOT NULL,
    ALTER COLUMN run_count SET NOT NULL, ALTER COLUMN success_count SET NOT NULL, ALTER COLUMN error_count SET NOT NULL,
    ALTER COLUMN max_retries_per_node SET NOT NULL, ALTER COLUMN retry_backoff_base SET NOT NULL,
    ALTER COLUMN retry_backoff_max SET NOT NULL;
-- In one ALTER with them it would go first. It was there for them alone.
-- squawk-ignore ban-drop-constraint
ALTER TABLE circle.pipelines DROP CONSTRAINT IF EXISTS tmp_pipelines_not_null;

-- == upgrade: checks on runs, not validated yet
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                               AND conname = 'ck_pipeline_runs_times') THEN
        ALTER TABLE circle.pipeline_runs
            ADD CONSTRAINT ck_pipeline_runs_duration CHECK (duration_seconds >= 0) NOT VALID,
            ADD CONSTRAINT ck_pipeline_runs_terminal_is_completed CHECK (
                (status = ANY ('{pending,running}')) = (completed_at IS NULL)) NOT VALID,
            ADD CONSTRAINT ck_pipeline_runs_times CHECK (
                completed_at >= started_at AND isfinite(created_at) AND isfinite(started_at) AND isfinite(completed_at))
                NOT VALID,
            ADD CONSTRAINT tmp_pipeline_runs_not_null CHECK (
                status IS NOT NULL AND duration_seconds IS NOT NULL) NOT VALID;
    END IF;
END $checks$;

-- == upgrade: validate them beside the writers
ALTER TABLE circle.pipeline_runs
    VALIDATE CONSTRAINT ck_pipeline_runs_duration,
    VALIDATE CONSTRAINT ck_pipeline_runs_terminal_is_completed,
    VALIDATE CONSTRAINT ck_pipeline_runs_times;
DO $checks$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                           AND conname = 'tmp_pipeline_runs_not_null') THEN
        ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT tmp_pipeline_runs_not_null;
    END IF;
END $checks$;

-- == upgrade: NOT NULL needs no scan where a validated check proves it
ALTER TABLE circle.pipeline_runs
    ALTER COLUMN status SET NOT NULL, ALTER COLUMN duration_seconds SET NOT NULL;
-- squawk-ignore ban-drop-constraint
ALTER TABLE circle.pipeline_runs DROP CONSTRAINT IF EXISTS tmp_pipeline_runs_not_null;

-- == upgrade: checks on node runs, not validated yet
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_node_runs'::regclass
                                               AND conname = 'ck_pipeline_node_runs_times') THEN
        ALTER TABLE circle.pipeline_node_runs
            ADD CONSTRAINT ck_pipeline_node_runs_type CHECK (
                node_type = ANY ('{trigger,agent,condition,action,parallel,delay}')) NOT VALID,
            ADD CONSTRAINT ck_pipeline_node_runs_numbers CHECK (retry_count >= 0 AND duration_ms >= 0) NOT VALID,
            ADD CONSTRAINT ck_pipeline_node_runs_terminal_is_completed CHECK (
                (status = ANY ('{pending,running}')) = (completed_at IS NULL)) NOT VALID,
            ADD CONSTRAINT ck_pipeline_node_runs_times CHECK (
                completed_at >= started_at AND isfinite(started_at) AND isfinite(completed_at)) NOT VALID,
            ADD CONSTRAINT tmp_pipeline_node_runs_not_null CHECK (
                status IS NOT NULL AND retry_count IS NOT NULL AND duration_ms IS NOT NULL) NOT VALID;
    END IF;
END $checks$;

-- == upgrade: validate them beside the writers
ALTER TABLE circle.pipeline_node_runs
    VALIDATE CONSTRAINT ck_pipeline_node_runs_type,
    VALIDATE CONSTRAINT ck_pipeline_node_runs_numbers,
    VALIDATE CONSTRAINT ck_pipeline_node_runs_terminal_is_completed,
    VALIDATE CONSTRAINT ck_pipeline_node_runs_times;
DO $checks$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_node_runs'::regclass
                                           AND conname = 'tmp_pipeline_node_runs_not_null') THEN
        ALTER TABLE circle.pipeline_node_runs VALIDATE CONSTRAINT tmp_pipeline_node_runs_not_null;
    END IF;
END $checks$;

-- == upgrade: NOT NULL needs no scan where a validated check proves it
ALTER TABLE circle.pipeline_node_runs
    ALTER COLUMN status SET NOT NULL, ALTER COLUMN retry_count SET NOT NULL, ALTER COLUMN duration_ms SET NOT NULL;
-- squawk-ignore ban-drop-constraint
ALTER TABLE circle.pipeline_node_runs DROP CONSTRAINT IF EXISTS tmp_pipeline_node_runs_not_null;

-- == upgrade: ids of node runs grow ten times as fast as those of runs; the rewrite is quick only while the table is small
DO $bigint$
BEGIN
    IF (SELECT atttypid FROM pg_attribute
        WHERE attrelid = 'circle.pipeline_node_runs'::regclass AND attname = 'id') = 'bigint'::regtype THEN
        RETURN;
    ELSIF pg_relation_size('circle.pipeline_node_runs') > 8388608 THEN
        RAISE WARNING 'circle.pipeline_node_runs.id stays INTEGER: the table is too large to be rewritten in a moment';
    ELSE
        ALTER TABLE circle.pipeline_node_runs ALTER COLUMN id TYPE bigint;
        ALTER SEQUENCE circle.pipeline_node_runs_id_seq AS bigint;
    END IF;
END $bigint$;

-- == upgrade index: circle.idx_pipeline_node_runs_run_node_new
CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_node_runs_run_node_new
    ON circle.pipeline_node_runs (run_id, node_id);

-- == upgrade: a node stands once in a run
DO $swap$
BEGIN
    IF (SELECT indisunique FROM pg_index WHERE indexrelid = to_regclass('circle.idx_pipeline_node_runs_run_node')) THEN
        DROP INDEX IF EXISTS circle.idx_pipeline_node_runs_run_node_new;
    ELSE
        DROP INDEX IF EXISTS circle.idx_pipeline_node_runs_run_node;
        ALTER INDEX circle.idx_pipeline_node_runs_run_node_new RENAME TO idx_pipeline_node_runs_run_node;
    END IF;
END $swap$;

-- == downgrade index: circle.idx_pipeline_node_runs_run_node_old
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_node_runs_run_node_old ON circle.pipeline_node_runs (run_id, node_id);

-- == downgrade: the index of revision 007 is not unique
DO $swap$
BEGIN
    IF (SELECT NOT indisunique FROM pg_index WHERE indexrelid = to_regclass('circle.idx_pipeline_node_runs_run_node')) THEN
        DROP INDEX IF EXISTS circle.idx_pipeline_node_runs_run_node_old;
    ELSE
        DROP INDEX IF EXISTS circle.idx_pipeline_node_runs_run_node;
        ALTER INDEX circle.idx_pipeline_node_runs_run_node_old RENAME TO idx_pipeline_node_runs_run_node;
    END IF;
END $swap$;

-- == downgrade: ids of node runs, where they still fit and the table is small
DO $bigint$
BEGIN
    IF (SELECT atttypid FROM pg_attribute
        WHERE attrelid = 'circle.pipeline_node_runs'::regclass AND attname = 'id') = 'bigint'::regtype
       AND pg_relation_size('circle.pipeline_node_runs') <= 8388608
       AND NOT EXISTS (SELECT FROM circle.pipeline_node_runs WHERE id > 2147483647) THEN
        ALTER TABLE circle.pipeline_node_runs ALTER COLUMN id TYPE integer;
        ALTER SEQUENCE circle.pipeline_node_runs_id_seq AS integer;
    END IF;
END $bigint$;

-- == downgrade: node runs
ALTER TABLE circle.pipeline_node_runs
    ALTER COLUMN status DROP NOT NULL, ALTER COLUMN retry_count DROP NOT NULL, ALTER COLUMN duration_ms DROP NOT NULL,
    DROP CONSTRAINT IF EXISTS tmp_pipeline_node_runs_not_null,
    DROP CONSTRAINT IF EXISTS ck_pipeline_node_runs_type,
    DROP CONSTRAINT IF EXISTS ck_pipeline_node_runs_numbers,
    DROP CONSTRAINT IF EXISTS ck_pipeline_node_runs_terminal_is_completed,
    DROP CONSTRAINT IF EXISTS ck_pipeline_node_runs_times;
DROP TRIGGER IF EXISTS pipeline_node_runs_before ON circle.pipeline_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_before_insert ON circle.pipeline_node_runs;

-- == downgrade: runs
ALTER TABLE circle.pipeline_runs
    ALTER COLUMN status DROP NOT NULL, ALTER COLUMN duration_seconds DROP NOT NULL,
    DROP CONSTRAINT IF EXISTS tmp_pipeline_runs_not_null,
    DROP CONSTRAINT IF EXISTS ck_pipeline_runs_duration,
    DROP CONSTRAINT IF EXISTS ck_pipeline_runs_terminal_is_completed,
    DROP CONSTRAINT IF EXISTS ck_pipeline_runs_times;
DROP TRIGGER IF EXISTS pipeline_runs_before ON circle.pipeline_runs;

-- == downgrade: pipelines
ALTER TABLE circle.pipelines
    ALTER COLUMN status DROP NOT NULL, ALTER COLUMN nodes DROP NOT NULL, ALTER COLUMN edges DROP NOT NULL,
    ALTER COLUMN run_count DROP NOT NULL, ALTER COLUMN success_count DROP NOT NULL,
    ALTER COLUMN error_count DROP NOT NULL, ALTER COLUMN max_retries_per_node DROP NOT NULL,
    ALTER COLUMN retry_backoff_base DROP NOT NULL, ALTER COLUMN retry_backoff_max DROP NOT NULL,
    DROP CONSTRAINT IF EXISTS tmp_pipelines_not_null,
    DROP CONSTRAINT IF EXISTS ck_pipelines_timeout,
    DROP CONSTRAINT IF EXISTS ck_pipelines_retries,
    DROP CONSTRAINT IF EXISTS ck_pipelines_backoff,
    DROP CONSTRAINT IF EXISTS ck_pipelines_counters,
    DROP CONSTRAINT IF EXISTS ck_pipelines_timestamps_finite;

-- == downgrade: functions
DROP FUNCTION IF EXISTS circle.pipeline_runs_before();
DROP FUNCTION IF EXISTS circle.pipeline_node_runs_before();
