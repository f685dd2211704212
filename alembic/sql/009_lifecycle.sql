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
--   PL006 pipeline not active  PL007 lease lost         PL008 graph not valid   PL009 stale version      PL010 pipeline in use

-- == upgrade: versions of pipelines
ALTER TABLE circle.pipelines ADD COLUMN IF NOT EXISTS version INTEGER NOT NULL DEFAULT 1;

-- == upgrade: leases, keys and versions of runs
ALTER TABLE circle.pipeline_runs
    ADD COLUMN IF NOT EXISTS pipeline_version INTEGER,
    ADD COLUMN IF NOT EXISTS failed_node VARCHAR(100),
    ADD COLUMN IF NOT EXISTS worker_id VARCHAR(255),
    ADD COLUMN IF NOT EXISTS claim_token BIGINT NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS claim_count INTEGER NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS lease_expires_at TIMESTAMPTZ,
    ADD COLUMN IF NOT EXISTS idempotency_key VARCHAR(255);

-- == upgrade: the compiled graph on node runs
ALTER TABLE circle.pipeline_node_runs
    ADD COLUMN IF NOT EXISTS position INTEGER,
    ADD COLUMN IF NOT EXISTS predecessors INTEGER[],
    ADD COLUMN IF NOT EXISTS successors INTEGER[],
    ADD COLUMN IF NOT EXISTS available_at TIMESTAMPTZ;

-- == upgrade: room on each page for the row's next versions, so that a transition touches no index
ALTER TABLE circle.pipeline_node_runs SET (fillfactor = 50);
ALTER TABLE circle.pipeline_runs SET (fillfactor = 70);

-- == upgrade: a finite lease, not validated yet
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                               AND conname = 'ck_pipeline_runs_lease') THEN
        ALTER TABLE circle.pipeline_runs ADD CONSTRAINT ck_pipeline_runs_lease CHECK (
            lease_expires_at IS NULL
            OR (completed_at IS NULL AND worker_id IS NOT NULL AND isfinite(lease_expires_at))) NOT VALID;
    END IF;
END $checks$;

-- == upgrade: validate it beside the writers
ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT ck_pipeline_runs_lease;

-- == upgrade: graphs as they were
CREATE TABLE IF NOT EXISTS circle.pipeline_versions (
    pipeline_id INTEGER NOT NULL REFERENCES circle.pipelines (id) ON DELETE CASCADE,
    version INTEGER NOT NULL,
    nodes JSONB NOT NULL,
    edges JSONB NOT NULL,
    node_count INTEGER NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (pipeline_id, version)
);

-- == upgrade: and compiled, so that creating a run parses no JSON
-- No foreign key: a check for each node would cost more than the rest of the insert. Rows are written with their
-- version and deleted with it (pipeline_versions_after_delete).
CREATE TABLE IF NOT EXISTS circle.pipeline_version_nodes (
    pipeline_id INTEGER NOT NULL,
    version INTEGER NOT NULL,
    position INTEGER NOT NULL,
    node_id VARCHAR(100) NOT NULL,
    node_type VARCHAR(50) NOT NULL,
    predecessors INTEGER[] NOT NULL,
    successors INTEGER[] NOT NULL,
    PRIMARY KEY (pipeline_id, version, position)
);

-- == upgrade: errors
CREATE OR REPLACE FUNCTION circle.refuse_graph(p_code text, p_message text, p_node_id text, p_edge_id text)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', left(p_message, 1000) USING ERRCODE = 'PL008', DETAIL = jsonb_build_object(
        'issues', jsonb_build_array(jsonb_build_object('code', p_code, 'message', left(p_message, 1000), 'node_id', left(p_node_id, 200),
                           'edge_id', left(p_edge_id, 200))));
END $$;
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

-- == upgrade: the graph compiler
-- Refuses what is no graph or can't be sorted; else each node's generation (longest path from a root), and the edges as places
-- in nodes, sorted, each pair once. Ids become integers once, by hash joins; generations then come from one pass over the
-- edges where the nodes stand in topological order already, else from Kahn's algorithm on arrays. No JIT: compiling the plans
-- would take longer than running them.
CREATE OR REPLACE FUNCTION circle.sort_graph(p_nodes jsonb, p_edges jsonb, OUT ids text[], OUT types text[],
                                             OUT sources integer[], OUT targets integer[], OUT generation integer[])
LANGUAGE plpgsql STABLE SET enable_nestloop = off SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    sorted boolean;
    complete boolean;
    edge_count integer;
    n integer;
    bad record;
