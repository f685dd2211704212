-- Revision 011: node runs: when one is ready, and the functions that move them.
--
-- A pending node is ready, so that it may start, when nothing blocks it:
--
--   retry         it failed before, and the delay of its retry has not passed
--   run           its run is not running
--   failure       a node of the run failed for good: from then on only retries start
--   predecessors  some of its predecessors are neither completed nor skipped
--   skipped       all edges to it are dead: it is to be skipped, too
--
-- An edge is dead if its source is skipped, or completed with an outcome that doesn't take it (untaken).
--
-- Nothing precedes a node run whose predecessors are NULL: it was inserted raw, or before there were versions.

-- == create the rule on ready nodes
-- The node runs at these positions. Inlined. Each is looked up by an ordered range of one, for which only the index on position saves a
-- sort: where most runs are small, the planner takes that on run_id for as good, and would read all nodes of a large run each time.
CREATE OR REPLACE FUNCTION circle.nodes_at(p_run_id bigint, p_positions integer[]) RETURNS SETOF circle.pipeline_node_runs
LANGUAGE sql STABLE AS $$
    SELECT n.* FROM unnest(p_positions) u (position) CROSS JOIN LATERAL (
        SELECT * FROM circle.pipeline_node_runs t
        WHERE t.run_id = p_run_id AND t.position >= u.position AND t.position <= u.position ORDER BY t.position LIMIT 1) n
