-- Revision 011: the legal transitions, and the guards that refuse any other from every writer.
--
-- Each table has one BEFORE ROW function, which judges and completes a row, and one AFTER function for each kind of change, which
-- judges what needs other rows, writes the events and counts: by statement, but for the status of runs, because a trigger with a
-- column list has no transition tables, and without the list heartbeats would fire it.
--
-- A BEFORE ROW trigger is ALWAYS: it holds for logical subscribers and
-- under replica role. The others aren't, because their effects arrive by replication. With triggers disabled the CHECKs hold.
--
-- These are hot paths. PL/pgSQL prepares an expression in every transaction, and PostgreSQL a WHEN or CHECK in every statement:
-- hence few expressions, the first of which passes by what is complete and legal.

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

-- == create the functions that count runs
-- Adds up the rows of pipelines that have several, as far as no other transaction holds them; at most 5,000 in one call.
CREATE OR REPLACE FUNCTION circle.add_up_counters() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    WITH free AS MATERIALIZED (
        SELECT c.pipeline_id, c.id FROM circle.pipeline_counters c
        WHERE c.pipeline_id IN (SELECT pipeline_id FROM circle.pipeline_counters GROUP BY 1 HAVING count(*) > 1)
        ORDER BY c.pipeline_id, c.id LIMIT 5000 FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM circle.pipeline_counters c USING free f WHERE c.pipeline_id = f.pipeline_id AND c.id = f.id RETURNING c.*
    )
    INSERT INTO circle.pipeline_counters (pipeline_id, pending, running, completed, failed, cancelled, timeout, run_count,
                                          success_count, error_count, leases_lost, last_run)
    SELECT g.pipeline_id, sum(g.pending), sum(g.running), sum(g.completed), sum(g.failed), sum(g.cancelled), sum(g.timeout),
           sum(g.run_count), sum(g.success_count), sum(g.error_count), sum(g.leases_lost), max(g.last_run)
    FROM gone g JOIN circle.pipelines p ON p.id = g.pipeline_id GROUP BY g.pipeline_id;
END $$;
-- Counts runs that change from a status to another; a NULL is no status. One in some hundred calls adds up the rows.
CREATE OR REPLACE FUNCTION circle.count_runs(p_pipeline_id integer, p_old text, p_new text, p_number bigint DEFAULT 1) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO circle.pipeline_counters (pipeline_id, pending, running, completed, failed, cancelled, timeout) VALUES (
        p_pipeline_id,
        CASE 'pending' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END,
        CASE 'running' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END,
        CASE 'completed' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END,
        CASE 'failed' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END,
        CASE 'cancelled' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END,
        CASE 'timeout' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END);
    IF random() < 0.005 AND circle.is_read_committed() THEN
        PERFORM circle.add_up_counters();
    END IF;
END $$;
REVOKE ALL ON FUNCTION circle.add_up_counters(), circle.count_runs(integer, text, text, bigint) FROM PUBLIC;