BEGIN
    IF coalesce(jsonb_typeof(p_nodes), '') <> 'array' OR coalesce(jsonb_typeof(p_edges), '') <> 'array' THEN
        PERFORM circle.refuse_graph('invalid_shape', 'nodes and edges must be JSON arrays', NULL, NULL);
    END IF;
    p_nodes := p_nodes || '[]';   -- which is p_nodes, decompressed once and not by each of what follows
    p_edges := p_edges || '[]';
    n := jsonb_array_length(p_nodes);
    SELECT array_agg(e ->> 'id'), array_agg(e ->> 'type') INTO ids, types FROM jsonb_array_elements(p_nodes) e;
    SELECT count(DISTINCT u.id COLLATE "C") AS distinct_ids, max(char_length(u.id)) AS longest, min(char_length(u.id)) AS shortest
    INTO bad FROM unnest(ids) u (id);
    IF n > 0 AND (bad.distinct_ids < n OR bad.longest > 100 OR bad.shortest < 1
                  OR NOT types <@ '{trigger,agent,condition,action,parallel,delay}'
                  OR jsonb_path_match(p_nodes, '$[*].id.type() != "string"')) THEN
        SELECT e.ord - 1 AS place, e.node ->> 'id' AS id, e.node ->> 'type' AS type INTO bad
        FROM jsonb_array_elements(p_nodes) WITH ORDINALITY e (node, ord)
        WHERE (jsonb_typeof(e.node -> 'id') = 'string' AND char_length(e.node ->> 'id') BETWEEN 1 AND 100
               AND e.node ->> 'type' IN ('trigger', 'agent', 'condition', 'action', 'parallel', 'delay')) IS NOT TRUE
        ORDER BY e.ord LIMIT 1;
        IF FOUND THEN
            PERFORM circle.refuse_graph('invalid_node', format(
                'nodes[%s]: an id of 1 to 100 characters and a known type are needed, not id %s and type %s', bad.place,
                coalesce(quote_literal(left(bad.id, 120)), 'null'), coalesce(quote_literal(left(bad.type, 60)), 'null')),
                bad.id, NULL);
        END IF;
        SELECT u.id INTO bad FROM unnest(ids) u (id) GROUP BY u.id HAVING count(*) > 1 LIMIT 1;
        PERFORM circle.refuse_graph('duplicate_node', format('Duplicate node id %L', bad.id), bad.id, NULL);
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
        SELECT e.ord - 1 AS place, e.edge ->> 'id' AS id, s.key, s.word, e.edge ->> s.key AS name INTO bad
        FROM jsonb_array_elements(p_edges) WITH ORDINALITY e (edge, ord)
        CROSS JOIN (VALUES ('from', 'source'), ('to', 'target')) s (key, word)
        WHERE NOT EXISTS (SELECT FROM unnest(ids) u (id) WHERE u.id COLLATE "C" = e.edge ->> s.key)
        ORDER BY e.ord, s.key LIMIT 1;
        IF bad.name IS NULL THEN
            PERFORM circle.refuse_graph('invalid_edge', format('edges[%s].%s is not a string', bad.place, bad.key), NULL, bad.id);
        END IF;
        PERFORM circle.refuse_graph('unknown_' || bad.word, format('Edge %L references unknown %s node: %L',
            coalesce(bad.id, '#' || bad.place), bad.word, left(bad.name, 120)), NULL, bad.id);
    END IF;

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
                -- walk backwards along predecessors that are open themselves, until a node comes again
                DECLARE
                    back integer[] := array_fill(0, ARRAY[n]);
                    seen boolean[] := array_fill(false, ARRAY[n]);
                    path text := '';
                    len integer := 0;
                    start integer;
                BEGIN
                    FOR i IN 1 .. edge_count LOOP
                        IF open[sources[i]] > 0 THEN
                            back[targets[i]] := sources[i];
                        END IF;
                    END LOOP;
                    SELECT min(u.place) INTO node FROM unnest(open) WITH ORDINALITY u (waits, place) WHERE u.waits > 0;
                    WHILE NOT seen[node] LOOP
                        seen[node] := true;
                        node := back[node];
                    END LOOP;
                    start := node;
                    LOOP
                        path := CASE WHEN len < 20 THEN ' -> ' || ids[node] || path ELSE path END;
                        node := back[node];
                        len := len + 1;
                        EXIT WHEN node = start;
                    END LOOP;
                    PERFORM circle.refuse_graph('cycle', format('Pipeline contains a cycle: %s%s%s', ids[start],
                        CASE WHEN len > 20 THEN format(' -> ... (%s nodes)', len) ELSE '' END, path), ids[start], NULL);
                END;
            END IF;
        END;
    END IF;
END $$;
-- A row for each node of a graph that can be sorted: positions by generation, then by place.
CREATE OR REPLACE FUNCTION circle.compile_graph(p_nodes jsonb, p_edges jsonb)
RETURNS TABLE (node_position integer, id text, type text, preds integer[], succs integer[])
LANGUAGE plpgsql STABLE SET enable_nestloop = off SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    g record := circle.sort_graph(p_nodes, p_edges);
    positions integer[] := ARRAY(   -- by place
        SELECT (row_number() OVER (ORDER BY u.generation, u.place))::integer - 1
        FROM unnest(g.generation) WITH ORDINALITY u (generation, place) ORDER BY u.place);
BEGIN
    -- sorted before they are gathered: a sort for each list would take longer than all the rest
    RETURN QUERY WITH edges AS MATERIALIZED (
        SELECT positions[e.source] AS source, positions[e.target] AS target FROM unnest(g.sources, g.targets) e (source, target)
    ), incoming AS (
        SELECT e.target AS pos, array_agg(e.source) AS list FROM (SELECT * FROM edges ORDER BY target, source) e GROUP BY 1
    ), outgoing AS (
        SELECT e.source AS pos, array_agg(e.target) AS list FROM (SELECT * FROM edges ORDER BY source, target) e GROUP BY 1
    )
    SELECT u.pos, u.id, u.type, coalesce(i.list, '{}'), coalesce(o.list, '{}') FROM unnest(positions, g.ids, g.types) u (pos, id, type)
    LEFT JOIN incoming i ON i.pos = u.pos LEFT JOIN outgoing o ON o.pos = u.pos
    ORDER BY u.pos;
END $$;
CREATE OR REPLACE FUNCTION circle.write_version(p_pipeline_id integer, p_version integer, p_nodes jsonb, p_edges jsonb)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO circle.pipeline_version_nodes
        (pipeline_id, version, position, node_id, node_type, predecessors, successors)
    SELECT p_pipeline_id, p_version, c.node_position, c.id, c.type, c.preds, c.succs
    FROM circle.compile_graph(p_nodes, p_edges) c;
    INSERT INTO circle.pipeline_versions (pipeline_id, version, nodes, edges, node_count)
    VALUES (p_pipeline_id, p_version, p_nodes, p_edges, jsonb_array_length(p_nodes));
END $$;

-- == upgrade: trigger functions of pipelines and versions
CREATE OR REPLACE FUNCTION circle.pipelines_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.version := OLD.version + (NEW.nodes IS DISTINCT FROM OLD.nodes OR NEW.edges IS DISTINCT FROM OLD.edges)::integer;
    RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION circle.pipelines_after() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM circle.write_version(NEW.id, NEW.version, NEW.nodes, NEW.edges);
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_versions_frozen() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'versions of a pipeline are never changed' USING ERRCODE = 'integrity_constraint_violation';
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_versions_after_delete() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM circle.pipeline_version_nodes WHERE pipeline_id = OLD.pipeline_id AND version = OLD.version;
    RETURN NULL;
END $$;

-- == upgrade: a version is never changed
CREATE OR REPLACE TRIGGER pipeline_versions_frozen BEFORE UPDATE ON circle.pipeline_versions
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_versions_frozen();
CREATE OR REPLACE TRIGGER pipeline_versions_after_delete AFTER DELETE ON circle.pipeline_versions
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_versions_after_delete();
ALTER TABLE circle.pipeline_versions ENABLE ALWAYS TRIGGER pipeline_versions_frozen;

