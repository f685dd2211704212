-- Revision 009: functions on one run.

-- == create functions that lock and end a run
-- Locks the run for a caller that holds it; a pending one is started.
CREATE OR REPLACE FUNCTION circle.lock_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF NOT FOUND OR NOT coalesce(r.claim_token = p_token, r.lease_expires_at IS NULL)
       OR r.status NOT IN ('pending', 'running') THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    ELSIF r.status = 'pending' THEN
        UPDATE circle.pipeline_runs SET status = 'running' WHERE id = p_run_id RETURNING * INTO r;
    END IF;
    RETURN r;
END $$;
-- Ends a run that is locked; its live nodes are cancelled by the trigger on runs.
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
CREATE OR REPLACE FUNCTION circle.end_run_if_over(p_run_id bigint) RETURNS circle.pipeline_runs
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
        -- what is left waits for a node that was cancelled
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
    -- shared among creators: delete_pipeline waits here, where it holds nothing yet, and not between them
    PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(p_pipeline_id));
    -- the first run with this key is the answer, also when the pipeline is paused by now
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
        RAISE EXCEPTION 'pipeline % does not exist', p_pipeline_id
            USING ERRCODE = 'PL002', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id);
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
    WHERE id = p_run_id AND (status = 'pending') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    RETURNING * INTO r;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    END IF;
    RETURN r;
END $$;
-- Ends a run as its caller says: completed, failed or cancelled. A cancel needs no token.
CREATE OR REPLACE FUNCTION circle.conclude_run(p_run_id bigint, p_status text, p_error text, p_token bigint)
RETURNS circle.pipeline_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (p_status = 'cancelled' OR coalesce(claim_token = p_token, lease_expires_at IS NULL))
      AND (status = 'running' OR status = 'pending' AND p_status <> 'completed') IS TRUE
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, p_status);
    END IF;
    RETURN circle.end_run(p_run_id, p_status, p_error);
END $$;
-- Ends a run as its nodes say.
CREATE OR REPLACE FUNCTION circle.finish_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'completed');
    END IF;
    r := circle.end_run_if_over(p_run_id);
    IF r.id IS NULL THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'completed', 'some of its nodes are running, ready or waiting for a retry');
    END IF;
    RETURN r;
END $$;
CREATE OR REPLACE FUNCTION circle.append_run_log(p_run_id bigint, p_entry jsonb, p_token bigint) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    UPDATE circle.pipeline_runs SET logs = coalesce(logs, '[]') || jsonb_build_array(p_entry)
    WHERE id = p_run_id AND coalesce(claim_token = p_token, lease_expires_at IS NULL);
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'logged');
    END IF;
END $$;
-- A page of the history, newest first. The order begins with a column that is compared by >= and <=: with "=" the planner
-- would drop it, and might walk through the runs of others by the primary key; without sorts only the right index is left.
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
-- Runs before their pipeline, as everywhere; create_run is kept out meanwhile by the advisory lock.
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
        RAISE EXCEPTION 'pipeline % does not exist', p_pipeline_id
            USING ERRCODE = 'PL002', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id);
    END IF;
    SELECT count(*) INTO live FROM circle.pipeline_runs
    WHERE pipeline_id = p_pipeline_id AND status IN ('pending', 'running');
    IF live > 0 AND NOT p_force THEN
        RAISE EXCEPTION 'pipeline % has % live runs', p_pipeline_id, live USING ERRCODE = 'PL010',
            DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'live_runs', live);
    END IF;
    DELETE FROM circle.pipelines WHERE id = p_pipeline_id;
END $$;
