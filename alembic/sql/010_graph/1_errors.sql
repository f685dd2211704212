-- Revision 010: the graph of a pipeline, checked and compiled when it is written, whichever writer does.
--
-- PL008, invalid graph: DETAIL is a JSON object with the issues, which the package reads.

-- == create functions that raise issues
-- An issue about a graph: a code of IssueCode in Python, and the path of the place, such as ["nodes", 3, "config", "task"].
CREATE OR REPLACE FUNCTION circle.graph_issue(p_code text, p_message text, p_loc jsonb DEFAULT '[]', p_node_id text DEFAULT NULL,
                                              p_edge_id text DEFAULT NULL)
RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT jsonb_build_object('code', p_code, 'message', left(p_message, 1000), 'loc', p_loc, 'node_id', left(p_node_id, 200),
                              'edge_id', left(p_edge_id, 200))
$$;
-- Raises PL008 with a list of issues, unless it is NULL or empty.
CREATE OR REPLACE FUNCTION circle.refuse_issues(p_issues jsonb) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF p_issues <> '[]' THEN
        RAISE EXCEPTION '%', p_issues -> 0 ->> 'message'
            USING ERRCODE = 'PL008', DETAIL = jsonb_build_object('issues', p_issues);
    END IF;
END $$;
-- PL008 with one issue.
CREATE OR REPLACE FUNCTION circle.refuse_graph(p_code text, p_message text, p_loc jsonb DEFAULT '[]', p_node_id text DEFAULT NULL,
                                               p_edge_id text DEFAULT NULL)
RETURNS void LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT circle.refuse_issues(jsonb_build_array(circle.graph_issue(p_code, p_message, p_loc, p_node_id, p_edge_id)))
$$;
