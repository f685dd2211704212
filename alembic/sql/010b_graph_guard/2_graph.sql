-- Revision 010: every writer is refused an invalid graph. The compiler of revision 009 refuses what can't be sorted;
-- here are ids, shapes, configuration, nesting, and completeness of active pipelines.

-- == create graph-check functions
-- What is wrong with the values of each node, and what a draft may still lack. A row for each finding; the first condition
-- passes by the nodes that are surely good, which is all that most graphs cost.
CREATE OR REPLACE FUNCTION circle.node_findings(p_nodes jsonb)
RETURNS TABLE (place bigint, node_id text, code text, message text) LANGUAGE sql STABLE AS $$
    SELECT n.ord - 1, n.id, f.code, format('nodes[%s]%s', n.ord - 1, f.message)
    FROM (
        SELECT ord, node, node ->> 'id' AS id, node ->> 'type' AS type, node -> 'config' AS config,
               node -> 'config' ->> 'agent_id' AS agent_id, node -> 'config' ->> 'task' AS task
        FROM jsonb_array_elements(p_nodes) WITH ORDINALITY e (node, ord) OFFSET 0
    ) n
    CROSS JOIN LATERAL (VALUES
        (jsonb_typeof(n.node) <> 'object', 'invalid_node', ' is not an object'),
        (jsonb_typeof(n.node -> 'id') IS DISTINCT FROM 'string', 'invalid_id', '.id is not a string'),
        (jsonb_typeof(n.node -> 'id') = 'string' AND circle.trimmed(n.id) = '', 'invalid_id', '.id is empty or blank'),
        (circle.trimmed(n.id) NOT IN ('', n.id), 'invalid_id', '.id has leading or trailing blanks'),
        (char_length(n.id) > 100, 'invalid_id', '.id is longer than 100 characters'),
        ((jsonb_typeof(n.node -> 'type') = 'string' AND n.type IN ('trigger', 'agent', 'condition', 'action', 'parallel', 'delay'))
         IS NOT TRUE, 'invalid_type', format(' has invalid type %s', coalesce(left((n.node -> 'type')::text, 80), 'null'))),
        (jsonb_typeof(n.node -> 'name') IS DISTINCT FROM 'string', 'invalid_node', '.name is not a string'),
        (jsonb_typeof(n.config) <> 'object', 'invalid_node', '.config is not an object'),
        (jsonb_typeof(n.node -> 'position') NOT IN ('object', 'null'), 'invalid_node', '.position is not an object'),
        (jsonb_typeof(n.node -> 'next') NOT IN ('array', 'null')
         OR jsonb_path_exists(n.node -> 'next', 'strict $[*] ? (@.type() != "string")', '{}', true),
         'invalid_node', '.next is not a list of strings'),
        (n.type = 'agent' AND jsonb_typeof(n.config -> 'agent_id') NOT IN ('string', 'number', 'null'),
         'invalid_config', '.config.agent_id is neither a string nor a number'),
        (n.type = 'agent' AND jsonb_typeof(n.config -> 'task') NOT IN ('string', 'null'),
         'invalid_config', '.config.task is not a string'),
        (n.type = 'condition' AND jsonb_typeof(n.config -> 'condition') NOT IN ('string', 'null'),
         'invalid_config', '.config.condition is not a string'),
        (n.type = 'action' AND jsonb_typeof(n.config -> 'action') NOT IN ('string', 'null'),
         'invalid_config', '.config.action is not a string'),
        (n.type = 'delay' AND jsonb_typeof(n.config -> 'seconds') <> 'null'
         AND NOT jsonb_path_exists(n.config -> 'seconds', 'strict $ ? (@.type() == "number" && @ >= 0)'),
         'invalid_config', '.config.seconds is not a number of seconds from 0'),
        (n.type = 'agent' AND coalesce(circle.trimmed(n.agent_id), '') = '', 'missing_config', '.config.agent_id is missing'),
        (n.type = 'agent' AND coalesce(circle.trimmed(n.task), '') = '', 'missing_config', '.config.task is missing'),
        (n.type = 'condition' AND (n.config ->> 'condition') IS NULL, 'missing_config', '.config.condition is missing')
    ) f (wrong, code, message)
    WHERE (
        jsonb_typeof(n.node -> 'id') = 'string' AND octet_length(n.id) <= 100
        AND circle.begins_well(n.id) AND circle.begins_well(right(n.id, 1))
        AND jsonb_typeof(n.node -> 'name') = 'string' AND coalesce(jsonb_typeof(n.config), 'object') = 'object'
        AND coalesce(jsonb_typeof(n.node -> 'position'), 'null') IN ('object', 'null') AND (n.node ->> 'next') IS NULL
        AND CASE n.type
            WHEN 'agent' THEN jsonb_typeof(n.config -> 'agent_id') IN ('string', 'number')
                AND jsonb_typeof(n.config -> 'task') = 'string'
                AND circle.begins_well(n.agent_id) AND circle.begins_well(n.task)
            WHEN 'action' THEN coalesce(jsonb_typeof(n.config -> 'action'), 'null') IN ('string', 'null')
            WHEN 'condition' THEN jsonb_typeof(n.config -> 'condition') = 'string'
            WHEN 'trigger' THEN true
            WHEN 'parallel' THEN true
            ELSE false END
    ) IS NOT TRUE AND f.wrong
