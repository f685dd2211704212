-- The schema at head, for reading; nothing runs this file. Written by: python -m tests.generated
--
-- First the tables, each with its constraints, indexes and triggers; then views and functions by subject, each below the
-- file that defined it last. A trigger marked ALWAYS fires under session_replication_role = replica, too.

-- ---- table circle.pipelines

CREATE TABLE circle.pipelines (
    id integer NOT NULL DEFAULT nextval('circle.pipelines_id_seq'::regclass),
    name character varying(255) NOT NULL,
    description text,
    status character varying(50) NOT NULL DEFAULT 'draft',
    nodes jsonb NOT NULL DEFAULT '[]'::jsonb,
    edges jsonb NOT NULL DEFAULT '[]'::jsonb,
    created_at timestamp with time zone DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamp with time zone DEFAULT CURRENT_TIMESTAMP,
    last_run timestamp with time zone,
    run_count integer NOT NULL DEFAULT 0,
    success_count integer NOT NULL DEFAULT 0,
    error_count integer NOT NULL DEFAULT 0,
    timeout_seconds integer DEFAULT 3600,
    max_retries_per_node integer NOT NULL DEFAULT 3,
    retry_backoff_base double precision NOT NULL DEFAULT 1.0,
    retry_backoff_max double precision NOT NULL DEFAULT 60.0,
    version integer NOT NULL DEFAULT 1,
    CONSTRAINT pipelines_pkey PRIMARY KEY (id),
    CONSTRAINT ck_pipelines_backoff CHECK (retry_backoff_base >= 0::double precision AND retry_backoff_base <= 31536000::double precision AND retry_backoff_max >= 0::double precision AND retry_backoff_max <= 31536000::double precision),
    CONSTRAINT ck_pipelines_counters CHECK (run_count >= 0 AND success_count >= 0 AND error_count >= 0),
    CONSTRAINT ck_pipelines_retries CHECK (max_retries_per_node >= 0),
    CONSTRAINT ck_pipelines_timeout CHECK (timeout_seconds >= 0),
    CONSTRAINT ck_pipelines_timestamps_finite CHECK (isfinite(created_at) AND isfinite(updated_at) AND isfinite(last_run)),
    CONSTRAINT pipelines_status_check CHECK (status = ANY (ARRAY['active', 'paused', 'draft']))
);

CREATE INDEX idx_pipelines_status ON circle.pipelines USING btree (status);

CREATE TRIGGER pipelines_accept AFTER INSERT OR UPDATE OF nodes, edges, status ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_accept();  -- ALWAYS
CREATE TRIGGER pipelines_after_insert AFTER INSERT ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_after();
CREATE TRIGGER pipelines_after_update AFTER UPDATE ON circle.pipelines
    FOR EACH ROW WHEN (old.version IS DISTINCT FROM new.version) EXECUTE FUNCTION circle.pipelines_after();
CREATE TRIGGER pipelines_before BEFORE UPDATE OF nodes, edges, version ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_before();  -- ALWAYS

-- ---- table circle.pipeline_versions

CREATE TABLE circle.pipeline_versions (
    pipeline_id integer NOT NULL,
    version integer NOT NULL,
    nodes jsonb NOT NULL,
    edges jsonb NOT NULL,
    node_count integer NOT NULL,
    created_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT pipeline_versions_pkey PRIMARY KEY (pipeline_id, version),
    CONSTRAINT pipeline_versions_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES circle.pipelines(id) ON DELETE CASCADE
);

CREATE TRIGGER pipeline_versions_after_delete AFTER DELETE ON circle.pipeline_versions
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_versions_after_delete();
CREATE TRIGGER pipeline_versions_frozen BEFORE UPDATE ON circle.pipeline_versions
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_versions_frozen();  -- ALWAYS

-- ---- table circle.pipeline_version_nodes

CREATE TABLE circle.pipeline_version_nodes (
    pipeline_id integer NOT NULL,
    version integer NOT NULL,
    "position" integer NOT NULL,
    node_id character varying(100) NOT NULL,
    node_type character varying(50) NOT NULL,
    predecessors integer[] NOT NULL,
    successors integer[] NOT NULL,
    CONSTRAINT pipeline_version_nodes_pkey PRIMARY KEY (pipeline_id, version, "position")
);

CREATE TRIGGER pipeline_version_nodes_frozen BEFORE UPDATE ON circle.pipeline_version_nodes
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_versions_frozen();  -- ALWAYS

-- ---- table circle.pipeline_runs

CREATE TABLE circle.pipeline_runs (
    id integer NOT NULL DEFAULT nextval('circle.pipeline_runs_id_seq'::regclass),
    pipeline_id integer NOT NULL,
    status character varying(50) NOT NULL DEFAULT 'pending',
    started_at timestamp with time zone,
    completed_at timestamp with time zone,
    current_node character varying(100),
    logs jsonb DEFAULT '[]'::jsonb,
    trigger_data jsonb DEFAULT '{}'::jsonb,
    error_message text,
    created_at timestamp with time zone DEFAULT CURRENT_TIMESTAMP,
    duration_seconds integer NOT NULL DEFAULT 0,
    pipeline_version integer,
    failed_node character varying(100),
    worker_id character varying(255),
    claim_token bigint NOT NULL DEFAULT 0,
    claim_count integer NOT NULL DEFAULT 0,
    lease_expires_at timestamp with time zone,
    idempotency_key character varying(255),
    CONSTRAINT pipeline_runs_pkey PRIMARY KEY (id),
    CONSTRAINT pipeline_runs_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES circle.pipelines(id) ON DELETE CASCADE,
    CONSTRAINT ck_pipeline_runs_duration CHECK (duration_seconds >= 0),
    CONSTRAINT ck_pipeline_runs_lease CHECK (lease_expires_at IS NULL OR completed_at IS NULL AND worker_id IS NOT NULL AND isfinite(lease_expires_at)),
    CONSTRAINT ck_pipeline_runs_terminal_is_completed CHECK ((status = ANY ('{pending,running}')) = (completed_at IS NULL)),
    CONSTRAINT ck_pipeline_runs_times CHECK (completed_at >= started_at AND isfinite(created_at) AND isfinite(started_at) AND isfinite(completed_at)),
    CONSTRAINT pipeline_runs_status_check CHECK (status = ANY (ARRAY['pending', 'running', 'completed', 'failed', 'cancelled', 'timeout']))
) WITH (fillfactor=70);

CREATE INDEX idx_pipeline_runs_completed_at ON circle.pipeline_runs USING btree (completed_at) WHERE (completed_at IS NOT NULL);
CREATE INDEX idx_pipeline_runs_history ON circle.pipeline_runs USING btree (pipeline_id, id);
CREATE UNIQUE INDEX idx_pipeline_runs_idempotency_key ON circle.pipeline_runs USING btree (pipeline_id, idempotency_key) WHERE (idempotency_key IS NOT NULL);
CREATE INDEX idx_pipeline_runs_pending ON circle.pipeline_runs USING btree (id) WHERE ((status) = 'pending');
CREATE INDEX idx_pipeline_runs_pipeline_id ON circle.pipeline_runs USING btree (pipeline_id);
CREATE INDEX idx_pipeline_runs_running ON circle.pipeline_runs USING btree (id) WHERE ((status) = 'running');
CREATE INDEX idx_pipeline_runs_status ON circle.pipeline_runs USING btree (status);
CREATE INDEX idx_pipeline_runs_status_history ON circle.pipeline_runs USING btree (status, id);

