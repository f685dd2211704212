-- Revision 011: functions on one run.
--
-- A function that reads other rows than the one it changes first locks the run (FOR NO KEY UPDATE), then acts; so each of its
-- statements sees what the transactions before it committed. Lock order: run, node runs; nobody waits for a counter. A raw UPDATE of
-- a node run locks the node run before its run, so it can deadlock with these functions: PostgreSQL then cancels one of the two with
-- 40P01.
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
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token) THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    IF r.completed_at IS NOT NULL THEN
        PERFORM circle.refuse_run_over(p_run_id, r.status, r.completed_at, r.error_message, p_requested);
    END IF;
    PERFORM circle.refuse_transition(p_run_id, NULL, r.status, p_requested, p_reason);
END $$;
-- The run, if a call repeats the one that ended it, with the token that held it then; else raises why the call is refused.
CREATE OR REPLACE FUNCTION circle.repeat_or_refuse_run(p_run_id bigint, p_statuses text[], p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id AND claim_token = p_token AND status = ANY (p_statuses);
    IF r.completed_at IS NULL OR NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_run(p_run_id, p_token, p_statuses[1]);
    END IF;
    PERFORM pg_logical_emit_message(true, 'circle', '');   -- writes WAL: the commit waits for a synchronous standby, as the first one did
    RETURN r;
END $$;
-- Locks the run for a caller that holds it, and starts a pending one.
CREATE OR REPLACE FUNCTION circle.lock_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token)
       OR r.status NOT IN ('pending', 'running') THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    ELSIF r.status = 'pending' THEN
        UPDATE circle.pipeline_runs SET status = 'running', started_at = coalesce(started_at, clock_timestamp()), waits_until = NULL
        WHERE id = p_run_id RETURNING * INTO r;
    END IF;
    RETURN r;
END $$;
-- Ends a locked run. The trigger pipeline_runs_after_update cancels its live nodes.
CREATE OR REPLACE FUNCTION circle.end_run(p_run_id bigint, p_status text, p_error text) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    UPDATE circle.pipeline_runs SET status = p_status, error_message = coalesce(p_error, error_message),
        completed_at = greatest(clock_timestamp(), started_at), lease_expires_at = NULL, waits_until = NULL,
        duration_seconds = least(coalesce(extract(epoch FROM greatest(clock_timestamp(), started_at) - started_at), 0), 2147483647)
    WHERE id = p_run_id RETURNING * INTO r;
    IF p_status <> 'cancelled' THEN
        INSERT INTO circle.pipeline_counters (pipeline_id, success_count, error_count)
        VALUES (r.pipeline_id, (p_status = 'completed')::integer, (p_status <> 'completed')::integer);
    END IF;
    RETURN r;
END $$;
-- Gives a locked run the nodes of its version that it lacks, as one that was inserted raw does; returns how many.
CREATE OR REPLACE FUNCTION circle.fill_run(p_run_id bigint) RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    filled bigint := 0;
BEGIN
    IF (SELECT count(*) FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND position IS NOT NULL)
       < (SELECT v.node_count FROM circle.pipeline_runs r
          JOIN circle.pipeline_versions v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version WHERE r.id = p_run_id) THEN
        INSERT INTO circle.pipeline_node_runs AS n (run_id, node_id, node_type, position, predecessors, successors)
        SELECT r.id, c.node_id, c.node_type, c.place - 1, c.predecessors, c.successors
        FROM circle.pipeline_runs r
        JOIN circle.pipeline_versions v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
        CROSS JOIN LATERAL unnest(v.compiled) WITH ORDINALITY c (node_id, node_type, predecessors, successors, branches, place)
        WHERE r.id = p_run_id ORDER BY c.place
        ON CONFLICT (run_id, node_id) DO UPDATE SET
            position = excluded.position, predecessors = excluded.predecessors, successors = excluded.successors
        WHERE n.position IS NULL;
        GET DIAGNOSTICS filled = ROW_COUNT;
    END IF;
    RETURN filled;