-- == upgrade: nor are its nodes
CREATE OR REPLACE TRIGGER pipeline_version_nodes_frozen BEFORE UPDATE ON circle.pipeline_version_nodes
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_versions_frozen();
ALTER TABLE circle.pipeline_version_nodes ENABLE ALWAYS TRIGGER pipeline_version_nodes_frozen;

-- == upgrade: a new graph is a new version
CREATE OR REPLACE TRIGGER pipelines_before BEFORE UPDATE OF nodes, edges, version ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_before();
CREATE OR REPLACE TRIGGER pipelines_after_insert AFTER INSERT ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_after();
CREATE OR REPLACE TRIGGER pipelines_after_update AFTER UPDATE ON circle.pipelines
    FOR EACH ROW WHEN (OLD.version IS DISTINCT FROM NEW.version) EXECUTE FUNCTION circle.pipelines_after();
ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_before;

-- == upgrade: versions of the pipelines that are there; broken graphs are listed, and left as they are
DO $versions$
DECLARE
    pipeline_id integer;
    p circle.pipelines;
BEGIN
    FOR pipeline_id IN SELECT id FROM circle.pipelines ORDER BY id LOOP
        BEGIN
            SELECT * INTO p FROM circle.pipelines WHERE id = pipeline_id FOR NO KEY UPDATE;
            IF FOUND AND NOT EXISTS (SELECT FROM circle.pipeline_versions v
                                     WHERE v.pipeline_id = p.id AND v.version = p.version) THEN
                PERFORM circle.write_version(p.id, p.version, p.nodes, p.edges);
            END IF;
        EXCEPTION WHEN SQLSTATE 'PL008' THEN
            RAISE WARNING 'circle.pipelines id % can''t be run until its graph is mended: %', p.id, SQLERRM;
        END;
        COMMIT;
    END LOOP;
END $versions$;

-- == upgrade: inserts of node runs get a function of their own before the other one becomes a guard of updates
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status = 'running' THEN
        NEW.started_at := coalesce(NEW.started_at, clock_timestamp());
    ELSE
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        NEW.duration_ms := CASE WHEN NEW.duration_ms <> 0 OR NEW.started_at IS NULL THEN NEW.duration_ms
            ELSE least(extract(epoch FROM NEW.completed_at - NEW.started_at) * 1000, 2147483647)::integer END;
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER pipeline_node_runs_before_insert BEFORE INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status <> 'pending') EXECUTE FUNCTION circle.pipeline_node_runs_before_insert();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_before_insert;

-- == upgrade: trigger functions of runs and node runs
CREATE OR REPLACE FUNCTION circle.pipeline_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF current_setting('session_replication_role') <> 'replica' THEN
            SELECT v.version INTO NEW.pipeline_version FROM circle.pipelines p
            JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
            WHERE p.id = NEW.pipeline_id;
        END IF;
    ELSIF NOT (OLD.status = 'running' AND NEW.status IN ('completed', 'failed', 'cancelled', 'timeout', 'pending')
               OR OLD.status = 'pending' AND NEW.status IN ('running', 'failed', 'cancelled')) THEN
        IF OLD.status = NEW.status AND current_setting('session_replication_role') = 'replica' THEN
            RETURN NEW;   -- a logical subscriber's updates name every column, whatever they change
        END IF;
        -- else the same status again is refused too, or of two that end a run both would win
        RAISE EXCEPTION 'run % is % and can''t become %', OLD.id, OLD.status, NEW.status
            USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
                'entity', 'run', 'id', OLD.id, 'current', OLD.status, 'requested', NEW.status, 'reason', '');
    END IF;
    IF NEW.status = 'running' THEN
        NEW.started_at := coalesce(NEW.started_at, clock_timestamp());
    ELSIF NEW.status <> 'pending' THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        NEW.lease_expires_at := NULL;
        IF coalesce(NEW.duration_seconds, 0) = 0 THEN
            NEW.duration_seconds := least(coalesce(extract(epoch FROM NEW.completed_at - NEW.started_at), 0), 2147483647)::integer;
        END IF;
    END IF;
    RETURN NEW;
END $$;
-- After the insert: ON CONFLICT DO UPDATE proposes rows that are never inserted.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'run % can''t begin as %', NEW.id, NEW.status USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
        'entity', 'run', 'id', NEW.id, 'current', 'new', 'requested', NEW.status, 'reason', '');
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_runs_over() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'run % is over: its status, end and error stay as they are', OLD.id
        USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
            'entity', 'run', 'id', OLD.id, 'current', OLD.status, 'requested', NEW.status,
            'reason', 'its end and its error stay as they are, and tokens only grow');
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status IN ('failed', 'cancelled', 'timeout') THEN
        UPDATE circle.pipeline_node_runs SET status = 'cancelled'
        WHERE run_id = NEW.id AND (status IN ('pending', 'running')) IS TRUE;
    ELSIF EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = NEW.id AND (
            status = 'running' OR NEW.status = 'completed' AND status IN ('pending', 'failed'))) THEN
        RAISE EXCEPTION 'run % can''t become %: some of its nodes are live or failed', NEW.id, NEW.status
            USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
                'entity', 'run', 'id', NEW.id, 'current', OLD.status, 'requested', NEW.status,
                'reason', 'some of its nodes are live or failed');
    END IF;
    RETURN NULL;
END $$;
-- On the hot path: few expressions, because PL/pgSQL prepares each of them anew in every transaction.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    run_status text;
BEGIN
    IF NEW.status = 'running' THEN
        -- locked, so that the run can't be given back beside a raw writer; our own functions hold the lock already
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = NEW.run_id FOR NO KEY UPDATE;
    ELSE
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = NEW.run_id;
    END IF;
    IF NOT (OLD.status = 'running' AND NEW.status IN ('completed', 'failed', 'cancelled', 'pending')
            OR OLD.status = 'pending' AND NEW.status IN ('running', 'completed', 'failed', 'skipped', 'cancelled'))
       -- a node moves only while its run is running, or with it; under replica role other rows may come later
       OR NOT (run_status = 'running' OR NEW.status = 'cancelled' AND run_status IN ('failed', 'cancelled', 'timeout')
               OR current_setting('session_replication_role') = 'replica') THEN
        IF OLD.status = NEW.status AND current_setting('session_replication_role') = 'replica' THEN
            RETURN NEW;   -- as with runs
        END IF;
        RAISE EXCEPTION 'node % of run % is % and can''t become %', OLD.node_id, OLD.run_id, OLD.status, NEW.status
            USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
                'entity', 'node run', 'id', OLD.run_id || '/' || OLD.node_id, 'current', OLD.status, 'requested', NEW.status,
                'reason', CASE WHEN run_status <> 'running' THEN 'its run is ' || run_status ELSE '' END);
    END IF;
    IF NEW.status = 'running' THEN
        NEW.started_at := CASE WHEN NEW.started_at IS DISTINCT FROM OLD.started_at THEN NEW.started_at ELSE clock_timestamp() END;
    ELSIF NEW.status <> 'pending' THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        NEW.duration_ms := CASE WHEN NEW.duration_ms <> 0 OR NEW.started_at IS NULL THEN NEW.duration_ms
            ELSE least(extract(epoch FROM NEW.completed_at - NEW.started_at) * 1000, 2147483647)::integer END;
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_insert() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    new_run record;
    run_status text;
