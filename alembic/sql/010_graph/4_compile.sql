-- Revision 010: the compiler of graphs.

-- == create the graph compiler
-- The types of nodes; circle.is_valid_node_run has the same list.
CREATE OR REPLACE FUNCTION circle.node_types() RETURNS text[] LANGUAGE sql IMMUTABLE AS $$
    SELECT '{trigger,agent,condition,action,parallel,delay}'::text[]
$$;
CREATE OR REPLACE FUNCTION circle.refuse_no_lists(p_nodes jsonb, p_edges jsonb) RETURNS void LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF coalesce(jsonb_typeof(p_nodes), '') <> 'array' OR coalesce(jsonb_typeof(p_edges), '') <> 'array' THEN
        PERFORM circle.refuse_issues(jsonb_agg(circle.graph_issue('not_a_list', format('Invalid %s data: %s must be a list, not %s',
            l.word, l.key, coalesce(jsonb_typeof(l.list), 'null')), jsonb_build_array(l.key))))
        FROM (VALUES ('node', 'nodes', p_nodes), ('edge', 'edges', p_edges)) l (word, key, list)
        WHERE coalesce(jsonb_typeof(l.list), '') <> 'array';
    END IF;
END $$;
-- Raises PL008 for a graph that can't be sorted. p_open has the number of unsorted predecessors of each node. Python reports the
-- same cycle: an edge from a node to itself, else the cycle that precedes the first unsorted node, found by following the last
-- unsorted predecessor of each node. It begins with the node of the cycle that stands first.
CREATE OR REPLACE FUNCTION circle.refuse_cycle(p_ids text[], p_sources integer[], p_targets integer[], p_open integer[])
RETURNS void LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    before integer[] := array_fill(0, ARRAY[cardinality(p_ids)]);
    seen boolean[] := array_fill(false, ARRAY[cardinality(p_ids)]);
    node integer;
    first integer;
    start integer;
    len integer := 0;
    path text := '';
BEGIN
    SELECT min(e.source) INTO start FROM unnest(p_sources, p_targets) e (source, target) WHERE e.source = e.target;
    IF start IS NOT NULL THEN
        before[start] := start;
    ELSE
        FOR i IN 1 .. cardinality(p_sources) LOOP   -- sorted by source
            IF p_open[p_sources[i]] > 0 THEN
                before[p_targets[i]] := p_sources[i];
            END IF;
        END LOOP;
        SELECT min(u.place) INTO node FROM unnest(p_open) WITH ORDINALITY u (waits, place) WHERE u.waits > 0;
        WHILE NOT seen[node] LOOP
            seen[node] := true;
            node := before[node];
        END LOOP;
        first := node;
        start := node;
        LOOP   -- once around the cycle, for the node that stands first
            node := before[node];
            start := least(start, node);
            EXIT WHEN node = first;
        END LOOP;
    END IF;
    node := start;
    LOOP
        path := CASE WHEN len < 20 THEN ' -> ' || p_ids[node] || path ELSE path END;
        node := before[node];
        len := len + 1;
        EXIT WHEN node = start;
    END LOOP;
    PERFORM circle.refuse_graph('cycle', format('Pipeline contains a cycle: %s%s%s', p_ids[start],
        CASE WHEN len > 20 THEN format(' -> ... (%s nodes)', len) ELSE '' END, path), jsonb_build_array('nodes', start - 1), p_ids[start]);
END $$;
-- Refuses what is no graph or can't be sorted; else each node's generation (longest path from a root), and the edges as places
-- in nodes, sorted, each pair once. Ids become integers once, by hash joins; generations then come from one pass over the
-- edges where the nodes stand in topological order already, else from Kahn's algorithm on arrays. No JIT: compiling the plans
-- would take longer than running them. labelled: whether an edge has a condition.
CREATE OR REPLACE FUNCTION circle.sort_graph(p_nodes jsonb, p_edges jsonb, OUT ids text[], OUT types text[],
                                             OUT sources integer[], OUT targets integer[], OUT generation integer[],
                                             OUT labelled boolean)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_nestloop = off SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    sorted boolean;
    complete boolean;
    edge_count integer;
    n integer;
    bad record;