CREATE TRIGGER pipeline_runs_after AFTER UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW WHEN (new.status <> 'running') EXECUTE FUNCTION circle.pipeline_runs_after();
CREATE TRIGGER pipeline_runs_after_insert AFTER INSERT ON circle.pipeline_runs
    FOR EACH ROW WHEN (new.status <> ALL (ARRAY['pending', 'running'])) EXECUTE FUNCTION circle.pipeline_runs_after_insert();
CREATE TRIGGER pipeline_runs_before BEFORE INSERT OR UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_runs_before();  -- ALWAYS
CREATE TRIGGER pipeline_runs_event AFTER INSERT OR UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW WHEN (new.status <> 'pending') EXECUTE FUNCTION circle.pipeline_runs_event();
CREATE TRIGGER pipeline_runs_json BEFORE INSERT OR UPDATE OF trigger_data, logs ON circle.pipeline_runs
    FOR EACH ROW WHEN (new.trigger_data <> '{}'::jsonb OR new.logs <> '[]'::jsonb) EXECUTE FUNCTION circle.pipeline_runs_json();  -- ALWAYS
CREATE TRIGGER pipeline_runs_terminal BEFORE UPDATE OF completed_at, error_message, claim_token ON circle.pipeline_runs
    FOR EACH ROW WHEN (new.claim_token < old.claim_token OR old.completed_at IS NOT NULL AND (new.completed_at IS DISTINCT FROM old.completed_at OR new.error_message IS DISTINCT FROM old.error_message)) EXECUTE FUNCTION circle.pipeline_runs_terminal();  -- ALWAYS

-- ---- table circle.pipeline_node_runs

CREATE TABLE circle.pipeline_node_runs (
    id bigint NOT NULL DEFAULT nextval('circle.pipeline_node_runs_id_seq'::regclass),
    run_id integer NOT NULL,
    node_id character varying(100) NOT NULL,
    node_type character varying(50) NOT NULL,
    status character varying(50) NOT NULL DEFAULT 'pending',
    input_data jsonb DEFAULT '{}'::jsonb,
    output_data jsonb DEFAULT '{}'::jsonb,
    error_message text,
    retry_count integer NOT NULL DEFAULT 0,
    started_at timestamp with time zone,
    completed_at timestamp with time zone,
    duration_ms integer NOT NULL DEFAULT 0,
    "position" integer,
    predecessors integer[],
    successors integer[],
    available_at timestamp with time zone,
    CONSTRAINT pipeline_node_runs_pkey PRIMARY KEY (id),
    CONSTRAINT pipeline_node_runs_run_id_fkey FOREIGN KEY (run_id) REFERENCES circle.pipeline_runs(id) ON DELETE CASCADE,
    CONSTRAINT ck_pipeline_node_runs_numbers CHECK (retry_count >= 0 AND duration_ms >= 0),
    CONSTRAINT ck_pipeline_node_runs_terminal_is_completed CHECK ((status = ANY ('{pending,running}')) = (completed_at IS NULL)),
    CONSTRAINT ck_pipeline_node_runs_times CHECK (completed_at >= started_at AND isfinite(started_at) AND isfinite(completed_at)),
    CONSTRAINT ck_pipeline_node_runs_type CHECK (node_type = ANY ('{trigger,agent,condition,action,parallel,delay}')),
    CONSTRAINT pipeline_node_runs_status_check CHECK (status = ANY (ARRAY['pending', 'running', 'completed', 'failed', 'skipped', 'cancelled']))
) WITH (fillfactor=50);

CREATE INDEX idx_pipeline_node_runs_run_id ON circle.pipeline_node_runs USING btree (run_id);
CREATE UNIQUE INDEX idx_pipeline_node_runs_run_node ON circle.pipeline_node_runs USING btree (run_id, node_id);
CREATE UNIQUE INDEX idx_pipeline_node_runs_run_position ON circle.pipeline_node_runs USING btree (run_id, "position");

CREATE TRIGGER pipeline_node_runs_after_insert AFTER INSERT ON circle.pipeline_node_runs REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_insert();
CREATE TRIGGER pipeline_node_runs_before BEFORE UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_node_runs_before();  -- ALWAYS
CREATE TRIGGER pipeline_node_runs_before_insert BEFORE INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (new.status <> 'pending') EXECUTE FUNCTION circle.pipeline_node_runs_before_insert();  -- ALWAYS
CREATE TRIGGER pipeline_node_runs_event AFTER UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (new.status <> 'cancelled') EXECUTE FUNCTION circle.pipeline_node_runs_event();
CREATE TRIGGER pipeline_node_runs_event_insert AFTER INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (new.status <> ALL (ARRAY['pending', 'cancelled'])) EXECUTE FUNCTION circle.pipeline_node_runs_event();
CREATE TRIGGER pipeline_node_runs_failed AFTER INSERT OR UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (new.status = 'failed') EXECUTE FUNCTION circle.pipeline_node_runs_failed();
CREATE TRIGGER pipeline_node_runs_json BEFORE INSERT OR UPDATE OF input_data, output_data ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (new.input_data <> '{}'::jsonb OR new.output_data <> '{}'::jsonb) EXECUTE FUNCTION circle.pipeline_node_runs_json();  -- ALWAYS

-- ---- table circle.pipeline_events

CREATE TABLE circle.pipeline_events (
    id bigint NOT NULL GENERATED BY DEFAULT AS IDENTITY (INCREMENT BY 131072),
    xid xid8 NOT NULL,
    run_id integer NOT NULL,
    node_id character varying(100),
    type character varying(50) NOT NULL,
    data jsonb NOT NULL DEFAULT '{}'::jsonb,
    created_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT pipeline_events_pkey PRIMARY KEY (xid, id)
);

CREATE INDEX idx_pipeline_events_run ON circle.pipeline_events USING btree (run_id, xid, id);

CREATE TRIGGER pipeline_events_frozen BEFORE UPDATE ON circle.pipeline_events
    FOR EACH ROW WHEN (new.xid <> '0'::xid8 OR new.id IS DISTINCT FROM old.id OR new.run_id IS DISTINCT FROM old.run_id OR new.node_id IS DISTINCT FROM old.node_id OR new.type IS DISTINCT FROM old.type OR new.data IS DISTINCT FROM old.data OR new.created_at IS DISTINCT FROM old.created_at) EXECUTE FUNCTION circle.pipeline_events_frozen();  -- ALWAYS

-- ---- alembic/sql/009b_lifecycle/2_errors.sql

-- PL001: an illegal transition, of a run where p_node_id is NULL, else of its node run.
CREATE OR REPLACE FUNCTION circle.refuse_transition(p_run_id bigint, p_node_id text, p_current text, p_requested text, p_reason text)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
DECLARE
    entity text := CASE WHEN p_node_id IS NULL THEN 'run' ELSE 'node run' END;
    id jsonb := coalesce(to_jsonb(p_run_id || '/' || p_node_id), to_jsonb(p_run_id));
BEGIN
    RAISE EXCEPTION '% % is % and can''t become %', entity, id #>> '{}', p_current,
        concat_ws(': ', coalesce(p_requested, 'NULL'), nullif(p_reason, ''))
        USING ERRCODE = 'PL001', DETAIL = jsonb_build_object('entity', entity, 'id', id, 'current', p_current,
                                                             'requested', p_requested, 'reason', coalesce(p_reason, ''));
END $function$;

-- PL002
CREATE OR REPLACE FUNCTION circle.refuse_unknown_pipeline(p_pipeline_id bigint)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
BEGIN
    RAISE EXCEPTION 'pipeline % does not exist', p_pipeline_id
        USING ERRCODE = 'PL002', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id);
END $function$;

-- PL007: the caller doesn't hold the run; PL003: there is no such run.
CREATE OR REPLACE FUNCTION circle.refuse_lease(p_run_id bigint)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
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
END $function$;

