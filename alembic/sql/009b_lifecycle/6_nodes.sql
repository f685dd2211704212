-- Revision 009: node runs: when one is ready, and functions that move them.

-- == create startable_node_runs
-- It has the columns of the table in their order, so that it can be updated in its place.
CREATE OR REPLACE VIEW circle.startable_node_runs AS
SELECT n.id, n.run_id, n.node_id, n.node_type, n.status, n.input_data, n.output_data, n.error_message, n.retry_count,
       n.started_at, n.completed_at, n.duration_ms, n.position, n.predecessors, n.successors, n.available_at
FROM circle.pipeline_node_runs n
WHERE n.status = 'pending' AND (n.available_at IS NULL OR n.available_at <= clock_timestamp())
  -- every predecessor completed or skipped, at least one of them completed; or none at all, as a node run has that was
  -- inserted raw or before there were versions: its executor knows the order
  AND (coalesce(n.predecessors, '{}') = '{}'
       OR (SELECT bool_and(p.status IN ('completed', 'skipped')) AND bool_or(p.status = 'completed')
           FROM circle.pipeline_node_runs p WHERE p.run_id = n.run_id AND p.position = ANY (n.predecessors)));

-- == create functions on one node run
-- A node all of whose predecessors are skipped is skipped, transitively, beginning with the nodes at these positions.
-- Returns the positions that follow the skipped ones.
CREATE OR REPLACE FUNCTION circle.skip_followers(p_run_id bigint, p_positions integer[]) RETURNS integer[]
LANGUAGE plpgsql AS $$
DECLARE
    following integer[] := p_positions;
    touched integer[] := p_positions;
BEGIN
    WHILE cardinality(following) > 0 LOOP
        WITH skipped AS (
            UPDATE circle.pipeline_node_runs n SET status = 'skipped'
            WHERE n.run_id = p_run_id AND n.status = 'pending' AND n.position = ANY (following)
              AND (SELECT bool_and(p.status = 'skipped') FROM circle.pipeline_node_runs p
                   WHERE p.run_id = p_run_id AND p.position = ANY (n.predecessors))
            RETURNING n.successors
        )
        SELECT array_agg(DISTINCT s.position) INTO following FROM skipped k CROSS JOIN unnest(k.successors) s (position);
        touched := touched || following;
    END LOOP;
    RETURN touched;
END $$;
CREATE OR REPLACE FUNCTION circle.start_node(p_run_id bigint, p_node_id text, p_input jsonb, p_token bigint)
RETURNS circle.pipeline_node_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    failed text;
    n circle.pipeline_node_runs;
BEGIN
    UPDATE circle.pipeline_runs SET current_node = left(p_node_id, 100)
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    RETURNING failed_node INTO failed;
    IF FOUND THEN
        UPDATE circle.startable_node_runs SET status = 'running', input_data = coalesce(p_input, input_data)
        WHERE run_id = p_run_id AND node_id = p_node_id AND (failed IS NULL OR retry_count > 0)
        RETURNING * INTO n;
        IF FOUND THEN
            RETURN n;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'running');
END $$;
CREATE OR REPLACE FUNCTION circle.complete_node(p_run_id bigint, p_node_id text, p_output jsonb, p_token bigint)
RETURNS circle.pipeline_node_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs
        SET status = 'completed', output_data = coalesce(p_output, output_data), error_message = NULL
        WHERE run_id = p_run_id AND node_id = p_node_id AND (status IN ('pending', 'running')) IS TRUE
        RETURNING * INTO n;
        IF FOUND THEN
            RETURN n;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'completed');
END $$;
CREATE OR REPLACE FUNCTION circle.skip_node(p_run_id bigint, p_node_id text, p_token bigint)
RETURNS circle.pipeline_node_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs SET status = 'skipped'
        WHERE run_id = p_run_id AND node_id = p_node_id AND (status = 'pending') IS TRUE RETURNING * INTO n;
        IF FOUND THEN
            PERFORM circle.skip_followers(p_run_id, n.successors);
            RETURN n;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'skipped');