-- == create guards of runs
-- Judges and completes a row. Logs may be written after the end; a claim token grows, to at most the microseconds of the clock.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_before() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NOT circle.is_replica() THEN
            -- shared among creators: a version is deleted, and a pipeline, when no run of it is being created
            PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(NEW.pipeline_id));
            SELECT v.version INTO NEW.pipeline_version FROM circle.pipelines p
            JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
            WHERE p.id = NEW.pipeline_id;
            IF NEW.resumed_from IS NOT NULL THEN   -- of the graph that the old run had
                SELECT r.pipeline_version INTO NEW.pipeline_version FROM circle.pipeline_runs r
                WHERE r.id = NEW.resumed_from AND r.pipeline_id = NEW.pipeline_id AND r.status IN ('failed', 'cancelled', 'timeout');
                IF NOT FOUND THEN
                    RAISE EXCEPTION 'resumed_from % is no failed, cancelled or timed-out run of pipeline %', NEW.resumed_from, NEW.pipeline_id
                        USING ERRCODE = 'integrity_constraint_violation';
                END IF;
            END IF;
        END IF;
        IF NEW.status = 'pending' AND NEW.trigger_data = '{}' AND NEW.logs = '[]' THEN
            RETURN NEW;
        ELSIF NOT (circle.is_readable(NEW.trigger_data) AND circle.is_readable(NEW.logs)) THEN
            PERFORM circle.refuse_json('trigger_data or logs', TG_TABLE_NAME);
        END IF;
    ELSE
        IF (CASE NEW.status
               WHEN 'running' THEN OLD.status = 'pending' AND NEW.started_at IS NOT NULL AND NEW.completed_at IS NULL
               WHEN 'completed' THEN OLD.status = 'running' AND NEW.completed_at IS NOT NULL AND NEW.lease_expires_at IS NULL
                   AND NEW.duration_seconds IS NOT NULL END)
           AND NEW.pipeline_id = OLD.pipeline_id AND NEW.id = OLD.id AND NEW.claim_token = OLD.claim_token
           AND NEW.pipeline_version = OLD.pipeline_version AND NEW.error_message IS NULL AND NEW.failed_node IS NULL
           AND NEW.trigger_data = OLD.trigger_data AND NEW.logs = OLD.logs AND NEW.resumed_from IS NOT DISTINCT FROM OLD.resumed_from THEN
            RETURN NEW;
        END IF;
        -- a run from before there were versions gets one, once
        IF NEW.id <> OLD.id OR NEW.pipeline_id <> OLD.pipeline_id OR NEW.pipeline_version IS DISTINCT FROM OLD.pipeline_version
           AND (OLD.pipeline_version IS NOT NULL OR NOT EXISTS (
               SELECT FROM circle.pipeline_versions WHERE pipeline_id = OLD.pipeline_id AND version = NEW.pipeline_version)) THEN
            PERFORM circle.refuse_change('run ' || OLD.id, 'id, pipeline_id and pipeline_version');
        -- its foreign key sets it to NULL when the old run is deleted
        ELSIF NEW.resumed_from IS DISTINCT FROM OLD.resumed_from AND NOT circle.is_replica()
              AND (NEW.resumed_from IS NOT NULL OR EXISTS (SELECT FROM circle.pipeline_runs WHERE id = OLD.resumed_from)) THEN
            PERFORM circle.refuse_change('run ' || OLD.id, 'resumed_from');
        ELSIF NEW.status IS DISTINCT FROM OLD.status AND circle.run_may_become(OLD.status, NEW.status) IS NOT TRUE THEN
            PERFORM circle.refuse_transition(OLD.id, NULL, OLD.status, NEW.status, '');
        ELSIF OLD.completed_at IS NOT NULL AND (NEW.completed_at IS DISTINCT FROM OLD.completed_at
                                                OR NEW.error_message IS DISTINCT FROM OLD.error_message) THEN
            PERFORM circle.refuse_transition(OLD.id, NULL, OLD.status, NEW.status, 'the end and the error of a terminal run are final');
        ELSIF NEW.failed_node IS DISTINCT FROM OLD.failed_node AND NOT circle.is_replica() AND (
                OLD.failed_node IS NOT NULL OR NOT EXISTS (
                    SELECT FROM circle.pipeline_node_runs
                    WHERE run_id = OLD.id AND node_id = NEW.failed_node AND status = 'failed')) THEN
            PERFORM circle.refuse_change('run ' || OLD.id, 'failed_node, the first node that failed,');
        ELSIF NEW.claim_token < OLD.claim_token OR OLD.completed_at IS NOT NULL AND NEW.claim_token <> OLD.claim_token
              OR NEW.claim_token > OLD.claim_token AND NEW.claim_token > circle.next_token(OLD.claim_token) AND NOT circle.is_replica() THEN
            PERFORM circle.refuse_transition(OLD.id, NULL, OLD.status, NEW.status,
                                             'claim tokens only grow, by one or to the microseconds of the clock');
        -- only changed values are checked: else a run with values from before this revision could never end
        ELSIF NEW.trigger_data IS DISTINCT FROM OLD.trigger_data AND NOT circle.is_readable(NEW.trigger_data)
              OR NEW.logs IS DISTINCT FROM OLD.logs AND NOT circle.is_readable(NEW.logs) AND circle.is_readable(OLD.logs) THEN
            PERFORM circle.refuse_json(format('trigger_data or logs of run %s', OLD.id), TG_TABLE_NAME);
        ELSIF NEW.status = OLD.status THEN
            RETURN NEW;
        END IF;
    END IF;
    IF NEW.status = 'running' THEN
        NEW.started_at := coalesce(NEW.started_at, clock_timestamp());
    ELSIF NEW.status <> 'pending' THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        NEW.lease_expires_at := NULL;
        IF coalesce(NEW.duration_seconds, 0) = 0 THEN
            -- times that are not finite have no difference: ck_pipeline_runs_leased refuses them, and an end before the start
            NEW.duration_seconds := CASE WHEN isfinite(NEW.completed_at) AND isfinite(NEW.started_at)
                THEN least(greatest(extract(epoch FROM NEW.completed_at - NEW.started_at), 0), 2147483647)::integer ELSE 0 END;
        END IF;
    END IF;
    RETURN NEW;