END $$;
-- Ends a locked run in which nothing is running, ready or waiting for a retry; else returns NULL.
CREATE OR REPLACE FUNCTION circle.end_run_if_done(p_run_id bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r record;
BEGIN
    SELECT t.failed_node,
           EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id
                   AND (status = 'running' OR status = 'pending' AND retry_count > 0)) AS busy,
           EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'pending') AS pending,
           EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'cancelled') AS cancelled
    INTO r FROM circle.pipeline_runs t WHERE t.id = p_run_id;
    IF r.busy THEN
        RETURN NULL;
    ELSIF r.failed_node IS NOT NULL THEN
        RETURN circle.end_run(p_run_id, 'failed', (SELECT error_message FROM circle.pipeline_node_runs
                                                   WHERE run_id = p_run_id AND node_id = r.failed_node));
    ELSIF r.pending AND EXISTS (SELECT FROM circle.startable_node_runs WHERE run_id = p_run_id) THEN
        RETURN NULL;
    ELSIF circle.fill_run(p_run_id) > 0 THEN
        RETURN circle.end_run_if_done(p_run_id);   -- the rows of a raw writer may be all of its nodes
    END IF;
    -- pending nodes that can't start wait for a cancelled one
    RETURN circle.end_run(p_run_id, CASE WHEN r.pending OR r.cancelled THEN 'cancelled' ELSE 'completed' END, NULL);
END $$;