BEGIN
    -- a query on a transition table is planned each time: this one is small, and the one inside the loop is cached
    FOR new_run IN SELECT run_id, max(node_id) AS node_id, bool_or(status = 'running') AS running FROM new_rows
                   WHERE status IN ('pending', 'running') GROUP BY run_id ORDER BY run_id LOOP
        -- locked, so that the run can't end beside this transaction
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = new_run.run_id FOR NO KEY UPDATE;
        IF run_status <> 'running' AND (run_status <> 'pending' OR new_run.running) THEN
            RAISE EXCEPTION 'node % of run % can''t be live: its run is %', new_run.node_id, new_run.run_id, run_status
                USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
                    'entity', 'node run', 'id', new_run.run_id || '/' || new_run.node_id, 'current', 'new',
                    'requested', CASE WHEN new_run.running THEN 'running' ELSE 'pending' END,
                    'reason', 'its run is ' || run_status);
        END IF;
    END LOOP;
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_failed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE circle.pipeline_runs SET failed_node = NEW.node_id WHERE id = NEW.run_id AND failed_node IS NULL;
    RETURN NULL;
END $$;

-- == upgrade: guards of runs
CREATE OR REPLACE TRIGGER pipeline_runs_over BEFORE UPDATE OF completed_at, error_message, claim_token
    ON circle.pipeline_runs FOR EACH ROW
    WHEN (NEW.claim_token < OLD.claim_token
          OR OLD.completed_at IS NOT NULL AND (NEW.completed_at IS DISTINCT FROM OLD.completed_at
                                               OR NEW.error_message IS DISTINCT FROM OLD.error_message))
    EXECUTE FUNCTION circle.pipeline_runs_over();
CREATE OR REPLACE TRIGGER pipeline_runs_after_insert AFTER INSERT ON circle.pipeline_runs FOR EACH ROW
    WHEN (NEW.status NOT IN ('pending', 'running')) EXECUTE FUNCTION circle.pipeline_runs_after_insert();
CREATE OR REPLACE TRIGGER pipeline_runs_after AFTER UPDATE OF status ON circle.pipeline_runs FOR EACH ROW
    WHEN (NEW.status <> 'running') EXECUTE FUNCTION circle.pipeline_runs_after();
ALTER TABLE circle.pipeline_runs ENABLE ALWAYS TRIGGER pipeline_runs_over;

-- == upgrade: guards of node runs
CREATE OR REPLACE TRIGGER pipeline_node_runs_after_insert AFTER INSERT ON circle.pipeline_node_runs
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_insert();
CREATE OR REPLACE TRIGGER pipeline_node_runs_failed AFTER INSERT OR UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status = 'failed') EXECUTE FUNCTION circle.pipeline_node_runs_failed();

-- == upgrade: what may start now; the one place that says when a node is ready
-- It has the columns of the table in their order, so that it can be updated in its place.
CREATE OR REPLACE VIEW circle.startable_node_runs AS
SELECT n.id, n.run_id, n.node_id, n.node_type, n.status, n.input_data, n.output_data, n.error_message, n.retry_count,
       n.started_at, n.completed_at, n.duration_ms, n.position, n.predecessors, n.successors, n.available_at
FROM circle.pipeline_node_runs n
WHERE n.status = 'pending' AND (n.available_at IS NULL OR n.available_at <= clock_timestamp())
  -- every predecessor completed or skipped, at least one of them completed; or none at all, as a node run has that was
  -- inserted raw or before there were versions: its executor knows the order
  AND (coalesce(n.predecessors, '{}') = '{}'
       OR (SELECT bool_and(p.status IN ('completed', 'skipped')) AND bool_or(p.status = 'completed')
           FROM circle.pipeline_node_runs p WHERE p.run_id = n.run_id AND p.position = ANY (n.predecessors)));

-- == upgrade: functions that others build on
-- Locks the run for a caller that holds it; a pending one is started.
CREATE OR REPLACE FUNCTION circle.lock_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF NOT FOUND OR NOT coalesce(r.claim_token = p_token, r.lease_expires_at IS NULL)
       OR r.status NOT IN ('pending', 'running') THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    ELSIF r.status = 'pending' THEN
        UPDATE circle.pipeline_runs SET status = 'running' WHERE id = p_run_id RETURNING * INTO r;
    END IF;
    RETURN r;
END $$;
-- Ends a run that is locked; its live nodes are cancelled by the trigger on runs.
CREATE OR REPLACE FUNCTION circle.end_run(p_run_id bigint, p_status text, p_error text) RETURNS circle.pipeline_runs
LANGUAGE plpgsql AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    UPDATE circle.pipeline_runs SET status = p_status, error_message = coalesce(p_error, error_message)
    WHERE id = p_run_id RETURNING * INTO r;
    IF p_status <> 'cancelled' THEN
        UPDATE circle.pipelines SET success_count = success_count + (p_status = 'completed')::integer,
                                    error_count = error_count + (p_status <> 'completed')::integer
        WHERE id = r.pipeline_id;
    END IF;
    RETURN r;
