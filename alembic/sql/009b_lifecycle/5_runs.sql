-- Revision 009: functions on one run.
--
-- A function that reads other rows than the one it changes first locks the run (FOR NO KEY UPDATE), then acts; so each of its
-- statements sees what the transactions before it committed. Lock order: run, node runs, the pipeline's counters; a sweep ends
-- runs in the order of their pipelines. A raw UPDATE of a node run locks the node run before its run, so it can deadlock with
-- these functions: PostgreSQL then cancels one of the two with 40P01.
--
-- Functions keep generic plans: planning a statement takes longer than running it, and every statement uses an index. The
-- form (status = 'running') IS TRUE keeps plans off the partial indexes, whose dead entries grow with every transition.

-- == create functions that check the caller, lock and end a run
-- Whether the caller holds the run: its token is the run's, or it gives none and the run has no lease. Inlined.
CREATE OR REPLACE FUNCTION circle.holds_run(p_claim_token bigint, p_lease_expires_at timestamptz, p_token bigint)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(p_claim_token = p_token, p_lease_expires_at IS NULL)
$$;
-- Raises why a call on a run is refused.
CREATE OR REPLACE FUNCTION circle.refuse_run(p_run_id bigint, p_token bigint, p_requested text, p_reason text DEFAULT '')
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token) THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    PERFORM circle.refuse_transition(p_run_id, NULL, r.status, p_requested, p_reason);
END $$;
-- Locks the run for a caller that holds it, and starts a pending one.
CREATE OR REPLACE FUNCTION circle.lock_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token)
       OR r.status NOT IN ('pending', 'running') THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    ELSIF r.status = 'pending' THEN
        UPDATE circle.pipeline_runs SET status = 'running' WHERE id = p_run_id RETURNING * INTO r;
    END IF;
    RETURN r;
END $$;
-- Ends a locked run. The trigger pipeline_runs_after cancels its live nodes.
CREATE OR REPLACE FUNCTION circle.end_run(p_run_id bigint, p_status text, p_error text) RETURNS circle.pipeline_runs
LANGUAGE plpgsql AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    UPDATE circle.pipeline_runs SET status = p_status, error_message = coalesce(p_error, error_message)
    WHERE id = p_run_id RETURNING * INTO r;
    IF p_status <> 'cancelled' THEN
        UPDATE circle.pipelines SET success_count = success_count + (p_status = 'completed')::integer,
                                    error_count = error_count + (p_status <> 'completed')::integer
        WHERE id = r.pipeline_id;
    END IF;
    RETURN r;
END $$;
-- Ends a locked run in which nothing is running, ready or waiting for a retry; else returns NULL.
CREATE OR REPLACE FUNCTION circle.end_run_if_done(p_run_id bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql AS $$
DECLARE
    r record;
BEGIN
    SELECT t.failed_node,
           EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id
                   AND (status = 'running' OR status = 'pending' AND retry_count > 0)) AS busy,
           EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'pending') AS pending
    INTO r FROM circle.pipeline_runs t WHERE t.id = p_run_id;
    IF r.busy THEN
        RETURN NULL;
    ELSIF r.failed_node IS NOT NULL THEN
        RETURN circle.end_run(p_run_id, 'failed', (SELECT error_message FROM circle.pipeline_node_runs
                                                   WHERE run_id = p_run_id AND node_id = r.failed_node));
    ELSIF r.pending THEN
        IF EXISTS (SELECT FROM circle.startable_node_runs WHERE run_id = p_run_id) THEN
            RETURN NULL;
        END IF;
        -- the pending nodes wait for a cancelled one
        UPDATE circle.pipeline_node_runs SET status = 'cancelled' WHERE run_id = p_run_id AND status = 'pending';
    END IF;
    RETURN circle.end_run(p_run_id, 'completed', NULL);
END $$;

-- == create functions on runs
CREATE OR REPLACE FUNCTION circle.create_run(p_pipeline_id bigint, p_trigger_data jsonb, p_key text)
RETURNS circle.pipeline_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
    pipeline_status text;
    created integer;
    expected integer;