-- PL004
CREATE OR REPLACE FUNCTION circle.refuse_unknown_node(p_run_id bigint, p_node_id text)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
BEGIN
    RAISE EXCEPTION 'run % has no node %', p_run_id, left(p_node_id, 200)
        USING ERRCODE = 'PL004', DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', p_node_id);
END $function$;

-- An issue about a graph: a code of IssueCode in Python, and the path of the place, such as ["nodes", 3, "config", "task"].
CREATE OR REPLACE FUNCTION circle.graph_issue(p_code text, p_message text, p_loc jsonb DEFAULT '[]'::jsonb, p_node_id text DEFAULT NULL::text, p_edge_id text DEFAULT NULL::text)
 RETURNS jsonb
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT jsonb_build_object('code', p_code, 'message', left(p_message, 1000), 'loc', p_loc, 'node_id', left(p_node_id, 200),
                              'edge_id', left(p_edge_id, 200))
$function$;

-- Raises PL008 with a list of issues, unless it is NULL or empty.
CREATE OR REPLACE FUNCTION circle.refuse_issues(p_issues jsonb)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
BEGIN
    IF p_issues <> '[]' THEN
        RAISE EXCEPTION '%', p_issues -> 0 ->> 'message'
            USING ERRCODE = 'PL008', DETAIL = jsonb_build_object('issues', p_issues);
    END IF;
END $function$;

-- PL008 with one issue.
CREATE OR REPLACE FUNCTION circle.refuse_graph(p_code text, p_message text, p_loc jsonb DEFAULT '[]'::jsonb, p_node_id text DEFAULT NULL::text, p_edge_id text DEFAULT NULL::text)
 RETURNS void
 LANGUAGE sql
AS $function$
    SELECT circle.refuse_issues(jsonb_build_array(circle.graph_issue(p_code, p_message, p_loc, p_node_id, p_edge_id)))
$function$;

-- ---- alembic/sql/009b_lifecycle/3_graph.sql

-- The types of nodes; pipeline_node_runs has a CHECK with the same list.
CREATE OR REPLACE FUNCTION circle.node_types()
 RETURNS text[]
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT '{trigger,agent,condition,action,parallel,delay}'::text[]
$function$;

CREATE OR REPLACE FUNCTION circle.refuse_no_lists(p_nodes jsonb, p_edges jsonb)
 RETURNS void
 LANGUAGE plpgsql
 STABLE
AS $function$
BEGIN
    IF coalesce(jsonb_typeof(p_nodes), '') <> 'array' OR coalesce(jsonb_typeof(p_edges), '') <> 'array' THEN
        PERFORM circle.refuse_issues(jsonb_agg(circle.graph_issue('not_a_list', format('Invalid %s data: %s must be a list, not %s',
            l.word, l.key, coalesce(jsonb_typeof(l.list), 'null')), jsonb_build_array(l.key))))
        FROM (VALUES ('node', 'nodes', p_nodes), ('edge', 'edges', p_edges)) l (word, key, list)
        WHERE coalesce(jsonb_typeof(l.list), '') <> 'array';
    END IF;
END $function$;

-- Raises PL008 for a graph that can't be sorted. p_open has the number of unsorted predecessors of each node. Python reports the
-- same cycle: an edge from a node to itself, else the cycle that precedes the first unsorted node, found by following the last
-- unsorted predecessor of each node. It begins with the node of the cycle that stands first.
CREATE OR REPLACE FUNCTION circle.refuse_cycle(p_ids text[], p_sources integer[], p_targets integer[], p_open integer[])
 RETURNS void
 LANGUAGE plpgsql
 STABLE
AS $function$
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
END $function$;

-- Refuses what is no graph or can't be sorted; else each node's generation (longest path from a root), and the edges as places
-- in nodes, sorted, each pair once. Ids become integers once, by hash joins; generations then come from one pass over the
-- edges where the nodes stand in topological order already, else from Kahn's algorithm on arrays. No JIT: compiling the plans
-- would take longer than running them.
CREATE OR REPLACE FUNCTION circle.sort_graph(p_nodes jsonb, p_edges jsonb, OUT ids text[], OUT types text[], OUT sources integer[], OUT targets integer[], OUT generation integer[])
 RETURNS record
 LANGUAGE plpgsql
 STABLE
 SET enable_nestloop TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
AS $function$
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
END $function$;

-- A row for each node of a graph that can be sorted: positions by generation, then by place.
CREATE OR REPLACE FUNCTION circle.compile_graph(p_nodes jsonb, p_edges jsonb)
 RETURNS TABLE(node_position integer, id text, type text, preds integer[], succs integer[])
 LANGUAGE plpgsql
 STABLE
 SET enable_nestloop TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION circle.write_version(p_pipeline_id integer, p_version integer, p_nodes jsonb, p_edges jsonb)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
BEGIN
    INSERT INTO circle.pipeline_version_nodes
        (pipeline_id, version, position, node_id, node_type, predecessors, successors)
    SELECT p_pipeline_id, p_version, c.node_position, c.id, c.type, c.preds, c.succs
    FROM circle.compile_graph(p_nodes, p_edges) c;
    INSERT INTO circle.pipeline_versions (pipeline_id, version, nodes, edges, node_count)
    VALUES (p_pipeline_id, p_version, p_nodes, p_edges, jsonb_array_length(p_nodes));
END $function$;

CREATE OR REPLACE FUNCTION circle.pipelines_before()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    NEW.version := OLD.version + (NEW.nodes IS DISTINCT FROM OLD.nodes OR NEW.edges IS DISTINCT FROM OLD.edges)::integer;
    RETURN NEW;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipelines_after()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    PERFORM circle.write_version(NEW.id, NEW.version, NEW.nodes, NEW.edges);
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_versions_frozen()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    RAISE EXCEPTION 'versions of a pipeline are immutable' USING ERRCODE = 'integrity_constraint_violation';
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_versions_after_delete()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    DELETE FROM circle.pipeline_version_nodes WHERE pipeline_id = OLD.pipeline_id AND version = OLD.version;
    RETURN NULL;
END $function$;

-- ---- alembic/sql/009b_lifecycle/4_guards.sql

-- RUN_TRANSITIONS and NODE_TRANSITIONS of gathering_pipeline/lifecycle.py; a test compares them. Both functions are inlined.
CREATE OR REPLACE FUNCTION circle.run_may_become(p_current text, p_requested text)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT CASE p_current
        WHEN 'pending' THEN p_requested IN ('running', 'failed', 'cancelled')
        WHEN 'running' THEN p_requested IN ('pending', 'completed', 'failed', 'cancelled', 'timeout')
        ELSE false END
$function$;

CREATE OR REPLACE FUNCTION circle.node_may_become(p_current text, p_requested text)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT CASE p_current
        WHEN 'pending' THEN p_requested IN ('running', 'completed', 'failed', 'skipped', 'cancelled')
        WHEN 'running' THEN p_requested IN ('pending', 'completed', 'failed', 'cancelled')
        ELSE false END
$function$;

CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before_insert()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    IF NEW.status = 'running' THEN
        NEW.started_at := coalesce(NEW.started_at, clock_timestamp());
    ELSE
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        NEW.duration_ms := CASE WHEN NEW.duration_ms <> 0 OR NEW.started_at IS NULL THEN NEW.duration_ms
            ELSE least(extract(epoch FROM NEW.completed_at - NEW.started_at) * 1000, 2147483647)::integer END;
    END IF;
    RETURN NEW;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_runs_before()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF current_setting('session_replication_role') <> 'replica' THEN
            SELECT v.version INTO NEW.pipeline_version FROM circle.pipelines p
            JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
            WHERE p.id = NEW.pipeline_id;
        END IF;
    ELSIF NOT circle.run_may_become(OLD.status, NEW.status) THEN
        IF OLD.status = NEW.status AND current_setting('session_replication_role') = 'replica' THEN
            RETURN NEW;   -- updates of a logical subscriber name every column, changed or not
        END IF;
        -- the current status is refused, too: of two writers that end a run only one may succeed
        PERFORM circle.refuse_transition(OLD.id, NULL, OLD.status, NEW.status, '');
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
END $function$;

