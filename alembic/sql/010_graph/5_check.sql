-- Revision 010: the checks of graphs. The compiler refuses what can't be sorted; here are ids, shapes, configuration, nesting, and
-- completeness of active pipelines.

-- == create graph-check functions
-- A row for each invalid value of a node, and for each configuration that a draft may lack; keys is the path within the node.
-- The first condition passes by the nodes that are certainly valid, which is all that most graphs cost.
CREATE OR REPLACE FUNCTION circle.node_findings(p_nodes jsonb)
RETURNS TABLE (place bigint, id text, code text, message text, keys jsonb) LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT n.ord - 1, n.id, f.code, format('nodes[%s]%s', n.ord - 1, f.message), f.keys
    FROM (
        SELECT ord, node, node ->> 'id' AS id, node ->> 'type' AS type, node -> 'config' AS config, node -> 'next' AS next,
               node -> 'config' ->> 'agent_id' AS agent_id, node -> 'config' ->> 'task' AS task,
               coalesce(jsonb_typeof(node -> 'config'), 'object') = 'object' AS configured
        FROM jsonb_array_elements(p_nodes) WITH ORDINALITY e (node, ord) OFFSET 0
    ) n
    CROSS JOIN LATERAL (VALUES
        (jsonb_typeof(n.node) <> 'object', 'invalid_node', ' is not an object', '[]'::jsonb),
        (jsonb_typeof(n.node -> 'id') IS DISTINCT FROM 'string', 'invalid_id', '.id is not a string', '["id"]'),
        (jsonb_typeof(n.node -> 'id') = 'string' AND circle.trimmed(n.id) = '', 'invalid_id', '.id is empty or blank', '["id"]'),
        (circle.trimmed(n.id) NOT IN ('', n.id), 'invalid_id', '.id has leading or trailing blanks', '["id"]'),
        (char_length(n.id) > 100, 'invalid_id', '.id is longer than 100 characters', '["id"]'),
        ((jsonb_typeof(n.node -> 'type') = 'string' AND n.type = ANY (circle.node_types())) IS NOT TRUE, 'invalid_type',
         format(' has invalid type %s', coalesce(left((n.node -> 'type')::text, 80), 'null')), '["type"]'),
        (jsonb_typeof(n.node -> 'name') IS DISTINCT FROM 'string', 'invalid_node', '.name is not a string', '["name"]'),
        (NOT n.configured, 'invalid_config', '.config is not an object', '["config"]'),
        (jsonb_typeof(n.node -> 'position') NOT IN ('object', 'null'), 'invalid_node', '.position is not an object',
         '["position"]'),
        (jsonb_typeof(n.next) NOT IN ('array', 'null'), 'invalid_node', '.next is not a list of strings', '["next"]'),
        (jsonb_path_exists(n.next, 'strict $[*] ? (@.type() != "string")', '{}', true),
         'invalid_node', '.next is not a list of strings', '["next"]' || (
            SELECT to_jsonb(min(x.ord) - 1)
            FROM jsonb_array_elements(CASE jsonb_typeof(n.next) WHEN 'array' THEN n.next ELSE '[]' END) WITH ORDINALITY x (text, ord)
            WHERE jsonb_typeof(x.text) <> 'string')),
        (n.type = 'agent' AND jsonb_typeof(n.config -> 'agent_id') NOT IN ('string', 'number', 'null'),
         'invalid_config', '.config.agent_id is neither a string nor a number', '["config", "agent_id"]'),
        (n.type = 'agent' AND jsonb_typeof(n.config -> 'task') NOT IN ('string', 'null'),
         'invalid_config', '.config.task is not a string', '["config", "task"]'),
        (n.type = 'condition' AND jsonb_typeof(n.config -> 'condition') NOT IN ('string', 'null'),
         'invalid_config', '.config.condition is not a string', '["config", "condition"]'),
        (n.type = 'action' AND jsonb_typeof(n.config -> 'action') NOT IN ('string', 'null'),
         'invalid_config', '.config.action is not a string', '["config", "action"]'),
        (n.type = 'delay' AND jsonb_typeof(n.config -> 'seconds') <> 'null'
         AND NOT jsonb_path_exists(n.config -> 'seconds', 'strict $ ? (@.type() == "number" && @ >= 0)'),
         'invalid_config', '.config.seconds is not a number of seconds from 0', '["config", "seconds"]'),
        (n.type = 'agent' AND n.configured AND coalesce(circle.trimmed(n.agent_id), '') = '',
         'missing_config', '.config.agent_id is missing', '["config", "agent_id"]'),
        (n.type = 'agent' AND n.configured AND coalesce(circle.trimmed(n.task), '') = '',
         'missing_config', '.config.task is missing', '["config", "task"]'),
        (n.type = 'condition' AND n.configured AND (n.config ->> 'condition') IS NULL,
         'missing_config', '.config.condition is missing', '["config", "condition"]')
    ) f (wrong, code, message, keys)
    WHERE (
        jsonb_typeof(n.node -> 'id') = 'string' AND octet_length(n.id) <= 100
        AND circle.begins_well(n.id) AND circle.begins_well(right(n.id, 1))
        AND jsonb_typeof(n.node -> 'name') = 'string' AND n.configured
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
    ) IS NOT TRUE AND f.wrong AND (jsonb_typeof(n.node) = 'object' OR f.keys = '[]')