BEGIN
    -- shared among creators; delete_pipeline waits for this lock before it takes any other
    PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(p_pipeline_id));
    -- the first run with this key is returned even if the pipeline has been paused since
    FOR attempt IN 1 .. 2 LOOP
        IF p_key IS NOT NULL THEN
            SELECT * INTO r FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND idempotency_key = p_key;
            IF FOUND THEN
                RETURN r;
            END IF;
        END IF;
        INSERT INTO circle.pipeline_runs (pipeline_id, trigger_data, idempotency_key)
        SELECT p.id, p_trigger_data, p_key FROM circle.pipelines p
        WHERE p.id = p_pipeline_id AND (p.status = 'active') IS TRUE
        ON CONFLICT (pipeline_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING * INTO r;
        EXIT WHEN FOUND;
    END LOOP;
    IF r.id IS NOT NULL AND r.pipeline_version IS NOT NULL THEN
        INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, position, predecessors, successors)
        SELECT r.id, v.node_id, v.node_type, v.position, v.predecessors, v.successors
        FROM circle.pipeline_version_nodes v
        WHERE v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version ORDER BY v.position;
        GET DIAGNOSTICS created = ROW_COUNT;
        SELECT node_count INTO expected FROM circle.pipeline_versions
        WHERE pipeline_id = r.pipeline_id AND version = r.pipeline_version;
        IF created = 0 THEN
            PERFORM circle.refuse_graph('no_nodes', 'Pipeline must have at least one node', '["nodes"]');
        ELSIF created <> expected THEN
            RAISE EXCEPTION 'version % of pipeline % has % of its % nodes', r.pipeline_version, r.pipeline_id, created, expected
                USING ERRCODE = 'data_corrupted';
        END IF;
        UPDATE circle.pipelines SET run_count = run_count + 1, last_run = greatest(last_run, clock_timestamp())
        WHERE id = p_pipeline_id AND (status = 'active') IS TRUE;
        IF FOUND THEN
            RETURN r;
        END IF;
    END IF;
    SELECT p.status INTO pipeline_status FROM circle.pipelines p WHERE p.id = p_pipeline_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_unknown_pipeline(p_pipeline_id);
    ELSIF pipeline_status = 'active' THEN
        PERFORM circle.sort_graph(p.nodes, p.edges) FROM circle.pipelines p WHERE p.id = p_pipeline_id;
        PERFORM circle.refuse_graph('no_version', 'the stored graph was never compiled: save it again');
    END IF;
    RAISE EXCEPTION 'pipeline % is %, not active', p_pipeline_id, pipeline_status USING ERRCODE = 'PL006',
        DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'status', pipeline_status);
END $$;
CREATE OR REPLACE FUNCTION circle.start_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    UPDATE circle.pipeline_runs SET status = 'running'
    WHERE id = p_run_id AND circle.run_may_become(status, 'running')
      AND circle.holds_run(claim_token, lease_expires_at, p_token)
    RETURNING * INTO r;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    END IF;
    RETURN r;
END $$;
-- Ends a run with the caller's status: completed, failed or cancelled. A cancel needs no token.
CREATE OR REPLACE FUNCTION circle.conclude_run(p_run_id bigint, p_status text, p_error text, p_token bigint)
RETURNS circle.pipeline_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (p_status = 'cancelled' OR circle.holds_run(claim_token, lease_expires_at, p_token))
      AND circle.run_may_become(status, p_status)
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, p_status);
    END IF;
    RETURN circle.end_run(p_run_id, p_status, p_error);
END $$;
-- Ends a run with the status that follows from its nodes.
CREATE OR REPLACE FUNCTION circle.finish_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'completed');
    END IF;
    r := circle.end_run_if_done(p_run_id);
    IF r.id IS NULL THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'completed', 'some of its nodes are running, ready or waiting for a retry');
    END IF;
    RETURN r;
END $$;
CREATE OR REPLACE FUNCTION circle.append_run_log(p_run_id bigint, p_entry jsonb, p_token bigint) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    UPDATE circle.pipeline_runs SET logs = coalesce(logs, '[]') || jsonb_build_array(p_entry)
    WHERE id = p_run_id AND circle.holds_run(claim_token, lease_expires_at, p_token);
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'logged');
    END IF;
END $$;
-- A page of the history, newest first. The first column of the order is compared by >= and <, because with "=" the planner
-- would drop it from the order and might scan the primary key through the runs of other pipelines. Without sorts only the
-- right index remains.
CREATE OR REPLACE FUNCTION circle.page_of_runs(p_pipeline_id bigint, p_status text, p_after bigint, p_limit integer)
RETURNS SETOF circle.pipeline_runs
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan SET enable_sort = off SET enable_incremental_sort = off
SET enable_seqscan = off AS $$
BEGIN
    IF p_pipeline_id IS NOT NULL THEN
        RETURN QUERY SELECT * FROM circle.pipeline_runs r
        WHERE r.pipeline_id >= p_pipeline_id AND (r.pipeline_id, r.id) < (p_pipeline_id, p_after)
          AND (p_status IS NULL OR r.status = p_status)
        ORDER BY r.pipeline_id DESC, r.id DESC LIMIT p_limit;
    ELSIF p_status IS NOT NULL THEN
        RETURN QUERY SELECT * FROM circle.pipeline_runs r
        WHERE r.status >= p_status AND (r.status, r.id) < (p_status, p_after)
        ORDER BY r.status DESC, r.id DESC LIMIT p_limit;
    ELSE
        RETURN QUERY SELECT * FROM circle.pipeline_runs r WHERE r.id < p_after ORDER BY r.id DESC LIMIT p_limit;
    END IF;
END $$;
-- Locks the runs before their pipeline. The advisory lock keeps create_run out.
CREATE OR REPLACE FUNCTION circle.delete_pipeline(p_pipeline_id bigint, p_force boolean) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    live bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(1734964328, hashint8(p_pipeline_id));
    IF p_force THEN
        PERFORM FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND status IN ('pending', 'running')
        ORDER BY id FOR UPDATE;
    END IF;
    PERFORM FROM circle.pipelines WHERE id = p_pipeline_id FOR UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_unknown_pipeline(p_pipeline_id);
    END IF;
    SELECT count(*) INTO live FROM circle.pipeline_runs
    WHERE pipeline_id = p_pipeline_id AND status IN ('pending', 'running');
    IF live > 0 AND NOT p_force THEN
        RAISE EXCEPTION 'pipeline % has % live runs', p_pipeline_id, live USING ERRCODE = 'PL010',
            DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'live_runs', live);
    END IF;
    DELETE FROM circle.pipelines WHERE id = p_pipeline_id;
END $$;