$$;
CREATE OR REPLACE FUNCTION circle.edge_findings(p_edges jsonb)
RETURNS TABLE (place bigint, edge_id text, code text, message text) LANGUAGE sql STABLE AS $$
    SELECT e.ord - 1, e.id, f.code, format('edges[%s]%s', e.ord - 1, f.message)
    FROM (
        SELECT ord, edge, edge ->> 'id' AS id FROM jsonb_array_elements(p_edges) WITH ORDINALITY e (edge, ord) OFFSET 0
    ) e
    CROSS JOIN LATERAL (VALUES
        (jsonb_typeof(e.edge) <> 'object', 'invalid_edge', ' is not an object'),
        (jsonb_typeof(e.edge -> 'id') IS DISTINCT FROM 'string', 'invalid_id', '.id is not a string'),
        (jsonb_typeof(e.edge -> 'id') = 'string' AND circle.trimmed(e.id) = '', 'invalid_id', '.id is empty or blank'),
        (circle.trimmed(e.id) NOT IN ('', e.id), 'invalid_id', '.id has leading or trailing blanks'),
        (char_length(e.id) > 100, 'invalid_id', '.id is longer than 100 characters'),
        (jsonb_typeof(e.edge -> 'from') IS DISTINCT FROM 'string', 'invalid_edge', '.from is not a string'),
        (jsonb_typeof(e.edge -> 'to') IS DISTINCT FROM 'string', 'invalid_edge', '.to is not a string'),
        (jsonb_typeof(e.edge -> 'condition') NOT IN ('string', 'null'), 'invalid_edge', '.condition is not a string')
    ) f (wrong, code, message)
    WHERE f.wrong
$$;
-- Raises PL008 with the findings, at most 20 of nodes and 20 of edges.
CREATE OR REPLACE FUNCTION circle.check_graph(p_nodes jsonb, p_edges jsonb, p_active boolean) RETURNS void
LANGUAGE plpgsql STABLE SET jit = off AS $$
DECLARE
    issues jsonb;
    of_edges jsonb := '[]';
    edge_ids text[];
    longest integer;
    texts_only boolean;   -- as most edges are