$$;
CREATE OR REPLACE FUNCTION circle.edge_findings(p_edges jsonb)
RETURNS TABLE (place bigint, id text, code text, message text, keys jsonb) LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT e.ord - 1, e.id, f.code, format('edges[%s]%s', e.ord - 1, f.message), f.keys
    FROM (
        SELECT ord, edge, edge ->> 'id' AS id FROM jsonb_array_elements(p_edges) WITH ORDINALITY e (edge, ord) OFFSET 0
    ) e
    CROSS JOIN LATERAL (VALUES
        (jsonb_typeof(e.edge) <> 'object', 'invalid_edge', ' is not an object', '[]'::jsonb),
        (jsonb_typeof(e.edge -> 'id') IS DISTINCT FROM 'string', 'invalid_id', '.id is not a string', '["id"]'),
        (jsonb_typeof(e.edge -> 'id') = 'string' AND circle.trimmed(e.id) = '', 'invalid_id', '.id is empty or blank', '["id"]'),
        (circle.trimmed(e.id) NOT IN ('', e.id), 'invalid_id', '.id has leading or trailing blanks', '["id"]'),
        (char_length(e.id) > 1000, 'invalid_id', '.id is longer than 1000 characters', '["id"]'),
        (jsonb_typeof(e.edge -> 'from') IS DISTINCT FROM 'string', 'invalid_edge', '.from is not a string', '["from"]'),
        (jsonb_typeof(e.edge -> 'to') IS DISTINCT FROM 'string', 'invalid_edge', '.to is not a string', '["to"]'),
        (jsonb_typeof(e.edge -> 'condition') NOT IN ('string', 'null'), 'invalid_edge', '.condition is not a string',
         '["condition"]')
    ) f (wrong, code, message, keys)
    WHERE f.wrong AND (jsonb_typeof(e.edge) = 'object' OR f.keys = '[]')
    UNION ALL
    SELECT d.ord - 1, d.id, 'duplicate_edge', format('Duplicate edge id %L', d.id), '["id"]'
    FROM (SELECT e.ord, e.edge ->> 'id' AS id, row_number() OVER (PARTITION BY (e.edge ->> 'id') COLLATE "C" ORDER BY e.ord) AS nth
          FROM jsonb_array_elements(p_edges) WITH ORDINALITY e (edge, ord) WHERE jsonb_typeof(e.edge -> 'id') = 'string') d
    WHERE d.nth = 2
$$;
-- Raises PL008 for JSON that Python can't read back, with the path of the first such place.
CREATE OR REPLACE FUNCTION circle.refuse_unreadable(p_key text, p_json jsonb) RETURNS void LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    too_deep boolean := circle.nested_too_deep(p_json);
    levels integer := 64;
    condition jsonpath := 'strict $.** ? (@ > 1.7976931348623157e308 || @ < -1.7976931348623157e308)';
    loc jsonb := jsonb_build_array(p_key);
    path text := p_key;
    key jsonb;
