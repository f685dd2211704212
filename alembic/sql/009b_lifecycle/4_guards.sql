-- Revision 009: triggers that refuse illegal transitions from every writer.

-- == pipeline_node_runs: fill in inserted rows by a function of its own, before pipeline_node_runs_before becomes a guard of updates
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status = 'running' THEN
        NEW.started_at := coalesce(NEW.started_at, clock_timestamp());
    ELSE
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        NEW.duration_ms := CASE WHEN NEW.duration_ms <> 0 OR NEW.started_at IS NULL THEN NEW.duration_ms
            ELSE least(extract(epoch FROM NEW.completed_at - NEW.started_at) * 1000, 2147483647)::integer END;
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER pipeline_node_runs_before_insert BEFORE INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status <> 'pending') EXECUTE FUNCTION circle.pipeline_node_runs_before_insert();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_before_insert;

-- == create guards of runs and node runs
CREATE OR REPLACE FUNCTION circle.pipeline_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF current_setting('session_replication_role') <> 'replica' THEN
            SELECT v.version INTO NEW.pipeline_version FROM circle.pipelines p
            JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
            WHERE p.id = NEW.pipeline_id;
        END IF;
    ELSIF NOT (OLD.status = 'running' AND NEW.status IN ('completed', 'failed', 'cancelled', 'timeout', 'pending')
               OR OLD.status = 'pending' AND NEW.status IN ('running', 'failed', 'cancelled')) THEN
        IF OLD.status = NEW.status AND current_setting('session_replication_role') = 'replica' THEN
            RETURN NEW;   -- a logical subscriber's updates name every column, whatever they change
        END IF;
        -- else the same status again is refused too, or of two that end a run both would win
        RAISE EXCEPTION 'run % is % and can''t become %', OLD.id, OLD.status, NEW.status
            USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
                'entity', 'run', 'id', OLD.id, 'current', OLD.status, 'requested', NEW.status, 'reason', '');
    END IF;
    IF NEW.status = 'running' THEN
        NEW.started_at := coalesce(NEW.started_at, clock_timestamp());
    ELSIF NEW.status <> 'pending' THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        NEW.lease_expires_at := NULL;
        IF coalesce(NEW.duration_seconds, 0) = 0 THEN
            NEW.duration_seconds := least(coalesce(extract(epoch FROM NEW.completed_at - NEW.started_at), 0), 2147483647)::integer;
        END IF;
    END IF;
    RETURN NEW;
END $$;
-- After the insert: ON CONFLICT DO UPDATE proposes rows that are never inserted.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'run % can''t begin as %', NEW.id, NEW.status USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
        'entity', 'run', 'id', NEW.id, 'current', 'new', 'requested', NEW.status, 'reason', '');
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_runs_over() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'run % is over: its status, end and error stay as they are', OLD.id
        USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
            'entity', 'run', 'id', OLD.id, 'current', OLD.status, 'requested', NEW.status,
            'reason', 'its end and its error stay as they are, and tokens only grow');
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status IN ('failed', 'cancelled', 'timeout') THEN
        UPDATE circle.pipeline_node_runs SET status = 'cancelled'
        WHERE run_id = NEW.id AND (status IN ('pending', 'running')) IS TRUE;
    ELSIF EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = NEW.id AND (
            status = 'running' OR NEW.status = 'completed' AND status IN ('pending', 'failed'))) THEN
        RAISE EXCEPTION 'run % can''t become %: some of its nodes are live or failed', NEW.id, NEW.status
            USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
                'entity', 'run', 'id', NEW.id, 'current', OLD.status, 'requested', NEW.status,
                'reason', 'some of its nodes are live or failed');
    END IF;
    RETURN NULL;