-- A trigger after the insert, because ON CONFLICT DO UPDATE proposes rows that are never inserted.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_insert()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    PERFORM circle.refuse_transition(NEW.id, NULL, 'new', NEW.status, '');
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_runs_terminal()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    PERFORM circle.refuse_transition(OLD.id, NULL, OLD.status, NEW.status,
                                     'the end and the error of a terminal run are final, and claim tokens only grow');
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_runs_after()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    IF NEW.status IN ('failed', 'cancelled', 'timeout') THEN
        UPDATE circle.pipeline_node_runs SET status = 'cancelled'
        WHERE run_id = NEW.id AND (status IN ('pending', 'running')) IS TRUE;
    ELSIF EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = NEW.id AND (
            status = 'running' OR NEW.status = 'completed' AND status IN ('pending', 'failed'))) THEN
        PERFORM circle.refuse_transition(NEW.id, NULL, OLD.status, NEW.status, 'some of its nodes are live or failed');
    END IF;
    RETURN NULL;
END $function$;

-- A hot path: it has few expressions, because PL/pgSQL prepares each of them in every transaction.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
DECLARE
    run_status text;
BEGIN
    IF NEW.status = 'running' THEN
        -- locks the run, so that it isn't released concurrently; functions of this package hold the lock already
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = NEW.run_id FOR NO KEY UPDATE;
    ELSE
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = NEW.run_id;
    END IF;
    IF NOT circle.node_may_become(OLD.status, NEW.status)
       -- a node moves only while its run is running, or is cancelled with it; a replica may apply the run's row later
       OR NOT (run_status = 'running' OR NEW.status = 'cancelled' AND run_status IN ('failed', 'cancelled', 'timeout')
               OR current_setting('session_replication_role') = 'replica') THEN
        IF OLD.status = NEW.status AND current_setting('session_replication_role') = 'replica' THEN
            RETURN NEW;   -- as in pipeline_runs_before
        END IF;
        PERFORM circle.refuse_transition(OLD.run_id, OLD.node_id, OLD.status, NEW.status,
                                         CASE WHEN run_status <> 'running' THEN 'its run is ' || run_status END);
    END IF;
    IF NEW.status = 'running' THEN
        NEW.started_at := CASE WHEN NEW.started_at IS DISTINCT FROM OLD.started_at THEN NEW.started_at ELSE clock_timestamp() END;
    ELSIF NEW.status <> 'pending' THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        NEW.duration_ms := CASE WHEN NEW.duration_ms <> 0 OR NEW.started_at IS NULL THEN NEW.duration_ms
            ELSE least(extract(epoch FROM NEW.completed_at - NEW.started_at) * 1000, 2147483647)::integer END;
    END IF;
    RETURN NEW;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_insert()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
DECLARE
    new_run record;
    run_status text;
BEGIN
    -- a query on a transition table is planned on every call: this one is small, and the one in the loop is cached
    FOR new_run IN SELECT run_id, max(node_id) AS node_id, bool_or(status = 'running') AS running FROM new_rows
                   WHERE status IN ('pending', 'running') GROUP BY run_id ORDER BY run_id LOOP
        -- locks the run, so that it doesn't end concurrently
        SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = new_run.run_id FOR NO KEY UPDATE;
        IF run_status <> 'running' AND (run_status <> 'pending' OR new_run.running) THEN
            PERFORM circle.refuse_transition(new_run.run_id, new_run.node_id, 'new',
                                             CASE WHEN new_run.running THEN 'running' ELSE 'pending' END,
                                             'its run is ' || run_status);
        END IF;
    END LOOP;
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_failed()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    UPDATE circle.pipeline_runs SET failed_node = NEW.node_id WHERE id = NEW.run_id AND failed_node IS NULL;
    RETURN NULL;
END $function$;

-- ---- alembic/sql/009b_lifecycle/5_runs.sql

-- Whether the caller holds the run: its token is the run's, or it gives none and the run has no lease. Inlined.
CREATE OR REPLACE FUNCTION circle.holds_run(p_claim_token bigint, p_lease_expires_at timestamp with time zone, p_token bigint)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT coalesce(p_claim_token = p_token, p_lease_expires_at IS NULL)
$function$;

-- Raises why a call on a run is refused.
CREATE OR REPLACE FUNCTION circle.refuse_run(p_run_id bigint, p_token bigint, p_requested text, p_reason text DEFAULT ''::text)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token) THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    PERFORM circle.refuse_transition(p_run_id, NULL, r.status, p_requested, p_reason);
END $function$;

-- Locks the run for a caller that holds it, and starts a pending one.
CREATE OR REPLACE FUNCTION circle.lock_run(p_run_id bigint, p_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token)
       OR r.status NOT IN ('pending', 'running') THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    ELSIF r.status = 'pending' THEN
        UPDATE circle.pipeline_runs SET status = 'running' WHERE id = p_run_id RETURNING * INTO r;
    END IF;
    RETURN r;
END $function$;

-- Ends a locked run. The trigger pipeline_runs_after cancels its live nodes.
CREATE OR REPLACE FUNCTION circle.end_run(p_run_id bigint, p_status text, p_error text)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
AS $function$
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
END $function$;

-- Ends a locked run in which nothing is running, ready or waiting for a retry; else returns NULL.
CREATE OR REPLACE FUNCTION circle.end_run_if_done(p_run_id bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
AS $function$
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
        -- the pending nodes wait for a cancelled one
        UPDATE circle.pipeline_node_runs SET status = 'cancelled' WHERE run_id = p_run_id AND status = 'pending';
    END IF;
    RETURN circle.end_run(p_run_id, 'completed', NULL);
END $function$;

CREATE OR REPLACE FUNCTION circle.create_run(p_pipeline_id bigint, p_trigger_data jsonb, p_key text)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r circle.pipeline_runs;
    pipeline_status text;
    created integer;
    expected integer;
BEGIN
    -- shared among creators; delete_pipeline waits for this lock before it takes any other
    PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(p_pipeline_id));
    -- the first run with this key is returned even if the pipeline has been paused since
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
            PERFORM circle.refuse_graph('no_nodes', 'Pipeline must have at least one node', '["nodes"]');
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
        PERFORM circle.refuse_unknown_pipeline(p_pipeline_id);
    ELSIF pipeline_status = 'active' THEN
        PERFORM circle.sort_graph(p.nodes, p.edges) FROM circle.pipelines p WHERE p.id = p_pipeline_id;
        PERFORM circle.refuse_graph('no_version', 'the stored graph was never compiled: save it again');
    END IF;
    RAISE EXCEPTION 'pipeline % is %, not active', p_pipeline_id, pipeline_status USING ERRCODE = 'PL006',
        DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'status', pipeline_status);
END $function$;