-- == create functions on runs
-- Creates a run without node runs, or returns the one that has the key, or with p_unless_live the one that is live; NULL if the
-- pipeline can't be run. A pending run has not begun; record_run begins one at once.
CREATE OR REPLACE FUNCTION circle.insert_run(p_pipeline_id bigint, p_status text, p_trigger_data jsonb, p_key text, p_priority integer,
                                             p_run_at timestamptz, p_unless_live boolean,
                                             OUT r circle.pipeline_runs, OUT is_new boolean)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    pipeline_status text;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    is_new := false;
    -- as the insert does: delete_pipeline waits for this lock before it takes any other
    IF p_unless_live THEN
        PERFORM pg_advisory_xact_lock(1734964328, hashint8(p_pipeline_id));   -- one creator after the other
    ELSE
        PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(p_pipeline_id));
    END IF;
    -- the first run with this key is returned even if the pipeline has been paused since; the bound is for hosts whose triggers
    -- discard every row
    FOR attempt IN 1 .. 100 LOOP
        IF p_key IS NOT NULL THEN
            SELECT * INTO r FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND idempotency_key = p_key;
            IF FOUND THEN
                IF r.trigger_data IS DISTINCT FROM p_trigger_data THEN
                    RAISE EXCEPTION 'run % of pipeline % has this idempotency key, and other trigger data', r.id, p_pipeline_id
                        USING ERRCODE = 'PL014', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'key', p_key, 'run_id', r.id);
                END IF;
                PERFORM pg_logical_emit_message(true, 'circle', '');   -- writes WAL: the commit waits for a synchronous standby, as the first one did
                RETURN;
            END IF;
        END IF;
        -- the counters tell it without reading the history
        IF p_unless_live AND (SELECT sum(pending) + sum(running) FROM circle.pipeline_counters WHERE pipeline_id = p_pipeline_id) > 0 THEN
            SELECT * INTO r FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND completed_at IS NULL
            ORDER BY pipeline_id DESC, id DESC LIMIT 1;
            IF FOUND THEN
                PERFORM pg_logical_emit_message(true, 'circle', '');   -- as above
                RETURN;
            END IF;
        END IF;
        INSERT INTO circle.pipeline_runs (pipeline_id, status, trigger_data, idempotency_key, priority, run_at, waits_until)
        SELECT p.id, p_status, p_trigger_data, p_key, p_priority, p_run_at, CASE WHEN p_run_at > clock_timestamp() THEN p_run_at END
        FROM circle.pipelines p
        WHERE p.id = p_pipeline_id AND (p.status = 'active') IS TRUE
        ON CONFLICT (pipeline_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING * INTO r;
        is_new := FOUND;
        EXIT WHEN is_new;
        -- judged here, as the pipeline may be activated before refuse_create reads it
        SELECT status INTO pipeline_status FROM circle.pipelines WHERE id = p_pipeline_id;
        IF pipeline_status <> 'active' AND NOT EXISTS (   -- the first run with the key may have been committed meanwhile
            SELECT FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND idempotency_key = p_key) THEN
            PERFORM circle.refuse_inactive(p_pipeline_id, pipeline_status);
        END IF;
        EXIT WHEN pipeline_status IS NULL;
    END LOOP;
    IF is_new THEN
        INSERT INTO circle.pipeline_counters (pipeline_id, run_count, last_run) VALUES (r.pipeline_id, 1, clock_timestamp());
    END IF;
END $$;
-- Raises why a run of a pipeline can't be created.
CREATE OR REPLACE FUNCTION circle.refuse_create(p_pipeline_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p circle.pipelines;
BEGIN
    SELECT * INTO p FROM circle.pipelines WHERE id = p_pipeline_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_unknown_pipeline(p_pipeline_id);
    ELSIF p.status = 'active' THEN
        PERFORM circle.sort_graph(p.nodes, p.edges);
        IF p.nodes = '[]' THEN
            PERFORM circle.refuse_graph('no_nodes', 'Pipeline must have at least one node', '["nodes"]');
        END IF;
        PERFORM circle.refuse_graph('no_version', 'the stored graph was never compiled: ' || CASE
            WHEN current_setting('session_replication_role') = 'replica'
            THEN 'session_replication_role is replica, so that no trigger compiles it: reset it, then ' ELSE '' END || 'save it again');
    END IF;
    PERFORM circle.refuse_inactive(p_pipeline_id, p.status);
END $$;
CREATE OR REPLACE FUNCTION circle.create_run(p_pipeline_id bigint, p_trigger_data jsonb DEFAULT '{}', p_key text DEFAULT NULL,
                                             p_priority integer DEFAULT 0, p_run_at timestamptz DEFAULT NULL,
                                             p_unless_live boolean DEFAULT false, p_tags jsonb DEFAULT NULL)
RETURNS circle.pipeline_runs LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    created record;
BEGIN
    SELECT * INTO created FROM circle.insert_run(p_pipeline_id, 'pending', p_trigger_data, p_key, p_priority, p_run_at, p_unless_live);
    IF created.is_new THEN
        INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, position, predecessors, successors)
        SELECT (created.r).id, c.node_id, c.node_type, c.place - 1, c.predecessors, c.successors
        FROM circle.pipeline_versions v
        CROSS JOIN LATERAL unnest(v.compiled) WITH ORDINALITY c (node_id, node_type, predecessors, successors, branches, place)
        WHERE v.pipeline_id = (created.r).pipeline_id AND v.version = (created.r).pipeline_version
        ORDER BY c.place;
        IF NOT FOUND THEN
            PERFORM circle.refuse_create(p_pipeline_id);
        ELSIF p_tags IS NOT NULL THEN
            INSERT INTO circle.pipeline_run_tags (run_id, key, value) SELECT (created.r).id, t.key, t.value FROM jsonb_each_text(p_tags) t;
        END IF;
    ELSIF created.r IS NULL THEN
        PERFORM circle.refuse_create(p_pipeline_id);
    END IF;
    RETURN created.r;
END $$;
CREATE OR REPLACE FUNCTION circle.start_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    UPDATE circle.pipeline_runs SET status = 'running', started_at = coalesce(started_at, clock_timestamp()), waits_until = NULL
    WHERE id = p_run_id AND (status = 'pending') IS TRUE
      AND circle.holds_run(claim_token, lease_expires_at, p_token)
    RETURNING * INTO r;
    IF NOT FOUND THEN
        -- with its token a second start changes nothing
        SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id AND claim_token = p_token AND status = 'running';
        IF NOT FOUND OR NOT circle.is_read_committed() THEN
            PERFORM circle.refuse_run(p_run_id, p_token, 'running');
        END IF;
        PERFORM pg_logical_emit_message(true, 'circle', '');   -- as in insert_run
    ELSIF r.pipeline_version IS NULL THEN
        PERFORM circle.refuse_graph('no_version', format(
            'run %s is bound to no version of its pipeline''s graph: cancel it and create it again', p_run_id));
    ELSIF NOT EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND position = 0) THEN
        PERFORM circle.fill_run(p_run_id);
    END IF;
    RETURN r;
