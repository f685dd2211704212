-- Revision 011: what a run stands still for, and which runs nothing moves.
--
-- Reads of a few rows, by indexes: what could be long is cut at a number. As in page_of_runs, only the right index remains without sorts.

-- == create functions that explain
-- The last claim of a run of a pipeline: of its last 100 runs, the last 100 before the head of its queue, because the claimed ones stand
-- before a long queue, and 100 running ones.
CREATE OR REPLACE FUNCTION circle.last_claim(p_pipeline_id bigint, OUT claimed_at timestamptz, OUT worker_id text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_sort = off
SET enable_incremental_sort = off SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    head bigint;
BEGIN
    SELECT r.id INTO head FROM circle.pipeline_runs r
    WHERE r.pipeline_id = p_pipeline_id AND r.status = 'pending' AND r.waits_until IS NULL AND r.pipeline_version IS NOT NULL
    ORDER BY r.pipeline_id, r.priority DESC, r.id LIMIT 1;
    SELECT max(c.at), (array_agg(c.worker_id ORDER BY c.at DESC) FILTER (WHERE c.at IS NOT NULL))[1] INTO claimed_at, worker_id
    FROM (
        (SELECT r.id FROM circle.pipeline_runs r
         WHERE r.pipeline_id >= p_pipeline_id AND (r.pipeline_id, r.id) <= (p_pipeline_id, 9223372036854775807)
         ORDER BY r.pipeline_id DESC, r.id DESC LIMIT 100)
        UNION
        (SELECT r.id FROM circle.pipeline_runs r
         WHERE r.pipeline_id >= p_pipeline_id AND (r.pipeline_id, r.id) < (p_pipeline_id, head)
         ORDER BY r.pipeline_id DESC, r.id DESC LIMIT 100)
        UNION
        (SELECT r.id FROM circle.pipeline_runs r WHERE r.pipeline_id = p_pipeline_id AND r.status = 'running'
         ORDER BY r.pipeline_id DESC, r.id DESC LIMIT 100)
    ) n
    LEFT JOIN LATERAL (
        SELECT h.at, h.worker_id, h.kind FROM circle.pipeline_run_history h WHERE h.run_id = n.id
        ORDER BY h.run_id DESC, h.id DESC LIMIT 4) c ON c.kind = 'claimed';   -- at most three rows follow the last claim
END $$;
-- The facts from which gathering_pipeline/explaining.py says why a run stands still; NULL: there is no such run. Of its nodes at most
-- 100 that are live, failed, skipped or taken over, those first that something can be done about. Tokens stay secret.
CREATE OR REPLACE FUNCTION circle.explain_run(p_run_id bigint) RETURNS json
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_sort = off
SET enable_incremental_sort = off SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    r circle.pipeline_runs;
    p circle.pipelines;
    resumed_as bigint;
    ahead bigint := 0;
    running bigint[] := '{}';
    last_claim record;
    nodes record;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT * INTO p FROM circle.pipelines WHERE id = r.pipeline_id;
    resumed_as := (SELECT id FROM circle.pipeline_runs WHERE resumed_from = p_run_id);
    SELECT NULL::timestamptz AS claimed_at, NULL::text AS worker_id INTO last_claim;
    IF r.status = 'pending' THEN
        ahead := (SELECT count(*) FROM (
            (SELECT 1 FROM circle.pipeline_runs q
             WHERE q.pipeline_id = r.pipeline_id AND q.status = 'pending' AND q.waits_until IS NULL AND q.pipeline_version IS NOT NULL
               AND q.priority > r.priority
             ORDER BY q.pipeline_id, q.priority DESC, q.id LIMIT 1000)
            UNION ALL
            (SELECT 1 FROM circle.pipeline_runs q
             WHERE q.pipeline_id = r.pipeline_id AND q.status = 'pending' AND q.waits_until IS NULL AND q.pipeline_version IS NOT NULL
               AND q.priority = r.priority AND q.id < r.id
             ORDER BY q.pipeline_id, q.priority DESC, q.id LIMIT 1000)
            LIMIT 1000) q);
        running := ARRAY(SELECT q.id FROM circle.pipeline_runs q WHERE q.pipeline_id = r.pipeline_id AND q.status = 'running'
                         ORDER BY q.pipeline_id, q.id LIMIT CASE WHEN p.max_running > 0 THEN p.max_running + 1000::bigint ELSE 0 END);
        SELECT c.claimed_at, c.worker_id INTO last_claim FROM circle.last_claim(r.pipeline_id) c;
    END IF;
    WITH judged AS MATERIALIZED (
        SELECT n.id, n.position, n.status, n.started_at, n.completed_at, n.available_at,
               n.taken_from,
               CASE WHEN n.status = 'pending' THEN (
                   SELECT b.reason FROM circle.blocked_by(r.status, r.failed_node, n.run_id, n.position, n.predecessors, n.retry_count,
                                                          n.available_at) b (reason)) END AS blocked_by
        FROM circle.pipeline_node_runs n WHERE n.run_id = p_run_id
    ), ranked AS MATERIALIZED (
        SELECT j.*, CASE
                   WHEN j.status = 'failed' THEN 0
                   WHEN j.status = 'running' THEN 1
                   WHEN j.status = 'pending' THEN coalesce(array_position('{retry,skipped,failure,predecessors,run}', j.blocked_by), 0) + 2
                   WHEN j.taken_from IS NOT NULL THEN 9
                   WHEN j.status = 'skipped' THEN 8 END AS rank
        FROM judged j
    ), chosen AS MATERIALIZED (
        SELECT k.id, k.blocked_by, k.taken_from FROM ranked k WHERE k.rank IS NOT NULL ORDER BY k.rank, k.position, k.id LIMIT 100
    )
    SELECT count(*) AS number, count(k.rank) AS listable, coalesce(bool_or(k.position = 0), false) AS filled,
           max(greatest(k.started_at, k.completed_at)) AS moved_at, count(*) FILTER (WHERE k.status = 'running') AS running,
           min(k.started_at) FILTER (WHERE k.status = 'running') AS running_since,
           count(*) FILTER (WHERE k.rank = 2) AS ready, count(*) FILTER (WHERE k.blocked_by = 'retry') AS retrying,
           min(k.available_at) FILTER (WHERE k.blocked_by = 'retry') AS retry_at,
           (SELECT json_agg(json_build_object(
                'node_id', n.node_id, 'status', n.status, 'attempt', n.retry_count + 1::bigint, 'started_at', n.started_at,
                'completed_at', n.completed_at, 'available_at', n.available_at, 'error', left(n.error_message, 1000),
                'blocked_by', c.blocked_by, 'taken_from', c.taken_from, 'waiting_for', coalesce(w.names[:10], '{}'),
                'waiting', coalesce(cardinality(w.names), 0), 'skipped_by', s.by, 'untaken_by', s.node_id)
                ORDER BY n.position, n.id)
            FROM chosen c
            CROSS JOIN LATERAL (SELECT * FROM circle.pipeline_node_runs t WHERE t.id = c.id OFFSET 0) n
            LEFT JOIN LATERAL (
                SELECT v.waiting_for AS names FROM circle.pending_node_runs v
                WHERE v.id = c.id AND c.blocked_by = 'predecessors' OFFSET 0) w ON true
            LEFT JOIN LATERAL (
                SELECT CASE WHEN bool_and(circle.is_dead(q.status, q.untaken, n.position)) IS NOT TRUE THEN 'report'
                            WHEN bool_and(q.status = 'skipped') THEN 'cascade' ELSE 'branch' END AS by,
                       min(q.node_id) FILTER (WHERE q.status = 'completed') AS node_id
                FROM circle.pipeline_node_runs q
                WHERE n.status = 'skipped' AND q.run_id = p_run_id AND q.position = ANY (n.predecessors)) s ON true) AS listed
    INTO nodes FROM ranked k;
    RETURN json_build_object(
        'now', clock_timestamp(),
        'run', json_build_object(
            'id', r.id, 'status', r.status, 'pipeline_version', r.pipeline_version, 'error_message', left(r.error_message, 1000),
            'failed_node', r.failed_node, 'worker_id', r.worker_id, 'lapsed_claims', r.lapsed_claims,
            'lease_expires_at', r.lease_expires_at, 'run_at', r.run_at, 'waits_until', r.waits_until, 'started_at', r.started_at,
            'completed_at', r.completed_at, 'created_at', r.created_at, 'resumed_as', resumed_as),
        'pipeline', json_build_object(
            'id', p.id, 'status', p.status, 'status_changed_at', p.status_changed_at, 'timeout_seconds', p.timeout_seconds,
            'max_retries_per_node', p.max_retries_per_node, 'max_running', p.max_running),
        'queue', json_build_object(
            'ahead', ahead, 'running', cardinality(running), 'running_ids', running[:10], 'claimed_at', last_claim.claimed_at,
            'claimed_by', last_claim.worker_id),
        'nodes', to_json(nodes),
        'history', (SELECT json_agg(json_build_object('at', h.at, 'kind', h.kind, 'worker_id', h.worker_id,
                                                      'reason', left(h.reason, 1000), 'is_current', h.token = r.claim_token) ORDER BY h.id)
                    FROM (SELECT * FROM circle.pipeline_run_history t WHERE t.run_id = p_run_id
                          ORDER BY t.run_id DESC, t.id DESC LIMIT 20) h));
END $$;
-- Live runs in which nothing has moved for a time, and which nothing holds on purpose, oldest first: their lease is past, or their timeout, or
-- they are running and no worker executes a node, or a worker could have claimed them, or none ever can. Whatever the history, it looks at
-- the oldest 10,000 running runs and as many pending ones, the first p_limit of each queue, and the 10,000 longest past their waiting time.
CREATE OR REPLACE FUNCTION circle.stuck_runs(p_older_than interval, p_limit integer) RETURNS bigint[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_sort = off
SET enable_incremental_sort = off SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    since timestamptz := clock_timestamp() - p_older_than;
BEGIN
    RETURN ARRAY(
        WITH open AS MATERIALIZED (
            SELECT p.id, p.max_running FROM circle.pipelines p
            WHERE p.status = 'active' AND coalesce(p.status_changed_at < since, true)
              AND (p.max_running = 0 OR NOT EXISTS (SELECT FROM circle.pipeline_runs r WHERE r.pipeline_id = p.id AND r.status = 'running'
                                                    ORDER BY r.pipeline_id, r.id OFFSET p.max_running - 1))
        ), found AS (
            -- the last event of a run is its last change of a status, whichever writer made it
            (SELECT r.id FROM (
                 SELECT t.id, t.pipeline_id, coalesce(t.started_at, t.created_at) AS began, t.lease_expires_at FROM circle.pipeline_runs t
                 WHERE t.status >= 'running' AND t.status <= 'running' ORDER BY t.status, t.id LIMIT 10000) r
             WHERE r.lease_expires_at < since
                OR r.began < since - (SELECT make_interval(secs => nullif(p.timeout_seconds, 0)) FROM circle.pipelines p WHERE p.id = r.pipeline_id)
                OR r.began < since
                   AND coalesce((SELECT h.at FROM circle.pipeline_run_history h WHERE h.run_id = r.id
                                 ORDER BY h.run_id DESC, h.id DESC LIMIT 1) < since, true)
                   AND coalesce((SELECT e.created_at FROM circle.pipeline_events e WHERE e.run_id = r.id
                                 ORDER BY e.run_id DESC, e.xid DESC, e.id DESC LIMIT 1) < since, true)
                   -- as a value: an EXISTS might be hashed, which reads the nodes of all runs
                   AND (SELECT n.id FROM circle.pipeline_node_runs n WHERE n.run_id = r.id AND (
                            n.status = 'pending' AND n.available_at >= since OR n.status = 'running' AND r.lease_expires_at IS NOT NULL)
                        LIMIT 1) IS NULL
             LIMIT p_limit)
            UNION ALL
            (SELECT q.id FROM open p
             CROSS JOIN LATERAL (
                 SELECT r.id FROM circle.pipeline_runs r
                 WHERE r.pipeline_id = p.id AND r.status = 'pending' AND r.waits_until IS NULL AND r.pipeline_version IS NOT NULL
                 ORDER BY r.pipeline_id, r.priority DESC, r.id LIMIT 1) head
             CROSS JOIN LATERAL (
                 SELECT r.id, r.created_at, r.run_at FROM circle.pipeline_runs r
                 WHERE r.pipeline_id = p.id AND r.status = 'pending' AND r.waits_until IS NULL AND r.pipeline_version IS NOT NULL
                   -- until lately the pipeline was full, if one of its runs was claimed or ended: those stand before the head, or are new
                   AND (p.max_running = 0 OR NOT EXISTS (
                       SELECT FROM (
                           (SELECT b.id, b.completed_at FROM circle.pipeline_runs b
                            WHERE b.pipeline_id >= p.id AND (b.pipeline_id, b.id) < (p.id, head.id)
                            ORDER BY b.pipeline_id DESC, b.id DESC LIMIT 100)
                           UNION ALL
                           (SELECT b.id, b.completed_at FROM circle.pipeline_runs b
                            WHERE b.pipeline_id >= p.id AND (b.pipeline_id, b.id) <= (p.id, 9223372036854775807)
                            ORDER BY b.pipeline_id DESC, b.id DESC LIMIT 100)) b
                       WHERE b.completed_at >= since OR (SELECT h.at FROM circle.pipeline_run_history h WHERE h.run_id = b.id
                                                         ORDER BY h.run_id DESC, h.id DESC LIMIT 1) >= since))
                 ORDER BY r.pipeline_id, r.priority DESC, r.id LIMIT p_limit) q
             WHERE q.created_at < since AND coalesce(q.run_at < since, true)
               AND coalesce((SELECT h.at FROM circle.pipeline_run_history h WHERE h.run_id = q.id
                             ORDER BY h.run_id DESC, h.id DESC LIMIT 1) < since, true)
               AND (SELECT n.id FROM circle.pipeline_node_runs n
                    WHERE n.run_id = q.id AND n.status = 'pending' AND n.available_at >= since LIMIT 1) IS NULL
             LIMIT p_limit)
            UNION ALL
            (SELECT w.id FROM (
                 SELECT r.id, r.pipeline_id, r.pipeline_version FROM circle.pipeline_runs r
                 WHERE r.status = 'pending' AND r.waits_until IS NOT NULL AND r.waits_until < since ORDER BY r.waits_until LIMIT 10000) w
             WHERE w.pipeline_version IS NOT NULL AND (w.pipeline_id IN (SELECT p.id FROM open p)) IS TRUE
             LIMIT p_limit)
            UNION ALL   -- without a version a run is never claimed
            (SELECT u.id FROM (
                 SELECT r.id, r.pipeline_version, r.created_at FROM circle.pipeline_runs r
                 WHERE r.status >= 'pending' AND r.status <= 'pending' ORDER BY r.status, r.id LIMIT 10000) u
             WHERE u.pipeline_version IS NULL AND u.created_at < since
             LIMIT p_limit)
        )
        SELECT f.id FROM found f ORDER BY f.id LIMIT p_limit);
END $$;
-- Since when the first pending run is there, and the first event that a transaction which was open before it keeps from being read.
CREATE OR REPLACE FUNCTION circle.waiting_since(OUT run timestamptz, OUT event timestamptz)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_sort = off
SET enable_incremental_sort = off SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
BEGIN
    -- a range of one status, or the planner would drop it from the order and might use another index
    run := (SELECT r.created_at FROM circle.pipeline_runs r WHERE r.status >= 'pending' AND r.status <= 'pending'
            ORDER BY r.status, r.id LIMIT 1);
    event := (SELECT e.created_at FROM circle.pipeline_events e WHERE e.xid >= pg_snapshot_xmin(pg_current_snapshot())
              ORDER BY e.xid, e.id LIMIT 1);
END $$;