END $$;
-- The fencing token after this one. It grows with the clock, so that neither a restore nor a failover issues one twice. Inlined.
CREATE OR REPLACE FUNCTION circle.next_token(p_token bigint) RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT greatest(p_token + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
$$;
-- The current status is refused, too: of two writers that end a run or a node run only one may succeed. An UPDATE of a logical
-- subscriber names every column, changed or not.
CREATE OR REPLACE FUNCTION circle.refuse_same_status() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT circle.is_replica() THEN
        PERFORM circle.refuse_transition((to_jsonb(OLD) ->> CASE TG_TABLE_NAME WHEN 'pipeline_runs' THEN 'id' ELSE 'run_id' END)::bigint,
                                         to_jsonb(OLD) ->> 'node_id', OLD.status, NEW.status, '');
    END IF;
    RETURN NEW;
END $$;
-- Judges inserted runs here and not BEFORE, because ON CONFLICT proposes rows that are never inserted.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_insert() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    c record;
    started boolean := false;
BEGIN
    IF TG_RELID <> 'circle.pipeline_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_runs_after_insert', TG_RELID);
    END IF;
    FOR c IN SELECT pipeline_id, status, count(*) AS number, min(id) AS first,
                    max(claim_token) > circle.next_token(0) AS ahead, min(id) FILTER (WHERE failed_node IS NOT NULL) AS blamed
             FROM new_rows GROUP BY pipeline_id, status ORDER BY pipeline_id, status LOOP
        IF c.status NOT IN ('pending', 'running') OR c.ahead THEN
            PERFORM circle.refuse_transition(c.first, NULL, 'new', c.status, CASE WHEN c.ahead THEN 'its claim token is ahead of the clock' END);
        ELSIF c.blamed IS NOT NULL THEN   -- a new run has no node that failed
            PERFORM circle.refuse_change('run ' || c.blamed, 'failed_node, the first node that failed,');
        END IF;
        PERFORM circle.count_runs(c.pipeline_id, NULL, c.status, c.number);
        started := started OR c.status = 'running';
    END LOOP;
    IF started THEN
        INSERT INTO circle.pipeline_events (xid, run_id, type)
        SELECT circle.event_xid(), id, circle.run_event(status) FROM new_rows WHERE status = 'running' ORDER BY id;
    END IF;
    RETURN NULL;
END $$;
-- The data of the event of a run that starts: its claim and the worker, and what it was resumed from.
CREATE OR REPLACE FUNCTION circle.start_event_data(p_run_id bigint, p_claim integer, p_worker_id text, p_resumed_from bigint) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN CASE WHEN p_claim IS NULL THEN '{}' ELSE jsonb_build_object('claim', p_claim, 'worker_id', p_worker_id) END
        || CASE WHEN p_resumed_from IS NULL THEN '{}' ELSE jsonb_build_object('resumed_from', p_resumed_from, 'taken_over', (
               SELECT count(*) FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND taken_from IS NOT NULL)) END;