BEGIN
    IF NOT too_deep AND circle.number_too_large(p_json) IS NOT TRUE THEN
        RETURN;
    END IF;
    WHILE CASE WHEN too_deep THEN levels > 0 ELSE jsonb_typeof(p_json) <> 'number' END LOOP
        levels := levels - 1;
        IF too_deep THEN
            condition := format('strict $.**{%s to last} ? (@.type() == "object" || @.type() == "array")', levels);
        END IF;
        SELECT m.key, m.value INTO key, p_json
        FROM (SELECT to_jsonb(o.key), o.value
              FROM jsonb_each(CASE jsonb_typeof(p_json) WHEN 'object' THEN p_json ELSE '{}' END) o
              UNION ALL
              SELECT to_jsonb(a.ord - 1), a.value
              FROM jsonb_array_elements(CASE jsonb_typeof(p_json) WHEN 'array' THEN p_json ELSE '[]' END) WITH ORDINALITY a (value, ord)
             ) m (key, value)
        WHERE jsonb_path_exists(m.value, condition) LIMIT 1;
        loc := loc || jsonb_build_array(key);
        path := path || CASE jsonb_typeof(key) WHEN 'number' THEN format('[%s]', key) ELSE '.' || (key #>> '{}') END;
    END LOOP;
    PERFORM circle.refuse_graph('invalid_json', left(path, 300) || CASE WHEN too_deep
        THEN ' is nested deeper than 64' ELSE ' is a number too large for a float' END, loc);
END $$;
-- Raises PL008 with the findings, at most 20 of nodes and 20 of edges.
CREATE OR REPLACE FUNCTION circle.check_graph(p_nodes jsonb, p_edges jsonb, p_active boolean) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    issues jsonb;
    edge_ids text[];
    longest integer;
    texts_only boolean;   -- as most edges are
BEGIN
    PERFORM circle.refuse_no_lists(p_nodes, p_edges);
    p_nodes := p_nodes || '[]';   -- as in sort_graph
    p_edges := p_edges || '[]';
    IF jsonb_array_length(p_nodes) > 100000 OR jsonb_array_length(p_edges) > 1000000 THEN
        PERFORM circle.refuse_issues(jsonb_agg(circle.graph_issue('too_large', format(
            'Pipeline has %s %s, more than the limit of %s %s', l.count, l.key, l.most, l.key), jsonb_build_array(l.key))))
        FROM (VALUES ('nodes', jsonb_array_length(p_nodes), 100000), ('edges', jsonb_array_length(p_edges), 1000000))
             l (key, count, most)
        WHERE l.count > l.most;
    ELSIF p_active AND p_nodes = '[]' THEN
        PERFORM circle.refuse_graph('no_nodes', 'Pipeline must have at least one node', '["nodes"]');
    END IF;

    SELECT coalesce(jsonb_agg(circle.graph_issue(f.code, left(f.message, 300), jsonb_build_array('nodes', f.place) || f.keys, f.id)
                              ORDER BY f.place), '[]')
    INTO issues FROM (SELECT * FROM circle.node_findings(p_nodes) WHERE p_active OR code <> 'missing_config'
                      ORDER BY place LIMIT 20) f;

    -- One edge costs a fraction of a microsecond in each of these; only unusual edges are checked one by one.
    -- A missing end is no node's id: sort_graph refuses it.
    SELECT array_agg(e ->> 'id'), max(octet_length(e ->> 'id')) INTO edge_ids, longest FROM jsonb_array_elements(p_edges) e;
    texts_only := NOT jsonb_path_match(p_edges, '$[*].*.type() != "string"');
    IF p_edges <> '[]' AND (
        array_position(edge_ids, NULL) IS NOT NULL OR longest > 1000
        OR NOT circle.surely_trimmed(edge_ids)
        OR jsonb_array_length(jsonb_path_query_array(jsonb_object(edge_ids, array_fill(''::text, ARRAY[cardinality(edge_ids)])),
                                                     '$.*')) < cardinality(edge_ids)
        OR NOT texts_only AND (
            jsonb_path_match(p_edges, '$[*].id.type() != "string" || $[*].from.type() != "string" || $[*].to.type() != "string"')
            OR jsonb_path_exists(p_edges, '$[*].condition.type() ? (@ != "string" && @ != "null")'))
    ) THEN
        SELECT issues || coalesce(jsonb_agg(circle.graph_issue(f.code, left(f.message, 300),
                                                               jsonb_build_array('edges', f.place) || f.keys, NULL, f.id)
                                            ORDER BY f.place), '[]')
        INTO issues FROM (SELECT * FROM circle.edge_findings(p_edges) ORDER BY place LIMIT 20) f;
    END IF;
    PERFORM circle.refuse_issues(issues);

    PERFORM circle.refuse_unreadable('nodes', p_nodes);
    IF NOT texts_only THEN
        PERFORM circle.refuse_unreadable('edges', p_edges);
    END IF;
END $$;