END $$;
-- Ends a run with the caller's status: completed, failed or cancelled. A cancel needs no token.
CREATE OR REPLACE FUNCTION circle.conclude_run(p_run_id bigint, p_status text, p_error text, p_token bigint)
RETURNS circle.pipeline_runs LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (p_status = 'cancelled' OR circle.holds_run(claim_token, lease_expires_at, p_token))
      AND circle.run_may_become(status, p_status)
    FOR NO KEY UPDATE;
    IF NOT FOUND AND p_status <> 'cancelled' THEN
        RETURN circle.repeat_or_refuse_run(p_run_id, ARRAY[p_status], p_token);
    ELSIF NOT FOUND THEN   -- of several that cancel one wins
        PERFORM circle.refuse_run(p_run_id, (SELECT claim_token FROM circle.pipeline_runs WHERE id = p_run_id), p_status);
    ELSIF p_status = 'completed' THEN
        PERFORM circle.fill_run(p_run_id);   -- a run never succeeds without its nodes
    ELSIF p_status = 'cancelled' THEN
        INSERT INTO circle.pipeline_run_history (run_id, kind, worker_id, reason) VALUES (p_run_id, 'cancelled', session_user, p_error);
    END IF;
    RETURN circle.end_run(p_run_id, p_status, p_error);
END $$;
-- Ends a run with the status that follows from its nodes.
CREATE OR REPLACE FUNCTION circle.finish_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN circle.repeat_or_refuse_run(p_run_id, '{completed,failed,cancelled}', p_token);
    END IF;
    r := circle.end_run_if_done(p_run_id);
    IF r.id IS NULL THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'completed', 'some of its nodes are running, ready or waiting for a retry');
    END IF;
    RETURN r;
END $$;
CREATE OR REPLACE FUNCTION circle.append_run_log(p_run_id bigint, p_entry jsonb, p_token bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    -- locked, so that the ids of a run's entries grow in the order of their commits
    PERFORM FROM circle.pipeline_runs WHERE id = p_run_id AND circle.holds_run(claim_token, lease_expires_at, p_token) FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'logged');
    END IF;
    INSERT INTO circle.pipeline_run_logs (run_id, entry) VALUES (p_run_id, p_entry);