END $$;
-- Writes the event, takes live nodes along, refuses an end that would leave some.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_update() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.status IN ('failed', 'cancelled', 'timeout') AND TG_RELID = 'circle.pipeline_runs'::regclass THEN
        UPDATE circle.pipeline_node_runs SET status = 'cancelled' WHERE run_id = NEW.id AND (status IN ('pending', 'running')) IS TRUE;
    END IF;
    INSERT INTO circle.pipeline_events (xid, run_id, type, data)
    SELECT circle.event_xid(), NEW.id, circle.run_event(NEW.status),
           CASE NEW.status
               WHEN 'running' THEN circle.start_event_data(
                   NEW.id, CASE WHEN NEW.claim_count > OLD.claim_count THEN NEW.claim_count END, NEW.worker_id, NEW.resumed_from)
               WHEN 'completed' THEN jsonb_build_object('worker_id', NEW.worker_id, 'duration_seconds', NEW.duration_seconds)
               ELSE jsonb_build_object('worker_id', NEW.worker_id, 'duration_seconds', NEW.duration_seconds, 'error', NEW.error_message) END
    WHERE CASE
        WHEN TG_RELID <> 'circle.pipeline_runs'::regclass OR NOT circle.is_read_committed()
             OR NEW.status IN ('pending', 'completed') AND EXISTS (
                 SELECT FROM circle.pipeline_node_runs WHERE run_id = NEW.id AND (
                     status = 'running' OR NEW.status = 'completed' AND status IN ('pending', 'failed')))
        THEN circle.refuse_run_change(TG_RELID, NEW.id, OLD.status, NEW.status)
        ELSE NEW.status <> 'pending' END;
    PERFORM circle.count_runs(NEW.pipeline_id, OLD.status, NEW.status);
    RETURN NULL;
END $$;
-- Raises why pipeline_runs_after_update refuses a row.
CREATE OR REPLACE FUNCTION circle.refuse_run_change(p_table regclass, p_run_id bigint, p_current text, p_requested text)
RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF p_table <> 'circle.pipeline_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_runs_after_update', p_table);
    ELSIF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    RETURN circle.refuse_transition(p_run_id, NULL, p_current, p_requested, 'some of its nodes are live or failed');
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_delete() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_RELID <> 'circle.pipeline_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_runs_after_delete', TG_RELID);
    END IF;
    PERFORM circle.count_runs(c.pipeline_id, c.status, NULL, c.number)
    FROM (SELECT pipeline_id, status, count(*) AS number FROM old_rows GROUP BY pipeline_id, status ORDER BY pipeline_id, status) c;
    RETURN NULL;
END $$;
-- Events and counters have no row left that they are about.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_truncate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_RELID <> 'circle.pipeline_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_runs_after_truncate', TG_RELID);
    END IF;
    PERFORM circle.fold_counters();
    TRUNCATE circle.pipeline_events, circle.pipeline_counters;
    RETURN NULL;
END $$;

-- == pipeline_node_runs: complete inserted rows by a function of their own, before that of revision 008 becomes a guard of updates
-- Raises that a node run can't have this untaken.
CREATE OR REPLACE FUNCTION circle.refuse_untaken(p_node_id text, p_run_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'untaken of node % of run % is written with the change to completed only, and has positions of its successors',
        p_node_id, p_run_id USING ERRCODE = 'integrity_constraint_violation';
END $$;
-- Completes a proposed row; pipeline_node_runs_after_insert judges those that were inserted.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT (circle.is_readable(NEW.input_data) AND circle.is_readable(NEW.output_data)) THEN
        PERFORM circle.refuse_json(format('input_data or output_data of node %s of run %s', NEW.node_id, NEW.run_id),
                                   TG_TABLE_NAME);
    ELSIF NEW.untaken IS NOT NULL AND (NEW.status = 'completed' AND NEW.untaken <@ NEW.successors) IS NOT TRUE THEN
        PERFORM circle.refuse_untaken(NEW.node_id, NEW.run_id);
    ELSIF NEW.status = 'running' THEN
        NEW.started_at := coalesce(NEW.started_at, clock_timestamp());
    ELSIF NEW.status <> 'pending' AND NEW.completed_at IS NULL THEN
        NEW.completed_at := greatest(clock_timestamp(), NEW.started_at);
        NEW.duration_ms := CASE WHEN NEW.duration_ms <> 0 OR isfinite(NEW.started_at) IS NOT TRUE THEN NEW.duration_ms
            ELSE least(extract(epoch FROM NEW.completed_at - NEW.started_at) * 1000, 2147483647)::integer END;
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER pipeline_node_runs_before_insert BEFORE INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status <> 'pending' OR NEW.input_data <> '{}' OR NEW.output_data <> '{}' OR NEW.untaken IS NOT NULL)
    EXECUTE FUNCTION circle.pipeline_node_runs_before_insert();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_before_insert;

