-- Revision 009: the legal transitions, and triggers that refuse any other from every writer.

-- == create the tables of legal transitions
-- RUN_TRANSITIONS and NODE_TRANSITIONS of gathering_pipeline/lifecycle.py; a test compares them. Both functions are inlined.
CREATE OR REPLACE FUNCTION circle.run_may_become(p_current text, p_requested text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE p_current
        WHEN 'pending' THEN p_requested IN ('running', 'failed', 'cancelled')
        WHEN 'running' THEN p_requested IN ('pending', 'completed', 'failed', 'cancelled', 'timeout')
        ELSE false END
$$;
CREATE OR REPLACE FUNCTION circle.node_may_become(p_current text, p_requested text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE p_current
        WHEN 'pending' THEN p_requested IN ('running', 'completed', 'failed', 'skipped', 'cancelled')
        WHEN 'running' THEN p_requested IN ('pending', 'completed', 'failed', 'cancelled')
        ELSE false END
$$;

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
    ELSIF NOT circle.run_may_become(OLD.status, NEW.status) THEN
        IF OLD.status = NEW.status AND current_setting('session_replication_role') = 'replica' THEN
            RETURN NEW;   -- updates of a logical subscriber name every column, changed or not
        END IF;
        -- the current status is refused, too: of two writers that end a run only one may succeed
        PERFORM circle.refuse_transition(OLD.id, NULL, OLD.status, NEW.status, '');
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
-- A trigger after the insert, because ON CONFLICT DO UPDATE proposes rows that are never inserted.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM circle.refuse_transition(NEW.id, NULL, 'new', NEW.status, '');
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_runs_terminal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM circle.refuse_transition(OLD.id, NULL, OLD.status, NEW.status,
                                     'the end and the error of a terminal run are final, and claim tokens only grow');
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status IN ('failed', 'cancelled', 'timeout') THEN
        UPDATE circle.pipeline_node_runs SET status = 'cancelled'
        WHERE run_id = NEW.id AND (status IN ('pending', 'running')) IS TRUE;
    ELSIF EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = NEW.id AND (
            status = 'running' OR NEW.status = 'completed' AND status IN ('pending', 'failed'))) THEN
        PERFORM circle.refuse_transition(NEW.id, NULL, OLD.status, NEW.status, 'some of its nodes are live or failed');
    END IF;
    RETURN NULL;
END $$;
-- A hot path: it has few expressions, because PL/pgSQL prepares each of them in every transaction.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    run_status text;
BEGIN
    IF NEW.status = 'running' THEN
        -- locks the run, so that it isn't released concurrently; functions of this package hold the lock already
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = NEW.run_id FOR NO KEY UPDATE;
    ELSE
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = NEW.run_id;
    END IF;
    IF NOT circle.node_may_become(OLD.status, NEW.status)
       -- a node moves only while its run is running, or is cancelled with it; a replica may apply the run's row later
       OR NOT (run_status = 'running' OR NEW.status = 'cancelled' AND run_status IN ('failed', 'cancelled', 'timeout')
               OR current_setting('session_replication_role') = 'replica') THEN
        IF OLD.status = NEW.status AND current_setting('session_replication_role') = 'replica' THEN
            RETURN NEW;   -- as in pipeline_runs_before
        END IF;
        PERFORM circle.refuse_transition(OLD.run_id, OLD.node_id, OLD.status, NEW.status,
                                         CASE WHEN run_status <> 'running' THEN 'its run is ' || run_status END);
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
    -- a query on a transition table is planned on every call: this one is small, and the one in the loop is cached
    FOR new_run IN SELECT run_id, max(node_id) AS node_id, bool_or(status = 'running') AS running FROM new_rows
                   WHERE status IN ('pending', 'running') GROUP BY run_id ORDER BY run_id LOOP
        -- locks the run, so that it doesn't end concurrently
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = new_run.run_id FOR NO KEY UPDATE;
        IF run_status <> 'running' AND (run_status <> 'pending' OR new_run.running) THEN
            PERFORM circle.refuse_transition(new_run.run_id, new_run.node_id, 'new',
                                             CASE WHEN new_run.running THEN 'running' ELSE 'pending' END,
                                             'its run is ' || run_status);
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
CREATE OR REPLACE TRIGGER pipeline_runs_terminal BEFORE UPDATE OF completed_at, error_message, claim_token
    ON circle.pipeline_runs FOR EACH ROW
    WHEN (NEW.claim_token < OLD.claim_token
          OR OLD.completed_at IS NOT NULL AND (NEW.completed_at IS DISTINCT FROM OLD.completed_at
                                               OR NEW.error_message IS DISTINCT FROM OLD.error_message))
    EXECUTE FUNCTION circle.pipeline_runs_terminal();
CREATE OR REPLACE TRIGGER pipeline_runs_after_insert AFTER INSERT ON circle.pipeline_runs FOR EACH ROW
    WHEN (NEW.status NOT IN ('pending', 'running')) EXECUTE FUNCTION circle.pipeline_runs_after_insert();
CREATE OR REPLACE TRIGGER pipeline_runs_after AFTER UPDATE OF status ON circle.pipeline_runs FOR EACH ROW
    WHEN (NEW.status <> 'running') EXECUTE FUNCTION circle.pipeline_runs_after();
ALTER TABLE circle.pipeline_runs ENABLE ALWAYS TRIGGER pipeline_runs_terminal;

-- == pipeline_node_runs: guard transitions
CREATE OR REPLACE TRIGGER pipeline_node_runs_after_insert AFTER INSERT ON circle.pipeline_node_runs
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_insert();
CREATE OR REPLACE TRIGGER pipeline_node_runs_failed AFTER INSERT OR UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status = 'failed') EXECUTE FUNCTION circle.pipeline_node_runs_failed();