CREATE OR REPLACE FUNCTION circle.start_run(p_run_id bigint, p_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    UPDATE circle.pipeline_runs SET status = 'running'
    WHERE id = p_run_id AND circle.run_may_become(status, 'running')
      AND circle.holds_run(claim_token, lease_expires_at, p_token)
    RETURNING * INTO r;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    END IF;
    RETURN r;
END $function$;

-- Ends a run with the caller's status: completed, failed or cancelled. A cancel needs no token.
CREATE OR REPLACE FUNCTION circle.conclude_run(p_run_id bigint, p_status text, p_error text, p_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (p_status = 'cancelled' OR circle.holds_run(claim_token, lease_expires_at, p_token))
      AND circle.run_may_become(status, p_status)
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, p_status);
    END IF;
    RETURN circle.end_run(p_run_id, p_status, p_error);
END $function$;

-- Ends a run with the status that follows from its nodes.
CREATE OR REPLACE FUNCTION circle.finish_run(p_run_id bigint, p_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'completed');
    END IF;
    r := circle.end_run_if_done(p_run_id);
    IF r.id IS NULL THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'completed', 'some of its nodes are running, ready or waiting for a retry');
    END IF;
    RETURN r;
END $function$;

CREATE OR REPLACE FUNCTION circle.append_run_log(p_run_id bigint, p_entry jsonb, p_token bigint)
 RETURNS void
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
    UPDATE circle.pipeline_runs SET logs = coalesce(logs, '[]') || jsonb_build_array(p_entry)
    WHERE id = p_run_id AND circle.holds_run(claim_token, lease_expires_at, p_token);
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'logged');
    END IF;
END $function$;

-- A page of the history, newest first. The first column of the order is compared by >= and <, because with "=" the planner
-- would drop it from the order and might scan the primary key through the runs of other pipelines. Without sorts only the
-- right index remains.
CREATE OR REPLACE FUNCTION circle.page_of_runs(p_pipeline_id bigint, p_status text, p_after bigint, p_limit integer)
 RETURNS SETOF circle.pipeline_runs
 LANGUAGE plpgsql
 STABLE
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_sort TO 'off'
 SET enable_incremental_sort TO 'off'
 SET enable_seqscan TO 'off'
AS $function$
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
END $function$;

-- Locks the runs before their pipeline. The advisory lock keeps create_run out.
CREATE OR REPLACE FUNCTION circle.delete_pipeline(p_pipeline_id bigint, p_force boolean)
 RETURNS void
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
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
        PERFORM circle.refuse_unknown_pipeline(p_pipeline_id);
    END IF;
    SELECT count(*) INTO live FROM circle.pipeline_runs
    WHERE pipeline_id = p_pipeline_id AND status IN ('pending', 'running');
    IF live > 0 AND NOT p_force THEN
        RAISE EXCEPTION 'pipeline % has % live runs', p_pipeline_id, live USING ERRCODE = 'PL010',
            DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'live_runs', live);
    END IF;
    DELETE FROM circle.pipelines WHERE id = p_pipeline_id;
END $function$;

-- ---- alembic/sql/009b_lifecycle/6_nodes.sql

-- Returns what blocks a pending node, NULL if it is ready. RETURNS SETOF, because a function with a subquery is inlined only in
-- FROM.
CREATE OR REPLACE FUNCTION circle.blocked_by(p_run_status text, p_failed_node text, p_run_id integer, p_predecessors integer[], p_retry_count integer, p_available_at timestamp with time zone)
 RETURNS SETOF text
 LANGUAGE sql
 STABLE
AS $function$
    SELECT CASE
        WHEN p_available_at > clock_timestamp() THEN 'retry'
        WHEN (p_run_status = 'running') IS NOT TRUE THEN 'run'
        WHEN p_failed_node IS NOT NULL AND p_retry_count = 0 THEN 'failure'
        WHEN p_predecessors <> '{}' THEN (
            SELECT CASE WHEN bool_and(p.status IN ('completed', 'skipped')) IS NOT TRUE THEN 'predecessors'
                        WHEN bool_or(p.status = 'completed') IS NOT TRUE THEN 'skipped' END
            FROM circle.pipeline_node_runs p WHERE p.run_id = p_run_id AND p.position = ANY (p_predecessors))
    END
$function$;

CREATE OR REPLACE VIEW circle.pending_node_runs AS
 SELECT n.id,
    n.run_id,
    n.node_id,
    n."position",
    b.reason AS blocked_by,
    ARRAY( SELECT p.node_id
           FROM circle.pipeline_node_runs p
          WHERE ((p.run_id = n.run_id) AND (p."position" = ANY (n.predecessors)) AND ((p.status)::text <> ALL ((ARRAY['completed'::character varying, 'skipped'::character varying])::text[])))
          ORDER BY p."position") AS waiting_for
   FROM ((circle.pipeline_node_runs n
     JOIN circle.pipeline_runs r ON ((r.id = n.run_id)))
     CROSS JOIN LATERAL circle.blocked_by((r.status)::text, (r.failed_node)::text, n.run_id, n.predecessors, n.retry_count, n.available_at) b(reason))
  WHERE ((n.status)::text = 'pending'::text);

CREATE OR REPLACE VIEW circle.startable_node_runs AS
 SELECT id,
    run_id,
    node_id,
    "position"
   FROM circle.pending_node_runs n
  WHERE (blocked_by IS NULL);

-- Raises why a call on a node run is refused.
CREATE OR REPLACE FUNCTION circle.refuse_node(p_run_id bigint, p_node_id text, p_token bigint, p_requested text)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
DECLARE
    r circle.pipeline_runs;
    n circle.pipeline_node_runs;
    p record;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token) THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    SELECT * INTO n FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND node_id = p_node_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_unknown_node(p_run_id, p_node_id);
    ELSIF r.status = 'running' AND n.status = 'pending' AND p_requested = 'running' THEN
        SELECT blocked_by, to_jsonb(waiting_for) AS waiting_for INTO p
        FROM circle.pending_node_runs WHERE run_id = p_run_id AND node_id = p_node_id;
        RAISE EXCEPTION 'node % of run % is not ready', p_node_id, p_run_id USING ERRCODE = 'PL005',
            DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', p_node_id, 'waiting_for', coalesce(p.waiting_for, '[]'),
                'reason', CASE
                    WHEN p.waiting_for <> '[]' THEN ''
                    WHEN p.blocked_by = 'retry' THEN 'its retry is due at ' || n.available_at
                    WHEN p.blocked_by = 'failure' THEN format('node %L failed, and only retries start after a failure', r.failed_node)
                    WHEN p.blocked_by IN ('predecessors', 'skipped') THEN 'none of its predecessors is completed: skip it, too'
                    ELSE 'it became ready during this call: try again' END);
    END IF;
    PERFORM circle.refuse_transition(p_run_id, p_node_id, n.status, p_requested,
                                     CASE WHEN r.status <> 'running' THEN 'its run is ' || r.status END);
END $function$;

-- Skips the nodes all of whose predecessors are skipped, transitively, from the nodes at these positions on. Returns these
-- positions and those of the nodes that follow the skipped ones.
CREATE OR REPLACE FUNCTION circle.skip_followers(p_run_id bigint, p_positions integer[])
 RETURNS integer[]
 LANGUAGE plpgsql
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION circle.start_node(p_run_id bigint, p_node_id text, p_input jsonb, p_token bigint)
 RETURNS circle.pipeline_node_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    failed text;
    started circle.pipeline_node_runs;
BEGIN
    UPDATE circle.pipeline_runs SET current_node = left(p_node_id, 100)
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    RETURNING failed_node INTO failed;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs n SET status = 'running', input_data = coalesce(p_input, n.input_data)
        WHERE n.run_id = p_run_id AND n.node_id = p_node_id AND n.status = 'pending'
          AND (SELECT b.reason FROM circle.blocked_by('running', failed, n.run_id, n.predecessors, n.retry_count,
                                                      n.available_at) b (reason)) IS NULL
        RETURNING * INTO started;
        IF FOUND THEN
            RETURN started;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'running');
END $function$;