$$;
-- Whether the edge from a node run to the one at a position is dead. Inlined.
CREATE OR REPLACE FUNCTION circle.is_dead(p_status text, p_untaken integer[], p_position integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT p_status = 'skipped' OR p_status = 'completed' AND coalesce(p_position = ANY (p_untaken), false)
$$;
-- Returns what blocks a pending node, NULL if it is ready. RETURNS SETOF, because a function with a subquery is inlined only in
-- FROM.
CREATE OR REPLACE FUNCTION circle.blocked_by(p_run_status text, p_failed_node text, p_run_id bigint, p_position integer,
                                             p_predecessors integer[], p_retry_count integer, p_available_at timestamptz)
RETURNS SETOF text LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN p_available_at > clock_timestamp() THEN 'retry'
        WHEN (p_run_status = 'running') IS NOT TRUE THEN 'run'
        WHEN p_failed_node IS NOT NULL AND p_retry_count = 0 THEN 'failure'
        WHEN p_predecessors <> '{}' THEN (
            SELECT CASE WHEN bool_and(p.status IN ('completed', 'skipped')) IS NOT TRUE THEN 'predecessors'
                        WHEN bool_and(circle.is_dead(p.status, p.untaken, p_position)) THEN 'skipped' END
            FROM circle.nodes_at(p_run_id, p_predecessors) p)
    END
$$;
CREATE OR REPLACE VIEW circle.pending_node_runs WITH (security_invoker = true) AS
SELECT n.id, n.run_id, n.node_id, n.position, b.reason AS blocked_by,
       ARRAY(SELECT p.node_id FROM circle.nodes_at(n.run_id, n.predecessors) p WHERE p.status NOT IN ('completed', 'skipped')
             ORDER BY p.position) AS waiting_for
FROM circle.pipeline_node_runs n JOIN circle.pipeline_runs r ON r.id = n.run_id
CROSS JOIN LATERAL circle.blocked_by(r.status, r.failed_node, n.run_id, n.position, n.predecessors, n.retry_count, n.available_at) b (reason)
WHERE n.status = 'pending';
CREATE OR REPLACE VIEW circle.startable_node_runs WITH (security_invoker = true) AS
SELECT n.id, n.run_id, n.node_id, n.position FROM circle.pending_node_runs n WHERE n.blocked_by IS NULL;

-- == create functions on outcomes
-- The branches of nodes that have any, by node id, as the version of their run has them.
CREATE OR REPLACE FUNCTION circle.branches_of(p_run_id bigint, p_node_ids text[]) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (SELECT jsonb_object_agg(c.node_id, c.branches)
            FROM circle.pipeline_runs r
            JOIN circle.pipeline_versions v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
            CROSS JOIN LATERAL unnest(v.compiled) c
            -- IS TRUE, because a join would be planned for a few nodes: by loops
            WHERE r.id = p_run_id AND c.branches IS NOT NULL AND (c.node_id IN (SELECT unnest(p_node_ids))) IS TRUE);
END $$;
-- The successors that a node doesn't take if it completes with this outcome; '{}': it takes all. Without labels only 'false' takes
-- none. With labels edges without one are always taken, and of the others those of the label.
CREATE OR REPLACE FUNCTION circle.untaken(p_node_id text, p_branches jsonb, p_successors integer[], p_branch text) RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    label text := circle.branch_label(p_branch);
BEGIN
    IF label NOT IN ('true', 'false') AND (p_branches ? label) IS NOT TRUE THEN
        PERFORM circle.refuse_branch(p_node_id, p_branch, p_branches);
    ELSIF p_branches IS NULL THEN
        RETURN CASE label WHEN 'false' THEN p_successors ELSE '{}' END;
    END IF;
    RETURN ARRAY(SELECT s::integer FROM jsonb_each(p_branches) b CROSS JOIN jsonb_array_elements(b.value) s
                 EXCEPT SELECT s::integer FROM jsonb_array_elements(p_branches -> label) s ORDER BY 1);
END $$;

-- == create functions on one node run
-- What a call returns of a node run: little, because these are the hot paths.
CREATE OR REPLACE FUNCTION circle.node_answer(n circle.pipeline_node_runs) RETURNS json LANGUAGE sql STABLE AS $$
    SELECT json_build_object('run_id', n.run_id, 'node_id', n.node_id, 'node_type', n.node_type, 'status', n.status,
                             'attempt', n.retry_count + 1::bigint, 'available_at', n.available_at, 'error_message', n.error_message)
$$;
-- Whether a completed node takes what it would take with this outcome.
CREATE OR REPLACE FUNCTION circle.has_outcome(n circle.pipeline_node_runs, p_branch text) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted integer[] := circle.untaken(n.node_id, circle.branches_of(n.run_id, ARRAY[n.node_id]) -> n.node_id, n.successors, p_branch);
BEGIN
    RETURN wanted <@ coalesce(n.untaken, '{}') AND wanted @> coalesce(n.untaken, '{}');
END $$;
-- Whether a result that can't be applied repeats one that was: it has the caller's token, and changes nothing. An attempt that isn't
-- given is the current one.
--
--   state of the node              a repeat is
--   the status reported            the same attempt, and for completed the same output and outcome
--   pending, to be retried         failed, of an earlier attempt
CREATE OR REPLACE FUNCTION circle.is_repeat(n circle.pipeline_node_runs, p_token bigint, p_status text, p_attempt integer, p_output jsonb,
                                            p_branch text)
RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN p_status = 'skipped' THEN n.status = 'skipped'
        WHEN p_token IS NULL THEN false
        WHEN p_status = 'failed' AND n.status IN ('pending', 'running') THEN
            coalesce(p_attempt <= n.retry_count, n.status = 'pending' AND n.retry_count > 0)
        WHEN p_status = 'completed' THEN n.status = 'completed' AND coalesce(p_attempt = n.retry_count + 1::bigint, true)
                                         AND coalesce(p_output = n.output_data, true) AND (p_branch IS NULL OR circle.has_outcome(n, p_branch))
        ELSE n.status = p_status AND coalesce(p_attempt = n.retry_count + 1::bigint, true) END
$$;
-- Raises why a call on a node run is refused, unless it repeats one that succeeded: then returns the node run.
CREATE OR REPLACE FUNCTION circle.repeat_or_refuse(p_run_id bigint, p_node_id text, p_token bigint, p_requested text,
                                                   p_attempt integer DEFAULT NULL, p_output jsonb DEFAULT NULL,
                                                   p_branch text DEFAULT NULL)
RETURNS circle.pipeline_node_runs LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r circle.pipeline_runs;
    n circle.pipeline_node_runs;
    p record;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token) THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    SELECT * INTO n FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND node_id = p_node_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_unknown_node(p_run_id, p_node_id);
    ELSIF circle.is_repeat(n, p_token, p_requested, p_attempt, p_output, p_branch) THEN
        PERFORM pg_logical_emit_message(true, 'circle', '');   -- writes WAL: the commit waits for a synchronous standby, as the first one did
        RETURN n;
    ELSIF r.status = 'running' AND n.status = 'pending' AND p_requested = 'running' THEN
        SELECT blocked_by, to_jsonb(waiting_for) AS waiting_for INTO p
        FROM circle.pending_node_runs WHERE run_id = p_run_id AND node_id = p_node_id;
        RAISE EXCEPTION 'node % of run % is not ready', p_node_id, p_run_id USING ERRCODE = 'PL005',
            DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', p_node_id, 'waiting_for', coalesce(p.waiting_for, '[]'),
                'reason', CASE
                    WHEN p.waiting_for <> '[]' THEN ''
                    WHEN p.blocked_by = 'retry' THEN 'its retry is due at ' || n.available_at
                    WHEN p.blocked_by = 'failure' THEN format('node %L failed, and only retries start after a failure', r.failed_node)
                    WHEN p.blocked_by IN ('predecessors', 'skipped') THEN 'no predecessor is completed and takes it: skip it, too'
                    ELSE 'it became ready during this call: try again' END);
    END IF;
    IF r.completed_at IS NOT NULL THEN
        PERFORM circle.refuse_run_over(p_run_id, r.status, r.completed_at, r.error_message, p_requested);
    END IF;
    PERFORM circle.refuse_transition(p_run_id, p_node_id, n.status, p_requested, CASE
        WHEN r.status <> 'running' THEN 'its run is ' || r.status
        WHEN p_attempt < n.retry_count + 1::bigint THEN format('attempt %s has ended, the current one is %s', p_attempt, n.retry_count + 1::bigint)
        WHEN p_attempt > n.retry_count + 1::bigint THEN format('attempt %s has not begun, the current one is %s', p_attempt, n.retry_count + 1::bigint)
        WHEN p_requested = 'completed' AND n.status = 'completed' AND p_token IS NOT NULL THEN
            'it completed with another ' || CASE WHEN p_output <> n.output_data THEN 'output' ELSE 'branch' END END);
END $$;
-- Skips the nodes to which all edges are dead, transitively, from the nodes at these positions on. Returns these positions and those
-- of the nodes that follow the skipped ones.
CREATE OR REPLACE FUNCTION circle.skip_followers(p_run_id bigint, p_positions integer[]) RETURNS integer[]
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    following integer[] := p_positions;
    touched integer[] := p_positions;
BEGIN
    WHILE cardinality(following) > 0 LOOP
        WITH skipped AS (
            UPDATE circle.pipeline_node_runs n SET status = 'skipped'
            WHERE n.run_id = p_run_id AND n.status = 'pending' AND n.position = ANY (following)
              AND (SELECT bool_and(circle.is_dead(p.status, p.untaken, n.position)) FROM circle.nodes_at(p_run_id, n.predecessors) p)
            RETURNING n.successors
        )
        SELECT array_agg(DISTINCT s.position) INTO following FROM skipped k CROSS JOIN unnest(k.successors) s (position);
        touched := touched || following;
    END LOOP;
    RETURN touched;
