-- Revision 009: versions of the graph, leases, and the lifecycle as functions.
--
-- Every function that reads rows other than the one it changes locks the run first (FOR NO KEY UPDATE) and acts then, each
-- statement with a snapshot of its own. Lock order: run, nodes, and the pipeline's counters last; sweeps end their runs
-- pipeline by pipeline. A raw UPDATE of a node run locks the node before its run, so it can deadlock with these functions:
-- PostgreSQL then breaks off one of the two with 40P01.
-- Functions keep generic plans: to plan a statement anew takes longer than to run it, and all of them go by indexes.
--
-- SQLSTATEs raised here; DETAIL is a JSON object with the values:
--   PL001 illegal transition   PL002 no such pipeline   PL003 no such run       PL004 no such node run   PL005 node not ready
--   PL006 pipeline not active  PL007 lease lost         PL008 invalid graph     PL009 stale version      PL010 pipeline in use

-- == create functions that raise errors
-- An issue about a graph: a code of IssueCode in Python, and the path of the place, such as ["nodes", 3, "config", "task"].
CREATE OR REPLACE FUNCTION circle.graph_issue(p_code text, p_message text, p_loc jsonb DEFAULT '[]', p_node_id text DEFAULT NULL,
                                              p_edge_id text DEFAULT NULL)
RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT jsonb_build_object('code', p_code, 'message', left(p_message, 1000), 'loc', p_loc, 'node_id', left(p_node_id, 200),
                              'edge_id', left(p_edge_id, 200))
$$;
-- Raises PL008 with a list of issues, unless it is NULL or empty.
CREATE OR REPLACE FUNCTION circle.refuse_issues(p_issues jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF p_issues <> '[]' THEN
        RAISE EXCEPTION '%', p_issues -> 0 ->> 'message'
            USING ERRCODE = 'PL008', DETAIL = jsonb_build_object('issues', p_issues);
    END IF;
END $$;
CREATE OR REPLACE FUNCTION circle.refuse_graph(p_code text, p_message text, p_loc jsonb DEFAULT '[]', p_node_id text DEFAULT NULL,
                                               p_edge_id text DEFAULT NULL)
RETURNS void LANGUAGE sql AS $$
    SELECT circle.refuse_issues(jsonb_build_array(circle.graph_issue(p_code, p_message, p_loc, p_node_id, p_edge_id)))
$$;
CREATE OR REPLACE FUNCTION circle.refuse_run(p_run_id bigint, p_token bigint, p_requested text, p_reason text DEFAULT '')
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    r record;
BEGIN
    SELECT status, coalesce(claim_token = p_token, lease_expires_at IS NULL) AS held INTO r
    FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % does not exist', p_run_id
            USING ERRCODE = 'PL003', DETAIL = jsonb_build_object('run_id', p_run_id);
    ELSIF NOT r.held THEN
        RAISE EXCEPTION 'the lease on run % is lost: the run is %', p_run_id, r.status
            USING ERRCODE = 'PL007', DETAIL = jsonb_build_object('run_id', p_run_id, 'status', r.status);
    END IF;
    RAISE EXCEPTION 'run % is % and can''t become %', p_run_id, r.status, p_requested
        USING ERRCODE = 'PL001', DETAIL = jsonb_build_object('entity', 'run', 'id', p_run_id, 'current', r.status,
                                                             'requested', p_requested, 'reason', p_reason);
END $$;
CREATE OR REPLACE FUNCTION circle.refuse_node(p_run_id bigint, p_node_id text, p_token bigint, p_requested text)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    r circle.pipeline_runs;
    n circle.pipeline_node_runs;
    waiting jsonb;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND OR NOT coalesce(r.claim_token = p_token, r.lease_expires_at IS NULL) THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    END IF;
    SELECT * INTO n FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND node_id = p_node_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % has no node %', p_run_id, left(p_node_id, 200)
            USING ERRCODE = 'PL004', DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', p_node_id);
    ELSIF r.status = 'running' AND n.status = 'pending' AND p_requested = 'running' THEN
        SELECT coalesce(jsonb_agg(p.node_id ORDER BY p.position), '[]') INTO waiting FROM circle.pipeline_node_runs p
        WHERE p.run_id = p_run_id AND p.position = ANY (n.predecessors) AND p.status NOT IN ('completed', 'skipped');
        RAISE EXCEPTION 'node % of run % is not ready', p_node_id, p_run_id USING ERRCODE = 'PL005',
            DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', p_node_id, 'waiting_for', waiting, 'reason', CASE
                WHEN waiting <> '[]' THEN ''
                WHEN n.available_at > clock_timestamp() THEN 'its retry is due at ' || n.available_at
                WHEN r.failed_node IS NOT NULL AND n.retry_count = 0
                    THEN 'node ' || quote_literal(r.failed_node) || ' failed, and nothing new starts after that'
                WHEN NOT EXISTS (SELECT FROM circle.pipeline_node_runs p WHERE p.run_id = p_run_id
                                 AND p.position = ANY (n.predecessors) AND p.status = 'completed')
                    THEN 'all nodes before it are skipped: skip it, too'
                ELSE 'it has become ready just now: try again' END);
    END IF;
    RAISE EXCEPTION 'node % of run % is % and can''t become %', p_node_id, p_run_id, n.status, p_requested
        USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
            'entity', 'node run', 'id', p_run_id || '/' || p_node_id, 'current', n.status, 'requested', p_requested,
            'reason', CASE WHEN r.status <> 'running' THEN 'its run is ' || r.status ELSE '' END);
END $$;