END $$;
-- Ends a locked run in which nothing is running, ready or waiting for a retry; else returns NULL.
CREATE OR REPLACE FUNCTION circle.end_run_if_over(p_run_id bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql AS $$
DECLARE
    r record;
BEGIN
    SELECT t.failed_node,
           EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id
                   AND (status = 'running' OR status = 'pending' AND retry_count > 0)) AS busy,
           EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'pending') AS pending
    INTO r FROM circle.pipeline_runs t WHERE t.id = p_run_id;
    IF r.busy THEN
        RETURN NULL;
    ELSIF r.failed_node IS NOT NULL THEN
        RETURN circle.end_run(p_run_id, 'failed', (SELECT error_message FROM circle.pipeline_node_runs
                                                   WHERE run_id = p_run_id AND node_id = r.failed_node));
    ELSIF r.pending THEN
        IF EXISTS (SELECT FROM circle.startable_node_runs WHERE run_id = p_run_id) THEN
            RETURN NULL;
        END IF;
        -- what is left waits for a node that was cancelled
        UPDATE circle.pipeline_node_runs SET status = 'cancelled' WHERE run_id = p_run_id AND status = 'pending';
    END IF;
    RETURN circle.end_run(p_run_id, 'completed', NULL);
END $$;
-- A node all of whose predecessors are skipped is skipped, transitively, beginning with the nodes at these positions.
-- Returns the positions that follow the skipped ones.
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
-- Records results, all or none. Returns the positions of the nodes that follow.
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
            -- reported afterwards: it ran when its result says
            started_at = coalesce(n.started_at, CASE WHEN x.status IN ('completed', 'failed') THEN
                clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0) END)
        FROM results x
        WHERE n.run_id = p_run_id AND n.node_id = x.node_id
          -- in this form the condition says nothing of x alone: the planner would expect few results, and compare each
          -- with each
          AND x.status = ANY (CASE n.status WHEN 'running' THEN ARRAY['completed', 'failed', 'cancelled']
                                            WHEN 'pending' THEN ARRAY['completed', 'failed', 'skipped', 'cancelled'] END)
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
            RAISE EXCEPTION 'run % has no node %', p_run_id, left(bad.node_id, 200)
                USING ERRCODE = 'PL004', DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', bad.node_id);
        END IF;
        RAISE EXCEPTION 'node % of run % is % and can''t become %', bad.node_id, p_run_id, bad.current, bad.status
            USING ERRCODE = 'PL001', DETAIL = jsonb_build_object(
                'entity', 'node run', 'id', p_run_id || '/' || bad.node_id, 'current', bad.current, 'requested', bad.status,
                'reason', CASE WHEN bad.times > 1 THEN 'the batch has more than one result for it' ELSE '' END);
    END IF;
    IF done.failed IS NOT NULL THEN
        -- of the first batch with failures the first in execution order counts, whatever order the rows were updated in
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

-- == upgrade: runs
CREATE OR REPLACE FUNCTION circle.create_run(p_pipeline_id bigint, p_trigger_data jsonb, p_key text)
RETURNS circle.pipeline_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
    pipeline_status text;
    created integer;
    expected integer;
BEGIN
    -- shared among creators: delete_pipeline waits here, where it holds nothing yet, and not between them
    PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(p_pipeline_id));
    -- the first run with this key is the answer, also when the pipeline is paused by now
    FOR attempt IN 1 .. 2 LOOP
        IF p_key IS NOT NULL THEN
            SELECT * INTO r FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND idempotency_key = p_key;
            IF FOUND THEN
                RETURN r;
            END IF;
        END IF;
        INSERT INTO circle.pipeline_runs (pipeline_id, trigger_data, idempotency_key)
        SELECT p.id, p_trigger_data, p_key FROM circle.pipelines p
        WHERE p.id = p_pipeline_id AND (p.status = 'active') IS TRUE
        ON CONFLICT (pipeline_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING * INTO r;
        EXIT WHEN FOUND;
    END LOOP;
    IF r.id IS NOT NULL AND r.pipeline_version IS NOT NULL THEN
        INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, position, predecessors, successors)
        SELECT r.id, v.node_id, v.node_type, v.position, v.predecessors, v.successors
        FROM circle.pipeline_version_nodes v
        WHERE v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version ORDER BY v.position;
        GET DIAGNOSTICS created = ROW_COUNT;
        SELECT node_count INTO expected FROM circle.pipeline_versions
        WHERE pipeline_id = r.pipeline_id AND version = r.pipeline_version;
        IF created = 0 THEN
            PERFORM circle.refuse_graph('no_nodes', 'Pipeline must have at least one node', NULL, NULL);
        ELSIF created <> expected THEN
            RAISE EXCEPTION 'version % of pipeline % has % of its % nodes', r.pipeline_version, r.pipeline_id, created, expected
                USING ERRCODE = 'data_corrupted';
        END IF;
        UPDATE circle.pipelines SET run_count = run_count + 1, last_run = greatest(last_run, clock_timestamp())
        WHERE id = p_pipeline_id AND (status = 'active') IS TRUE;
        IF FOUND THEN
            RETURN r;
        END IF;
    END IF;
    SELECT p.status INTO pipeline_status FROM circle.pipelines p WHERE p.id = p_pipeline_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'pipeline % does not exist', p_pipeline_id
            USING ERRCODE = 'PL002', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id);
    ELSIF pipeline_status = 'active' THEN
        PERFORM circle.sort_graph(p.nodes, p.edges) FROM circle.pipelines p WHERE p.id = p_pipeline_id;
        PERFORM circle.refuse_graph('no_version', 'the stored graph was never compiled: save it again', NULL, NULL);
    END IF;
    RAISE EXCEPTION 'pipeline % is %, not active', p_pipeline_id, pipeline_status USING ERRCODE = 'PL006',
        DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'status', pipeline_status);
END $$;
CREATE OR REPLACE FUNCTION circle.start_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    UPDATE circle.pipeline_runs SET status = 'running'
    WHERE id = p_run_id AND (status = 'pending') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    RETURNING * INTO r;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    END IF;
    RETURN r;
END $$;
-- Ends a run as its caller says: completed, failed or cancelled. A cancel needs no token.
CREATE OR REPLACE FUNCTION circle.conclude_run(p_run_id bigint, p_status text, p_error text, p_token bigint)
RETURNS circle.pipeline_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (p_status = 'cancelled' OR coalesce(claim_token = p_token, lease_expires_at IS NULL))
      AND (status = 'running' OR status = 'pending' AND p_status <> 'completed') IS TRUE
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, p_status);
    END IF;
    RETURN circle.end_run(p_run_id, p_status, p_error);
END $$;
-- Ends a run as its nodes say.
CREATE OR REPLACE FUNCTION circle.finish_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'completed');
    END IF;
    r := circle.end_run_if_over(p_run_id);
    IF r.id IS NULL THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'completed', 'some of its nodes are running, ready or waiting for a retry');
    END IF;
    RETURN r;