END $$;
CREATE OR REPLACE FUNCTION circle.start_node(p_run_id bigint, p_node_id text, p_input jsonb, p_token bigint) RETURNS json
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    failed text;
    n circle.pipeline_node_runs;
BEGIN
    UPDATE circle.pipeline_runs SET current_node = left(p_node_id, 100)
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    RETURNING failed_node INTO failed;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs t SET
            status = 'running', started_at = clock_timestamp(), input_data = coalesce(p_input, t.input_data)
        WHERE t.run_id = p_run_id AND t.node_id = p_node_id AND (t.status = 'pending') IS TRUE
          AND (SELECT b.reason FROM circle.blocked_by('running', failed, t.run_id, t.position, t.predecessors, t.retry_count,
                                                      t.available_at) b (reason)) IS NULL
        RETURNING * INTO n;
    END IF;
    IF n.id IS NULL THEN
        n := circle.repeat_or_refuse(p_run_id, p_node_id, p_token, 'running');
    END IF;
    RETURN circle.node_answer(n);
END $$;
CREATE OR REPLACE FUNCTION circle.complete_node(p_run_id bigint, p_node_id text, p_output jsonb, p_attempt integer, p_token bigint,
                                                p_branch text DEFAULT NULL)
RETURNS json LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs t SET
            status = 'completed', output_data = coalesce(p_output, t.output_data), error_message = NULL,
            untaken = CASE WHEN p_branch IS NOT NULL THEN nullif(circle.untaken(
                t.node_id, circle.branches_of(t.run_id, ARRAY[t.node_id]) -> t.node_id, t.successors, p_branch), '{}') END,
            completed_at = greatest(clock_timestamp(), t.started_at), duration_ms = circle.elapsed_ms(NULL, t.started_at)
        WHERE t.run_id = p_run_id AND t.node_id = p_node_id AND (t.status IN ('pending', 'running')) IS TRUE
          AND coalesce(p_attempt = t.retry_count + 1::bigint, true)
        RETURNING * INTO n;
    END IF;
    IF n.id IS NULL THEN
        n := circle.repeat_or_refuse(p_run_id, p_node_id, p_token, 'completed', p_attempt, p_output, p_branch);
    ELSIF n.untaken IS NOT NULL THEN
        PERFORM circle.skip_followers(p_run_id, n.untaken);
    END IF;
    RETURN circle.node_answer(n);
END $$;
CREATE OR REPLACE FUNCTION circle.skip_node(p_run_id bigint, p_node_id text, p_token bigint) RETURNS json
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs SET status = 'skipped'
        WHERE run_id = p_run_id AND node_id = p_node_id AND circle.node_may_become(status, 'skipped') RETURNING * INTO n;
        PERFORM circle.skip_followers(p_run_id, n.successors);
    END IF;
    IF n.id IS NULL THEN
        n := circle.repeat_or_refuse(p_run_id, p_node_id, p_token, 'skipped');
    END IF;
    RETURN circle.node_answer(n);