BEGIN
    PERFORM circle.refuse_no_lists(p_nodes, p_edges);
    p_nodes := p_nodes || '[]';   -- which is p_nodes, decompressed once and not by each of what follows
    p_edges := p_edges || '[]';
    n := jsonb_array_length(p_nodes);
    SELECT array_agg(e ->> 'id'), array_agg(e ->> 'type') INTO ids, types FROM jsonb_array_elements(p_nodes) e;
    SELECT count(DISTINCT u.id COLLATE "C") AS distinct_ids, max(char_length(u.id)) AS longest, min(char_length(u.id)) AS shortest
    INTO bad FROM unnest(ids) u (id);
    IF n > 0 AND (bad.distinct_ids < n OR bad.longest > 100 OR bad.shortest < 1
                  OR NOT types <@ circle.node_types()
                  OR jsonb_path_match(p_nodes, '$[*].id.type() != "string"')) THEN
        SELECT e.ord - 1 AS place, e.node ->> 'id' AS id, f.code, f.key, f.reason INTO bad
        FROM jsonb_array_elements(p_nodes) WITH ORDINALITY e (node, ord)
        CROSS JOIN LATERAL (VALUES
            (1, 'invalid_node', NULL, 'is not an object', jsonb_typeof(e.node) = 'object'),
            (2, 'invalid_id', 'id', 'must be a string of 1 to 100 characters',
             jsonb_typeof(e.node -> 'id') = 'string' AND char_length(e.node ->> 'id') BETWEEN 1 AND 100),
            (3, 'invalid_type', 'type', 'must be one of ' || array_to_string(circle.node_types(), ', '),
             jsonb_typeof(e.node -> 'type') = 'string' AND e.node ->> 'type' = ANY (circle.node_types()))
        ) f (ord, code, key, reason, good)
        WHERE f.good IS NOT TRUE ORDER BY e.ord, f.ord LIMIT 1;
        IF FOUND THEN
            PERFORM circle.refuse_graph(bad.code, format('nodes[%s]%s %s', bad.place, '.' || bad.key, bad.reason),
                                        jsonb_build_array('nodes', bad.place) || CASE WHEN bad.key IS NULL THEN '[]' ELSE to_jsonb(bad.key) END, bad.id);
        END IF;
        SELECT d.id, d.place INTO bad
        FROM (SELECT u.id, u.place - 1 AS place, row_number() OVER (PARTITION BY u.id COLLATE "C" ORDER BY u.place) AS nth
              FROM unnest(ids) WITH ORDINALITY u (id, place)) d
        WHERE d.nth = 2 ORDER BY d.place LIMIT 1;
        PERFORM circle.refuse_graph('duplicate_node', format('Duplicate node id %L', bad.id),
                                    jsonb_build_array('nodes', bad.place, 'id'), bad.id);
    END IF;

    WITH places AS MATERIALIZED (
        SELECT u.id COLLATE "C" AS id, u.place::integer AS place FROM unnest(ids) WITH ORDINALITY u (id, place)
    ), mapped AS (
        SELECT DISTINCT s.place AS source, t.place AS target
        FROM (SELECT e ->> 'from' AS source, e ->> 'to' AS target FROM jsonb_array_elements(p_edges) e) e
        LEFT JOIN places s ON s.id = e.source LEFT JOIN places t ON t.id = e.target
        ORDER BY s.place, t.place
    )
    SELECT array_agg(source), array_agg(target), count(*), coalesce(bool_and(source < target), true),
           coalesce(bool_and(source + target IS NOT NULL), true)
    INTO sources, targets, edge_count, sorted, complete FROM mapped;
    IF NOT complete THEN
        SELECT e.ord - 1 AS place, e.edge, e.edge ->> 'id' AS id, s.key, s.word, e.edge ->> s.key AS name INTO bad
        FROM jsonb_array_elements(p_edges) WITH ORDINALITY e (edge, ord)
        CROSS JOIN (VALUES ('from', 'source'), ('to', 'target')) s (key, word)
        WHERE NOT EXISTS (SELECT FROM unnest(ids) u (id) WHERE u.id COLLATE "C" = e.edge ->> s.key)
        ORDER BY e.ord, s.key LIMIT 1;
        IF jsonb_typeof(bad.edge) <> 'object' THEN
            PERFORM circle.refuse_graph('invalid_edge', format('edges[%s] is not an object', bad.place),
                                        jsonb_build_array('edges', bad.place));
        ELSIF jsonb_typeof(bad.edge -> bad.key) IS DISTINCT FROM 'string' THEN
            PERFORM circle.refuse_graph('invalid_edge', format('edges[%s].%s is not a string', bad.place, bad.key),
                                        jsonb_build_array('edges', bad.place, bad.key), NULL, bad.id);
        END IF;
        PERFORM circle.refuse_graph('unknown_' || bad.word, format('Edge %L references unknown %s node: %L',
            coalesce(bad.id, '#' || bad.place), bad.word, left(bad.name, 120)),
            jsonb_build_array('edges', bad.place, bad.key), NULL, bad.id);
    END IF;

    labelled := p_edges @? '$[*].condition ? (@ != null)';
    generation := array_fill(0, ARRAY[n]);
    IF sorted THEN
        FOR i IN 1 .. edge_count LOOP
            IF generation[targets[i]] <= generation[sources[i]] THEN
                generation[targets[i]] := generation[sources[i]] + 1;
            END IF;
        END LOOP;
    ELSE
        DECLARE
            open integer[] := array_fill(0, ARRAY[n]);    -- predecessors not done yet
            first integer[] := array_fill(0, ARRAY[n]);   -- a node's first outgoing edge
            queue integer[] := array_fill(0, ARRAY[n]);
            head integer := 1;
            tail integer := 0;
            node integer;
            i integer;
        BEGIN
            FOR i IN REVERSE edge_count .. 1 LOOP
                open[targets[i]] := open[targets[i]] + 1;
                first[sources[i]] := i;
            END LOOP;
            FOR node IN 1 .. n LOOP
                IF open[node] = 0 THEN
                    tail := tail + 1;
                    queue[tail] := node;
                END IF;
            END LOOP;
            WHILE head <= tail LOOP
                node := queue[head];
                head := head + 1;
                i := first[node];
                WHILE i > 0 AND i <= edge_count AND sources[i] = node LOOP
                    open[targets[i]] := open[targets[i]] - 1;
                    IF open[targets[i]] = 0 THEN
                        -- the queue is sorted by generation, so the last predecessor done is the deepest
                        generation[targets[i]] := generation[node] + 1;
                        tail := tail + 1;
                        queue[tail] := targets[i];
                    END IF;
                    i := i + 1;
                END LOOP;
            END LOOP;
            IF tail < n THEN
                PERFORM circle.refuse_cycle(ids, sources, targets, open);
            END IF;
        END;
    END IF;