END $$;
CREATE OR REPLACE FUNCTION circle.append_run_log(p_run_id bigint, p_entry jsonb, p_token bigint) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    UPDATE circle.pipeline_runs SET logs = coalesce(logs, '[]') || jsonb_build_array(p_entry)
    WHERE id = p_run_id AND coalesce(claim_token = p_token, lease_expires_at IS NULL);
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'logged');
    END IF;
END $$;

-- == upgrade: nodes
CREATE OR REPLACE FUNCTION circle.start_node(p_run_id bigint, p_node_id text, p_input jsonb, p_token bigint)
RETURNS circle.pipeline_node_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    failed text;
    n circle.pipeline_node_runs;
BEGIN
    UPDATE circle.pipeline_runs SET current_node = left(p_node_id, 100)
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    RETURNING failed_node INTO failed;
    IF FOUND THEN
        UPDATE circle.startable_node_runs SET status = 'running', input_data = coalesce(p_input, input_data)
        WHERE run_id = p_run_id AND node_id = p_node_id AND (failed IS NULL OR retry_count > 0)
        RETURNING * INTO n;
        IF FOUND THEN
            RETURN n;
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
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs
        SET status = 'completed', output_data = coalesce(p_output, output_data), error_message = NULL
        WHERE run_id = p_run_id AND node_id = p_node_id AND (status IN ('pending', 'running')) IS TRUE
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
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs SET status = 'skipped'
        WHERE run_id = p_run_id AND node_id = p_node_id AND (status = 'pending') IS TRUE RETURNING * INTO n;
        IF FOUND THEN
            PERFORM circle.skip_followers(p_run_id, n.successors);
            RETURN n;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'skipped');
END $$;
-- The attempts of one node, or of all running ones, have failed: a retry where one is left, else the end.
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
                                      ELSE t.node_id = p_node_id AND t.status IN ('pending', 'running') END
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
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND coalesce(claim_token = p_token, lease_expires_at IS NULL)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        SELECT * INTO n FROM circle.fail_attempts(p_run_id, p_node_id, p_error, p_retryable);
        IF FOUND THEN
            RETURN n;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'failed');
END $$;

-- == upgrade: many nodes in one call
CREATE OR REPLACE FUNCTION circle.advance_run(p_run_id bigint, p_results jsonb, p_token bigint)
RETURNS SETOF circle.pipeline_node_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r circle.pipeline_runs;
    n circle.pipeline_node_runs;
    fresh boolean;
    following integer[];   -- NULL: look at every node
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF (r.status = 'running' AND coalesce(r.claim_token = p_token, r.lease_expires_at IS NULL)) IS NOT TRUE THEN
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
        following := NULL;   -- nothing new starts, but retries that are due
    END IF;
    IF following IS NULL THEN
        FOR n IN UPDATE circle.startable_node_runs SET status = 'running'
                 WHERE run_id = p_run_id AND (r.failed_node IS NULL OR retry_count > 0) RETURNING * LOOP
            RETURN NEXT n;
        END LOOP;
    ELSE
        FOR n IN UPDATE circle.startable_node_runs SET status = 'running'
                 WHERE run_id = p_run_id AND position = ANY (following) RETURNING * LOOP
            RETURN NEXT n;
        END LOOP;
    END IF;
    IF FOUND THEN
        UPDATE circle.pipeline_runs SET current_node = n.node_id WHERE id = p_run_id;
    ELSE
        PERFORM circle.end_run_if_over(p_run_id);
    END IF;
END $$;
CREATE OR REPLACE FUNCTION circle.record_results(p_run_id bigint, p_results jsonb, p_token bigint) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    PERFORM circle.lock_run(p_run_id, p_token);
    PERFORM circle.apply_results(p_run_id, p_results);
END $$;