-- == create guards of node runs
-- Judges and completes a changed row. position, predecessors and successors may be set once, where they are NULL.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (CASE NEW.status
           WHEN 'running' THEN OLD.status = 'pending' AND NEW.started_at IS DISTINCT FROM OLD.started_at AND NEW.completed_at IS NULL
           WHEN 'completed' THEN OLD.status IN ('pending', 'running') AND NEW.completed_at IS NOT NULL END)
       AND NEW.run_id = OLD.run_id AND NEW.node_id = OLD.node_id AND NEW.id = OLD.id AND NEW.node_type = OLD.node_type
       AND NEW.position = OLD.position AND NEW.predecessors = OLD.predecessors AND NEW.successors = OLD.successors AND NEW.untaken IS NULL
       AND NEW.taken_from IS NULL
       AND (NEW.output_data = OLD.output_data OR circle.is_readable(NEW.output_data))
       AND (NEW.input_data = OLD.input_data OR circle.is_readable(NEW.input_data)) THEN
        RETURN NEW;
    END IF;
    IF NEW.run_id <> OLD.run_id OR NEW.node_id <> OLD.node_id OR NEW.id <> OLD.id OR NEW.node_type <> OLD.node_type
       OR OLD.position IS NOT NULL AND NEW.position IS DISTINCT FROM OLD.position
       OR OLD.predecessors IS NOT NULL AND NEW.predecessors IS DISTINCT FROM OLD.predecessors
       OR OLD.successors IS NOT NULL AND NEW.successors IS DISTINCT FROM OLD.successors OR NEW.taken_from IS DISTINCT FROM OLD.taken_from THEN
        PERFORM circle.refuse_change(format('node %s of run %s', OLD.node_id, OLD.run_id),
                                     'id, run_id, node_id, node_type, position, predecessors, successors and taken_from');
    ELSIF NEW.status IS DISTINCT FROM OLD.status AND circle.node_may_become(OLD.status, NEW.status) IS NOT TRUE THEN
        PERFORM circle.refuse_transition(OLD.run_id, OLD.node_id, OLD.status, NEW.status,
            (SELECT 'its run is ' || r.status FROM circle.pipeline_runs r WHERE r.id = OLD.run_id AND r.status <> 'running'));
    ELSIF NEW.untaken IS DISTINCT FROM OLD.untaken
          AND (NEW.status = 'completed' AND OLD.status <> 'completed' AND NEW.untaken <@ NEW.successors) IS NOT TRUE THEN
        PERFORM circle.refuse_untaken(OLD.node_id, OLD.run_id);
    ELSIF NEW.input_data IS DISTINCT FROM OLD.input_data AND NOT circle.is_readable(NEW.input_data)
          OR NEW.output_data IS DISTINCT FROM OLD.output_data AND NOT circle.is_readable(NEW.output_data) THEN
        PERFORM circle.refuse_json(format('input_data or output_data of node %s of run %s', NEW.node_id, NEW.run_id),
                                   TG_TABLE_NAME);
    ELSIF NEW.status = OLD.status THEN
        RETURN NEW;
    ELSIF NEW.status = 'pending' THEN
        -- a due time tells a retry from a run that is released: pipeline_node_runs_after_update relies on it
        NEW.available_at := CASE
            WHEN NEW.retry_count > OLD.retry_count THEN coalesce(NEW.available_at, clock_timestamp())
            WHEN NEW.available_at IS DISTINCT FROM OLD.available_at THEN NEW.available_at END;
    ELSIF NEW.status = 'running' THEN
        NEW.started_at := CASE WHEN NEW.started_at IS DISTINCT FROM OLD.started_at THEN NEW.started_at ELSE clock_timestamp() END;
    ELSIF NEW.completed_at IS NULL THEN
        NEW.completed_at := greatest(clock_timestamp(), NEW.started_at);
        NEW.duration_ms := CASE WHEN NEW.duration_ms <> 0 OR isfinite(NEW.started_at) IS NOT TRUE THEN NEW.duration_ms
            ELSE least(extract(epoch FROM NEW.completed_at - NEW.started_at) * 1000, 2147483647)::integer END;
    END IF;
    RETURN NEW;