END $$;
-- Whether an attempt that isn't named was reported before: its node waits for the retry. Inlined.
CREATE OR REPLACE FUNCTION circle.was_reported(n circle.pipeline_node_runs, p_attempt integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT p_attempt IS NULL AND n.status = 'pending' AND n.retry_count > 0
$$;
-- When the next attempt of a node may start; PostgreSQL has no interval for a larger exponent. Inlined.
CREATE OR REPLACE FUNCTION circle.retry_due(p_base double precision, p_max double precision, p_retries integer) RETURNS timestamptz
LANGUAGE sql VOLATILE AS $$
    SELECT clock_timestamp() + make_interval(secs => least(p_base * power(2, least(p_retries, 62)), p_max))
$$;
-- Records that the attempt of a node, or of all running nodes, failed: it is retried if retries remain, else failed.
CREATE OR REPLACE FUNCTION circle.fail_attempts(p_run_id bigint, p_node_id text, p_error text, p_retryable boolean, p_attempt integer,
                                                p_claimed boolean)
RETURNS SETOF circle.pipeline_node_runs LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p circle.pipelines;
BEGIN
    SELECT * INTO p FROM circle.pipelines WHERE id = (SELECT pipeline_id FROM circle.pipeline_runs WHERE id = p_run_id);
    RETURN QUERY UPDATE circle.pipeline_node_runs n SET
        status = CASE WHEN a.retried THEN 'pending' ELSE 'failed' END,
        retry_count = n.retry_count + a.retried::integer,
        available_at = CASE WHEN a.retried THEN circle.retry_due(p.retry_backoff_base, p.retry_backoff_max, n.retry_count) END,
        error_message = p_error
    FROM (
        SELECT t.id, p_retryable AND t.status = 'running' AND t.retry_count < p.max_retries_per_node AS retried
        FROM circle.pipeline_node_runs t
        WHERE t.run_id = p_run_id AND CASE WHEN p_node_id IS NULL THEN t.status = 'running'
                                      ELSE t.node_id = p_node_id AND circle.node_may_become(t.status, 'failed')
                                           AND coalesce(p_attempt = t.retry_count + 1::bigint, true)
                                           AND NOT (p_claimed AND p_retryable AND circle.was_reported(t, p_attempt)) END
    ) a
    WHERE n.id = a.id
    RETURNING n.*;
END $$;
CREATE OR REPLACE FUNCTION circle.fail_node(p_run_id bigint, p_node_id text, p_error text, p_retryable boolean, p_attempt integer,
                                            p_token bigint)
RETURNS json LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        SELECT * INTO n FROM circle.fail_attempts(p_run_id, p_node_id, p_error, p_retryable, p_attempt, p_token IS NOT NULL);
    END IF;
    IF n.id IS NULL THEN
        n := circle.repeat_or_refuse(p_run_id, p_node_id, p_token, 'failed', p_attempt);
    END IF;
    RETURN circle.node_answer(n);
END $$;

-- == create functions on many node runs
-- A result of a node as it is reported: a JSON object with the fields of NodeResult that were given.
DO $type$
BEGIN
    IF to_regtype('circle.node_result') IS NULL THEN
        CREATE TYPE circle.node_result AS (node_id TEXT, status TEXT, output JSONB, error TEXT, duration_ms INTEGER,
                                           retry_count INTEGER, attempt INTEGER, retryable BOOLEAN, branch TEXT);
    END IF;
END $type$;
-- Raises why results can't be recorded, unless all that were not applied are repeats.
CREATE OR REPLACE FUNCTION circle.repeat_or_refuse_results(p_run_id bigint, p_results jsonb, p_applied text[], p_token bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    x record;
BEGIN
    FOR x IN SELECT r.*, n.status AS current, count(*) OVER (PARTITION BY r.node_id) AS times
             FROM jsonb_populate_recordset(NULL::circle.node_result, p_results) r
             LEFT JOIN circle.pipeline_node_runs n ON n.run_id = p_run_id AND n.node_id = r.node_id
             ORDER BY n.id IS NULL DESC, times DESC, n.position LOOP
        IF x.current IS NOT NULL AND x.times > 1 THEN
            PERFORM circle.refuse_transition(p_run_id, x.node_id, x.current, x.status, 'the batch has more than one result for it');
        ELSIF (x.node_id = ANY (p_applied)) IS NOT TRUE THEN
            PERFORM circle.repeat_or_refuse(p_run_id, x.node_id, p_token, x.status, x.attempt, x.output, x.branch);
        END IF;
    END LOOP;
END $$;
-- Records results, all or none. p_retry: whether failed attempts are retried where a result doesn't say. Returns the positions of the
-- nodes that may have become ready, and whether some results repeat earlier ones.
CREATE OR REPLACE FUNCTION circle.apply_results(p_run_id bigint, p_results jsonb, p_token bigint, p_retry boolean,
                                                OUT following integer[], OUT repeated boolean)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    done record;
    p record;
BEGIN
    IF p_retry OR p_results @? '$[*] ? (@.retryable == true)' THEN
        SELECT t.max_retries_per_node AS retries, t.retry_backoff_base AS base, t.retry_backoff_max AS most INTO p
        FROM circle.pipelines t WHERE t.id = (SELECT pipeline_id FROM circle.pipeline_runs WHERE id = p_run_id);
    ELSE
        -- the types of the columns above: the statements below are prepared with them
        SELECT 0 AS retries, 0.0::double precision AS base, 0.0::double precision AS most INTO p;
    END IF;
    WITH updated AS (
        UPDATE circle.pipeline_node_runs n SET
            status = CASE WHEN x.retried THEN 'pending' ELSE x.status END, error_message = x.error,
            output_data = coalesce(x.output, n.output_data), duration_ms = circle.elapsed_ms(x.duration_ms, n.started_at),
            -- the branches are read once, if a result has one
            untaken = CASE WHEN x.branch IS NOT NULL AND x.status = 'completed' THEN nullif(circle.untaken(
                n.node_id, (SELECT circle.branches_of(p_run_id, ARRAY(SELECT e ->> 'node_id' FROM jsonb_array_elements(p_results) e
                                                                      WHERE e ? 'branch'))) -> n.node_id,
                n.successors, x.branch), '{}') END,
            retry_count = CASE WHEN x.retried THEN n.retry_count + 1 ELSE greatest(n.retry_count, CASE WHEN x.attempt IS NULL THEN x.retry_count END) END,
            available_at = CASE WHEN x.retried THEN circle.retry_due(p.base, p.most, n.retry_count) END,
            -- of a node that is reported after it ran
            started_at = CASE WHEN n.started_at IS NULL AND x.status IN ('completed', 'failed') THEN
                clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0) ELSE n.started_at END,
            completed_at = CASE WHEN NOT x.retried THEN greatest(clock_timestamp(), n.started_at) END
        FROM (
            SELECT t.id, r.*, r.status = 'failed' AND coalesce(r.retryable, p_retry) AND t.status = 'running'
                              AND t.retry_count < p.retries AS retried
            FROM jsonb_populate_recordset(NULL::circle.node_result, p_results) r
            JOIN circle.pipeline_node_runs t ON t.run_id = p_run_id AND t.node_id = r.node_id
            WHERE circle.node_may_become(t.status, r.status) AND coalesce(r.attempt = t.retry_count + 1::bigint, true)
              -- NOT IN, because with a list of the terminal statuses the planner would expect few results and join by loops
              AND r.status NOT IN ('pending', 'running')
              AND NOT (p_token IS NOT NULL AND r.status = 'failed' AND coalesce(r.retryable, p_retry)
                       AND circle.was_reported(t, r.attempt))
        ) x
        WHERE n.id = x.id
        RETURNING n.node_id, n.status, n.successors, n.untaken
    )
    SELECT array_agg(u.node_id) FILTER (WHERE coalesce(s.ord, 1) = 1) AS nodes, array_agg(s.position) AS following,
           bool_or(u.status = 'skipped' OR u.untaken IS NOT NULL) AS skipped
    INTO done FROM updated u LEFT JOIN unnest(u.successors) WITH ORDINALITY s (position, ord) ON true;
    repeated := coalesce(cardinality(done.nodes), 0) <> jsonb_array_length(p_results);
    IF repeated THEN
        PERFORM circle.repeat_or_refuse_results(p_run_id, p_results, done.nodes, p_token);
    END IF;
    following := coalesce(done.following, '{}');
    IF done.skipped THEN
        following := circle.skip_followers(p_run_id, following);
    END IF;
END $$;
-- Nodes that were started, as a JSON list in execution order; p_inputs adds the outputs of completed predecessors that take them.
CREATE OR REPLACE FUNCTION circle.started_nodes(p_run_id bigint, p_ids bigint[], p_inputs boolean) RETURNS json
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF p_inputs THEN
        RETURN (SELECT json_agg(json_build_object(
                    'node_id', n.node_id, 'node_type', n.node_type, 'attempt', n.retry_count + 1::bigint, 'inputs', (
                        SELECT coalesce(json_object_agg(p.node_id, p.output_data ORDER BY p.position), '{}')
                        FROM circle.nodes_at(p_run_id, n.predecessors) p
                        WHERE p.status = 'completed' AND NOT circle.is_dead(p.status, p.untaken, n.position)))
                    ORDER BY n.position, n.id)
                FROM circle.pipeline_node_runs n WHERE n.id = ANY (p_ids));
    END IF;
    RETURN (SELECT json_agg(json_build_object('node_id', n.node_id, 'node_type', n.node_type, 'attempt', n.retry_count + 1::bigint)
                            ORDER BY n.position, n.id)
            FROM circle.pipeline_node_runs n WHERE n.id = ANY (p_ids));
END $$;
-- The answer of advance_run if it started nothing: what is running, and when a retry is due.
CREATE OR REPLACE FUNCTION circle.waiting_step(p_run_id bigint) RETURNS json LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (SELECT json_build_object(
        'status', (SELECT r.status FROM circle.pipeline_runs r WHERE r.id = p_run_id),
        'running', json_agg(json_build_object('node_id', n.node_id, 'node_type', n.node_type, 'attempt', n.retry_count + 1::bigint)
                            ORDER BY n.position) FILTER (WHERE n.status = 'running'),
        'next_due', min(n.available_at) FILTER (WHERE n.status = 'pending'))
        FROM circle.pipeline_node_runs n WHERE n.run_id = p_run_id AND n.status IN ('pending', 'running'));
END $$;
-- Starts the ready nodes at these positions, or all that are ready if they are NULL, and returns their ids.
CREATE OR REPLACE FUNCTION circle.start_ready_nodes(r circle.pipeline_runs, p_positions integer[]) RETURNS bigint[]
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    started bigint[];
BEGIN
    IF p_positions IS NULL THEN
        WITH s AS (
            UPDATE circle.pipeline_node_runs n SET status = 'running', started_at = clock_timestamp()
            WHERE n.run_id = r.id AND (n.status = 'pending') IS TRUE
              AND (SELECT b.reason FROM circle.blocked_by(r.status, r.failed_node, n.run_id, n.position, n.predecessors, n.retry_count,
                                                          n.available_at) b (reason)) IS NULL
            RETURNING n.id
        ) SELECT array_agg(s.id) INTO started FROM s;
    ELSE
        WITH s AS (
            UPDATE circle.pipeline_node_runs n SET status = 'running', started_at = clock_timestamp()
            WHERE n.run_id = r.id AND n.position = ANY (p_positions) AND (n.status = 'pending') IS TRUE
              AND (SELECT b.reason FROM circle.blocked_by(r.status, r.failed_node, n.run_id, n.position, n.predecessors, n.retry_count,
                                                          n.available_at) b (reason)) IS NULL
            RETURNING n.id
        ) SELECT array_agg(s.id) INTO started FROM s;
    END IF;
    RETURN started;
END $$;
-- The answer of advance_run if it started nodes.
CREATE OR REPLACE FUNCTION circle.started_step(p_run_id bigint, p_ids bigint[], p_inputs boolean) RETURNS json
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE circle.pipeline_runs SET current_node = (
        SELECT node_id FROM circle.pipeline_node_runs WHERE id = ANY (p_ids) ORDER BY position DESC NULLS LAST, id DESC LIMIT 1)
    WHERE id = p_run_id;
    RETURN json_build_object('status', 'running', 'started', circle.started_nodes(p_run_id, p_ids, p_inputs));
END $$;
-- Ends a run in which nothing was started, if nothing is left. If nothing runs, either, starts what became ready by other calls.
CREATE OR REPLACE FUNCTION circle.settle_run(p_run_id bigint, p_inputs boolean) RETURNS json
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r circle.pipeline_runs := circle.end_run_if_done(p_run_id);
    started bigint[];
BEGIN
    IF r.id IS NULL AND NOT EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'running') THEN
        SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
        started := circle.start_ready_nodes(r, NULL);
        IF started IS NOT NULL THEN
            RETURN circle.started_step(p_run_id, started, p_inputs);
        END IF;
    END IF;
    RETURN circle.waiting_step(p_run_id);