END $$;
-- The attempts of one node, or of all running ones, have failed: a retry where one is left, else the end.
CREATE OR REPLACE FUNCTION circle.fail_attempts(p_run_id bigint, p_node_id text, p_error text, p_retryable boolean)
RETURNS SETOF circle.pipeline_node_runs LANGUAGE plpgsql AS $$
DECLARE
    p circle.pipelines;
BEGIN
    SELECT * INTO p FROM circle.pipelines WHERE id = (SELECT pipeline_id FROM circle.pipeline_runs WHERE id = p_run_id);
    RETURN QUERY UPDATE circle.pipeline_node_runs n SET
        status = CASE WHEN a.retried THEN 'pending' ELSE 'failed' END,
        retry_count = n.retry_count + a.retried::integer,
        available_at = CASE WHEN a.retried THEN clock_timestamp() + make_interval(secs => least(
            p.retry_backoff_base * power(2, least(n.retry_count, 62)), p.retry_backoff_max)) END,
        error_message = p_error
    FROM (
        SELECT t.id, p_retryable AND t.status = 'running' AND t.retry_count < p.max_retries_per_node AS retried
        FROM circle.pipeline_node_runs t
        WHERE t.run_id = p_run_id AND CASE WHEN p_node_id IS NULL THEN t.status = 'running'
                                      ELSE t.node_id = p_node_id AND t.status IN ('pending', 'running') END
    ) a
    WHERE n.id = a.id
    RETURNING n.*;
END $$;
CREATE OR REPLACE FUNCTION circle.fail_node(p_run_id bigint, p_node_id text, p_error text, p_retryable boolean, p_token bigint)
RETURNS circle.pipeline_node_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        SELECT * INTO n FROM circle.fail_attempts(p_run_id, p_node_id, p_error, p_retryable);
        IF FOUND THEN
            RETURN n;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'failed');
END $$;

-- == create functions on many node runs
-- Records results, all or none. Returns the positions of the nodes that follow.
CREATE OR REPLACE FUNCTION circle.apply_results(p_run_id bigint, p_results jsonb) RETURNS integer[]
LANGUAGE plpgsql AS $$
DECLARE
    done record;
    bad record;
