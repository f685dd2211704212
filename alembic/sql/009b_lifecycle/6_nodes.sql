-- Revision 009: node runs: when one is ready, and the functions that move them.
--
-- A pending node is ready, so that it may start, when nothing blocks it:
--
--   retry         it failed before, and the delay of its retry has not passed
--   run           its run is not running
--   failure       a node of the run failed for good: from then on only retries start
--   predecessors  some of its predecessors are neither completed nor skipped
--   skipped       all of its predecessors are skipped: it is to be skipped, too
--
-- Nothing precedes a node run whose predecessors are NULL: it was inserted raw, or before there were versions.

-- == create the rule on ready nodes
-- Returns what blocks a pending node, NULL if it is ready. RETURNS SETOF, because a function with a subquery is inlined only in
-- FROM.
CREATE OR REPLACE FUNCTION circle.blocked_by(p_run_status text, p_failed_node text, p_run_id integer, p_predecessors integer[],
                                             p_retry_count integer, p_available_at timestamptz)
RETURNS SETOF text LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN p_available_at > clock_timestamp() THEN 'retry'
        WHEN (p_run_status = 'running') IS NOT TRUE THEN 'run'
        WHEN p_failed_node IS NOT NULL AND p_retry_count = 0 THEN 'failure'
        WHEN p_predecessors <> '{}' THEN (
            SELECT CASE WHEN bool_and(p.status IN ('completed', 'skipped')) IS NOT TRUE THEN 'predecessors'
                        WHEN bool_or(p.status = 'completed') IS NOT TRUE THEN 'skipped' END
            FROM circle.pipeline_node_runs p WHERE p.run_id = p_run_id AND p.position = ANY (p_predecessors))
    END
$$;
CREATE OR REPLACE VIEW circle.pending_node_runs AS
SELECT n.id, n.run_id, n.node_id, n.position, b.reason AS blocked_by,
       ARRAY(SELECT p.node_id FROM circle.pipeline_node_runs p
             WHERE p.run_id = n.run_id AND p.position = ANY (n.predecessors) AND p.status NOT IN ('completed', 'skipped')
             ORDER BY p.position) AS waiting_for
FROM circle.pipeline_node_runs n JOIN circle.pipeline_runs r ON r.id = n.run_id
CROSS JOIN LATERAL circle.blocked_by(r.status, r.failed_node, n.run_id, n.predecessors, n.retry_count, n.available_at) b (reason)
WHERE n.status = 'pending';
CREATE OR REPLACE VIEW circle.startable_node_runs AS
SELECT n.id, n.run_id, n.node_id, n.position FROM circle.pending_node_runs n WHERE n.blocked_by IS NULL;

-- == create functions on one node run
-- Raises why a call on a node run is refused.
CREATE OR REPLACE FUNCTION circle.refuse_node(p_run_id bigint, p_node_id text, p_token bigint, p_requested text)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    r circle.pipeline_runs;
    n circle.pipeline_node_runs;
    p record;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token) THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    SELECT * INTO n FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND node_id = p_node_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_unknown_node(p_run_id, p_node_id);
    ELSIF r.status = 'running' AND n.status = 'pending' AND p_requested = 'running' THEN
        SELECT blocked_by, to_jsonb(waiting_for) AS waiting_for INTO p
        FROM circle.pending_node_runs WHERE run_id = p_run_id AND node_id = p_node_id;
        RAISE EXCEPTION 'node % of run % is not ready', p_node_id, p_run_id USING ERRCODE = 'PL005',
            DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', p_node_id, 'waiting_for', coalesce(p.waiting_for, '[]'),
                'reason', CASE
                    WHEN p.waiting_for <> '[]' THEN ''
                    WHEN p.blocked_by = 'retry' THEN 'its retry is due at ' || n.available_at
                    WHEN p.blocked_by = 'failure' THEN format('node %L failed, and only retries start after a failure', r.failed_node)
                    WHEN p.blocked_by IN ('predecessors', 'skipped') THEN 'none of its predecessors is completed: skip it, too'
                    ELSE 'it became ready during this call: try again' END);
    END IF;
    PERFORM circle.refuse_transition(p_run_id, p_node_id, n.status, p_requested,
                                     CASE WHEN r.status <> 'running' THEN 'its run is ' || r.status END);