END $$;
-- Records results, starts what became ready, ends the run when nothing is left. The results of most calls complete nodes, without a
-- branch, of a run in which none failed: for them it is one statement, in which the guard fires once.
CREATE OR REPLACE FUNCTION circle.advance_run(p_run_id bigint, p_results jsonb, p_token bigint, p_retry boolean, p_inputs boolean)
RETURNS json LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
    d record;
    fresh boolean := false;
    following integer[];   -- positions that may have become ready; NULL: any
    started bigint[];
    repeated boolean := false;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF r.status = 'running' AND r.failed_node IS NULL AND circle.holds_run(r.claim_token, r.lease_expires_at, p_token)
       AND p_results <> '[]' AND NOT p_results @? '$[*] ? (@.status != "completed" || @.branch != null)' THEN
        WITH done AS (
            UPDATE circle.pipeline_node_runs n SET
                status = 'completed', output_data = coalesce(x.output, n.output_data), error_message = NULL,
                duration_ms = circle.elapsed_ms(x.duration_ms, n.started_at), retry_count = greatest(n.retry_count, CASE WHEN x.attempt IS NULL THEN x.retry_count END),
                started_at = coalesce(n.started_at, clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0)),
                completed_at = greatest(clock_timestamp(), n.started_at)
            FROM jsonb_populate_recordset(NULL::circle.node_result, p_results) x
            WHERE n.run_id = p_run_id AND n.node_id = x.node_id AND (n.status IN ('pending', 'running')) IS TRUE
              AND coalesce(x.attempt = n.retry_count + 1::bigint, true)
            RETURNING n.node_id, n.position, n.successors
        ), started AS (
            UPDATE circle.pipeline_node_runs n SET status = 'running', started_at = clock_timestamp()
            WHERE n.run_id = p_run_id AND n.position = ANY (ARRAY(SELECT s FROM done, unnest(done.successors) s))
              AND (n.status = 'pending') IS TRUE AND coalesce(n.available_at <= clock_timestamp(), true)
              -- as blocked_by has it, of a run in which no node failed; done is of this statement, which doesn't see it, and takes all edges
              AND NOT EXISTS (SELECT FROM circle.nodes_at(p_run_id, n.predecessors) p
                              WHERE p.status NOT IN ('completed', 'skipped')
                                AND p.position NOT IN (SELECT done.position FROM done WHERE done.position IS NOT NULL))
            RETURNING n.id, n.node_id, n.node_type, n.position, n.retry_count
        ), current AS (
            UPDATE circle.pipeline_runs SET current_node = c.node_id
            FROM (SELECT node_id FROM started ORDER BY position DESC LIMIT 1) c WHERE id = p_run_id
        )
        SELECT (SELECT array_agg(node_id) FROM done) AS applied, array_agg(s.id) AS started,
               json_agg(json_build_object('node_id', s.node_id, 'node_type', s.node_type, 'attempt', s.retry_count + 1::bigint)
                        ORDER BY s.position) AS nodes
        INTO d FROM started s;
        started := d.started;
        IF cardinality(d.applied) = jsonb_array_length(p_results) THEN
            IF started IS NOT NULL THEN
                RETURN json_build_object('status', 'running', 'started', CASE WHEN p_inputs
                    THEN circle.started_nodes(p_run_id, started, true) ELSE d.nodes END);
            END IF;
        ELSE
            PERFORM circle.repeat_or_refuse_results(p_run_id, p_results, d.applied, p_token);
            repeated := true;
        END IF;
    ELSE
        IF (r.status = 'running' AND circle.holds_run(r.claim_token, r.lease_expires_at, p_token)) IS NOT TRUE THEN
            IF r.completed_at IS NOT NULL AND r.claim_token = p_token AND p_results <> '[]' THEN
                PERFORM circle.repeat_or_refuse_results(p_run_id, p_results, '{}', p_token);
                RETURN json_build_object('status', r.status);
            END IF;
            fresh := r.started_at IS NULL AND r.resumed_from IS NULL;
            r := circle.lock_run(p_run_id, p_token);
        END IF;
        IF p_results <> '[]' THEN
            SELECT a.following, a.repeated INTO following, repeated FROM circle.apply_results(p_run_id, p_results, p_token, p_retry) a;
            SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
        ELSIF fresh THEN
            SELECT array_agg(position) INTO following FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND predecessors = '{}';
        END IF;
        IF r.failed_node IS NOT NULL THEN
            following := NULL;   -- retries that are due can be anywhere
        END IF;
        started := circle.start_ready_nodes(r, following);
    END IF;
    IF repeated THEN   -- the answer to the first report may be lost: also what it started
        PERFORM circle.start_ready_nodes(r, NULL);
        SELECT array_agg(id) INTO started FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'running';
    END IF;
    RETURN CASE WHEN started IS NULL THEN circle.settle_run(p_run_id, p_inputs) ELSE circle.started_step(p_run_id, started, p_inputs) END;