END $$;
-- On the hot path: few expressions, because PL/pgSQL prepares each of them anew in every transaction.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    run_status text;
BEGIN
    IF NEW.status = 'running' THEN
        -- locked, so that the run can't be given back beside a raw writer; our own functions hold the lock already
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = NEW.run_id FOR NO KEY UPDATE;
    ELSE
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = NEW.run_id;
    END IF;
    IF NOT (OLD.status = 'running' AND NEW.status IN ('completed', 'failed', 'cancelled', 'pending')
            OR OLD.status = 'pending' AND NEW.status IN ('running', 'completed', 'failed', 'skipped', 'cancelled'))
       -- a node moves only while its run is running, or with it; under replica role other rows may come later
       OR NOT (run_status = 'running' OR NEW.status = 'cancelled' AND run_status IN ('failed', 'cancelled', 'timeout')
               OR current_setting('session_replication_role') = 'replica') THEN
        IF OLD.status = NEW.status AND current_setting('session_replication_role') = 'replica' THEN
            RETURN NEW;   -- as with runs
        END IF;
        RAISE EXCEPTION 'node % of run % is % and can''t become %', OLD.node_id, OLD.run_id, OLD.status, NEW.status
            USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
                'entity', 'node run', 'id', OLD.run_id || '/' || OLD.node_id, 'current', OLD.status, 'requested', NEW.status,
                'reason', CASE WHEN run_status <> 'running' THEN 'its run is ' || run_status ELSE '' END);
    END IF;
    IF NEW.status = 'running' THEN
        NEW.started_at := CASE WHEN NEW.started_at IS DISTINCT FROM OLD.started_at THEN NEW.started_at ELSE clock_timestamp() END;
    ELSIF NEW.status <> 'pending' THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        NEW.duration_ms := CASE WHEN NEW.duration_ms <> 0 OR NEW.started_at IS NULL THEN NEW.duration_ms
            ELSE least(extract(epoch FROM NEW.completed_at - NEW.started_at) * 1000, 2147483647)::integer END;
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_insert() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    new_run record;
    run_status text;
BEGIN
    -- a query on a transition table is planned each time: this one is small, and the one inside the loop is cached
    FOR new_run IN SELECT run_id, max(node_id) AS node_id, bool_or(status = 'running') AS running FROM new_rows
                   WHERE status IN ('pending', 'running') GROUP BY run_id ORDER BY run_id LOOP
        -- locked, so that the run can't end beside this transaction
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = new_run.run_id FOR NO KEY UPDATE;
        IF run_status <> 'running' AND (run_status <> 'pending' OR new_run.running) THEN
            RAISE EXCEPTION 'node % of run % can''t be live: its run is %', new_run.node_id, new_run.run_id, run_status
                USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
                    'entity', 'node run', 'id', new_run.run_id || '/' || new_run.node_id, 'current', 'new',
                    'requested', CASE WHEN new_run.running THEN 'running' ELSE 'pending' END,
                    'reason', 'its run is ' || run_status);
        END IF;
    END LOOP;
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_failed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE circle.pipeline_runs SET failed_node = NEW.node_id WHERE id = NEW.run_id AND failed_node IS NULL;
    RETURN NULL;
END $$;

-- == pipeline_runs: guard transitions
CREATE OR REPLACE TRIGGER pipeline_runs_over BEFORE UPDATE OF completed_at, error_message, claim_token
    ON circle.pipeline_runs FOR EACH ROW
    WHEN (NEW.claim_token < OLD.claim_token
          OR OLD.completed_at IS NOT NULL AND (NEW.completed_at IS DISTINCT FROM OLD.completed_at
                                               OR NEW.error_message IS DISTINCT FROM OLD.error_message))
    EXECUTE FUNCTION circle.pipeline_runs_over();
CREATE OR REPLACE TRIGGER pipeline_runs_after_insert AFTER INSERT ON circle.pipeline_runs FOR EACH ROW
    WHEN (NEW.status NOT IN ('pending', 'running')) EXECUTE FUNCTION circle.pipeline_runs_after_insert();
CREATE OR REPLACE TRIGGER pipeline_runs_after AFTER UPDATE OF status ON circle.pipeline_runs FOR EACH ROW
    WHEN (NEW.status <> 'running') EXECUTE FUNCTION circle.pipeline_runs_after();
ALTER TABLE circle.pipeline_runs ENABLE ALWAYS TRIGGER pipeline_runs_over;

-- == pipeline_node_runs: guard transitions
CREATE OR REPLACE TRIGGER pipeline_node_runs_after_insert AFTER INSERT ON circle.pipeline_node_runs
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_insert();
CREATE OR REPLACE TRIGGER pipeline_node_runs_failed AFTER INSERT OR UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status = 'failed') EXECUTE FUNCTION circle.pipeline_node_runs_failed();