END $$;
-- Notes the first of the failed nodes of a run, in execution order: whatever order a statement changes them in. Returns true.
CREATE OR REPLACE FUNCTION circle.note_failure(p_run_id bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE circle.pipeline_runs SET failed_node = (
        SELECT node_id FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'failed' ORDER BY position, id LIMIT 1)
    WHERE id = p_run_id AND failed_node IS NULL AND completed_at IS NULL;
    RETURN true;
END $$;
-- Raises why a node can't have a new status when the statement has ended, or returns whether it has an event. A statement that ends a
-- node and its run together is legal: both rows have its command number. A run that was over before had no live node left to end.
CREATE OR REPLACE FUNCTION circle.judge_node(p_run_id bigint, p_node_id text, p_current text, p_requested text) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    run_status text;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT (run_status = 'running'
            OR p_requested = 'cancelled' AND p_current <> 'new' AND run_status IN ('failed', 'cancelled', 'timeout')
            OR p_current = 'new' AND run_status = 'pending' AND p_requested <> 'running'
            OR p_current <> 'new' AND p_requested NOT IN ('running', 'pending') AND run_status <> 'pending' AND EXISTS (
                SELECT FROM circle.pipeline_node_runs n JOIN circle.pipeline_runs r ON r.id = n.run_id
                WHERE n.run_id = p_run_id AND n.node_id = p_node_id AND n.xmin = r.xmin AND n.cmin = r.cmin)) THEN
        PERFORM circle.refuse_transition(p_run_id, p_node_id, p_current, p_requested, 'its run is ' || run_status);
    END IF;
    RETURN p_requested <> 'cancelled';
END $$;
-- The milliseconds since a node was started, unless they are given. Inlined.
CREATE OR REPLACE FUNCTION circle.elapsed_ms(p_given integer, p_started_at timestamptz) RETURNS integer LANGUAGE sql VOLATILE AS $$
    SELECT CASE
        WHEN p_given IS NOT NULL THEN p_given
        WHEN p_started_at IS NULL THEN 0   -- least() would ignore the NULL
        ELSE least(extract(epoch FROM greatest(clock_timestamp(), p_started_at) - p_started_at) * 1000, 2147483647)::integer END
$$;
-- The data of the event of a node run that failed, that waits, for its retry or because its run was released, or that nobody executed.
CREATE OR REPLACE FUNCTION circle.node_failure_data(p_status text, p_worker_id text, p_retry_count integer, p_started_at timestamptz,
                                                    p_duration_ms integer, p_error text, p_available_at timestamptz)
RETURNS jsonb LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN CASE p_status
        WHEN 'failed' THEN jsonb_build_object('attempt', p_retry_count + 1::bigint, 'worker_id', p_worker_id, 'duration_ms', p_duration_ms,
                                              'error', p_error)
        WHEN 'pending' THEN jsonb_build_object(
            'attempt', CASE WHEN p_available_at IS NULL THEN p_retry_count + 1::bigint ELSE greatest(p_retry_count, 1) END,
            'worker_id', p_worker_id, 'duration_ms', circle.elapsed_ms(NULL, p_started_at), 'error', p_error,
            'available_at', p_available_at)
        ELSE '{}' END;
END $$;
-- The data of the event of a node run: the attempt, the worker that holds the run, and how long the attempt took. Inlined, and short,
-- because an executor prepares it anew in each step.
CREATE OR REPLACE FUNCTION circle.node_event_data(p_status text, p_worker_id text, p_retry_count integer, p_started_at timestamptz,
                                                  p_duration_ms integer, p_error text, p_available_at timestamptz)
RETURNS jsonb LANGUAGE sql VOLATILE AS $$
    SELECT CASE p_status
        WHEN 'running' THEN jsonb_build_object('attempt', p_retry_count + 1::bigint, 'worker_id', p_worker_id)
        WHEN 'completed' THEN jsonb_build_object('attempt', p_retry_count + 1::bigint, 'worker_id', p_worker_id,
                                                 'duration_ms', p_duration_ms)
        ELSE circle.node_failure_data(p_status, p_worker_id, p_retry_count, p_started_at, p_duration_ms, p_error, p_available_at) END
$$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_insert() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r record;
    run_status text;
    worker text;
    held boolean := false;
    eventful boolean := false;
BEGIN
    IF TG_RELID <> 'circle.pipeline_node_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_node_runs_after_insert', TG_RELID);
    END IF;
    FOR r IN SELECT run_id, bool_or(status NOT IN ('pending', 'cancelled') AND taken_from IS NULL) AS eventful,
                    bool_or(status = 'failed') AS failed, count(taken_from) > 0 AS taken, min(node_id) AS node_id, min(node_id) FILTER (WHERE status = 'running') AS running, min(status) AS status
             FROM new_rows GROUP BY run_id ORDER BY run_id LOOP
        -- locks the run, so that it doesn't end concurrently
        SELECT status, worker_id INTO run_status, worker FROM circle.pipeline_runs WHERE id = r.run_id FOR NO KEY UPDATE;
        IF run_status <> 'running' AND (run_status <> 'pending' OR r.running IS NOT NULL) THEN
            PERFORM circle.judge_node(r.run_id, coalesce(r.running, r.node_id), 'new',
                                      CASE WHEN r.running IS NOT NULL THEN 'running' ELSE r.status END);
        ELSIF r.failed THEN
            PERFORM circle.note_failure(r.run_id);
        END IF;
        IF r.taken AND NOT EXISTS (SELECT FROM circle.pipeline_runs WHERE id = r.run_id AND resumed_from IS NOT NULL) THEN
            RAISE EXCEPTION 'run % is not resumed: no node of it has taken_from', r.run_id USING ERRCODE = 'integrity_constraint_violation';
        END IF;
        held := held OR worker IS NOT NULL;
        eventful := eventful OR r.eventful;
    END LOOP;
    IF eventful THEN
        INSERT INTO circle.pipeline_events (xid, run_id, node_id, type, data)
        SELECT circle.event_xid(), run_id, node_id, circle.node_event(status), circle.node_event_data(
            status, CASE WHEN held THEN (SELECT t.worker_id FROM circle.pipeline_runs t WHERE t.id = run_id) END, retry_count, started_at, duration_ms,
            error_message, available_at)
        FROM new_rows WHERE status NOT IN ('pending', 'cancelled') AND taken_from IS NULL ORDER BY run_id, position, id;
    END IF;
    RETURN NULL;