END $$;
-- A page of the history, newest first. The first column of the order is compared by >= and <, because with "=" the planner
-- would drop it from the order and might scan the primary key through the runs of other pipelines. Without sorts only the
-- right index remains.
CREATE OR REPLACE FUNCTION circle.page_of_runs(p_pipeline_id bigint, p_status text, p_after bigint, p_limit integer)
RETURNS SETOF circle.pipeline_runs
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_sort = off SET enable_incremental_sort = off
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
-- A page of the history by more than one condition, newest first: of the runs that one index gives in the order of their ids, the first
-- 10,000 after the cursor are looked at. So a page may hold fewer than p_limit runs, even none, while the next one holds some. No page
-- follows 10,000 runs that were all created before p_since.
CREATE OR REPLACE FUNCTION circle.filtered_runs(p_pipeline_id bigint, p_statuses text[], p_tags jsonb, p_since timestamptz,
                                                p_until timestamptz, p_after bigint, p_limit integer,
                                                OUT ids bigint[], OUT next_cursor bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_sort = off SET enable_incremental_sort = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    most CONSTANT integer := 10000;
    tag record;
    runs refcursor;
    r record;
    looked_at bigint := 0;
    any_recent boolean := p_since IS NULL;
BEGIN
    ids := '{}';
    SELECT key, value INTO tag FROM jsonb_each_text(p_tags) LIMIT 1;
    IF FOUND THEN
        OPEN runs FOR SELECT c.id, c.pipeline_id, c.status, c.created_at
            FROM (SELECT t.run_id FROM circle.pipeline_run_tags t
                  WHERE t.key >= tag.key AND (t.key, t.value) >= (tag.key, tag.value) AND (t.key, t.value, t.run_id) < (tag.key, tag.value, p_after)
                  ORDER BY t.key DESC, t.value DESC, t.run_id DESC) t
            JOIN circle.pipeline_runs c ON c.id = t.run_id;
    ELSIF p_pipeline_id IS NOT NULL THEN
        OPEN runs FOR SELECT c.id, c.pipeline_id, c.status, c.created_at FROM circle.pipeline_runs c
            WHERE c.pipeline_id >= p_pipeline_id AND (c.pipeline_id, c.id) < (p_pipeline_id, p_after) ORDER BY c.pipeline_id DESC, c.id DESC;
    ELSE
        OPEN runs FOR SELECT c.id, c.pipeline_id, c.status, c.created_at FROM circle.pipeline_runs c
            WHERE c.id < p_after ORDER BY c.id DESC;
    END IF;
    LOOP
        FETCH runs INTO r;
        EXIT WHEN NOT FOUND;
        any_recent := any_recent OR r.created_at >= p_since;
        IF (p_pipeline_id IS NULL OR r.pipeline_id = p_pipeline_id) AND (p_statuses IS NULL OR r.status = ANY (p_statuses))
           AND (p_since IS NULL OR r.created_at >= p_since) AND (p_until IS NULL OR r.created_at < p_until)
           AND (p_tags IS NULL OR NOT EXISTS (SELECT FROM jsonb_each_text(p_tags) w WHERE NOT EXISTS (
                    SELECT FROM circle.pipeline_run_tags t WHERE t.run_id = r.id AND t.key = w.key AND t.value = w.value))) THEN
            IF cardinality(ids) = p_limit THEN
                next_cursor := ids[p_limit];
                EXIT;
            END IF;
            ids := ids || r.id;
        END IF;
        looked_at := looked_at + 1;
        IF looked_at >= p_limit::bigint + most THEN
            next_cursor := CASE WHEN any_recent THEN r.id END;
            EXIT;
        END IF;
    END LOOP;
    CLOSE runs;
END $$;
-- The number of runs of a pipeline by status, and the median and the 95th percentile of the seconds that completed ones took: of the
-- last p_limit runs, as far as they were created after p_since. Without sorts only the right index remains, as in page_of_runs.
CREATE OR REPLACE FUNCTION circle.run_statistics(p_pipeline_id bigint, p_since timestamptz, p_limit integer) RETURNS json
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_sort = off
SET enable_incremental_sort = off SET enable_seqscan = off AS $$
DECLARE
    counts json;
    seconds double precision[];
BEGIN
    WITH recent AS (
        SELECT r.status, r.created_at, CASE WHEN r.status = 'completed' THEN date_part('epoch', r.completed_at - r.started_at) END AS took
        FROM circle.pipeline_runs r
        WHERE r.pipeline_id >= p_pipeline_id AND (r.pipeline_id, r.id) <= (p_pipeline_id, 9223372036854775807)
        ORDER BY r.pipeline_id DESC, r.id DESC LIMIT p_limit
    )
    SELECT json_strip_nulls(json_build_object(
               'pending', nullif(count(*) FILTER (WHERE status = 'pending'), 0),
               'running', nullif(count(*) FILTER (WHERE status = 'running'), 0),
               'completed', nullif(count(*) FILTER (WHERE status = 'completed'), 0),
               'failed', nullif(count(*) FILTER (WHERE status = 'failed'), 0),
               'cancelled', nullif(count(*) FILTER (WHERE status = 'cancelled'), 0),
               'timeout', nullif(count(*) FILTER (WHERE status = 'timeout'), 0))),
           percentile_cont('{0.5,0.95}'::float8[]) WITHIN GROUP (ORDER BY took)
    INTO counts, seconds FROM recent WHERE created_at >= p_since;
    RETURN json_build_object('runs', counts, 'p50', seconds[1], 'p95', seconds[2]);
END $$;
-- Locks the runs before their pipeline. The advisory lock keeps create_run out.
CREATE OR REPLACE FUNCTION circle.delete_pipeline(p_pipeline_id bigint, p_force boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
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