-- == upgrade: leases and sweeps
CREATE OR REPLACE FUNCTION circle.claim_runs(p_worker_id text, p_lease interval, p_limit integer)
RETURNS SETOF circle.pipeline_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    RETURN QUERY WITH picked AS MATERIALIZED (
        SELECT id FROM circle.pipeline_runs WHERE status = 'pending' ORDER BY id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE circle.pipeline_runs r SET status = 'running', worker_id = p_worker_id, claim_token = r.claim_token + 1,
        claim_count = r.claim_count + 1, lease_expires_at = clock_timestamp() + p_lease
    WHERE r.id = ANY (ARRAY(SELECT picked.id FROM picked)) RETURNING r.*;
END $$;
CREATE OR REPLACE FUNCTION circle.heartbeat_run(p_run_id bigint, p_token bigint, p_lease interval) RETURNS timestamptz
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    expires timestamptz;
    run_status text;
BEGIN
    UPDATE circle.pipeline_runs SET lease_expires_at = clock_timestamp() + p_lease
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND claim_token = p_token AND lease_expires_at IS NOT NULL
    RETURNING lease_expires_at INTO expires;
    IF NOT FOUND THEN
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = p_run_id;
        IF NOT FOUND THEN
            PERFORM circle.refuse_run(p_run_id, p_token, 'running');
        END IF;
        RAISE EXCEPTION 'the lease on run % is lost: the run is %', p_run_id, run_status
            USING ERRCODE = 'PL007', DETAIL = jsonb_build_object('run_id', p_run_id, 'status', run_status);
    END IF;
    RETURN expires;
END $$;
-- Back to pending: a locked run without running nodes. Tokens grow, so that the last holder's is stale.
CREATE OR REPLACE FUNCTION circle.give_back_run(p_run_id bigint, p_counts integer) RETURNS circle.pipeline_runs
LANGUAGE sql AS $$
    UPDATE circle.pipeline_runs SET status = 'pending', worker_id = NULL, lease_expires_at = NULL,
        claim_token = claim_token + 1, claim_count = claim_count - p_counts
    WHERE id = p_run_id RETURNING *
$$;
CREATE OR REPLACE FUNCTION circle.release_run(p_run_id bigint, p_token bigint) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND claim_token = p_token AND lease_expires_at IS NOT NULL
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.heartbeat_run(p_run_id, NULL, interval '0');
    END IF;
    -- given back on purpose: neither the node's attempt nor the claim counts
    UPDATE circle.pipeline_node_runs SET status = 'pending' WHERE run_id = p_run_id AND status = 'running';
    RETURN circle.give_back_run(p_run_id, 1);
END $$;
CREATE OR REPLACE FUNCTION circle.recover_runs(p_limit integer, p_max_claims integer) RETURNS SETOF circle.pipeline_runs
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r record;
    result circle.pipeline_runs;
BEGIN
    -- pipeline by pipeline, so that two sweeps bump counters in one order
    FOR r IN SELECT id, claim_count FROM (
                 SELECT id, pipeline_id, claim_count FROM circle.pipeline_runs
                 WHERE status = 'running' AND lease_expires_at < clock_timestamp()
                 ORDER BY id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED) t
             ORDER BY pipeline_id, id LOOP
        PERFORM circle.fail_attempts(r.id, NULL, 'the worker''s lease ran out', true);
        result := circle.end_run_if_over(r.id);
        IF result.id IS NULL AND r.claim_count >= p_max_claims THEN
            result := circle.end_run(r.id, 'failed', format('its lease ran out, and it was claimed %s times', r.claim_count));
        ELSIF result.id IS NULL THEN
            result := circle.give_back_run(r.id, 0);
        END IF;
        RETURN NEXT result;
    END LOOP;
END $$;
CREATE OR REPLACE FUNCTION circle.expire_runs(p_limit integer) RETURNS SETOF circle.pipeline_runs LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    r record;
BEGIN
    FOR r IN SELECT id, timeout_seconds FROM (
                 SELECT t.id, t.pipeline_id, p.timeout_seconds FROM circle.pipeline_runs t
                 JOIN circle.pipelines p ON p.id = t.pipeline_id
                 WHERE t.status = 'running' AND p.timeout_seconds > 0
                   AND coalesce(t.started_at, t.created_at) < clock_timestamp() - make_interval(secs => p.timeout_seconds)
                 ORDER BY t.id LIMIT p_limit FOR NO KEY UPDATE OF t SKIP LOCKED) t
             ORDER BY pipeline_id, id LOOP
        RETURN NEXT circle.end_run(r.id, 'timeout', format('timed out after %s seconds', r.timeout_seconds));
    END LOOP;
END $$;
CREATE OR REPLACE FUNCTION circle.purge_runs(p_older_than interval, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_sort = off AS $$
DECLARE
    before timestamptz := clock_timestamp() - p_older_than;   -- a constant, so that the index can begin and end with it
    deleted integer;
BEGIN
    WITH old AS MATERIALIZED (
        SELECT id FROM circle.pipeline_runs WHERE completed_at < before
        ORDER BY completed_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    )
    DELETE FROM circle.pipeline_runs WHERE id = ANY (ARRAY(SELECT old.id FROM old));
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END $$;
-- A page of the history, newest first. The order begins with a column that is compared by >= and <=: with "=" the planner
-- would drop it, and might walk through the runs of others by the primary key; without sorts only the right index is left.
CREATE OR REPLACE FUNCTION circle.page_of_runs(p_pipeline_id bigint, p_status text, p_after bigint, p_limit integer)
RETURNS SETOF circle.pipeline_runs
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan SET enable_sort = off SET enable_incremental_sort = off
SET enable_seqscan = off AS $$
BEGIN
    IF p_pipeline_id IS NOT NULL THEN
        RETURN QUERY SELECT * FROM circle.pipeline_runs r
        WHERE r.pipeline_id >= p_pipeline_id AND (r.pipeline_id, r.id) < (p_pipeline_id, p_after)
          AND (p_status IS NULL OR r.status = p_status)
        ORDER BY r.pipeline_id DESC, r.id DESC LIMIT p_limit;
    ELSIF p_status IS NOT NULL THEN
        RETURN QUERY SELECT * FROM circle.pipeline_runs r
        WHERE r.status >= p_status AND (r.status, r.id) < (p_status, p_after)
        ORDER BY r.status DESC, r.id DESC LIMIT p_limit;
    ELSE
        RETURN QUERY SELECT * FROM circle.pipeline_runs r WHERE r.id < p_after ORDER BY r.id DESC LIMIT p_limit;
    END IF;
END $$;
-- Runs before their pipeline, as everywhere; create_run is kept out meanwhile by the advisory lock.
CREATE OR REPLACE FUNCTION circle.delete_pipeline(p_pipeline_id bigint, p_force boolean) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    live bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(1734964328, hashint8(p_pipeline_id));
    IF p_force THEN
        PERFORM FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND status IN ('pending', 'running')
        ORDER BY id FOR UPDATE;
    END IF;
    PERFORM FROM circle.pipelines WHERE id = p_pipeline_id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'pipeline % does not exist', p_pipeline_id
            USING ERRCODE = 'PL002', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id);
    END IF;
    SELECT count(*) INTO live FROM circle.pipeline_runs
    WHERE pipeline_id = p_pipeline_id AND status IN ('pending', 'running');
    IF live > 0 AND NOT p_force THEN
        RAISE EXCEPTION 'pipeline % has % live runs', p_pipeline_id, live USING ERRCODE = 'PL010',
            DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'live_runs', live);
    END IF;
    DELETE FROM circle.pipelines WHERE id = p_pipeline_id;
END $$;