BEGIN
    IF coalesce(jsonb_typeof(p_nodes), '') <> 'array' OR coalesce(jsonb_typeof(p_edges), '') <> 'array' THEN
        PERFORM circle.refuse_graph('invalid_shape', 'nodes and edges must be JSON arrays of objects', NULL, NULL);
    END IF;
    p_nodes := p_nodes || '[]';   -- as in sort_graph
    p_edges := p_edges || '[]';
    IF jsonb_array_length(p_nodes) > 100000 OR jsonb_array_length(p_edges) > 1000000 THEN
        PERFORM circle.refuse_graph('too_large', 'Pipeline has more than 100000 nodes or 1000000 edges', NULL, NULL);
    ELSIF p_active AND p_nodes = '[]' THEN
        PERFORM circle.refuse_graph('no_nodes', 'Pipeline must have at least one node', NULL, NULL);
    END IF;

    SELECT coalesce(jsonb_agg(jsonb_build_object('code', f.code, 'message', left(f.message, 300),
                                                 'node_id', left(f.node_id, 200), 'edge_id', NULL) ORDER BY f.place), '[]')
    INTO issues FROM (SELECT * FROM circle.node_findings(p_nodes) WHERE p_active OR code <> 'missing_config'
                      ORDER BY place LIMIT 20) f;

    -- One edge costs a fraction of a microsecond in each of these; only what is odd in some way is looked at one by one.
    -- Ends that are missing are no ids of nodes: sort_graph refuses them.
    SELECT array_agg(e ->> 'id'), max(octet_length(e ->> 'id')) INTO edge_ids, longest FROM jsonb_array_elements(p_edges) e;
    texts_only := NOT jsonb_path_match(p_edges, '$[*].*.type() != "string"');
    IF p_edges <> '[]' AND (
        array_position(edge_ids, NULL) IS NOT NULL OR longest > 100
        OR NOT circle.surely_trimmed(edge_ids)
        OR jsonb_array_length(jsonb_path_query_array(jsonb_object(edge_ids, array_fill(''::text, ARRAY[cardinality(edge_ids)])),
                                                     '$.*')) < cardinality(edge_ids)
        OR NOT texts_only AND (
            jsonb_path_match(p_edges, '$[*].id.type() != "string" || $[*].from.type() != "string" || $[*].to.type() != "string"')
            OR jsonb_path_exists(p_edges, '$[*].condition.type() ? (@ != "string" && @ != "null")'))
    ) THEN
        SELECT coalesce(jsonb_agg(jsonb_build_object('code', f.code, 'message', left(f.message, 300), 'node_id', NULL,
                                                     'edge_id', left(f.edge_id, 200)) ORDER BY f.place), '[]')
        INTO of_edges
        FROM (SELECT * FROM circle.edge_findings(p_edges)
              UNION ALL
              SELECT min(d.ord) - 1, d.edge ->> 'id', 'duplicate_edge', format('Duplicate edge id %L', d.edge ->> 'id')
              FROM jsonb_array_elements(p_edges) WITH ORDINALITY d (edge, ord)
              GROUP BY d.edge ->> 'id' HAVING count(*) > 1
              ORDER BY 1 LIMIT 20) f;
    END IF;
    issues := issues || of_edges;
    IF issues <> '[]' THEN
        RAISE EXCEPTION '%', left(issues -> 0 ->> 'message', 1000)
            USING ERRCODE = 'PL008', DETAIL = jsonb_build_object('issues', issues);
    END IF;

    IF circle.nested_too_deep(p_nodes) THEN   -- the list is the first of the levels
        PERFORM circle.refuse_graph('invalid_json', 'nodes are nested deeper than 64', NULL, NULL);
    ELSIF circle.number_too_large(p_nodes) THEN
        PERFORM circle.refuse_graph('invalid_json', 'nodes hold a number too large for a float', NULL, NULL);
    ELSIF NOT texts_only AND circle.nested_too_deep(p_edges) THEN
        PERFORM circle.refuse_graph('invalid_json', 'edges are nested deeper than 64', NULL, NULL);
    ELSIF NOT texts_only AND circle.number_too_large(p_edges) THEN
        PERFORM circle.refuse_graph('invalid_json', 'edges hold a number too large for a float', NULL, NULL);
    END IF;
END $$;
CREATE OR REPLACE FUNCTION circle.pipelines_accept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' OR NEW.version IS DISTINCT FROM OLD.version THEN
        PERFORM circle.check_graph(NEW.nodes, NEW.edges, NEW.status = 'active');
        IF current_setting('session_replication_role') = 'replica' THEN
            PERFORM circle.sort_graph(NEW.nodes, NEW.edges);   -- else it is sorted when the version is written
        END IF;
    ELSIF NEW.status = 'active' AND OLD.status <> 'active' THEN
        PERFORM circle.check_graph(NEW.nodes, NEW.edges, true);
        PERFORM circle.sort_graph(NEW.nodes, NEW.edges);
    END IF;
    RETURN NULL;
END $$;

-- == pipelines: check graphs on write
-- Fires before pipelines_after_*, which compile. A column list, because without one it would run for every counter update.
CREATE OR REPLACE TRIGGER pipelines_accept AFTER INSERT OR UPDATE OF nodes, edges, status ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_accept();
ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_accept;