CREATE OR REPLACE FUNCTION circle.complete_node(p_run_id bigint, p_node_id text, p_output jsonb, p_token bigint)
 RETURNS circle.pipeline_node_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs
        SET status = 'completed', output_data = coalesce(p_output, output_data), error_message = NULL
        WHERE run_id = p_run_id AND node_id = p_node_id AND circle.node_may_become(status, 'completed')
        RETURNING * INTO n;
        IF FOUND THEN
            RETURN n;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'completed');
END $function$;

CREATE OR REPLACE FUNCTION circle.skip_node(p_run_id bigint, p_node_id text, p_token bigint)
 RETURNS circle.pipeline_node_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs SET status = 'skipped'
        WHERE run_id = p_run_id AND node_id = p_node_id AND circle.node_may_become(status, 'skipped') RETURNING * INTO n;
        IF FOUND THEN
            PERFORM circle.skip_followers(p_run_id, n.successors);
            RETURN n;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'skipped');
END $function$;

-- Records that the attempt of a node, or of all running nodes, failed: it is retried if retries remain, else failed.
CREATE OR REPLACE FUNCTION circle.fail_attempts(p_run_id bigint, p_node_id text, p_error text, p_retryable boolean)
 RETURNS SETOF circle.pipeline_node_runs
 LANGUAGE plpgsql
AS $function$
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
                                      ELSE t.node_id = p_node_id AND circle.node_may_become(t.status, 'failed') END
    ) a
    WHERE n.id = a.id
    RETURNING n.*;
END $function$;

CREATE OR REPLACE FUNCTION circle.fail_node(p_run_id bigint, p_node_id text, p_error text, p_retryable boolean, p_token bigint)
 RETURNS circle.pipeline_node_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        SELECT * INTO n FROM circle.fail_attempts(p_run_id, p_node_id, p_error, p_retryable);
        IF FOUND THEN
            RETURN n;
        END IF;
    END IF;
    PERFORM circle.refuse_node(p_run_id, p_node_id, p_token, 'failed');
END $function$;

-- Records results, all or none. Returns the positions of the nodes that may have become ready.
CREATE OR REPLACE FUNCTION circle.apply_results(p_run_id bigint, p_results jsonb)
 RETURNS integer[]
 LANGUAGE plpgsql
AS $function$
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
            -- of a node that is reported after it ran
            started_at = coalesce(n.started_at, CASE WHEN x.status IN ('completed', 'failed') THEN
                clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0) END)
        FROM results x
        WHERE n.run_id = p_run_id AND n.node_id = x.node_id
          -- NOT IN, because with a list of the terminal statuses the planner would expect few results and join by loops
          AND circle.node_may_become(n.status, x.status) AND x.status NOT IN ('pending', 'running')
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
            PERFORM circle.refuse_unknown_node(p_run_id, bad.node_id);
        END IF;
        PERFORM circle.refuse_transition(p_run_id, bad.node_id, bad.current, bad.status,
                                         CASE WHEN bad.times > 1 THEN 'the batch has more than one result for it' END);
    END IF;
    IF done.failed IS NOT NULL THEN
        -- the failed node is the first in execution order of the first batch with failures, in whatever order rows were updated
        UPDATE circle.pipeline_runs SET failed_node = (
            SELECT node_id FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'failed'
            ORDER BY position, id LIMIT 1)
        WHERE id = p_run_id AND failed_node = ANY (done.failed);
    END IF;
    IF done.skipped THEN
        RETURN circle.skip_followers(p_run_id, done.following);
    END IF;
    RETURN done.following;
END $function$;

CREATE OR REPLACE FUNCTION circle.advance_run(p_run_id bigint, p_results jsonb, p_token bigint)
 RETURNS SETOF circle.pipeline_node_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r circle.pipeline_runs;
    started circle.pipeline_node_runs;
    fresh boolean;
    following integer[];   -- positions that may have become ready; NULL: any
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF (r.status = 'running' AND circle.holds_run(r.claim_token, r.lease_expires_at, p_token)) IS NOT TRUE THEN
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
        following := NULL;   -- retries that are due can be anywhere
    END IF;
    IF following IS NULL THEN
        FOR started IN
            UPDATE circle.pipeline_node_runs n SET status = 'running'
            WHERE n.run_id = p_run_id AND n.status = 'pending'
              AND (SELECT b.reason FROM circle.blocked_by(r.status, r.failed_node, n.run_id, n.predecessors, n.retry_count,
                                                          n.available_at) b (reason)) IS NULL
            RETURNING * LOOP
            RETURN NEXT started;
        END LOOP;
    ELSE
        FOR started IN
            UPDATE circle.pipeline_node_runs n SET status = 'running'
            WHERE n.run_id = p_run_id AND n.position = ANY (following) AND n.status = 'pending'
              AND (SELECT b.reason FROM circle.blocked_by(r.status, r.failed_node, n.run_id, n.predecessors, n.retry_count,
                                                          n.available_at) b (reason)) IS NULL
            RETURNING * LOOP
            RETURN NEXT started;
        END LOOP;
    END IF;
    IF FOUND THEN
        UPDATE circle.pipeline_runs SET current_node = started.node_id WHERE id = p_run_id;
    ELSE
        PERFORM circle.end_run_if_done(p_run_id);
    END IF;
END $function$;

CREATE OR REPLACE FUNCTION circle.record_results(p_run_id bigint, p_results jsonb, p_token bigint)
 RETURNS void
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
    PERFORM circle.lock_run(p_run_id, p_token);
    PERFORM circle.apply_results(p_run_id, p_results);
END $function$;

-- ---- alembic/sql/009b_lifecycle/7_workers.sql