END $$;
-- Skips the nodes all of whose predecessors are skipped, transitively, from the nodes at these positions on. Returns these
-- positions and those of the nodes that follow the skipped ones.
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
    started circle.pipeline_node_runs;
BEGIN
    UPDATE circle.pipeline_runs SET current_node = left(p_node_id, 100)
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    RETURNING failed_node INTO failed;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs n SET status = 'running', input_data = coalesce(p_input, n.input_data)
        WHERE n.run_id = p_run_id AND n.node_id = p_node_id AND n.status = 'pending'
          AND (SELECT b.reason FROM circle.blocked_by('running', failed, n.run_id, n.predecessors, n.retry_count,
                                                      n.available_at) b (reason)) IS NULL
        RETURNING * INTO started;
        IF FOUND THEN
            RETURN started;
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
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs
        SET status = 'completed', output_data = coalesce(p_output, output_data), error_message = NULL
        WHERE run_id = p_run_id AND node_id = p_node_id AND circle.node_may_become(status, 'completed')
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
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs SET status = 'skipped'
        WHERE run_id = p_run_id AND node_id = p_node_id AND circle.node_may_become(status, 'skipped') RETURNING * INTO n;
        IF FOUND THEN
            PERFORM circle.skip_followers(p_run_id, n.successors);
            RETURN n;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'skipped');
END $$;
-- Records that the attempt of a node, or of all running nodes, failed: it is retried if retries remain, else failed.
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
                                      ELSE t.node_id = p_node_id AND circle.node_may_become(t.status, 'failed') END
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
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
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
-- Records results, all or none. Returns the positions of the nodes that may have become ready.
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
            -- of a node that is reported after it ran
            started_at = coalesce(n.started_at, CASE WHEN x.status IN ('completed', 'failed') THEN
                clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0) END)
        FROM results x
        WHERE n.run_id = p_run_id AND n.node_id = x.node_id
          -- NOT IN, because with a list of the terminal statuses the planner would expect few results and join by loops
          AND circle.node_may_become(n.status, x.status) AND x.status NOT IN ('pending', 'running')
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
            PERFORM circle.refuse_unknown_node(p_run_id, bad.node_id);
        END IF;
        PERFORM circle.refuse_transition(p_run_id, bad.node_id, bad.current, bad.status,
                                         CASE WHEN bad.times > 1 THEN 'the batch has more than one result for it' END);
    END IF;
    IF done.failed IS NOT NULL THEN
        -- the failed node is the first in execution order of the first batch with failures, in whatever order rows were updated
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
    started circle.pipeline_node_runs;
    fresh boolean;
    following integer[];   -- positions that may have become ready; NULL: any
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF (r.status = 'running' AND circle.holds_run(r.claim_token, r.lease_expires_at, p_token)) IS NOT TRUE THEN
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
        following := NULL;   -- retries that are due can be anywhere
    END IF;
    IF following IS NULL THEN
        FOR started IN
            UPDATE circle.pipeline_node_runs n SET status = 'running'
            WHERE n.run_id = p_run_id AND n.status = 'pending'
              AND (SELECT b.reason FROM circle.blocked_by(r.status, r.failed_node, n.run_id, n.predecessors, n.retry_count,
                                                          n.available_at) b (reason)) IS NULL
            RETURNING * LOOP
            RETURN NEXT started;
        END LOOP;
    ELSE
        FOR started IN
            UPDATE circle.pipeline_node_runs n SET status = 'running'
            WHERE n.run_id = p_run_id AND n.position = ANY (following) AND n.status = 'pending'
              AND (SELECT b.reason FROM circle.blocked_by(r.status, r.failed_node, n.run_id, n.predecessors, n.retry_count,
                                                          n.available_at) b (reason)) IS NULL
            RETURNING * LOOP
            RETURN NEXT started;
        END LOOP;
    END IF;
    IF FOUND THEN
        UPDATE circle.pipeline_runs SET current_node = started.node_id WHERE id = p_run_id;
    ELSE
        PERFORM circle.end_run_if_done(p_run_id);
    END IF;
END $$;
CREATE OR REPLACE FUNCTION circle.record_results(p_run_id bigint, p_results jsonb, p_token bigint) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    PERFORM circle.lock_run(p_run_id, p_token);
    PERFORM circle.apply_results(p_run_id, p_results);
END $$;