END $$;
-- The number of the events of a statement that may have waited for its runs: from a snapshot of its own, so that it isn't before that
-- of a run's last holder.
CREATE OR REPLACE FUNCTION circle.event_xid_now() RETURNS xid8
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN circle.event_xid();
END $$;
-- Old and new rows are compared by groups, which takes O(rows) whatever plan is cached; a join, planned for one row, would not. The run
-- of a node that starts is locked, so that it isn't released concurrently; if this transaction wrote its row, as the functions of this
-- package do, it is.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_update() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_RELID <> 'circle.pipeline_node_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_node_runs_after_update', TG_RELID);
    END IF;
    INSERT INTO circle.pipeline_events (xid, run_id, node_id, type, data)
    -- one number for all, taken when the sort below has ended, and so every wait for a run
    SELECT (SELECT circle.event_xid_now()), e.run_id, e.node_id, circle.node_event(e.status),
           circle.node_event_data(e.status, e.run[2], e.retry_count, e.started_at, e.duration_ms, e.error_message, e.available_at)
    FROM (SELECT m.* FROM (
        SELECT c.*, CASE c.status
            WHEN 'running' THEN coalesce(
                (SELECT ARRAY[r.status, r.worker_id] FROM circle.pipeline_runs r WHERE r.id = c.run_id AND r.xmin = pg_current_xact_id()::xid),
                (SELECT ARRAY[r.status, r.worker_id] FROM circle.pipeline_runs r WHERE r.id = c.run_id FOR NO KEY UPDATE))
            ELSE (SELECT ARRAY[r.status, r.worker_id] FROM circle.pipeline_runs r WHERE r.id = c.run_id) END AS run   -- its status and worker
        FROM (
            -- a group has the old and the new row, or one of them: then the status changed, and a maximum is the value of the row
            SELECT id, run_id, node_id, status, max(retry_count) AS retry_count, max(started_at) AS started_at,
                   max(duration_ms) AS duration_ms, max(error_message) AS error_message, max(available_at) AS available_at
            FROM (SELECT 1 AS side, id, run_id, node_id, status, retry_count, started_at, duration_ms, error_message, available_at FROM new_rows
                  UNION ALL SELECT 2, id, run_id, node_id, status, NULL, NULL, NULL, NULL, NULL FROM old_rows) b
            GROUP BY id, run_id, node_id, status HAVING sum(side) = 1) c
        OFFSET 0) m
    WHERE CASE
        WHEN m.run[1] = 'running' AND circle.is_read_committed()
        THEN m.status <> 'cancelled' AND (m.status <> 'failed' OR circle.note_failure(m.run_id))
        -- with its run, or raised: looking for the old status takes O(rows)
        WHEN m.status = 'cancelled' AND circle.is_read_committed() AND m.run[1] = ANY ('{failed,cancelled,timeout}') THEN false
        ELSE circle.judge_node(m.run_id, m.node_id, (SELECT o.status FROM old_rows o WHERE o.id = m.id), m.status) END
    ORDER BY m.run_id, m.id OFFSET 0) e;   -- ids are given in execution order
    RETURN NULL;