CREATE OR REPLACE FUNCTION circle.claim_runs(p_worker_id text, p_lease interval, p_limit integer)
 RETURNS SETOF circle.pipeline_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
    RETURN QUERY WITH picked AS MATERIALIZED (
        SELECT id FROM circle.pipeline_runs WHERE status = 'pending' ORDER BY id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE circle.pipeline_runs r SET status = 'running', worker_id = p_worker_id, claim_token = r.claim_token + 1,
        claim_count = r.claim_count + 1, lease_expires_at = clock_timestamp() + p_lease
    WHERE r.id = ANY (ARRAY(SELECT picked.id FROM picked)) RETURNING r.*;
END $function$;

CREATE OR REPLACE FUNCTION circle.heartbeat_run(p_run_id bigint, p_token bigint, p_lease interval)
 RETURNS timestamp with time zone
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    expires timestamptz;
BEGIN
    UPDATE circle.pipeline_runs SET lease_expires_at = clock_timestamp() + p_lease
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND claim_token = p_token AND lease_expires_at IS NOT NULL
    RETURNING lease_expires_at INTO expires;
    IF NOT FOUND THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    RETURN expires;
END $function$;

-- Returns a locked run without running nodes to pending. Its token grows, so that the last holder's is stale.
CREATE OR REPLACE FUNCTION circle.requeue_run(p_run_id bigint, p_counts integer)
 RETURNS circle.pipeline_runs
 LANGUAGE sql
AS $function$
    UPDATE circle.pipeline_runs SET status = 'pending', worker_id = NULL, lease_expires_at = NULL,
        claim_token = claim_token + 1, claim_count = claim_count - p_counts
    WHERE id = p_run_id RETURNING *
$function$;

CREATE OR REPLACE FUNCTION circle.release_run(p_run_id bigint, p_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND claim_token = p_token AND lease_expires_at IS NOT NULL
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    -- the release is deliberate: neither the attempts of its nodes nor the claim count
    UPDATE circle.pipeline_node_runs SET status = 'pending' WHERE run_id = p_run_id AND status = 'running';
    RETURN circle.requeue_run(p_run_id, 1);
END $function$;

CREATE OR REPLACE FUNCTION circle.recover_runs(p_limit integer, p_max_claims integer)
 RETURNS SETOF circle.pipeline_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r record;
    result circle.pipeline_runs;
BEGIN
    -- in the order of pipelines, so that two sweeps lock counters in the same order
    FOR r IN SELECT id, claim_count FROM (
                 SELECT id, pipeline_id, claim_count FROM circle.pipeline_runs
                 WHERE status = 'running' AND lease_expires_at < clock_timestamp()
                 ORDER BY id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED) t
             ORDER BY pipeline_id, id LOOP
        PERFORM circle.fail_attempts(r.id, NULL, 'the worker''s lease ran out', true);
        result := circle.end_run_if_done(r.id);
        IF result.id IS NULL AND r.claim_count >= p_max_claims THEN
            result := circle.end_run(r.id, 'failed', format('its lease ran out, and it was claimed %s times', r.claim_count));
        ELSIF result.id IS NULL THEN
            result := circle.requeue_run(r.id, 0);
        END IF;
        RETURN NEXT result;
    END LOOP;
END $function$;

CREATE OR REPLACE FUNCTION circle.expire_runs(p_limit integer)
 RETURNS SETOF circle.pipeline_runs
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION circle.purge_runs(p_older_than interval, p_limit integer)
 RETURNS integer
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_sort TO 'off'
AS $function$
DECLARE
    before timestamptz := clock_timestamp() - p_older_than;   -- a constant, so that it bounds the index scan
    deleted integer;
BEGIN
    WITH old AS MATERIALIZED (
        SELECT id FROM circle.pipeline_runs WHERE completed_at < before
        ORDER BY completed_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    )
    DELETE FROM circle.pipeline_runs WHERE id = ANY (ARRAY(SELECT old.id FROM old));
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END $function$;

-- ---- alembic/sql/010b_graph_guard/1_values.sql

-- Blanks are those of Unicode's White_Space and the four separators U+001C to U+001F, as Python's str.strip has them.
CREATE OR REPLACE FUNCTION circle.trimmed(p_text text)
 RETURNS text
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT btrim(p_text, U&' \0009\000A\000B\000C\000D\001C\001D\001E\001F\0085\00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\2028\2029\202F\205F\3000')
$function$;

-- Whether a text certainly begins with a character that is no blank; ascii() returns the code point.
CREATE OR REPLACE FUNCTION circle.begins_well(p_text text)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT ascii(p_text) BETWEEN 33 AND 126 OR ascii(p_text) BETWEEN 161 AND 5759 OR ascii(p_text) >= 12289
$function$;

-- Whether all ids certainly have neither leading nor trailing blanks and are not empty; false is no proof of the contrary.
CREATE OR REPLACE FUNCTION circle.surely_trimmed(p_ids text[])
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT array_to_string(p_ids, E'\n') COLLATE "C" !~ ('(^|\n)([^!-~\u00A1-\u167F\u3001-\U0010FFFF]|$)'
                                                         '|[^!-~\u00A1-\u167F\u3001-\U0010FFFF](\n|$)')
$function$;

-- JSON that Python can't read: more than 64 levels, or a number out of the range of floats. jsonb_path_match ignores values that
-- are no numbers; both functions return NULL for NULL.
CREATE OR REPLACE FUNCTION circle.nested_too_deep(p_json jsonb)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT jsonb_path_exists(p_json, 'strict $.**{64 to last} ? (@.type() == "object" || @.type() == "array")')
$function$;

CREATE OR REPLACE FUNCTION circle.number_too_large(p_json jsonb)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT jsonb_path_match(p_json, '$[*].** > 1.7976931348623157e308 || $[*].** < -1.7976931348623157e308')
$function$;

-- ---- alembic/sql/010b_graph_guard/2_graph.sql

-- A row for each invalid value of a node, and for each configuration that a draft may lack; keys is the path within the node.
-- The first condition passes by the nodes that are certainly valid, which is all that most graphs cost.
CREATE OR REPLACE FUNCTION circle.node_findings(p_nodes jsonb)
 RETURNS TABLE(place bigint, id text, code text, message text, keys jsonb)
 LANGUAGE sql
 STABLE
AS $function$
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
$function$;

CREATE OR REPLACE FUNCTION circle.edge_findings(p_edges jsonb)
 RETURNS TABLE(place bigint, id text, code text, message text, keys jsonb)
 LANGUAGE sql
 STABLE
AS $function$
    SELECT e.ord - 1, e.id, f.code, format('edges[%s]%s', e.ord - 1, f.message), f.keys
    FROM (
        SELECT ord, edge, edge ->> 'id' AS id FROM jsonb_array_elements(p_edges) WITH ORDINALITY e (edge, ord) OFFSET 0
    ) e
    CROSS JOIN LATERAL (VALUES
        (jsonb_typeof(e.edge) <> 'object', 'invalid_edge', ' is not an object', '[]'::jsonb),
        (jsonb_typeof(e.edge -> 'id') IS DISTINCT FROM 'string', 'invalid_id', '.id is not a string', '["id"]'),
        (jsonb_typeof(e.edge -> 'id') = 'string' AND circle.trimmed(e.id) = '', 'invalid_id', '.id is empty or blank', '["id"]'),
        (circle.trimmed(e.id) NOT IN ('', e.id), 'invalid_id', '.id has leading or trailing blanks', '["id"]'),
        (char_length(e.id) > 100, 'invalid_id', '.id is longer than 100 characters', '["id"]'),
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
$function$;

-- Raises PL008 for JSON that Python can't read back, with the path of the first such place.
CREATE OR REPLACE FUNCTION circle.refuse_unreadable(p_key text, p_json jsonb)
 RETURNS void
 LANGUAGE plpgsql
 STABLE
AS $function$
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
END $function$;

-- Raises PL008 with the findings, at most 20 of nodes and 20 of edges.
CREATE OR REPLACE FUNCTION circle.check_graph(p_nodes jsonb, p_edges jsonb, p_active boolean)
 RETURNS void
 LANGUAGE plpgsql
 STABLE
 SET jit TO 'off'
AS $function$
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
        array_position(edge_ids, NULL) IS NOT NULL OR longest > 100
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
END $function$;

CREATE OR REPLACE FUNCTION circle.pipelines_accept()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
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
END $function$;

-- ---- alembic/sql/010b_graph_guard/3_json.sql

CREATE OR REPLACE FUNCTION circle.refuse_json(p_where text, p_table name, p_trigger name)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
BEGIN
    RAISE EXCEPTION '%: nested deeper than 64, or a number too large for a float', p_where
        USING ERRCODE = 'check_violation', SCHEMA = 'circle', TABLE = p_table, CONSTRAINT = p_trigger;
END $function$;

-- Only changed values are checked: else a run with values from before this revision could never end, and nothing could be
-- appended to such logs. OLD is NULL in an INSERT.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_json()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    IF NEW.trigger_data IS DISTINCT FROM OLD.trigger_data
       AND (circle.nested_too_deep(NEW.trigger_data) OR circle.number_too_large(NEW.trigger_data))
       OR NEW.logs IS DISTINCT FROM OLD.logs
       AND (circle.nested_too_deep(NEW.logs) OR circle.number_too_large(NEW.logs))
       AND (circle.nested_too_deep(OLD.logs) OR circle.number_too_large(OLD.logs)) IS NOT TRUE THEN
        PERFORM circle.refuse_json(format('trigger_data or logs of run %s', NEW.id), TG_TABLE_NAME, TG_NAME);
    END IF;
    RETURN NEW;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_json()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    IF NEW.input_data IS DISTINCT FROM OLD.input_data
       AND (circle.nested_too_deep(NEW.input_data) OR circle.number_too_large(NEW.input_data))
       OR NEW.output_data IS DISTINCT FROM OLD.output_data
       AND (circle.nested_too_deep(NEW.output_data) OR circle.number_too_large(NEW.output_data)) THEN
        PERFORM circle.refuse_json(format('input_data or output_data of node %s of run %s', NEW.node_id, NEW.run_id),
                                   TG_TABLE_NAME, TG_NAME);
    END IF;
    RETURN NEW;
END $function$;

-- ---- alembic/sql/011b_events/1_log.sql

-- Inlined. xid8 has no arithmetic, hence the casts.
CREATE OR REPLACE FUNCTION circle.event_xid()
 RETURNS xid8
 LANGUAGE sql
AS $function$
    SELECT greatest(pg_current_xact_id(), (pg_snapshot_xmax(pg_current_snapshot())::text::bigint - 1)::text::xid8)
$function$;

-- ---- alembic/sql/011b_events/2_maintenance.sql

CREATE OR REPLACE FUNCTION circle.pipeline_events_frozen()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    RAISE EXCEPTION 'events are immutable' USING ERRCODE = 'integrity_constraint_violation';
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_events_notify()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    NOTIFY circle_events;
    RETURN NULL;
END $function$;

-- Switches whether commits wake listeners, which poll otherwise. Off by default, because commits that notify are serialized.
CREATE OR REPLACE FUNCTION circle.notify_events(p_on boolean)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
BEGIN
    DROP TRIGGER IF EXISTS pipeline_events_notify ON circle.pipeline_events;
    IF p_on THEN
        CREATE TRIGGER pipeline_events_notify AFTER INSERT ON circle.pipeline_events
            FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_events_notify();
    END IF;
END $function$;

-- Moves restored events before all others, in their order, after a restore into a cluster whose transactions have lower numbers.
-- Has to be called before events are read. Returns the number of changed events. Later events have higher ids.
CREATE OR REPLACE FUNCTION circle.reset_event_xids()
 RETURNS bigint
 LANGUAGE plpgsql
AS $function$
DECLARE
    changed bigint;
BEGIN
    UPDATE circle.pipeline_events SET xid = '0' WHERE xid <> '0' AND id <= (
        SELECT max(id) FROM circle.pipeline_events WHERE xid >= pg_snapshot_xmax(pg_current_snapshot()));
    GET DIAGNOSTICS changed = ROW_COUNT;
    RETURN changed;
END $function$;

-- ---- alembic/sql/011b_events/3_reads.sql

-- EventType, RUN_EVENTS and NODE_EVENTS of the package (events.py, lifecycle.py); a test compares them.
CREATE OR REPLACE FUNCTION circle.event_types()
 RETURNS text[]
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT ARRAY['pipeline_run.started', 'pipeline_run.completed', 'pipeline_run.failed', 'pipeline_run.cancelled',
                 'pipeline_run.timeout', 'pipeline_node.started', 'pipeline_node.completed', 'pipeline_node.failed',
                 'pipeline_node.skipped', 'pipeline_node.retrying']
$function$;

-- The event of a run's new status; NULL where it has none. A run that returns to pending has an event when it starts again.
CREATE OR REPLACE FUNCTION circle.run_event(p_status text)
 RETURNS text
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT CASE p_status
        WHEN 'running' THEN 'pipeline_run.started'
        WHEN 'completed' THEN 'pipeline_run.completed'
        WHEN 'failed' THEN 'pipeline_run.failed'
        WHEN 'cancelled' THEN 'pipeline_run.cancelled'
        WHEN 'timeout' THEN 'pipeline_run.timeout' END
$function$;

-- The event of a node run's new status; NULL where it has none. A cancelled node has its run's event.
CREATE OR REPLACE FUNCTION circle.node_event(p_status text)
 RETURNS text
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT CASE p_status
        WHEN 'running' THEN 'pipeline_node.started'
        WHEN 'completed' THEN 'pipeline_node.completed'
        WHEN 'failed' THEN 'pipeline_node.failed'
        WHEN 'skipped' THEN 'pipeline_node.skipped'
        WHEN 'pending' THEN 'pipeline_node.retrying' END
$function$;

CREATE OR REPLACE FUNCTION circle.page_of_events(p_run_id bigint, p_xid xid8, p_id bigint, p_limit integer)
 RETURNS SETOF circle.pipeline_events
 LANGUAGE plpgsql
 STABLE
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_sort TO 'off'
 SET enable_incremental_sort TO 'off'
AS $function$
BEGIN
    IF p_run_id IS NULL THEN
        RETURN QUERY SELECT * FROM circle.pipeline_events
        WHERE (xid, id) > (p_xid, p_id) AND xid < pg_snapshot_xmin(pg_current_snapshot()) AND type = ANY (circle.event_types())
        ORDER BY xid, id LIMIT p_limit;
    ELSE
        -- >= and <=, because with "=" the planner would drop run_id from the order and might use the other index
        RETURN QUERY SELECT * FROM circle.pipeline_events
        WHERE run_id >= p_run_id AND run_id <= p_run_id
          AND (run_id, xid, id) > (p_run_id, p_xid, p_id) AND xid < pg_snapshot_xmin(pg_current_snapshot())
          AND type = ANY (circle.event_types())
        ORDER BY run_id, xid, id LIMIT p_limit;
    END IF;
END $function$;

-- Later events are younger, so only the first ones can be old enough.
CREATE OR REPLACE FUNCTION circle.purge_events(p_older_than interval, p_limit integer)
 RETURNS integer
 LANGUAGE plpgsql
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_seqscan TO 'off'
 SET enable_sort TO 'off'
AS $function$
DECLARE
    deleted integer;
BEGIN
    WITH oldest AS MATERIALIZED (
        SELECT xid, id, created_at FROM circle.pipeline_events ORDER BY xid, id LIMIT p_limit
    )
    DELETE FROM circle.pipeline_events e USING oldest o
    WHERE e.xid = o.xid AND e.id = o.id AND o.created_at < clock_timestamp() - p_older_than;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END $function$;

-- ---- alembic/sql/011b_events/4_writers.sql

-- A hot path: one statement, because PL/pgSQL prepares each expression in every transaction.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_event()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    INSERT INTO circle.pipeline_events (xid, run_id, type, data) VALUES (
        circle.event_xid(), NEW.id,
        circle.run_event(NEW.status),
        CASE WHEN NEW.status IN ('failed', 'cancelled', 'timeout') THEN jsonb_build_object('error', NEW.error_message)
            ELSE '{}' END);
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_event()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    INSERT INTO circle.pipeline_events (id, xid, run_id, node_id, type, data) VALUES (
        -- A setting of the transaction holds the block of the statement (cmin) for this run.
        CASE WHEN NEW.position BETWEEN 0 AND 131071 THEN split_part(
            CASE WHEN starts_with(current_setting('circle.event_block', true),
                                  NEW.run_id || '.' || pg_current_xact_id()::text || '.' || NEW.cmin || '.')
                THEN current_setting('circle.event_block')
                ELSE set_config('circle.event_block',
                                NEW.run_id || '.' || pg_current_xact_id()::text || '.' || NEW.cmin || '.'
                                || nextval('circle.pipeline_events_id_seq'), true)
            END, '.', 4)::bigint + NEW.position
            ELSE nextval('circle.pipeline_events_id_seq') END,
        circle.event_xid(), NEW.run_id, NEW.node_id,
        circle.node_event(NEW.status),
        CASE NEW.status
            WHEN 'failed' THEN jsonb_build_object('error', NEW.error_message)
            WHEN 'pending' THEN jsonb_build_object('attempt', OLD.retry_count + 1, 'error', NEW.error_message,
                                                   'available_at', NEW.available_at)
            ELSE '{}' END);
    RETURN NULL;
END $function$;