END $$;
-- IS TRUE keeps the index on ends away, which has the id as its second column.
CREATE OR REPLACE FUNCTION circle.record_results(p_run_id bigint, p_results jsonb, p_token bigint, p_retry boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    IF p_results <> '[]' AND EXISTS (
            SELECT FROM circle.pipeline_runs WHERE id = p_run_id AND (completed_at IS NOT NULL) IS TRUE AND claim_token = p_token) THEN
        PERFORM circle.repeat_or_refuse_results(p_run_id, p_results, '{}', p_token);
    ELSE
        PERFORM circle.lock_run(p_run_id, p_token);
        PERFORM circle.apply_results(p_run_id, p_results, p_token, p_retry);
    END IF;
END $$;
-- Creates a run with the results of its nodes and ends it.
CREATE OR REPLACE FUNCTION circle.record_run(p_pipeline_id bigint, p_trigger_data jsonb, p_key text, p_results jsonb) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    created record;
    r circle.pipeline_runs;
    done record;
BEGIN
    SELECT * INTO created FROM circle.insert_run(p_pipeline_id, 'running', p_trigger_data, p_key, 0, NULL, false);
    r := created.r;
    IF NOT created.is_new THEN
        IF r.id IS NULL THEN
            PERFORM circle.refuse_create(p_pipeline_id);
        ELSIF r.completed_at IS NULL THEN
            PERFORM circle.refuse_transition(r.id, NULL, r.status, 'recorded', 'it has this key, and was created to be executed');
        END IF;
        RETURN r;
    END IF;
    WITH inserted AS (
        INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, position, predecessors, successors, status, output_data,
                                               untaken, error_message, retry_count, duration_ms, started_at, completed_at)
        SELECT r.id, c.node_id, c.node_type, c.place - 1, c.predecessors, c.successors, coalesce(x.status, 'pending'),
               coalesce(x.output, '{}'), CASE WHEN x.branch IS NOT NULL AND x.status = 'completed' THEN
                   nullif(circle.untaken(c.node_id, c.branches, c.successors, x.branch), '{}') END,
               x.error, coalesce(x.attempt - 1, x.retry_count, 0), coalesce(x.duration_ms, 0),
               CASE WHEN x.status IN ('completed', 'failed') THEN
                   clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0) END,
               CASE WHEN x.status IS NOT NULL THEN clock_timestamp() END
        FROM circle.pipeline_versions v
        CROSS JOIN LATERAL unnest(v.compiled) WITH ORDINALITY c (node_id, node_type, predecessors, successors, branches, place)
        LEFT JOIN (SELECT DISTINCT ON (y.node_id) y.* FROM jsonb_populate_recordset(NULL::circle.node_result, p_results) y) x
            ON x.node_id = c.node_id
        WHERE v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
        ORDER BY c.place
        RETURNING status, untaken, node_id
    )
    SELECT count(*) AS nodes, array_agg(i.node_id) FILTER (WHERE i.status <> 'pending') AS applied,
           bool_or(i.status = 'skipped' OR i.untaken IS NOT NULL) AS skipped INTO done FROM inserted i;
    IF done.nodes = 0 THEN
        PERFORM circle.refuse_create(p_pipeline_id);
    ELSIF coalesce(cardinality(done.applied), 0) <> jsonb_array_length(p_results) THEN
        PERFORM circle.repeat_or_refuse_results(r.id, p_results, done.applied, NULL);
    ELSIF done.skipped THEN
        PERFORM circle.skip_followers(r.id, ARRAY(SELECT s FROM circle.pipeline_node_runs n, unnest(n.successors) s
                                                  WHERE n.run_id = r.id AND (n.status = 'skipped' OR n.untaken IS NOT NULL)));
    END IF;
    r := circle.end_run_if_done(r.id);
    IF r.id IS NULL THEN
        PERFORM circle.refuse_run((created.r).id, NULL, 'completed', (
            SELECT format('nodes %s could have started, and have no result', string_agg(n.node_id, ', ' ORDER BY n.position))
            FROM (SELECT s.node_id, s.position FROM circle.startable_node_runs s WHERE s.run_id = (created.r).id
                  ORDER BY s.position LIMIT 10) n));
    END IF;
    RETURN r;