-- == upgrade index: circle.idx_pipeline_runs_idempotency_key
CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_idempotency_key
    ON circle.pipeline_runs (pipeline_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- == upgrade index: circle.idx_pipeline_runs_pending
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_pending ON circle.pipeline_runs (id) WHERE status = 'pending';

-- == upgrade index: circle.idx_pipeline_runs_running
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_running ON circle.pipeline_runs (id) WHERE status = 'running';

-- == upgrade index: circle.idx_pipeline_runs_history
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_history ON circle.pipeline_runs (pipeline_id, id);

-- == upgrade index: circle.idx_pipeline_runs_status_history
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_status_history ON circle.pipeline_runs (status, id);

-- == upgrade index: circle.idx_pipeline_runs_completed_at
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_completed_at
    ON circle.pipeline_runs (completed_at) WHERE completed_at IS NOT NULL;

-- == upgrade index: circle.idx_pipeline_node_runs_run_position
CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_node_runs_run_position
    ON circle.pipeline_node_runs (run_id, position);

-- == downgrade: triggers do what they did in revision 008; first of all, because these look at what goes next
CREATE OR REPLACE FUNCTION circle.pipeline_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status NOT IN ('pending', 'running') THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        IF coalesce(NEW.duration_seconds, 0) = 0 THEN
            NEW.duration_seconds := least(coalesce(extract(epoch FROM NEW.completed_at - NEW.started_at), 0), 2147483647)::integer;
        END IF;
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status NOT IN ('pending', 'running') THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
    END IF;
    RETURN NEW;
END $$;

-- == downgrade: pipelines
DROP TRIGGER IF EXISTS pipelines_before ON circle.pipelines;
DROP TRIGGER IF EXISTS pipelines_after_insert ON circle.pipelines;
DROP TRIGGER IF EXISTS pipelines_after_update ON circle.pipelines;
ALTER TABLE circle.pipelines DROP COLUMN IF EXISTS version;

-- == downgrade: versions
DROP TABLE IF EXISTS circle.pipeline_version_nodes, circle.pipeline_versions;

-- == downgrade: node runs
DROP VIEW IF EXISTS circle.startable_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_after_insert ON circle.pipeline_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_failed ON circle.pipeline_node_runs;
CREATE OR REPLACE TRIGGER pipeline_node_runs_before_insert BEFORE INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status <> 'pending') EXECUTE FUNCTION circle.pipeline_node_runs_before();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_before_insert;
ALTER TABLE circle.pipeline_node_runs
    DROP COLUMN IF EXISTS position, DROP COLUMN IF EXISTS predecessors, DROP COLUMN IF EXISTS successors,
    DROP COLUMN IF EXISTS available_at;

-- == downgrade: runs
DROP TRIGGER IF EXISTS pipeline_runs_over ON circle.pipeline_runs;
DROP TRIGGER IF EXISTS pipeline_runs_after ON circle.pipeline_runs;
DROP TRIGGER IF EXISTS pipeline_runs_after_insert ON circle.pipeline_runs;
DROP INDEX IF EXISTS circle.idx_pipeline_runs_pending, circle.idx_pipeline_runs_running, circle.idx_pipeline_runs_history,
    circle.idx_pipeline_runs_status_history, circle.idx_pipeline_runs_completed_at;
ALTER TABLE circle.pipeline_runs
    DROP COLUMN IF EXISTS pipeline_version, DROP COLUMN IF EXISTS failed_node, DROP COLUMN IF EXISTS worker_id,
    DROP COLUMN IF EXISTS claim_token, DROP COLUMN IF EXISTS claim_count, DROP COLUMN IF EXISTS lease_expires_at,
    DROP COLUMN IF EXISTS idempotency_key;

-- == downgrade: as tightly packed as before
ALTER TABLE circle.pipeline_node_runs RESET (fillfactor);
ALTER TABLE circle.pipeline_runs RESET (fillfactor);

-- == downgrade: functions
DROP FUNCTION IF EXISTS circle.delete_pipeline(bigint, boolean);
DROP FUNCTION IF EXISTS circle.page_of_runs(bigint, text, bigint, integer);
DROP FUNCTION IF EXISTS circle.purge_runs(interval, integer);
DROP FUNCTION IF EXISTS circle.expire_runs(integer);
DROP FUNCTION IF EXISTS circle.recover_runs(integer, integer);
DROP FUNCTION IF EXISTS circle.release_run(bigint, bigint);
DROP FUNCTION IF EXISTS circle.give_back_run(bigint, integer);
DROP FUNCTION IF EXISTS circle.heartbeat_run(bigint, bigint, interval);
DROP FUNCTION IF EXISTS circle.claim_runs(text, interval, integer);
DROP FUNCTION IF EXISTS circle.record_results(bigint, jsonb, bigint);
DROP FUNCTION IF EXISTS circle.advance_run(bigint, jsonb, bigint);
DROP FUNCTION IF EXISTS circle.fail_node(bigint, text, text, boolean, bigint);
DROP FUNCTION IF EXISTS circle.fail_attempts(bigint, text, text, boolean);
DROP FUNCTION IF EXISTS circle.skip_node(bigint, text, bigint);
DROP FUNCTION IF EXISTS circle.complete_node(bigint, text, jsonb, bigint);
DROP FUNCTION IF EXISTS circle.start_node(bigint, text, jsonb, bigint);
DROP FUNCTION IF EXISTS circle.append_run_log(bigint, jsonb, bigint);
DROP FUNCTION IF EXISTS circle.finish_run(bigint, bigint);
DROP FUNCTION IF EXISTS circle.conclude_run(bigint, text, text, bigint);
DROP FUNCTION IF EXISTS circle.start_run(bigint, bigint);
DROP FUNCTION IF EXISTS circle.create_run(bigint, jsonb, text);
DROP FUNCTION IF EXISTS circle.apply_results(bigint, jsonb);
DROP FUNCTION IF EXISTS circle.skip_followers(bigint, integer[]);
DROP FUNCTION IF EXISTS circle.end_run_if_over(bigint);
DROP FUNCTION IF EXISTS circle.end_run(bigint, text, text);
DROP FUNCTION IF EXISTS circle.lock_run(bigint, bigint);
DROP FUNCTION IF EXISTS circle.pipeline_node_runs_failed();
DROP FUNCTION IF EXISTS circle.pipeline_node_runs_after_insert();
DROP FUNCTION IF EXISTS circle.pipeline_node_runs_before_insert();
DROP FUNCTION IF EXISTS circle.pipeline_runs_after();
DROP FUNCTION IF EXISTS circle.pipeline_runs_over();
DROP FUNCTION IF EXISTS circle.pipeline_runs_after_insert();
DROP FUNCTION IF EXISTS circle.pipeline_versions_after_delete();
DROP FUNCTION IF EXISTS circle.pipeline_versions_frozen();
DROP FUNCTION IF EXISTS circle.pipelines_after();
DROP FUNCTION IF EXISTS circle.pipelines_before();
DROP FUNCTION IF EXISTS circle.write_version(integer, integer, jsonb, jsonb);
DROP FUNCTION IF EXISTS circle.compile_graph(jsonb, jsonb);
DROP FUNCTION IF EXISTS circle.sort_graph(jsonb, jsonb);
DROP FUNCTION IF EXISTS circle.refuse_node(bigint, text, bigint, text);
DROP FUNCTION IF EXISTS circle.refuse_run(bigint, bigint, text, text);
DROP FUNCTION IF EXISTS circle.refuse_graph(text, text, text, text);
