-- Revision 009: errors. DETAIL is a JSON object with the values of the error, which the package reads.
--
--   PL001 illegal transition   PL002 no such pipeline   PL003 no such run       PL004 no such node run   PL005 node not ready
--   PL006 pipeline not active  PL007 lease lost         PL008 invalid graph     PL009 stale version      PL010 pipeline in use

-- == create functions that raise errors
-- PL001: an illegal transition, of a run where p_node_id is NULL, else of its node run.
CREATE OR REPLACE FUNCTION circle.refuse_transition(p_run_id bigint, p_node_id text, p_current text, p_requested text, p_reason text)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    entity text := CASE WHEN p_node_id IS NULL THEN 'run' ELSE 'node run' END;
    id jsonb := coalesce(to_jsonb(p_run_id || '/' || p_node_id), to_jsonb(p_run_id));
BEGIN
    RAISE EXCEPTION '% % is % and can''t become %', entity, id #>> '{}', p_current,
        concat_ws(': ', coalesce(p_requested, 'NULL'), nullif(p_reason, ''))
        USING ERRCODE = 'PL001', DETAIL = jsonb_build_object('entity', entity, 'id', id, 'current', p_current,
                                                             'requested', p_requested, 'reason', coalesce(p_reason, ''));
END $$;
-- PL002
CREATE OR REPLACE FUNCTION circle.refuse_unknown_pipeline(p_pipeline_id bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'pipeline % does not exist', p_pipeline_id
        USING ERRCODE = 'PL002', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id);
END $$;
-- PL007: the caller doesn't hold the run; PL003: there is no such run.
CREATE OR REPLACE FUNCTION circle.refuse_lease(p_run_id bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    run_status text;
BEGIN
    SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % does not exist', p_run_id
            USING ERRCODE = 'PL003', DETAIL = jsonb_build_object('run_id', p_run_id);
    END IF;
    RAISE EXCEPTION 'the lease on run % is lost: the run is %', p_run_id, run_status
        USING ERRCODE = 'PL007', DETAIL = jsonb_build_object('run_id', p_run_id, 'status', run_status);
END $$;
-- PL004
CREATE OR REPLACE FUNCTION circle.refuse_unknown_node(p_run_id bigint, p_node_id text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'run % has no node %', p_run_id, left(p_node_id, 200)
        USING ERRCODE = 'PL004', DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', p_node_id);
END $$;
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
-- PL008 with one issue.
CREATE OR REPLACE FUNCTION circle.refuse_graph(p_code text, p_message text, p_loc jsonb DEFAULT '[]', p_node_id text DEFAULT NULL,
                                               p_edge_id text DEFAULT NULL)
RETURNS void LANGUAGE sql AS $$
    SELECT circle.refuse_issues(jsonb_build_array(circle.graph_issue(p_code, p_message, p_loc, p_node_id, p_edge_id)))
$$;