END $$;
-- advance_run for many runs at once, each at most once, in one commit: for those whose call is plain. p_results has the results of
-- all, each with its run_id. A call is plain if its results complete nodes, without a branch, of a run that the caller holds and in
-- which no node failed, or begins such a run. A call whose run is locked by somebody else, or that isn't plain, changes nothing, and its
-- step is NULL: advance_run has to be called for it. So nobody waits for somebody else's run, and each refusal has its own error.
CREATE OR REPLACE FUNCTION circle.advance_runs(p_run_ids bigint[], p_tokens bigint[], p_results jsonb, p_with_inputs bigint[] DEFAULT '{}')
RETURNS TABLE (run_id bigint, step json)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET lock_timeout = '100ms' AS $$
#variable_conflict use_column
DECLARE
    calls record;
    moved record;
    idle bigint[];   -- runs in which nothing was started
    ended bigint[];
    one bigint;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    SELECT array_agg(l.id) FILTER (WHERE l.status = 'running' AND l.reported) AS reported,
           array_agg(l.id) FILTER (WHERE l.status = 'pending' AND NOT l.reported AND l.started_at IS NULL AND l.resumed_from IS NULL) AS fresh
    INTO calls FROM (
        SELECT r.id, r.status, r.started_at, r.resumed_from, x.run_id IS NOT NULL AS reported
        FROM unnest(p_run_ids, p_tokens) c (run_id, token)
        JOIN circle.pipeline_runs r ON r.id = c.run_id
        LEFT JOIN (SELECT DISTINCT run_id FROM jsonb_to_recordset(p_results) AS y (run_id bigint)) x ON x.run_id = c.run_id
        WHERE r.failed_node IS NULL AND r.completed_at IS NULL AND circle.holds_run(r.claim_token, r.lease_expires_at, c.token)
        ORDER BY r.id FOR NO KEY UPDATE OF r SKIP LOCKED
    ) l;
    IF calls.fresh IS NOT NULL THEN
        UPDATE circle.pipeline_runs SET status = 'running', started_at = coalesce(started_at, clock_timestamp())
        WHERE id = ANY (calls.fresh);
    END IF;
    WITH results AS MATERIALIZED (
        SELECT x.*, n.id, (n.status = ANY ('{pending,running}') AND x.status = 'completed' AND x.branch IS NULL
                           AND coalesce(x.attempt = n.retry_count + 1::bigint, true) AND count(*) OVER (PARTITION BY n.id) = 1) IS TRUE AS plain
        FROM jsonb_to_recordset(p_results) AS x (run_id bigint, node_id text, status text, output jsonb, duration_ms integer,
                                                 retry_count integer, attempt integer, branch text)
        LEFT JOIN circle.pipeline_node_runs n ON n.run_id = x.run_id AND n.node_id = x.node_id
        WHERE x.run_id = ANY (calls.reported)
    ), refused AS MATERIALIZED (
        SELECT DISTINCT x.run_id FROM results x WHERE NOT x.plain
    ), done AS (
        UPDATE circle.pipeline_node_runs n SET
            status = 'completed', output_data = coalesce(x.output, n.output_data), error_message = NULL,
            duration_ms = circle.elapsed_ms(x.duration_ms, n.started_at), retry_count = greatest(n.retry_count, CASE WHEN x.attempt IS NULL THEN x.retry_count END),
            started_at = coalesce(n.started_at, clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0)),
            completed_at = greatest(clock_timestamp(), n.started_at)
        FROM results x
        WHERE n.id = x.id AND (n.status IN ('pending', 'running')) IS TRUE AND NOT x.run_id IN (SELECT f.run_id FROM refused f)
        RETURNING n.run_id, n.position, n.successors
    ), following AS MATERIALIZED (
        SELECT DISTINCT d.run_id, s.position FROM done d CROSS JOIN unnest(d.successors) s (position)
        UNION ALL
        SELECT n.run_id, n.position FROM circle.pipeline_node_runs n WHERE n.run_id = ANY (calls.fresh) AND n.predecessors = '{}'
    ), started AS (
        UPDATE circle.pipeline_node_runs n SET status = 'running', started_at = clock_timestamp()
        FROM following f
        WHERE n.run_id = f.run_id AND n.position = f.position AND (n.status = 'pending') IS TRUE
          AND coalesce(n.available_at <= clock_timestamp(), true)
          AND NOT EXISTS (SELECT FROM circle.nodes_at(n.run_id, n.predecessors) p
                          WHERE p.status NOT IN ('completed', 'skipped')
                            AND NOT (p.run_id, p.position) IN (
                                SELECT d.run_id, d.position FROM done d WHERE d.position IS NOT NULL))
        RETURNING n.id, n.run_id, n.node_id, n.node_type, n.position, n.retry_count
    ), current AS (
        UPDATE circle.pipeline_runs r SET current_node = c.node_id
        FROM (SELECT DISTINCT ON (s.run_id) s.run_id, s.node_id FROM started s ORDER BY s.run_id, s.position DESC) c WHERE r.id = c.run_id
    ), steps AS (
        SELECT s.run_id, json_build_object('status', 'running', 'started', json_agg(json_build_object(
                   'node_id', s.node_id, 'node_type', s.node_type, 'attempt', s.retry_count + 1::bigint) ORDER BY s.position)) AS step,
               array_agg(s.id)::text AS ids
        FROM started s GROUP BY s.run_id
    )
    SELECT (SELECT count(*) FROM done) AS rows, (SELECT count(*) FROM results x WHERE NOT x.run_id IN (SELECT f.run_id FROM refused f)) AS wanted,
           ARRAY(SELECT f.run_id FROM refused f) AS refused, array_agg(s.run_id) AS run_ids, array_agg(s.step) AS steps, array_agg(s.ids) AS ids
    INTO moved FROM steps s;
    IF moved.rows <> moved.wanted THEN   -- a raw writer changed a node meanwhile
        RAISE EXCEPTION 'the batch was disturbed' USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN QUERY SELECT t.run_id::bigint, CASE WHEN t.run_id = ANY (p_with_inputs)   -- by a statement of its own, which sees the new outputs
        THEN json_build_object('status', 'running', 'started', circle.started_nodes(t.run_id, t.ids::bigint[], true)) ELSE t.step END
    FROM unnest(moved.run_ids, moved.steps, moved.ids) t (run_id, step, ids);
    idle := ARRAY(SELECT t.id FROM unnest(calls.reported || calls.fresh) t (id) EXCEPT SELECT unnest(moved.run_ids || moved.refused));
    IF idle <> '{}' THEN
        WITH over AS (
            UPDATE circle.pipeline_runs r SET
                status = 'completed', completed_at = greatest(clock_timestamp(), r.started_at), lease_expires_at = NULL,
                duration_seconds = least(extract(epoch FROM greatest(clock_timestamp(), r.started_at) - r.started_at), 2147483647)
            WHERE r.id = ANY (idle) AND NOT EXISTS (SELECT FROM circle.pipeline_node_runs n WHERE n.run_id = r.id
                                                    AND (n.status NOT IN ('completed', 'skipped') OR n.position IS NULL))
              AND EXISTS (SELECT FROM circle.pipeline_node_runs n WHERE n.run_id = r.id)   -- else settle_run gives it its nodes
            RETURNING r.id, r.pipeline_id
        ), counted AS (
            INSERT INTO circle.pipeline_counters (pipeline_id, success_count)
            SELECT o.pipeline_id, count(*) FROM over o GROUP BY o.pipeline_id
        )
        SELECT coalesce(array_agg(o.id), '{}') INTO ended FROM over o;
        RETURN QUERY SELECT t.id, '{"status": "completed"}'::json FROM unnest(ended) t (id);
        FOR one IN SELECT unnest(idle) EXCEPT SELECT unnest(ended) ORDER BY 1 LOOP   -- other nodes run, or something is unusual
            RETURN QUERY SELECT one, circle.settle_run(one, one = ANY (p_with_inputs));
        END LOOP;
    END IF;
    RETURN QUERY SELECT c.id, NULL::json FROM unnest(p_run_ids) c (id)
    WHERE NOT c.id = ANY (coalesce(moved.run_ids, '{}') || idle);
END $$;
