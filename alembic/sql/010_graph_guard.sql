-- Revision 010: no writer stores a graph that isn't one, whichever way it comes. The compiler of revision 009 refuses what
-- can't be sorted; here is the rest: ids, shapes, configuration, nesting, and completeness of what is active. And no writer
-- stores JSON of runs that Python can't read back.

-- == upgrade: the checks
-- Blanks are those of Unicode's White_Space and the four separators U+001C to U+001F, as Python's str.strip has them.
CREATE OR REPLACE FUNCTION circle.trimmed(p_text text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT btrim(p_text, U&' \0009\000A\000B\000C\000D\001C\001D\001E\001F\0085\00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\2028\2029\202F\205F\3000')
$$;
-- JSON that Python can't read back: more than 64 levels, or a number that no float holds. Comparing texts and numbers is
-- never true, nor is what is asked of NULL.
CREATE OR REPLACE FUNCTION circle.nested_too_deep(p_json jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT jsonb_path_exists(p_json, 'strict $.**{64 to last} ? (@.type() == "object" || @.type() == "array")')
$$;
CREATE OR REPLACE FUNCTION circle.number_too_large(p_json jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT jsonb_path_match(p_json, '$[*].** > 1.7976931348623157e308 || $[*].** < -1.7976931348623157e308')
$$;
-- Whether a text surely begins with something else than a blank; ascii() gives the code point.
CREATE OR REPLACE FUNCTION circle.begins_well(p_text text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT ascii(p_text) BETWEEN 33 AND 126 OR ascii(p_text) BETWEEN 161 AND 5759 OR ascii(p_text) >= 12289
$$;
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
-- Ids that begin and end well and are not empty, looked at as one text; another may be good, too.
CREATE OR REPLACE FUNCTION circle.surely_trimmed(p_ids text[]) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT array_to_string(p_ids, E'\n') COLLATE "C" !~ ('(^|\n)([^!-~\u00A1-\u167F\u3001-\U0010FFFF]|$)'
                                                         '|[^!-~\u00A1-\u167F\u3001-\U0010FFFF](\n|$)')
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
CREATE OR REPLACE FUNCTION circle.refuse_json(p_where text, p_table name, p_trigger name) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%: nested deeper than 64, or a number too large for a float', p_where
        USING ERRCODE = 'check_violation', SCHEMA = 'circle', TABLE = p_table, CONSTRAINT = p_trigger;
END $$;
-- Only what changes is checked, or a run from before this revision could never end; and an entry may be appended to logs that
-- were so before. OLD is null in an INSERT.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_json() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.trigger_data IS DISTINCT FROM OLD.trigger_data
       AND (circle.nested_too_deep(NEW.trigger_data) OR circle.number_too_large(NEW.trigger_data))
       OR NEW.logs IS DISTINCT FROM OLD.logs
       AND (circle.nested_too_deep(NEW.logs) OR circle.number_too_large(NEW.logs))
       AND (circle.nested_too_deep(OLD.logs) OR circle.number_too_large(OLD.logs)) IS NOT TRUE THEN
        PERFORM circle.refuse_json(format('trigger_data or logs of run %s', NEW.id), TG_TABLE_NAME, TG_NAME);
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_json() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.input_data IS DISTINCT FROM OLD.input_data
       AND (circle.nested_too_deep(NEW.input_data) OR circle.number_too_large(NEW.input_data))
       OR NEW.output_data IS DISTINCT FROM OLD.output_data
       AND (circle.nested_too_deep(NEW.output_data) OR circle.number_too_large(NEW.output_data)) THEN
        PERFORM circle.refuse_json(format('input_data or output_data of node %s of run %s', NEW.node_id, NEW.run_id),
                                   TG_TABLE_NAME, TG_NAME);
    END IF;
    RETURN NEW;
END $$;

-- == upgrade: for every writer
-- Fires before pipelines_after_*, which compile. A column list, because without one it would run for every counter update.
CREATE OR REPLACE TRIGGER pipelines_accept AFTER INSERT OR UPDATE OF nodes, edges, status ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_accept();
ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_accept;

-- == upgrade: JSON of runs
-- Not by CHECKs, which would look at all of it again whenever the row changes; and not in WHEN, which is planned anew for
-- each statement.
CREATE OR REPLACE TRIGGER pipeline_runs_json BEFORE INSERT OR UPDATE OF trigger_data, logs ON circle.pipeline_runs
    FOR EACH ROW WHEN (NEW.trigger_data <> '{}' OR NEW.logs <> '[]') EXECUTE FUNCTION circle.pipeline_runs_json();
ALTER TABLE circle.pipeline_runs ENABLE ALWAYS TRIGGER pipeline_runs_json;

-- == upgrade: and of node runs
CREATE OR REPLACE TRIGGER pipeline_node_runs_json BEFORE INSERT OR UPDATE OF input_data, output_data
    ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.input_data <> '{}' OR NEW.output_data <> '{}') EXECUTE FUNCTION circle.pipeline_node_runs_json();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_json;

-- == downgrade: the guard
DROP TRIGGER IF EXISTS pipelines_accept ON circle.pipelines;

-- == downgrade: of runs
DROP TRIGGER IF EXISTS pipeline_runs_json ON circle.pipeline_runs;

-- == downgrade: of node runs
DROP TRIGGER IF EXISTS pipeline_node_runs_json ON circle.pipeline_node_runs;

-- == downgrade: and what it calls
DROP FUNCTION IF EXISTS circle.pipeline_node_runs_json();
DROP FUNCTION IF EXISTS circle.pipeline_runs_json();
DROP FUNCTION IF EXISTS circle.refuse_json(text, name, name);
DROP FUNCTION IF EXISTS circle.pipelines_accept();
DROP FUNCTION IF EXISTS circle.check_graph(jsonb, jsonb, boolean);
DROP FUNCTION IF EXISTS circle.begins_well(text);
DROP FUNCTION IF EXISTS circle.edge_findings(jsonb);
DROP FUNCTION IF EXISTS circle.surely_trimmed(text[]);
DROP FUNCTION IF EXISTS circle.node_findings(jsonb);
DROP FUNCTION IF EXISTS circle.trimmed(text);
DROP FUNCTION IF EXISTS circle.number_too_large(jsonb);
DROP FUNCTION IF EXISTS circle.nested_too_deep(jsonb);