END $$;
-- The nodes of a graph that can be sorted, in execution order: by generation, then by place.
CREATE OR REPLACE FUNCTION circle.compile_graph(p_nodes jsonb, p_edges jsonb) RETURNS circle.compiled_node[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_nestloop = off SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    g record := circle.sort_graph(p_nodes, p_edges);
    positions integer[] := ARRAY(   -- by place
        SELECT (row_number() OVER (ORDER BY u.generation, u.place))::integer - 1
        FROM unnest(g.generation) WITH ORDINALITY u (generation, place) ORDER BY u.place);
    branches jsonb[];   -- by place
BEGIN
    IF g.labelled THEN
        WITH places AS MATERIALIZED (
            SELECT u.id COLLATE "C" AS id, u.place::integer AS place FROM unnest(g.ids) WITH ORDINALITY u (id, place)
        ), edges AS (
            SELECT s.place AS source, positions[t.place] AS target, nullif(circle.branch_label(e.edge ->> 'condition'), '') AS label
            FROM (SELECT e AS edge, e ->> 'from' AS source, e ->> 'to' AS target FROM jsonb_array_elements(p_edges) e) e
            JOIN places s ON s.id = e.source JOIN places t ON t.id = e.target
        ), labels AS (
            SELECT e.source, e.label, jsonb_agg(DISTINCT e.target) FILTER (WHERE NOT e.always) AS targets
            FROM (SELECT *, bool_or(label IS NULL) OVER (PARTITION BY source, target) AS always FROM edges) e
            WHERE e.label IS NOT NULL GROUP BY e.source, e.label
        ), nodes AS (
            SELECT l.source, jsonb_object_agg(l.label, coalesce(l.targets, '[]')) AS branches FROM labels l GROUP BY l.source
        )
        SELECT array_agg(n.branches ORDER BY p.place) INTO branches FROM places p LEFT JOIN nodes n ON n.source = p.place;
    END IF;
    -- sorted before they are gathered: a sort for each list would take longer than all the rest
    RETURN ARRAY(WITH edges AS MATERIALIZED (
        SELECT positions[e.source] AS source, positions[e.target] AS target FROM unnest(g.sources, g.targets) e (source, target)
    ), incoming AS (
        SELECT e.target AS pos, array_agg(e.source) AS list FROM (SELECT * FROM edges ORDER BY target, source) e GROUP BY 1
    ), outgoing AS (
        SELECT e.source AS pos, array_agg(e.target) AS list FROM (SELECT * FROM edges ORDER BY source, target) e GROUP BY 1
    )
    SELECT ROW(u.id, u.type, coalesce(i.list, '{}'), coalesce(o.list, '{}'), u.branches)::circle.compiled_node
    FROM unnest(positions, g.ids, g.types, branches) u (pos, id, type, branches)
    LEFT JOIN incoming i ON i.pos = u.pos LEFT JOIN outgoing o ON o.pos = u.pos
    ORDER BY u.pos);
END $$;
