-- Revision 011: runs that are run again, and calls on many runs.
--
-- A resumed run is a new run of the old one's version of the graph. It takes over the nodes that are completed or skipped and all of
-- whose ancestors are taken over; the other nodes begin anew. resumed_from is unique, so a run is resumed once.

-- == create functions that run again
-- The positions of the nodes that a resumed run takes over. Positions are in execution order: one pass is enough.
CREATE OR REPLACE FUNCTION circle.positions_to_take_over(p_run_id bigint) RETURNS integer[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    n record;
    is_taken boolean[];
    taken integer[] := '{}';
BEGIN
    FOR n IN SELECT position, predecessors, status FROM circle.pipeline_node_runs
             WHERE run_id = p_run_id AND position IS NOT NULL ORDER BY run_id, position LOOP
        is_taken[n.position] := n.status IN ('completed', 'skipped')
            AND NOT EXISTS (SELECT FROM unnest(n.predecessors) p WHERE is_taken[p] IS NOT TRUE);
        IF is_taken[n.position] THEN
            taken := taken || n.position;
        END IF;
    END LOOP;
    RETURN taken;
END $$;
-- Resumes a run that failed, was cancelled or timed out; returns the resumed one. The last of a chain of resumed runs is meant: if it
-- is live or completed, it is returned as it is.
CREATE OR REPLACE FUNCTION circle.resume_run(p_run_id bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    old circle.pipeline_runs;
    r circle.pipeline_runs;
    pipeline_status text;
    taken integer[];
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    -- as insert_run: delete_pipeline waits for this lock before it takes any other
    PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(r.pipeline_id));
    FOR attempt IN 1 .. 100 LOOP   -- a concurrent call may resume it first
        WHILE r.id IS NOT NULL LOOP
            old := r;
            SELECT * INTO r FROM circle.pipeline_runs WHERE resumed_from = old.id;
        END LOOP;
        PERFORM FROM circle.pipeline_runs WHERE id = old.id FOR KEY SHARE;
        IF NOT FOUND THEN   -- deleted since, and its pipeline perhaps, too
            SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
            IF NOT FOUND THEN
                PERFORM circle.refuse_lease(p_run_id);
            END IF;
            old := r;
            CONTINUE;
        END IF;
        IF old.id <> p_run_id AND old.status IN ('pending', 'running', 'completed') THEN
            PERFORM pg_logical_emit_message(true, 'circle', '');   -- writes WAL: the commit waits for a synchronous standby, as the first one did
            RETURN old;
        ELSIF old.completed_at IS NULL OR old.status = 'completed' THEN
            PERFORM circle.refuse_transition(old.id, NULL, old.status, 'resumed', 'only a failed, cancelled or timed-out run can be');
        ELSIF old.pipeline_version IS NULL THEN
            PERFORM circle.refuse_graph('no_version', format('run %s is bound to no version of its pipeline''s graph: create it again', old.id));
        END IF;
        INSERT INTO circle.pipeline_runs (pipeline_id, trigger_data, priority, resumed_from)
        SELECT p.id, old.trigger_data, old.priority, old.id FROM circle.pipelines p
        WHERE p.id = old.pipeline_id AND (p.status = 'active') IS TRUE
        ON CONFLICT (resumed_from) WHERE resumed_from IS NOT NULL DO NOTHING
        RETURNING * INTO r;
        EXIT WHEN FOUND;
        SELECT status INTO pipeline_status FROM circle.pipelines WHERE id = old.pipeline_id;
        IF pipeline_status <> 'active' THEN
            PERFORM circle.refuse_inactive(old.pipeline_id, pipeline_status);
        END IF;
        r := old;
    END LOOP;
    IF r.id = old.id THEN   -- a trigger of the host discards every row
        PERFORM circle.refuse_create(old.pipeline_id);
    END IF;
    taken := circle.positions_to_take_over(old.id);
    INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, position, predecessors, successors, status, input_data, output_data,
                                           untaken, retry_count, duration_ms, started_at, completed_at, taken_from)
    SELECT r.id, c.node_id, c.node_type, c.place - 1, c.predecessors, c.successors, coalesce(o.status, 'pending'), coalesce(o.input_data, '{}'),
           coalesce(o.output_data, '{}'), o.untaken, coalesce(o.retry_count, 0), coalesce(o.duration_ms, 0), o.started_at, o.completed_at,
           CASE WHEN o.id IS NOT NULL THEN coalesce(o.taken_from, old.id) END
    FROM circle.pipeline_versions v
    CROSS JOIN LATERAL unnest(v.compiled) WITH ORDINALITY c (node_id, node_type, predecessors, successors, branches, place)
    LEFT JOIN (SELECT * FROM circle.pipeline_node_runs n WHERE n.run_id = old.id AND (n.position IN (SELECT unnest(taken))) IS TRUE) o
        ON o.position = c.place - 1
    WHERE v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version ORDER BY c.place;
    INSERT INTO circle.pipeline_run_tags (run_id, key, value)
    SELECT r.id, t.key, t.value FROM circle.pipeline_run_tags t WHERE t.run_id = old.id;
    INSERT INTO circle.pipeline_run_history (run_id, kind, worker_id, reason)
    VALUES (r.id, 'resumed', session_user, format('from run %s', old.id));
    INSERT INTO circle.pipeline_counters (pipeline_id, run_count, last_run) VALUES (r.pipeline_id, 1, clock_timestamp());
    RETURN r;
END $$;
-- Creates a run with the data, priority and tags of another one, of the current graph.
CREATE OR REPLACE FUNCTION circle.rerun_run(p_run_id bigint, p_key text) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    old circle.pipeline_runs;
BEGIN
    -- as insert_run: delete_pipeline waits for this lock before it takes any other
    PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(pipeline_id)) FROM circle.pipeline_runs WHERE id = p_run_id;
    SELECT * INTO old FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    RETURN circle.create_run(old.pipeline_id, old.trigger_data, p_key, old.priority, NULL, false, (
        SELECT jsonb_object_agg(t.key, t.value) FROM circle.pipeline_run_tags t WHERE t.run_id = p_run_id));
END $$;

-- == create the function on many runs
-- Resumes or cancels the runs that filtered_runs finds, each in a subtransaction of its own: at most 60, as in recover_runs.
CREATE OR REPLACE FUNCTION circle.change_runs(p_resume boolean, p_reason text, p_pipeline_id bigint, p_statuses text[], p_tags jsonb,
                                              p_since timestamptz, p_until timestamptz, p_after bigint, p_limit integer) RETURNS json
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    page record;
    one bigint;
    changed json[] := '{}';
    refused jsonb := '{}';
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    page := circle.filtered_runs(p_pipeline_id, p_statuses, p_tags, p_since, p_until, p_after, least(p_limit, 60));
    -- in the order of their ids: two callers that change the same runs don't wait for each other
    FOR one IN SELECT unnest(page.ids) ORDER BY 1 LOOP
        BEGIN
            changed := changed || CASE WHEN p_resume THEN to_json(circle.resume_run(one))
                                       ELSE to_json(circle.conclude_run(one, 'cancelled', p_reason, NULL)) END;
        EXCEPTION WHEN SQLSTATE 'PL001' OR SQLSTATE 'PL003' OR SQLSTATE 'PL006' OR SQLSTATE 'PL008' OR SQLSTATE 'PL012' THEN
            refused := refused || jsonb_build_object(one, SQLERRM);
        END;
    END LOOP;
    RETURN json_build_object('runs', changed, 'refused', refused, 'next_cursor', page.next_cursor);
END $$;