BEGIN
    WITH results AS (
        SELECT x.* FROM jsonb_to_recordset(p_results)
            AS x (node_id text, status text, output jsonb, error text, duration_ms integer, retry_count integer)
    ), updated AS (
        UPDATE circle.pipeline_node_runs n SET
            status = x.status, output_data = coalesce(x.output, n.output_data), error_message = x.error,
            duration_ms = coalesce(x.duration_ms, 0), retry_count = greatest(n.retry_count, x.retry_count),
            -- reported afterwards: it ran when its result says
            started_at = coalesce(n.started_at, CASE WHEN x.status IN ('completed', 'failed') THEN
                clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0) END)
        FROM results x
        WHERE n.run_id = p_run_id AND n.node_id = x.node_id
          -- in this form the condition says nothing of x alone: the planner would expect few results, and compare each
          -- with each
          AND x.status = ANY (CASE n.status WHEN 'running' THEN ARRAY['completed', 'failed', 'cancelled']
                                            WHEN 'pending' THEN ARRAY['completed', 'failed', 'skipped', 'cancelled'] END)
        RETURNING n.node_id, n.status, n.successors
    )
    SELECT array_agg(u.node_id) FILTER (WHERE coalesce(s.ord, 1) = 1) AS nodes, array_agg(s.position) AS following,
           bool_or(u.status = 'skipped') AS skipped, array_agg(u.node_id) FILTER (WHERE u.status = 'failed') AS failed
    INTO done FROM updated u LEFT JOIN unnest(u.successors) WITH ORDINALITY s (position, ord) ON true;
    IF coalesce(cardinality(done.nodes), 0) <> jsonb_array_length(p_results) THEN
        SELECT x.node_id, x.status, n.status AS current, count(*) OVER (PARTITION BY x.node_id) AS times INTO bad
        FROM jsonb_to_recordset(p_results) AS x (node_id text, status text)
        LEFT JOIN circle.pipeline_node_runs n ON n.run_id = p_run_id AND n.node_id = x.node_id
        ORDER BY n.id IS NULL DESC, times DESC, x.node_id = ANY (done.nodes) LIMIT 1;
        IF bad.current IS NULL THEN
            RAISE EXCEPTION 'run % has no node %', p_run_id, left(bad.node_id, 200)
                USING ERRCODE = 'PL004', DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', bad.node_id);
        END IF;
        RAISE EXCEPTION 'node % of run % is % and can''t become %', bad.node_id, p_run_id, bad.current, bad.status
            USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
                'entity', 'node run', 'id', p_run_id || '/' || bad.node_id, 'current', bad.current, 'requested', bad.status,
                'reason', CASE WHEN bad.times > 1 THEN 'the batch has more than one result for it' ELSE '' END);
    END IF;
    IF done.failed IS NOT NULL THEN
        -- of the first batch with failures the first in execution order counts, whatever order the rows were updated in
        UPDATE circle.pipeline_runs SET failed_node = (
            SELECT node_id FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'failed'
            ORDER BY position, id LIMIT 1)
        WHERE id = p_run_id AND failed_node = ANY (done.failed);
    END IF;
    IF done.skipped THEN
        RETURN circle.skip_followers(p_run_id, done.following);
    END IF;
    RETURN done.following;
END $$;
CREATE OR REPLACE FUNCTION circle.advance_run(p_run_id bigint, p_results jsonb, p_token bigint)
RETURNS SETOF circle.pipeline_node_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
    n circle.pipeline_node_runs;
    fresh boolean;
    following integer[];   -- NULL: look at every node
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF (r.status = 'running' AND coalesce(r.claim_token = p_token, r.lease_expires_at IS NULL)) IS NOT TRUE THEN
        fresh := r.started_at IS NULL;
        r := circle.lock_run(p_run_id, p_token);
    END IF;
    IF p_results <> '[]' THEN
        following := coalesce(circle.apply_results(p_run_id, p_results), '{}');
        IF p_results @? '$[*] ? (@.status == "failed")' THEN
            SELECT failed_node INTO r.failed_node FROM circle.pipeline_runs WHERE id = p_run_id;
        END IF;
    ELSIF fresh THEN
        SELECT array_agg(position) INTO following FROM circle.pipeline_node_runs
        WHERE run_id = p_run_id AND predecessors = '{}';
    END IF;
    IF r.failed_node IS NOT NULL THEN
        following := NULL;   -- nothing new starts, but retries that are due
    END IF;
    IF following IS NULL THEN
        FOR n IN UPDATE circle.startable_node_runs SET status = 'running'
                 WHERE run_id = p_run_id AND (r.failed_node IS NULL OR retry_count > 0) RETURNING * LOOP
            RETURN NEXT n;
        END LOOP;
    ELSE
        FOR n IN UPDATE circle.startable_node_runs SET status = 'running'
                 WHERE run_id = p_run_id AND position = ANY (following) RETURNING * LOOP
            RETURN NEXT n;
        END LOOP;
    END IF;
    IF FOUND THEN
        UPDATE circle.pipeline_runs SET current_node = n.node_id WHERE id = p_run_id;
    ELSE
        PERFORM circle.end_run_if_over(p_run_id);
    END IF;
END $$;
CREATE OR REPLACE FUNCTION circle.record_results(p_run_id bigint, p_results jsonb, p_token bigint) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    PERFORM circle.lock_run(p_run_id, p_token);
    PERFORM circle.apply_results(p_run_id, p_results);
END $$;