END $$;
-- Node runs go with their run, or once they and it are over.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_delete() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    live record;
BEGIN
    IF TG_RELID <> 'circle.pipeline_node_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_node_runs_after_delete', TG_RELID);
    END IF;
    -- a statement may end the run of live nodes that it deletes; those of runs that ended before are leftovers
    SELECT r.id, r.status INTO live
    FROM (SELECT run_id, bool_or(status IN ('pending', 'running')) AS live FROM old_rows GROUP BY run_id) o
    -- by the primary key: a join would read all live runs
    CROSS JOIN LATERAL (SELECT t.id, t.status, t.xmin FROM circle.pipeline_runs t WHERE t.id = o.run_id OFFSET 0) r
    WHERE r.status IN ('pending', 'running') OR o.live AND age(r.xmin) <= age(pg_current_xact_id()::xid) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'nodes of run % can''t be deleted: the run is %', live.id,
            CASE WHEN live.status IN ('pending', 'running') THEN live.status ELSE 'ended by the same transaction' END
            USING ERRCODE = 'integrity_constraint_violation', HINT = 'Cancel the run first, or delete the run.';
    END IF;
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_truncate() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM circle.pipeline_runs) THEN
        RAISE EXCEPTION 'runs would be left without nodes: TRUNCATE circle.pipeline_runs CASCADE empties both tables'
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
REVOKE ALL ON FUNCTION circle.pipeline_runs_after_insert(), circle.pipeline_runs_after_update(), circle.pipeline_runs_after_delete(),
    circle.pipeline_runs_after_truncate(), circle.pipeline_node_runs_after_insert(), circle.pipeline_node_runs_after_update(),
    circle.pipeline_node_runs_after_delete() FROM PUBLIC;
