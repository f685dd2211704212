-- The schema at head, for reading; nothing runs this file. Written by: python -m tests.generated
--
-- First the types and the tables, each with its constraints, indexes and triggers; then views and functions by subject, each
-- below the file that defined it last. A trigger marked ALWAYS fires under session_replication_role = replica, too.

-- ---- types

CREATE TYPE circle.compiled_node AS (
    node_id character varying(100),
    node_type character varying(50),
    predecessors integer[],
    successors integer[],
    branches jsonb
);

CREATE TYPE circle.node_result AS (
    node_id text,
    status text,
    output jsonb,
    error text,
    duration_ms integer,
    retry_count integer,
    attempt integer,
    retryable boolean,
    branch text
);

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
    revision bigint NOT NULL DEFAULT 1,
    max_running integer NOT NULL DEFAULT 0,
    status_changed_at timestamp with time zone,
    CONSTRAINT pipelines_pkey PRIMARY KEY (id),
    CONSTRAINT ck_pipelines CHECK (timeout_seconds >= 0 AND max_retries_per_node >= 0 AND retry_backoff_base >= 0::double precision AND retry_backoff_base <= 31536000::double precision AND retry_backoff_max >= 0::double precision AND retry_backoff_max <= 31536000::double precision AND run_count >= 0 AND success_count >= 0 AND error_count >= 0 AND circle.are_readable_times(LEAST(created_at, updated_at, last_run), GREATEST(created_at, updated_at, last_run))),
    CONSTRAINT ck_pipelines_max_running CHECK (max_running >= 0),
    CONSTRAINT pipelines_status_check CHECK (status = ANY (ARRAY['active', 'paused', 'draft']))
);

CREATE INDEX idx_pipelines_status ON circle.pipelines USING btree (status);

CREATE TRIGGER pipelines_accept AFTER INSERT OR UPDATE OF nodes, edges, status ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_accept();  -- ALWAYS
CREATE TRIGGER pipelines_after_insert AFTER INSERT ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_after();
CREATE TRIGGER pipelines_after_update AFTER UPDATE ON circle.pipelines
    FOR EACH ROW WHEN (old.version IS DISTINCT FROM new.version) EXECUTE FUNCTION circle.pipelines_after();
CREATE TRIGGER pipelines_before BEFORE INSERT OR UPDATE OF name, description, status, nodes, edges, timeout_seconds, max_retries_per_node, retry_backoff_base, retry_backoff_max, max_running, version, revision, status_changed_at ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_before();  -- ALWAYS

-- ---- table circle.pipeline_versions

CREATE TABLE circle.pipeline_versions (
    pipeline_id integer NOT NULL,
    version integer NOT NULL,
    nodes jsonb NOT NULL,
    edges jsonb NOT NULL,
    node_count integer NOT NULL,
    compiled circle.compiled_node[] NOT NULL,
    created_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT pipeline_versions_pkey PRIMARY KEY (pipeline_id, version),
    CONSTRAINT pipeline_versions_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES circle.pipelines(id) ON DELETE CASCADE
);

CREATE TRIGGER pipeline_versions_after_delete AFTER DELETE ON circle.pipeline_versions
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_versions_after_delete();
CREATE TRIGGER pipeline_versions_after_truncate AFTER TRUNCATE ON circle.pipeline_versions
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_versions_after_truncate();
CREATE TRIGGER pipeline_versions_before BEFORE INSERT OR UPDATE ON circle.pipeline_versions
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_versions_before();  -- ALWAYS

-- ---- table circle.pipeline_runs

CREATE TABLE circle.pipeline_runs (
    id bigint NOT NULL DEFAULT nextval('circle.pipeline_runs_id_seq'::regclass),
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
    lapsed_claims integer NOT NULL DEFAULT 0,
    released_token bigint,
    priority smallint NOT NULL DEFAULT 0,
    run_at timestamp with time zone,
    waits_until timestamp with time zone,
    resumed_from bigint,
    CONSTRAINT pipeline_runs_pkey PRIMARY KEY (id),
    CONSTRAINT pipeline_runs_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES circle.pipelines(id) ON DELETE CASCADE,
    CONSTRAINT pipeline_runs_resumed_from_fkey FOREIGN KEY (resumed_from) REFERENCES circle.pipeline_runs(id) ON DELETE SET NULL,
    CONSTRAINT ck_pipeline_runs_leased CHECK (circle.is_valid_run(status, duration_seconds, created_at, started_at, completed_at, claim_token, claim_count, lapsed_claims, worker_id, lease_expires_at, run_at, waits_until)),
    CONSTRAINT pipeline_runs_status_check CHECK (status = ANY (ARRAY['pending', 'running', 'completed', 'failed', 'cancelled', 'timeout']))
) WITH (fillfactor=70);

CREATE INDEX idx_pipeline_runs_completed_at ON circle.pipeline_runs USING btree (completed_at, id) WHERE (completed_at IS NOT NULL);
CREATE INDEX idx_pipeline_runs_history ON circle.pipeline_runs USING btree (pipeline_id, id);
CREATE UNIQUE INDEX idx_pipeline_runs_idempotency_key ON circle.pipeline_runs USING btree (pipeline_id, idempotency_key) WHERE (idempotency_key IS NOT NULL);
CREATE INDEX idx_pipeline_runs_pipeline_id ON circle.pipeline_runs USING btree (pipeline_id);
CREATE INDEX idx_pipeline_runs_queue ON circle.pipeline_runs USING btree (pipeline_id, priority DESC, id) WHERE (((status) = 'pending') AND (waits_until IS NULL) AND (pipeline_version IS NOT NULL));
CREATE UNIQUE INDEX idx_pipeline_runs_resumed_from ON circle.pipeline_runs USING btree (resumed_from) WHERE (resumed_from IS NOT NULL);
CREATE INDEX idx_pipeline_runs_running ON circle.pipeline_runs USING btree (pipeline_id, id) WHERE ((status) = 'running');
CREATE INDEX idx_pipeline_runs_status ON circle.pipeline_runs USING btree (status);
CREATE INDEX idx_pipeline_runs_status_history ON circle.pipeline_runs USING btree (status, id);
CREATE INDEX idx_pipeline_runs_waiting ON circle.pipeline_runs USING btree (waits_until) WHERE (((status) = 'pending') AND (waits_until IS NOT NULL));

CREATE TRIGGER pipeline_runs_after_delete AFTER DELETE ON circle.pipeline_runs REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_runs_after_delete();
CREATE TRIGGER pipeline_runs_after_insert AFTER INSERT ON circle.pipeline_runs REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_runs_after_insert();
CREATE TRIGGER pipeline_runs_after_truncate AFTER TRUNCATE ON circle.pipeline_runs
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_runs_after_truncate();
CREATE TRIGGER pipeline_runs_after_update AFTER UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_runs_after_update();
CREATE TRIGGER pipeline_runs_before BEFORE INSERT OR UPDATE OF status, id, pipeline_id, pipeline_version, claim_token, completed_at, error_message, failed_node, trigger_data, logs, resumed_from ON circle.pipeline_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_runs_before();  -- ALWAYS
CREATE TRIGGER pipeline_runs_same_status BEFORE UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW WHEN (new.status = old.status) EXECUTE FUNCTION circle.refuse_same_status();  -- ALWAYS

-- ---- table circle.pipeline_node_runs

CREATE TABLE circle.pipeline_node_runs (
    id bigint NOT NULL DEFAULT nextval('circle.pipeline_node_runs_id_seq'::regclass),
    run_id bigint NOT NULL,
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
    untaken integer[],
    taken_from bigint,
    CONSTRAINT pipeline_node_runs_pkey PRIMARY KEY (id),
    CONSTRAINT pipeline_node_runs_run_id_fkey FOREIGN KEY (run_id) REFERENCES circle.pipeline_runs(id) ON DELETE CASCADE,
    CONSTRAINT ck_pipeline_node_runs_due CHECK (circle.is_valid_node_run(node_type, status, retry_count, duration_ms, started_at, completed_at, available_at)),
    CONSTRAINT pipeline_node_runs_status_check CHECK (status = ANY (ARRAY['pending', 'running', 'completed', 'failed', 'skipped', 'cancelled']))
) WITH (fillfactor=50);

CREATE INDEX idx_pipeline_node_runs_run_id ON circle.pipeline_node_runs USING btree (run_id);
CREATE UNIQUE INDEX idx_pipeline_node_runs_run_node ON circle.pipeline_node_runs USING btree (run_id, node_id);
CREATE UNIQUE INDEX idx_pipeline_node_runs_run_position ON circle.pipeline_node_runs USING btree (run_id, "position");

CREATE TRIGGER pipeline_node_runs_after_delete AFTER DELETE ON circle.pipeline_node_runs REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_delete();
CREATE TRIGGER pipeline_node_runs_after_insert AFTER INSERT ON circle.pipeline_node_runs REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_insert();
CREATE TRIGGER pipeline_node_runs_after_truncate AFTER TRUNCATE ON circle.pipeline_node_runs
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_truncate();
CREATE TRIGGER pipeline_node_runs_after_update AFTER UPDATE ON circle.pipeline_node_runs REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_update();
CREATE TRIGGER pipeline_node_runs_before BEFORE UPDATE ON circle.pipeline_node_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_node_runs_before();  -- ALWAYS
CREATE TRIGGER pipeline_node_runs_before_insert BEFORE INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (new.status <> 'pending' OR new.input_data <> '{}'::jsonb OR new.output_data <> '{}'::jsonb OR new.untaken IS NOT NULL) EXECUTE FUNCTION circle.pipeline_node_runs_before_insert();  -- ALWAYS
CREATE TRIGGER pipeline_node_runs_same_status BEFORE UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (new.status = old.status) EXECUTE FUNCTION circle.refuse_same_status();  -- ALWAYS

-- ---- table circle.pipeline_counters

CREATE TABLE circle.pipeline_counters (
    pipeline_id integer NOT NULL,
    id bigint NOT NULL GENERATED ALWAYS AS IDENTITY (INCREMENT BY 1),
    pending bigint NOT NULL DEFAULT 0,
    running bigint NOT NULL DEFAULT 0,
    completed bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    cancelled bigint NOT NULL DEFAULT 0,
    timeout bigint NOT NULL DEFAULT 0,
    run_count bigint NOT NULL DEFAULT 0,
    success_count bigint NOT NULL DEFAULT 0,
    error_count bigint NOT NULL DEFAULT 0,
    leases_lost bigint NOT NULL DEFAULT 0,
    last_run timestamp with time zone,
    CONSTRAINT pipeline_counters_pkey PRIMARY KEY (pipeline_id, id)
);

-- ---- table circle.pipeline_events

CREATE TABLE circle.pipeline_events (
    id bigint NOT NULL GENERATED BY DEFAULT AS IDENTITY (INCREMENT BY 1),
    xid xid8 NOT NULL,
    run_id bigint NOT NULL,
    node_id character varying(100),
    type character varying(50) NOT NULL,
    data jsonb NOT NULL DEFAULT '{}'::jsonb,
    created_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT pipeline_events_pkey PRIMARY KEY (xid, id)
);

CREATE INDEX idx_pipeline_events_run ON circle.pipeline_events USING btree (run_id, xid, id);

CREATE TRIGGER pipeline_events_frozen BEFORE UPDATE ON circle.pipeline_events
    FOR EACH ROW WHEN (new.xid <> '0'::xid8 OR new.id IS DISTINCT FROM old.id OR new.run_id IS DISTINCT FROM old.run_id OR new.node_id IS DISTINCT FROM old.node_id OR new.type IS DISTINCT FROM old.type OR new.data IS DISTINCT FROM old.data OR new.created_at IS DISTINCT FROM old.created_at) EXECUTE FUNCTION circle.pipeline_events_frozen();  -- ALWAYS

-- ---- table circle.pipeline_run_history

CREATE TABLE circle.pipeline_run_history (
    run_id bigint NOT NULL,
    id bigint NOT NULL GENERATED ALWAYS AS IDENTITY (INCREMENT BY 1),
    at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    kind character varying(20) NOT NULL,
    worker_id character varying(255),
    token bigint,
    reason text,
    CONSTRAINT pipeline_run_history_pkey PRIMARY KEY (run_id, id),
    CONSTRAINT pipeline_run_history_run_id_fkey FOREIGN KEY (run_id) REFERENCES circle.pipeline_runs(id) ON DELETE CASCADE,
    CONSTRAINT ck_pipeline_run_history CHECK ((kind = ANY (ARRAY['claimed', 'released', 'recovered', 'cancelled', 'resumed'])) AND circle.are_readable_times(at, at))
);

-- ---- table circle.pipeline_run_logs

CREATE TABLE circle.pipeline_run_logs (
    run_id bigint NOT NULL,
    id bigint NOT NULL GENERATED ALWAYS AS IDENTITY (INCREMENT BY 1),
    entry jsonb NOT NULL,
    created_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT pipeline_run_logs_pkey PRIMARY KEY (run_id, id),
    CONSTRAINT pipeline_run_logs_run_id_fkey FOREIGN KEY (run_id) REFERENCES circle.pipeline_runs(id) ON DELETE CASCADE,
    CONSTRAINT ck_pipeline_run_logs CHECK ((circle.nested_too_deep(entry) OR circle.number_too_large(entry)) IS NOT TRUE AND circle.are_readable_times(created_at, created_at))
);

-- ---- table circle.pipeline_run_tags

CREATE TABLE circle.pipeline_run_tags (
    run_id bigint NOT NULL,
    key character varying(100) NOT NULL,
    value character varying(255) NOT NULL,
    CONSTRAINT pipeline_run_tags_pkey PRIMARY KEY (run_id, key),
    CONSTRAINT pipeline_run_tags_run_id_fkey FOREIGN KEY (run_id) REFERENCES circle.pipeline_runs(id) ON DELETE CASCADE
);

CREATE INDEX idx_pipeline_run_tags_value ON circle.pipeline_run_tags USING btree (key, value, run_id);

-- ---- table circle.pipeline_sweep

CREATE TABLE circle.pipeline_sweep (
    id boolean NOT NULL DEFAULT true,
    next_at timestamp with time zone NOT NULL DEFAULT '2000-01-01 00:00:00+00'::timestamp with time zone,
    CONSTRAINT pipeline_sweep_pkey PRIMARY KEY (id),
    CONSTRAINT ck_pipeline_sweep CHECK (id)
);

-- ---- alembic/sql/008_valid_rows/2_triggers.sql

-- Python holds times of the years 1 to 9999. A day at each end is left out: the session's time zone may be ahead of UTC, or behind. (Some
-- time zones have seconds in the offsets of times before 1972, which only sessions in other ones can read.) The arguments are the least
-- and the greatest of some times. Inlined.
CREATE OR REPLACE FUNCTION circle.are_readable_times(p_first timestamp with time zone, p_last timestamp with time zone)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE
AS $function$
    SELECT p_first >= '0001-01-02 00:00:00+00' AND p_last < '9999-12-31 00:00:00+00'
$function$;

-- ---- alembic/sql/009_events/1_log.sql

-- Inlined. xid8 has no arithmetic, hence the casts.
CREATE OR REPLACE FUNCTION circle.event_xid()
 RETURNS xid8
 LANGUAGE sql
AS $function$
    SELECT greatest(pg_current_xact_id(), (pg_snapshot_xmax(pg_current_snapshot())::text::bigint - 1)::text::xid8)
$function$;

-- ---- alembic/sql/009_events/2_maintenance.sql

CREATE OR REPLACE FUNCTION circle.pipeline_events_frozen()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION 'events are immutable' USING ERRCODE = 'integrity_constraint_violation';
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_events_notify()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    NOTIFY circle_events;
    RETURN NULL;
END $function$;

-- Switches whether commits wake listeners, which poll otherwise. Off by default, because commits that notify are serialized.
CREATE OR REPLACE FUNCTION circle.notify_events(p_on boolean)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    DROP TRIGGER IF EXISTS pipeline_events_notify ON circle.pipeline_events;
    IF p_on THEN
        CREATE TRIGGER pipeline_events_notify AFTER INSERT ON circle.pipeline_events
            FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_events_notify();
    END IF;
END $function$;

-- Moves all events before those to come, in the order of their ids, if one is ahead of the cluster's transactions: after a restore from
-- another cluster, whose numbers are higher. Returns the number of changed events, whose cursors are invalid
-- then. Waits for the transactions that write events, so that none of theirs comes to stand before one that was read.
CREATE OR REPLACE FUNCTION circle.reset_event_xids()
 RETURNS bigint
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    changed bigint;
BEGIN
    LOCK TABLE circle.pipeline_events IN SHARE ROW EXCLUSIVE MODE;
    UPDATE circle.pipeline_events SET xid = '0' WHERE xid <> '0'
        AND EXISTS (SELECT FROM circle.pipeline_events WHERE xid >= pg_snapshot_xmax(pg_current_snapshot()));
    GET DIAGNOSTICS changed = ROW_COUNT;
    RETURN changed;
END $function$;

-- ---- alembic/sql/009_events/3_reads.sql

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
 SET search_path TO 'pg_catalog', 'pg_temp'
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

-- Later events are younger, so only the first ones can be old enough. The last of them stays: a reader that has it misses nothing.
CREATE OR REPLACE FUNCTION circle.purge_events(p_older_than interval, p_limit integer)
 RETURNS integer
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_seqscan TO 'off'
 SET enable_sort TO 'off'
AS $function$
DECLARE
    deleted integer;
BEGIN
    WITH oldest AS MATERIALIZED (
        SELECT xid, id FROM (SELECT xid, id, created_at FROM circle.pipeline_events ORDER BY xid, id LIMIT p_limit::bigint + 1) e
        WHERE created_at < clock_timestamp() - p_older_than
    )
    DELETE FROM circle.pipeline_events e USING oldest o
    WHERE e.xid = o.xid AND e.id = o.id
      AND (o.xid, o.id) < (SELECT n.xid, n.id FROM oldest n ORDER BY n.xid DESC, n.id DESC LIMIT 1);
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END $function$;

-- ---- alembic/sql/010_graph/1_errors.sql

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
 SET search_path TO 'pg_catalog', 'pg_temp'
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
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
    SELECT circle.refuse_issues(jsonb_build_array(circle.graph_issue(p_code, p_message, p_loc, p_node_id, p_edge_id)))
$function$;

-- ---- alembic/sql/010_graph/2_values.sql

-- Blanks are those of Unicode's White_Space and the four separators U+001C to U+001F, as Python's str.strip has them.
CREATE OR REPLACE FUNCTION circle.trimmed(p_text text)
 RETURNS text
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT btrim(p_text, U&' \0009\000A\000B\000C\000D\001C\001D\001E\001F\0085\00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\2028\2029\202F\205F\3000')
$function$;

-- The label that a condition of an edge or an outcome stands for; '' is none. Lower case of A to Z only, so that it is the same in every
-- database and in Python.
CREATE OR REPLACE FUNCTION circle.branch_label(p_text text)
 RETURNS text
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT lower(circle.trimmed(p_text) COLLATE "C")
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

-- ---- alembic/sql/010_graph/3_versions.sql

CREATE OR REPLACE VIEW circle.pipeline_version_nodes WITH (security_invoker=true) AS
 SELECT v.pipeline_id,
    v.version,
    ((c.place - 1))::integer AS "position",
    c.node_id,
    c.node_type,
    c.predecessors,
    c.successors,
    c.branches
   FROM (circle.pipeline_versions v
     CROSS JOIN LATERAL unnest(v.compiled) WITH ORDINALITY c(node_id, node_type, predecessors, successors, branches, place));

-- ---- alembic/sql/010_graph/4_compile.sql

-- The types of nodes; circle.is_valid_node_run has the same list.
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
 SET search_path TO 'pg_catalog', 'pg_temp'
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
 SET search_path TO 'pg_catalog', 'pg_temp'
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
-- would take longer than running them. labelled: whether an edge has a condition.
CREATE OR REPLACE FUNCTION circle.sort_graph(p_nodes jsonb, p_edges jsonb, OUT ids text[], OUT types text[], OUT sources integer[], OUT targets integer[], OUT generation integer[], OUT labelled boolean)
 RETURNS record
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
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
END $function$;

-- The nodes of a graph that can be sorted, in execution order: by generation, then by place.
CREATE OR REPLACE FUNCTION circle.compile_graph(p_nodes jsonb, p_edges jsonb)
 RETURNS circle.compiled_node[]
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_nestloop TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
AS $function$
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
END $function$;

-- ---- alembic/sql/010_graph/5_check.sql

-- A row for each invalid value of a node, and for each configuration that a draft may lack; keys is the path within the node.
-- The first condition passes by the nodes that are certainly valid, which is all that most graphs cost.
CREATE OR REPLACE FUNCTION circle.node_findings(p_nodes jsonb)
 RETURNS TABLE(place bigint, id text, code text, message text, keys jsonb)
 LANGUAGE sql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
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
 SET search_path TO 'pg_catalog', 'pg_temp'
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
$function$;

-- Raises PL008 for JSON that Python can't read back, with the path of the first such place.
CREATE OR REPLACE FUNCTION circle.refuse_unreadable(p_key text, p_json jsonb)
 RETURNS void
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
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
 SET search_path TO 'pg_catalog', 'pg_temp'
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
END $function$;

-- ---- alembic/sql/010_graph/6_guards.sql

-- Trigger functions run with the rights of their owner, so that writers need none on the tables that only triggers write. Hence
-- they serve no table but their own.
CREATE OR REPLACE FUNCTION circle.refuse_other_table(p_function text, p_table regclass)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION 'circle.% can''t be a trigger of %', p_function, p_table USING ERRCODE = 'insufficient_privilege';
END $function$;

CREATE OR REPLACE FUNCTION circle.is_replica()
 RETURNS boolean
 LANGUAGE sql
 STABLE
AS $function$
    SELECT current_setting('session_replication_role') = 'replica'
$function$;

-- Numbers the graphs and the revisions of the row: 1 for the first, one more for each other. An UPDATE may set the revision that its
-- writer has read, to be refused if the row has another one by now: PL009. Notes when the status changed. Replicas keep the revision and
-- the time that they are given.
CREATE OR REPLACE FUNCTION circle.pipelines_before()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        NEW.version := OLD.version + (NEW.nodes IS DISTINCT FROM OLD.nodes OR NEW.edges IS DISTINCT FROM OLD.edges)::integer;
        IF circle.is_replica() THEN
            RETURN NEW;
        ELSIF NEW.revision <> OLD.revision THEN
            RAISE EXCEPTION 'pipeline % is at revision %, not %', OLD.id, OLD.revision, NEW.revision
                USING ERRCODE = 'PL009', DETAIL = jsonb_build_object('pipeline_id', OLD.id, 'expected', NEW.revision,
                                                                     'current', OLD.revision);
        END IF;
        NEW.status_changed_at := CASE WHEN NEW.status IS DISTINCT FROM OLD.status THEN clock_timestamp() ELSE OLD.status_changed_at END;
        NEW.revision := NEW.revision + (
            NEW.version <> OLD.version OR NEW.status IS DISTINCT FROM OLD.status OR NEW.name IS DISTINCT FROM OLD.name
            OR NEW.description IS DISTINCT FROM OLD.description OR NEW.timeout_seconds IS DISTINCT FROM OLD.timeout_seconds
            OR NEW.max_retries_per_node IS DISTINCT FROM OLD.max_retries_per_node
            OR NEW.retry_backoff_base IS DISTINCT FROM OLD.retry_backoff_base
            OR NEW.retry_backoff_max IS DISTINCT FROM OLD.retry_backoff_max OR NEW.max_running <> OLD.max_running)::integer;
    ELSIF NOT circle.is_replica() THEN
        NEW.version := 1;
        NEW.revision := 1;
        NEW.status_changed_at := clock_timestamp();
    END IF;
    RETURN NEW;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipelines_accept()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_OP = 'INSERT' OR NEW.version IS DISTINCT FROM OLD.version THEN
        PERFORM circle.check_graph(NEW.nodes, NEW.edges, NEW.status = 'active');
        IF circle.is_replica() THEN
            PERFORM circle.sort_graph(NEW.nodes, NEW.edges);   -- else it is sorted when the version is written
        END IF;
    ELSIF NEW.status = 'active' AND OLD.status <> 'active' THEN
        PERFORM circle.check_graph(NEW.nodes, NEW.edges, true);
        PERFORM circle.sort_graph(NEW.nodes, NEW.edges);
    END IF;
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION circle.pipelines_after()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_RELID <> 'circle.pipelines'::regclass THEN
        PERFORM circle.refuse_other_table('pipelines_after', TG_RELID);
    END IF;
    INSERT INTO circle.pipeline_versions (pipeline_id, version, nodes, edges) VALUES (NEW.id, NEW.version, NEW.nodes, NEW.edges);
    RETURN NULL;
END $function$;
REVOKE ALL ON FUNCTION circle.pipelines_after() FROM PUBLIC;

-- A version is what the compiler makes of the pipeline's graph, not of what is inserted; a replica may get its pipeline later.
CREATE OR REPLACE FUNCTION circle.pipeline_versions_before()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        RAISE EXCEPTION 'versions of a pipeline are immutable' USING ERRCODE = 'integrity_constraint_violation';
    ELSIF NOT circle.is_replica() AND NOT EXISTS (
            SELECT FROM circle.pipelines p WHERE p.id = NEW.pipeline_id AND p.version = NEW.version
                                             AND p.nodes = NEW.nodes AND p.edges = NEW.edges) THEN
        RAISE EXCEPTION 'version % is not the graph of pipeline %: change nodes and edges of the pipeline, which writes a version',
            NEW.version, NEW.pipeline_id USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    NEW.compiled := circle.compile_graph(NEW.nodes, NEW.edges);
    NEW.node_count := cardinality(NEW.compiled);
    RETURN NEW;
END $function$;

-- A version goes with its pipeline, or once neither the pipeline nor a run names it. Runs are created under the same lock.
CREATE OR REPLACE FUNCTION circle.pipeline_versions_after_delete()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_RELID <> 'circle.pipeline_versions'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_versions_after_delete', TG_RELID);
    ELSIF EXISTS (SELECT FROM circle.pipelines WHERE id = OLD.pipeline_id) THEN
        PERFORM pg_advisory_xact_lock(1734964328, hashint8(OLD.pipeline_id));
        IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
            -- its snapshot doesn't see the runs that it waited for
            RAISE EXCEPTION 'versions can''t be deleted at isolation level %', current_setting('transaction_isolation')
                USING ERRCODE = 'PL011', DETAIL = jsonb_build_object('level', current_setting('transaction_isolation'));
        END IF;
        IF EXISTS (SELECT FROM circle.pipelines WHERE id = OLD.pipeline_id AND version = OLD.version) THEN
            RAISE EXCEPTION 'version % is the current one of pipeline %', OLD.version, OLD.pipeline_id
                USING ERRCODE = 'integrity_constraint_violation';
        ELSIF EXISTS (SELECT FROM circle.pipeline_runs WHERE pipeline_id = OLD.pipeline_id AND pipeline_version = OLD.version) THEN
            RAISE EXCEPTION 'runs of pipeline % have version %', OLD.pipeline_id, OLD.version
                USING ERRCODE = 'integrity_constraint_violation';
        END IF;
    END IF;
    RETURN NULL;
END $function$;
REVOKE ALL ON FUNCTION circle.pipeline_versions_after_delete() FROM PUBLIC;

-- Neither events nor versions have a foreign key that takes them along in TRUNCATE ... CASCADE of less than all.
CREATE OR REPLACE FUNCTION circle.pipeline_versions_after_truncate()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF EXISTS (SELECT FROM circle.pipelines) THEN
        RAISE EXCEPTION 'pipelines would be left without versions: TRUNCATE circle.pipelines CASCADE empties all tables'
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $function$;

-- ---- alembic/sql/011_lifecycle/1_tables.sql

-- It is merged with that of revision 008, as each CHECK costs time in every statement.
CREATE OR REPLACE FUNCTION circle.is_valid_run(p_status text, p_duration_seconds integer, p_created_at timestamp with time zone, p_started_at timestamp with time zone, p_completed_at timestamp with time zone)
 RETURNS boolean
 LANGUAGE plpgsql
 IMMUTABLE PARALLEL SAFE
AS $function$
BEGIN
    RETURN p_duration_seconds >= 0 AND (p_status = ANY ('{pending,running}')) = (p_completed_at IS NULL)
        AND p_completed_at >= p_started_at
        AND circle.are_readable_times(least(p_created_at, p_started_at, p_completed_at), greatest(p_created_at, p_started_at, p_completed_at));
END $function$;

-- It is merged with that of revision 008, as each CHECK costs time in every statement.
CREATE OR REPLACE FUNCTION circle.is_valid_run(p_status text, p_duration_seconds integer, p_created_at timestamp with time zone, p_started_at timestamp with time zone, p_completed_at timestamp with time zone, p_claim_token bigint, p_claim_count integer, p_lapsed_claims integer, p_worker_id text, p_lease_expires_at timestamp with time zone, p_run_at timestamp with time zone, p_waits_until timestamp with time zone)
 RETURNS boolean
 LANGUAGE plpgsql
 IMMUTABLE PARALLEL SAFE
AS $function$
BEGIN
    RETURN p_duration_seconds >= 0 AND (p_status = ANY ('{pending,running}')) = (p_completed_at IS NULL)
        AND p_completed_at >= p_started_at AND p_claim_token >= 0 AND p_claim_count >= 0 AND p_lapsed_claims >= 0
        AND circle.are_readable_times(
            least(p_created_at, p_started_at, p_completed_at, p_run_at, p_waits_until, p_lease_expires_at),
            greatest(p_created_at, p_started_at, p_completed_at, p_run_at, p_waits_until, p_lease_expires_at))
        AND (p_lease_expires_at IS NULL OR p_completed_at IS NULL AND p_worker_id IS NOT NULL);
END $function$;

-- It is merged with that of revision 008, as that of runs is.
CREATE OR REPLACE FUNCTION circle.is_valid_node_run(p_node_type text, p_status text, p_retry_count integer, p_duration_ms integer, p_started_at timestamp with time zone, p_completed_at timestamp with time zone)
 RETURNS boolean
 LANGUAGE plpgsql
 IMMUTABLE PARALLEL SAFE
AS $function$
BEGIN
    RETURN p_node_type = ANY ('{trigger,agent,condition,action,parallel,delay}') AND p_retry_count >= 0 AND p_duration_ms >= 0
        AND (p_status = ANY ('{pending,running}')) = (p_completed_at IS NULL)
        AND p_completed_at >= p_started_at
        AND circle.are_readable_times(least(p_started_at, p_completed_at), greatest(p_started_at, p_completed_at));
END $function$;

-- It is merged with that of revision 008, as that of runs is.
CREATE OR REPLACE FUNCTION circle.is_valid_node_run(p_node_type text, p_status text, p_retry_count integer, p_duration_ms integer, p_started_at timestamp with time zone, p_completed_at timestamp with time zone, p_available_at timestamp with time zone)
 RETURNS boolean
 LANGUAGE plpgsql
 IMMUTABLE PARALLEL SAFE
AS $function$
BEGIN
    RETURN p_node_type = ANY ('{trigger,agent,condition,action,parallel,delay}') AND p_retry_count >= 0 AND p_duration_ms >= 0
        AND (p_status = ANY ('{pending,running}')) = (p_completed_at IS NULL) AND p_completed_at >= p_started_at
        AND circle.are_readable_times(least(p_started_at, p_completed_at, p_available_at),
                                      greatest(p_started_at, p_completed_at, p_available_at));
END $function$;

-- ---- alembic/sql/011_lifecycle/2_errors.sql

-- PL001: an illegal transition, of a run where p_node_id is NULL, else of its node run. It returns boolean, so that a condition can
-- call it.
CREATE OR REPLACE FUNCTION circle.refuse_transition(p_run_id bigint, p_node_id text, p_current text, p_requested text, p_reason text)
 RETURNS boolean
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    entity text := CASE WHEN p_node_id IS NULL THEN 'run' ELSE 'node run' END;
    id jsonb := coalesce(to_jsonb(p_run_id || '/' || p_node_id), to_jsonb(p_run_id));
BEGIN
    RAISE EXCEPTION '% % is % and can''t % %', entity, id #>> '{}', p_current, CASE WHEN p_requested LIKE '%ed' THEN 'be' ELSE 'become' END,
        concat_ws(': ', coalesce(p_requested, 'NULL'), nullif(p_reason, ''))
        USING ERRCODE = 'PL001', DETAIL = jsonb_build_object('entity', entity, 'id', id, 'current', p_current,
                                                             'requested', p_requested, 'reason', coalesce(p_reason, ''));
END $function$;

-- PL012: a terminal run.
CREATE OR REPLACE FUNCTION circle.refuse_run_over(p_run_id bigint, p_status text, p_completed_at timestamp with time zone, p_error text, p_requested text)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION 'run % is terminal (% at %): it and its nodes can''t change', p_run_id, p_status, p_completed_at
        USING ERRCODE = 'PL012', DETAIL = jsonb_build_object('run_id', p_run_id, 'status', p_status, 'completed_at', p_completed_at,
                                                             'error', left(p_error, 1000), 'requested', p_requested);
END $function$;

-- PL002
CREATE OR REPLACE FUNCTION circle.refuse_unknown_pipeline(p_pipeline_id bigint)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION 'pipeline % does not exist', p_pipeline_id
        USING ERRCODE = 'PL002', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id);
END $function$;

-- PL006
CREATE OR REPLACE FUNCTION circle.refuse_inactive(p_pipeline_id bigint, p_status text)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION 'pipeline % is %, not active', p_pipeline_id, p_status
        USING ERRCODE = 'PL006', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'status', p_status);
END $function$;

-- PL007: the caller doesn't hold the run; PL003: there is no such run.
CREATE OR REPLACE FUNCTION circle.refuse_lease(p_run_id bigint)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
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
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION 'run % has no node %', p_run_id, left(p_node_id, 200)
        USING ERRCODE = 'PL004', DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', p_node_id);
END $function$;

-- PL011. The lifecycle needs a new snapshot for each statement: two transactions that complete the last two predecessors of a node
-- would else both leave it waiting for the other.
CREATE OR REPLACE FUNCTION circle.refuse_isolation()
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION 'runs can''t be changed at isolation level %', current_setting('transaction_isolation')
        USING ERRCODE = 'PL011', DETAIL = jsonb_build_object('level', current_setting('transaction_isolation')),
              HINT = 'Begin the transaction with ISOLATION LEVEL READ COMMITTED, or set default_transaction_isolation.';
END $function$;

-- Whether each statement of the transaction has a snapshot of its own. Inlined.
CREATE OR REPLACE FUNCTION circle.is_read_committed()
 RETURNS boolean
 LANGUAGE sql
 STABLE
AS $function$
    SELECT current_setting('transaction_isolation') IN ('read committed', 'read uncommitted')
$function$;

-- PL013: an outcome of a node that none of its edges has as label.
CREATE OR REPLACE FUNCTION circle.refuse_branch(p_node_id text, p_branch text, p_branches jsonb)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION '%', format('branch of node %L must be %s, not %L', p_node_id, CASE
        WHEN p_branches IS NULL THEN 'true or false, as no edge of it has a condition'
        ELSE 'one of true, false' END || coalesce((
        SELECT string_agg(', ' || left(l.label, 40), '' ORDER BY l.label)
        FROM (SELECT k COLLATE "C" AS label FROM jsonb_object_keys(p_branches) k
              WHERE k NOT IN ('true', 'false') ORDER BY 1 LIMIT 20) l), ''), left(p_branch, 100)) USING ERRCODE = 'PL013';
END $function$;

-- What no writer may change. p_what names the columns.
CREATE OR REPLACE FUNCTION circle.refuse_change(p_row text, p_what text)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION '% of % can''t be changed', p_what, p_row USING ERRCODE = 'integrity_constraint_violation';
END $function$;

CREATE OR REPLACE FUNCTION circle.refuse_json(p_where text, p_table name)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION '%: nested deeper than 64, or a number too large for a float', p_where
        USING ERRCODE = 'check_violation', SCHEMA = 'circle', TABLE = p_table, CONSTRAINT = p_table || '_json';
END $function$;

-- Whether Python can read a JSON value; NULL is readable. Inlined.
CREATE OR REPLACE FUNCTION circle.is_readable(p_json jsonb)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT (circle.nested_too_deep(p_json) OR circle.number_too_large(p_json)) IS NOT TRUE
$function$;

-- ---- alembic/sql/011_lifecycle/3_guards.sql

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

-- Adds up the rows of pipelines that have several, as far as no other transaction holds them; at most 5,000 in one call.
CREATE OR REPLACE FUNCTION circle.add_up_counters()
 RETURNS void
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    WITH free AS MATERIALIZED (
        SELECT c.pipeline_id, c.id FROM circle.pipeline_counters c
        WHERE c.pipeline_id IN (SELECT pipeline_id FROM circle.pipeline_counters GROUP BY 1 HAVING count(*) > 1)
        ORDER BY c.pipeline_id, c.id LIMIT 5000 FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM circle.pipeline_counters c USING free f WHERE c.pipeline_id = f.pipeline_id AND c.id = f.id RETURNING c.*
    )
    INSERT INTO circle.pipeline_counters (pipeline_id, pending, running, completed, failed, cancelled, timeout, run_count,
                                          success_count, error_count, leases_lost, last_run)
    SELECT g.pipeline_id, sum(g.pending), sum(g.running), sum(g.completed), sum(g.failed), sum(g.cancelled), sum(g.timeout),
           sum(g.run_count), sum(g.success_count), sum(g.error_count), sum(g.leases_lost), max(g.last_run)
    FROM gone g JOIN circle.pipelines p ON p.id = g.pipeline_id GROUP BY g.pipeline_id;
END $function$;
REVOKE ALL ON FUNCTION circle.add_up_counters() FROM PUBLIC;

-- Counts runs that change from a status to another; a NULL is no status. One in some hundred calls adds up the rows.
CREATE OR REPLACE FUNCTION circle.count_runs(p_pipeline_id integer, p_old text, p_new text, p_number bigint DEFAULT 1)
 RETURNS void
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    INSERT INTO circle.pipeline_counters (pipeline_id, pending, running, completed, failed, cancelled, timeout) VALUES (
        p_pipeline_id,
        CASE 'pending' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END,
        CASE 'running' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END,
        CASE 'completed' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END,
        CASE 'failed' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END,
        CASE 'cancelled' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END,
        CASE 'timeout' WHEN p_new THEN p_number WHEN p_old THEN -p_number ELSE 0 END);
    IF random() < 0.005 AND circle.is_read_committed() THEN
        PERFORM circle.add_up_counters();
    END IF;
END $function$;
REVOKE ALL ON FUNCTION circle.count_runs(integer,text,text,bigint) FROM PUBLIC;

-- Judges and completes a row. Logs may be written after the end; a claim token grows, to at most the microseconds of the clock.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_before()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NOT circle.is_replica() THEN
            -- shared among creators: a version is deleted, and a pipeline, when no run of it is being created
            PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(NEW.pipeline_id));
            SELECT v.version INTO NEW.pipeline_version FROM circle.pipelines p
            JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
            WHERE p.id = NEW.pipeline_id;
            IF NEW.resumed_from IS NOT NULL THEN   -- of the graph that the old run had
                SELECT r.pipeline_version INTO NEW.pipeline_version FROM circle.pipeline_runs r
                WHERE r.id = NEW.resumed_from AND r.pipeline_id = NEW.pipeline_id AND r.status IN ('failed', 'cancelled', 'timeout');
                IF NOT FOUND THEN
                    RAISE EXCEPTION 'resumed_from % is no failed, cancelled or timed-out run of pipeline %', NEW.resumed_from, NEW.pipeline_id
                        USING ERRCODE = 'integrity_constraint_violation';
                END IF;
            END IF;
        END IF;
        IF NEW.status = 'pending' AND NEW.trigger_data = '{}' AND NEW.logs = '[]' THEN
            RETURN NEW;
        ELSIF NOT (circle.is_readable(NEW.trigger_data) AND circle.is_readable(NEW.logs)) THEN
            PERFORM circle.refuse_json('trigger_data or logs', TG_TABLE_NAME);
        END IF;
    ELSE
        IF (CASE NEW.status
               WHEN 'running' THEN OLD.status = 'pending' AND NEW.started_at IS NOT NULL AND NEW.completed_at IS NULL
               WHEN 'completed' THEN OLD.status = 'running' AND NEW.completed_at IS NOT NULL AND NEW.lease_expires_at IS NULL
                   AND NEW.duration_seconds IS NOT NULL END)
           AND NEW.pipeline_id = OLD.pipeline_id AND NEW.id = OLD.id AND NEW.claim_token = OLD.claim_token
           AND NEW.pipeline_version = OLD.pipeline_version AND NEW.error_message IS NULL AND NEW.failed_node IS NULL
           AND NEW.trigger_data = OLD.trigger_data AND NEW.logs = OLD.logs AND NEW.resumed_from IS NOT DISTINCT FROM OLD.resumed_from THEN
            RETURN NEW;
        END IF;
        -- a run from before there were versions gets one, once
        IF NEW.id <> OLD.id OR NEW.pipeline_id <> OLD.pipeline_id OR NEW.pipeline_version IS DISTINCT FROM OLD.pipeline_version
           AND (OLD.pipeline_version IS NOT NULL OR NOT EXISTS (
               SELECT FROM circle.pipeline_versions WHERE pipeline_id = OLD.pipeline_id AND version = NEW.pipeline_version)) THEN
            PERFORM circle.refuse_change('run ' || OLD.id, 'id, pipeline_id and pipeline_version');
        -- its foreign key sets it to NULL when the old run is deleted
        ELSIF NEW.resumed_from IS DISTINCT FROM OLD.resumed_from AND NOT circle.is_replica()
              AND (NEW.resumed_from IS NOT NULL OR EXISTS (SELECT FROM circle.pipeline_runs WHERE id = OLD.resumed_from)) THEN
            PERFORM circle.refuse_change('run ' || OLD.id, 'resumed_from');
        ELSIF NEW.status IS DISTINCT FROM OLD.status AND circle.run_may_become(OLD.status, NEW.status) IS NOT TRUE THEN
            PERFORM circle.refuse_transition(OLD.id, NULL, OLD.status, NEW.status, '');
        ELSIF OLD.completed_at IS NOT NULL AND (NEW.completed_at IS DISTINCT FROM OLD.completed_at
                                                OR NEW.error_message IS DISTINCT FROM OLD.error_message) THEN
            PERFORM circle.refuse_transition(OLD.id, NULL, OLD.status, NEW.status, 'the end and the error of a terminal run are final');
        ELSIF NEW.failed_node IS DISTINCT FROM OLD.failed_node AND NOT circle.is_replica() AND (
                OLD.failed_node IS NOT NULL OR NOT EXISTS (
                    SELECT FROM circle.pipeline_node_runs
                    WHERE run_id = OLD.id AND node_id = NEW.failed_node AND status = 'failed')) THEN
            PERFORM circle.refuse_change('run ' || OLD.id, 'failed_node, the first node that failed,');
        ELSIF NEW.claim_token < OLD.claim_token OR OLD.completed_at IS NOT NULL AND NEW.claim_token <> OLD.claim_token
              OR NEW.claim_token > OLD.claim_token AND NEW.claim_token > circle.next_token(OLD.claim_token) AND NOT circle.is_replica() THEN
            PERFORM circle.refuse_transition(OLD.id, NULL, OLD.status, NEW.status,
                                             'claim tokens only grow, by one or to the microseconds of the clock');
        -- only changed values are checked: else a run with values from before this revision could never end
        ELSIF NEW.trigger_data IS DISTINCT FROM OLD.trigger_data AND NOT circle.is_readable(NEW.trigger_data)
              OR NEW.logs IS DISTINCT FROM OLD.logs AND NOT circle.is_readable(NEW.logs) AND circle.is_readable(OLD.logs) THEN
            PERFORM circle.refuse_json(format('trigger_data or logs of run %s', OLD.id), TG_TABLE_NAME);
        ELSIF NEW.status = OLD.status THEN
            RETURN NEW;
        END IF;
    END IF;
    IF NEW.status = 'running' THEN
        NEW.started_at := coalesce(NEW.started_at, clock_timestamp());
    ELSIF NEW.status <> 'pending' THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        NEW.lease_expires_at := NULL;
        IF coalesce(NEW.duration_seconds, 0) = 0 THEN
            -- times that are not finite have no difference: ck_pipeline_runs_leased refuses them, and an end before the start
            NEW.duration_seconds := CASE WHEN isfinite(NEW.completed_at) AND isfinite(NEW.started_at)
                THEN least(greatest(extract(epoch FROM NEW.completed_at - NEW.started_at), 0), 2147483647)::integer ELSE 0 END;
        END IF;
    END IF;
    RETURN NEW;
END $function$;

-- The fencing token after this one. It grows with the clock, so that neither a restore nor a failover issues one twice. Inlined.
CREATE OR REPLACE FUNCTION circle.next_token(p_token bigint)
 RETURNS bigint
 LANGUAGE sql
AS $function$
    SELECT greatest(p_token + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
$function$;

-- The current status is refused, too: of two writers that end a run or a node run only one may succeed. An UPDATE of a logical
-- subscriber names every column, changed or not.
CREATE OR REPLACE FUNCTION circle.refuse_same_status()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF NOT circle.is_replica() THEN
        PERFORM circle.refuse_transition((to_jsonb(OLD) ->> CASE TG_TABLE_NAME WHEN 'pipeline_runs' THEN 'id' ELSE 'run_id' END)::bigint,
                                         to_jsonb(OLD) ->> 'node_id', OLD.status, NEW.status, '');
    END IF;
    RETURN NEW;
END $function$;

-- Judges inserted runs here and not BEFORE, because ON CONFLICT proposes rows that are never inserted.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_insert()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    c record;
    started boolean := false;
BEGIN
    IF TG_RELID <> 'circle.pipeline_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_runs_after_insert', TG_RELID);
    END IF;
    FOR c IN SELECT pipeline_id, status, count(*) AS number, min(id) AS first,
                    max(claim_token) > circle.next_token(0) AS ahead, min(id) FILTER (WHERE failed_node IS NOT NULL) AS blamed
             FROM new_rows GROUP BY pipeline_id, status ORDER BY pipeline_id, status LOOP
        IF c.status NOT IN ('pending', 'running') OR c.ahead THEN
            PERFORM circle.refuse_transition(c.first, NULL, 'new', c.status, CASE WHEN c.ahead THEN 'its claim token is ahead of the clock' END);
        ELSIF c.blamed IS NOT NULL THEN   -- a new run has no node that failed
            PERFORM circle.refuse_change('run ' || c.blamed, 'failed_node, the first node that failed,');
        END IF;
        PERFORM circle.count_runs(c.pipeline_id, NULL, c.status, c.number);
        started := started OR c.status = 'running';
    END LOOP;
    IF started THEN
        INSERT INTO circle.pipeline_events (xid, run_id, type)
        SELECT circle.event_xid(), id, circle.run_event(status) FROM new_rows WHERE status = 'running' ORDER BY id;
    END IF;
    RETURN NULL;
END $function$;
REVOKE ALL ON FUNCTION circle.pipeline_runs_after_insert() FROM PUBLIC;

-- The data of the event of a run that starts: its claim and the worker, and what it was resumed from.
CREATE OR REPLACE FUNCTION circle.start_event_data(p_run_id bigint, p_claim integer, p_worker_id text, p_resumed_from bigint)
 RETURNS jsonb
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RETURN CASE WHEN p_claim IS NULL THEN '{}' ELSE jsonb_build_object('claim', p_claim, 'worker_id', p_worker_id) END
        || CASE WHEN p_resumed_from IS NULL THEN '{}' ELSE jsonb_build_object('resumed_from', p_resumed_from, 'taken_over', (
               SELECT count(*) FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND taken_from IS NOT NULL)) END;
END $function$;

-- Writes the event, takes live nodes along, refuses an end that would leave some.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_update()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF NEW.status IN ('failed', 'cancelled', 'timeout') AND TG_RELID = 'circle.pipeline_runs'::regclass THEN
        UPDATE circle.pipeline_node_runs SET status = 'cancelled' WHERE run_id = NEW.id AND (status IN ('pending', 'running')) IS TRUE;
    END IF;
    INSERT INTO circle.pipeline_events (xid, run_id, type, data)
    SELECT circle.event_xid(), NEW.id, circle.run_event(NEW.status),
           CASE NEW.status
               WHEN 'running' THEN circle.start_event_data(
                   NEW.id, CASE WHEN NEW.claim_count > OLD.claim_count THEN NEW.claim_count END, NEW.worker_id, NEW.resumed_from)
               WHEN 'completed' THEN jsonb_build_object('worker_id', NEW.worker_id, 'duration_seconds', NEW.duration_seconds)
               ELSE jsonb_build_object('worker_id', NEW.worker_id, 'duration_seconds', NEW.duration_seconds, 'error', NEW.error_message) END
    WHERE CASE
        WHEN TG_RELID <> 'circle.pipeline_runs'::regclass OR NOT circle.is_read_committed()
             OR NEW.status IN ('pending', 'completed') AND EXISTS (
                 SELECT FROM circle.pipeline_node_runs WHERE run_id = NEW.id AND (
                     status = 'running' OR NEW.status = 'completed' AND status IN ('pending', 'failed')))
        THEN circle.refuse_run_change(TG_RELID, NEW.id, OLD.status, NEW.status)
        ELSE NEW.status <> 'pending' END;
    PERFORM circle.count_runs(NEW.pipeline_id, OLD.status, NEW.status);
    RETURN NULL;
END $function$;
REVOKE ALL ON FUNCTION circle.pipeline_runs_after_update() FROM PUBLIC;

-- Raises why pipeline_runs_after_update refuses a row.
CREATE OR REPLACE FUNCTION circle.refuse_run_change(p_table regclass, p_run_id bigint, p_current text, p_requested text)
 RETURNS boolean
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF p_table <> 'circle.pipeline_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_runs_after_update', p_table);
    ELSIF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    RETURN circle.refuse_transition(p_run_id, NULL, p_current, p_requested, 'some of its nodes are live or failed');
END $function$;

CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_delete()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_RELID <> 'circle.pipeline_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_runs_after_delete', TG_RELID);
    END IF;
    PERFORM circle.count_runs(c.pipeline_id, c.status, NULL, c.number)
    FROM (SELECT pipeline_id, status, count(*) AS number FROM old_rows GROUP BY pipeline_id, status ORDER BY pipeline_id, status) c;
    RETURN NULL;
END $function$;
REVOKE ALL ON FUNCTION circle.pipeline_runs_after_delete() FROM PUBLIC;

-- Events and counters have no row left that they are about.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_after_truncate()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_RELID <> 'circle.pipeline_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_runs_after_truncate', TG_RELID);
    END IF;
    PERFORM circle.fold_counters();
    TRUNCATE circle.pipeline_events, circle.pipeline_counters;
    RETURN NULL;
END $function$;
REVOKE ALL ON FUNCTION circle.pipeline_runs_after_truncate() FROM PUBLIC;

-- Raises that a node run can't have this untaken.
CREATE OR REPLACE FUNCTION circle.refuse_untaken(p_node_id text, p_run_id bigint)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION 'untaken of node % of run % is written with the change to completed only, and has positions of its successors',
        p_node_id, p_run_id USING ERRCODE = 'integrity_constraint_violation';
END $function$;

-- Completes a proposed row; pipeline_node_runs_after_insert judges those that were inserted.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before_insert()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF NOT (circle.is_readable(NEW.input_data) AND circle.is_readable(NEW.output_data)) THEN
        PERFORM circle.refuse_json(format('input_data or output_data of node %s of run %s', NEW.node_id, NEW.run_id),
                                   TG_TABLE_NAME);
    ELSIF NEW.untaken IS NOT NULL AND (NEW.status = 'completed' AND NEW.untaken <@ NEW.successors) IS NOT TRUE THEN
        PERFORM circle.refuse_untaken(NEW.node_id, NEW.run_id);
    ELSIF NEW.status = 'running' THEN
        NEW.started_at := coalesce(NEW.started_at, clock_timestamp());
    ELSIF NEW.status <> 'pending' AND NEW.completed_at IS NULL THEN
        NEW.completed_at := greatest(clock_timestamp(), NEW.started_at);
        NEW.duration_ms := CASE WHEN NEW.duration_ms <> 0 OR isfinite(NEW.started_at) IS NOT TRUE THEN NEW.duration_ms
            ELSE least(extract(epoch FROM NEW.completed_at - NEW.started_at) * 1000, 2147483647)::integer END;
    END IF;
    RETURN NEW;
END $function$;

-- Judges and completes a changed row. position, predecessors and successors may be set once, where they are NULL.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF (CASE NEW.status
           WHEN 'running' THEN OLD.status = 'pending' AND NEW.started_at IS DISTINCT FROM OLD.started_at AND NEW.completed_at IS NULL
           WHEN 'completed' THEN OLD.status IN ('pending', 'running') AND NEW.completed_at IS NOT NULL END)
       AND NEW.run_id = OLD.run_id AND NEW.node_id = OLD.node_id AND NEW.id = OLD.id AND NEW.node_type = OLD.node_type
       AND NEW.position = OLD.position AND NEW.predecessors = OLD.predecessors AND NEW.successors = OLD.successors AND NEW.untaken IS NULL
       AND NEW.taken_from IS NULL
       AND (NEW.output_data = OLD.output_data OR circle.is_readable(NEW.output_data))
       AND (NEW.input_data = OLD.input_data OR circle.is_readable(NEW.input_data)) THEN
        RETURN NEW;
    END IF;
    IF NEW.run_id <> OLD.run_id OR NEW.node_id <> OLD.node_id OR NEW.id <> OLD.id OR NEW.node_type <> OLD.node_type
       OR OLD.position IS NOT NULL AND NEW.position IS DISTINCT FROM OLD.position
       OR OLD.predecessors IS NOT NULL AND NEW.predecessors IS DISTINCT FROM OLD.predecessors
       OR OLD.successors IS NOT NULL AND NEW.successors IS DISTINCT FROM OLD.successors OR NEW.taken_from IS DISTINCT FROM OLD.taken_from THEN
        PERFORM circle.refuse_change(format('node %s of run %s', OLD.node_id, OLD.run_id),
                                     'id, run_id, node_id, node_type, position, predecessors, successors and taken_from');
    ELSIF NEW.status IS DISTINCT FROM OLD.status AND circle.node_may_become(OLD.status, NEW.status) IS NOT TRUE THEN
        PERFORM circle.refuse_transition(OLD.run_id, OLD.node_id, OLD.status, NEW.status,
            (SELECT 'its run is ' || r.status FROM circle.pipeline_runs r WHERE r.id = OLD.run_id AND r.status <> 'running'));
    ELSIF NEW.untaken IS DISTINCT FROM OLD.untaken
          AND (NEW.status = 'completed' AND OLD.status <> 'completed' AND NEW.untaken <@ NEW.successors) IS NOT TRUE THEN
        PERFORM circle.refuse_untaken(OLD.node_id, OLD.run_id);
    ELSIF NEW.input_data IS DISTINCT FROM OLD.input_data AND NOT circle.is_readable(NEW.input_data)
          OR NEW.output_data IS DISTINCT FROM OLD.output_data AND NOT circle.is_readable(NEW.output_data) THEN
        PERFORM circle.refuse_json(format('input_data or output_data of node %s of run %s', NEW.node_id, NEW.run_id),
                                   TG_TABLE_NAME);
    ELSIF NEW.status = OLD.status THEN
        RETURN NEW;
    ELSIF NEW.status = 'pending' THEN
        -- a due time tells a retry from a run that is released: pipeline_node_runs_after_update relies on it
        NEW.available_at := CASE
            WHEN NEW.retry_count > OLD.retry_count THEN coalesce(NEW.available_at, clock_timestamp())
            WHEN NEW.available_at IS DISTINCT FROM OLD.available_at THEN NEW.available_at END;
    ELSIF NEW.status = 'running' THEN
        NEW.started_at := CASE WHEN NEW.started_at IS DISTINCT FROM OLD.started_at THEN NEW.started_at ELSE clock_timestamp() END;
    ELSIF NEW.completed_at IS NULL THEN
        NEW.completed_at := greatest(clock_timestamp(), NEW.started_at);
        NEW.duration_ms := CASE WHEN NEW.duration_ms <> 0 OR isfinite(NEW.started_at) IS NOT TRUE THEN NEW.duration_ms
            ELSE least(extract(epoch FROM NEW.completed_at - NEW.started_at) * 1000, 2147483647)::integer END;
    END IF;
    RETURN NEW;
END $function$;

-- Notes the first of the failed nodes of a run, in execution order: whatever order a statement changes them in. Returns true.
CREATE OR REPLACE FUNCTION circle.note_failure(p_run_id bigint)
 RETURNS boolean
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    UPDATE circle.pipeline_runs SET failed_node = (
        SELECT node_id FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'failed' ORDER BY position, id LIMIT 1)
    WHERE id = p_run_id AND failed_node IS NULL AND completed_at IS NULL;
    RETURN true;
END $function$;

-- Raises why a node can't have a new status when the statement has ended, or returns whether it has an event. A statement that ends a
-- node and its run together is legal: both rows have its command number. A run that was over before had no live node left to end.
CREATE OR REPLACE FUNCTION circle.judge_node(p_run_id bigint, p_node_id text, p_current text, p_requested text)
 RETURNS boolean
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    run_status text;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    SELECT status INTO run_status FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT (run_status = 'running'
            OR p_requested = 'cancelled' AND p_current <> 'new' AND run_status IN ('failed', 'cancelled', 'timeout')
            OR p_current = 'new' AND run_status = 'pending' AND p_requested <> 'running'
            OR p_current <> 'new' AND p_requested NOT IN ('running', 'pending') AND run_status <> 'pending' AND EXISTS (
                SELECT FROM circle.pipeline_node_runs n JOIN circle.pipeline_runs r ON r.id = n.run_id
                WHERE n.run_id = p_run_id AND n.node_id = p_node_id AND n.xmin = r.xmin AND n.cmin = r.cmin)) THEN
        PERFORM circle.refuse_transition(p_run_id, p_node_id, p_current, p_requested, 'its run is ' || run_status);
    END IF;
    RETURN p_requested <> 'cancelled';
END $function$;

-- The milliseconds since a node was started, unless they are given. Inlined.
CREATE OR REPLACE FUNCTION circle.elapsed_ms(p_given integer, p_started_at timestamp with time zone)
 RETURNS integer
 LANGUAGE sql
AS $function$
    SELECT CASE
        WHEN p_given IS NOT NULL THEN p_given
        WHEN p_started_at IS NULL THEN 0   -- least() would ignore the NULL
        ELSE least(extract(epoch FROM greatest(clock_timestamp(), p_started_at) - p_started_at) * 1000, 2147483647)::integer END
$function$;

-- The data of the event of a node run that failed, that waits, for its retry or because its run was released, or that nobody executed.
CREATE OR REPLACE FUNCTION circle.node_failure_data(p_status text, p_worker_id text, p_retry_count integer, p_started_at timestamp with time zone, p_duration_ms integer, p_error text, p_available_at timestamp with time zone)
 RETURNS jsonb
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RETURN CASE p_status
        WHEN 'failed' THEN jsonb_build_object('attempt', p_retry_count + 1::bigint, 'worker_id', p_worker_id, 'duration_ms', p_duration_ms,
                                              'error', p_error)
        WHEN 'pending' THEN jsonb_build_object(
            'attempt', CASE WHEN p_available_at IS NULL THEN p_retry_count + 1::bigint ELSE greatest(p_retry_count, 1) END,
            'worker_id', p_worker_id, 'duration_ms', circle.elapsed_ms(NULL, p_started_at), 'error', p_error,
            'available_at', p_available_at)
        ELSE '{}' END;
END $function$;

-- The data of the event of a node run: the attempt, the worker that holds the run, and how long the attempt took. Inlined, and short,
-- because an executor prepares it anew in each step.
CREATE OR REPLACE FUNCTION circle.node_event_data(p_status text, p_worker_id text, p_retry_count integer, p_started_at timestamp with time zone, p_duration_ms integer, p_error text, p_available_at timestamp with time zone)
 RETURNS jsonb
 LANGUAGE sql
AS $function$
    SELECT CASE p_status
        WHEN 'running' THEN jsonb_build_object('attempt', p_retry_count + 1::bigint, 'worker_id', p_worker_id)
        WHEN 'completed' THEN jsonb_build_object('attempt', p_retry_count + 1::bigint, 'worker_id', p_worker_id,
                                                 'duration_ms', p_duration_ms)
        ELSE circle.node_failure_data(p_status, p_worker_id, p_retry_count, p_started_at, p_duration_ms, p_error, p_available_at) END
$function$;

CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_insert()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    r record;
    run_status text;
    worker text;
    held boolean := false;
    eventful boolean := false;
BEGIN
    IF TG_RELID <> 'circle.pipeline_node_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_node_runs_after_insert', TG_RELID);
    END IF;
    FOR r IN SELECT run_id, bool_or(status NOT IN ('pending', 'cancelled') AND taken_from IS NULL) AS eventful,
                    bool_or(status = 'failed') AS failed, count(taken_from) > 0 AS taken, min(node_id) AS node_id, min(node_id) FILTER (WHERE status = 'running') AS running, min(status) AS status
             FROM new_rows GROUP BY run_id ORDER BY run_id LOOP
        -- locks the run, so that it doesn't end concurrently
        SELECT status, worker_id INTO run_status, worker FROM circle.pipeline_runs WHERE id = r.run_id FOR NO KEY UPDATE;
        IF run_status <> 'running' AND (run_status <> 'pending' OR r.running IS NOT NULL) THEN
            PERFORM circle.judge_node(r.run_id, coalesce(r.running, r.node_id), 'new',
                                      CASE WHEN r.running IS NOT NULL THEN 'running' ELSE r.status END);
        ELSIF r.failed THEN
            PERFORM circle.note_failure(r.run_id);
        END IF;
        IF r.taken AND NOT EXISTS (SELECT FROM circle.pipeline_runs WHERE id = r.run_id AND resumed_from IS NOT NULL) THEN
            RAISE EXCEPTION 'run % is not resumed: no node of it has taken_from', r.run_id USING ERRCODE = 'integrity_constraint_violation';
        END IF;
        held := held OR worker IS NOT NULL;
        eventful := eventful OR r.eventful;
    END LOOP;
    IF eventful THEN
        INSERT INTO circle.pipeline_events (xid, run_id, node_id, type, data)
        SELECT circle.event_xid(), run_id, node_id, circle.node_event(status), circle.node_event_data(
            status, CASE WHEN held THEN (SELECT t.worker_id FROM circle.pipeline_runs t WHERE t.id = run_id) END, retry_count, started_at, duration_ms,
            error_message, available_at)
        FROM new_rows WHERE status NOT IN ('pending', 'cancelled') AND taken_from IS NULL ORDER BY run_id, position, id;
    END IF;
    RETURN NULL;
END $function$;
REVOKE ALL ON FUNCTION circle.pipeline_node_runs_after_insert() FROM PUBLIC;

-- The number of the events of a statement that may have waited for its runs: from a snapshot of its own, so that it isn't before that
-- of a run's last holder.
CREATE OR REPLACE FUNCTION circle.event_xid_now()
 RETURNS xid8
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RETURN circle.event_xid();
END $function$;

-- Old and new rows are compared by groups, which takes O(rows) whatever plan is cached; a join, planned for one row, would not. The run
-- of a node that starts is locked, so that it isn't released concurrently; if this transaction wrote its row, as the functions of this
-- package do, it is.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_update()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_RELID <> 'circle.pipeline_node_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_node_runs_after_update', TG_RELID);
    END IF;
    INSERT INTO circle.pipeline_events (xid, run_id, node_id, type, data)
    -- one number for all, taken when the sort below has ended, and so every wait for a run
    SELECT (SELECT circle.event_xid_now()), e.run_id, e.node_id, circle.node_event(e.status),
           circle.node_event_data(e.status, e.run[2], e.retry_count, e.started_at, e.duration_ms, e.error_message, e.available_at)
    FROM (SELECT m.* FROM (
        SELECT c.*, CASE c.status
            WHEN 'running' THEN coalesce(
                (SELECT ARRAY[r.status, r.worker_id] FROM circle.pipeline_runs r WHERE r.id = c.run_id AND r.xmin = pg_current_xact_id()::xid),
                (SELECT ARRAY[r.status, r.worker_id] FROM circle.pipeline_runs r WHERE r.id = c.run_id FOR NO KEY UPDATE))
            ELSE (SELECT ARRAY[r.status, r.worker_id] FROM circle.pipeline_runs r WHERE r.id = c.run_id) END AS run   -- its status and worker
        FROM (
            -- a group has the old and the new row, or one of them: then the status changed, and a maximum is the value of the row
            SELECT id, run_id, node_id, status, max(retry_count) AS retry_count, max(started_at) AS started_at,
                   max(duration_ms) AS duration_ms, max(error_message) AS error_message, max(available_at) AS available_at
            FROM (SELECT 1 AS side, id, run_id, node_id, status, retry_count, started_at, duration_ms, error_message, available_at FROM new_rows
                  UNION ALL SELECT 2, id, run_id, node_id, status, NULL, NULL, NULL, NULL, NULL FROM old_rows) b
            GROUP BY id, run_id, node_id, status HAVING sum(side) = 1) c
        OFFSET 0) m
    WHERE CASE
        WHEN m.run[1] = 'running' AND circle.is_read_committed()
        THEN m.status <> 'cancelled' AND (m.status <> 'failed' OR circle.note_failure(m.run_id))
        -- with its run, or raised: looking for the old status takes O(rows)
        WHEN m.status = 'cancelled' AND circle.is_read_committed() AND m.run[1] = ANY ('{failed,cancelled,timeout}') THEN false
        ELSE circle.judge_node(m.run_id, m.node_id, (SELECT o.status FROM old_rows o WHERE o.id = m.id), m.status) END
    ORDER BY m.run_id, m.id OFFSET 0) e;   -- ids are given in execution order
    RETURN NULL;
END $function$;
REVOKE ALL ON FUNCTION circle.pipeline_node_runs_after_update() FROM PUBLIC;

-- Node runs go with their run, or once they and it are over.
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_delete()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    live record;
BEGIN
    IF TG_RELID <> 'circle.pipeline_node_runs'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_node_runs_after_delete', TG_RELID);
    END IF;
    -- a statement may end the run of live nodes that it deletes; those of runs that ended before are leftovers
    SELECT r.id, r.status INTO live
    FROM (SELECT run_id, bool_or(status IN ('pending', 'running')) AS live FROM old_rows GROUP BY run_id) o
    -- by the primary key: a join would read all live runs
    CROSS JOIN LATERAL (SELECT t.id, t.status, t.xmin FROM circle.pipeline_runs t WHERE t.id = o.run_id OFFSET 0) r
    WHERE r.status IN ('pending', 'running') OR o.live AND age(r.xmin) <= age(pg_current_xact_id()::xid) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'nodes of run % can''t be deleted: the run is %', live.id,
            CASE WHEN live.status IN ('pending', 'running') THEN live.status ELSE 'ended by the same transaction' END
            USING ERRCODE = 'integrity_constraint_violation', HINT = 'Cancel the run first, or delete the run.';
    END IF;
    RETURN NULL;
END $function$;
REVOKE ALL ON FUNCTION circle.pipeline_node_runs_after_delete() FROM PUBLIC;

CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_after_truncate()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF EXISTS (SELECT FROM circle.pipeline_runs) THEN
        RAISE EXCEPTION 'runs would be left without nodes: TRUNCATE circle.pipeline_runs CASCADE empties both tables'
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $function$;

-- ---- alembic/sql/011_lifecycle/5_runs.sql

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
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token) THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    IF r.completed_at IS NOT NULL THEN
        PERFORM circle.refuse_run_over(p_run_id, r.status, r.completed_at, r.error_message, p_requested);
    END IF;
    PERFORM circle.refuse_transition(p_run_id, NULL, r.status, p_requested, p_reason);
END $function$;

-- The run, if a call repeats the one that ended it, with the token that held it then; else raises why the call is refused.
CREATE OR REPLACE FUNCTION circle.repeat_or_refuse_run(p_run_id bigint, p_statuses text[], p_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id AND claim_token = p_token AND status = ANY (p_statuses);
    IF r.completed_at IS NULL OR NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_run(p_run_id, p_token, p_statuses[1]);
    END IF;
    PERFORM pg_logical_emit_message(true, 'circle', '');   -- writes WAL: the commit waits for a synchronous standby, as the first one did
    RETURN r;
END $function$;

-- Locks the run for a caller that holds it, and starts a pending one.
CREATE OR REPLACE FUNCTION circle.lock_run(p_run_id bigint, p_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token)
       OR r.status NOT IN ('pending', 'running') THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'running');
    ELSIF r.status = 'pending' THEN
        UPDATE circle.pipeline_runs SET status = 'running', started_at = coalesce(started_at, clock_timestamp()), waits_until = NULL
        WHERE id = p_run_id RETURNING * INTO r;
    END IF;
    RETURN r;
END $function$;

-- Ends a locked run. The trigger pipeline_runs_after_update cancels its live nodes.
CREATE OR REPLACE FUNCTION circle.end_run(p_run_id bigint, p_status text, p_error text)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    UPDATE circle.pipeline_runs SET status = p_status, error_message = coalesce(p_error, error_message),
        completed_at = greatest(clock_timestamp(), started_at), lease_expires_at = NULL, waits_until = NULL,
        duration_seconds = least(coalesce(extract(epoch FROM greatest(clock_timestamp(), started_at) - started_at), 0), 2147483647)
    WHERE id = p_run_id RETURNING * INTO r;
    IF p_status <> 'cancelled' THEN
        INSERT INTO circle.pipeline_counters (pipeline_id, success_count, error_count)
        VALUES (r.pipeline_id, (p_status = 'completed')::integer, (p_status <> 'completed')::integer);
    END IF;
    RETURN r;
END $function$;

-- Gives a locked run the nodes of its version that it lacks, as one that was inserted raw does; returns how many.
CREATE OR REPLACE FUNCTION circle.fill_run(p_run_id bigint)
 RETURNS bigint
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    filled bigint := 0;
BEGIN
    IF (SELECT count(*) FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND position IS NOT NULL)
       < (SELECT v.node_count FROM circle.pipeline_runs r
          JOIN circle.pipeline_versions v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version WHERE r.id = p_run_id) THEN
        INSERT INTO circle.pipeline_node_runs AS n (run_id, node_id, node_type, position, predecessors, successors)
        SELECT r.id, c.node_id, c.node_type, c.place - 1, c.predecessors, c.successors
        FROM circle.pipeline_runs r
        JOIN circle.pipeline_versions v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
        CROSS JOIN LATERAL unnest(v.compiled) WITH ORDINALITY c (node_id, node_type, predecessors, successors, branches, place)
        WHERE r.id = p_run_id ORDER BY c.place
        ON CONFLICT (run_id, node_id) DO UPDATE SET
            position = excluded.position, predecessors = excluded.predecessors, successors = excluded.successors
        WHERE n.position IS NULL;
        GET DIAGNOSTICS filled = ROW_COUNT;
    END IF;
    RETURN filled;
END $function$;

-- Ends a locked run in which nothing is running, ready or waiting for a retry; else returns NULL.
CREATE OR REPLACE FUNCTION circle.end_run_if_done(p_run_id bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    r record;
BEGIN
    SELECT t.failed_node,
           EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id
                   AND (status = 'running' OR status = 'pending' AND retry_count > 0)) AS busy,
           EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'pending') AS pending,
           EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'cancelled') AS cancelled
    INTO r FROM circle.pipeline_runs t WHERE t.id = p_run_id;
    IF r.busy THEN
        RETURN NULL;
    ELSIF r.failed_node IS NOT NULL THEN
        RETURN circle.end_run(p_run_id, 'failed', (SELECT error_message FROM circle.pipeline_node_runs
                                                   WHERE run_id = p_run_id AND node_id = r.failed_node));
    ELSIF r.pending AND EXISTS (SELECT FROM circle.startable_node_runs WHERE run_id = p_run_id) THEN
        RETURN NULL;
    ELSIF circle.fill_run(p_run_id) > 0 THEN
        RETURN circle.end_run_if_done(p_run_id);   -- the rows of a raw writer may be all of its nodes
    END IF;
    -- pending nodes that can't start wait for a cancelled one
    RETURN circle.end_run(p_run_id, CASE WHEN r.pending OR r.cancelled THEN 'cancelled' ELSE 'completed' END, NULL);
END $function$;

-- Creates a run without node runs, or returns the one that has the key, or with p_unless_live the one that is live; NULL if the
-- pipeline can't be run. A pending run has not begun; record_run begins one at once.
CREATE OR REPLACE FUNCTION circle.insert_run(p_pipeline_id bigint, p_status text, p_trigger_data jsonb, p_key text, p_priority integer, p_run_at timestamp with time zone, p_unless_live boolean, OUT r circle.pipeline_runs, OUT is_new boolean)
 RETURNS record
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    pipeline_status text;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    is_new := false;
    -- as the insert does: delete_pipeline waits for this lock before it takes any other
    IF p_unless_live THEN
        PERFORM pg_advisory_xact_lock(1734964328, hashint8(p_pipeline_id));   -- one creator after the other
    ELSE
        PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(p_pipeline_id));
    END IF;
    -- the first run with this key is returned even if the pipeline has been paused since; the bound is for hosts whose triggers
    -- discard every row
    FOR attempt IN 1 .. 100 LOOP
        IF p_key IS NOT NULL THEN
            SELECT * INTO r FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND idempotency_key = p_key;
            IF FOUND THEN
                IF r.trigger_data IS DISTINCT FROM p_trigger_data THEN
                    RAISE EXCEPTION 'run % of pipeline % has this idempotency key, and other trigger data', r.id, p_pipeline_id
                        USING ERRCODE = 'PL014', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'key', p_key, 'run_id', r.id);
                END IF;
                PERFORM pg_logical_emit_message(true, 'circle', '');   -- writes WAL: the commit waits for a synchronous standby, as the first one did
                RETURN;
            END IF;
        END IF;
        -- the counters tell it without reading the history
        IF p_unless_live AND (SELECT sum(pending) + sum(running) FROM circle.pipeline_counters WHERE pipeline_id = p_pipeline_id) > 0 THEN
            SELECT * INTO r FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND completed_at IS NULL
            ORDER BY pipeline_id DESC, id DESC LIMIT 1;
            IF FOUND THEN
                PERFORM pg_logical_emit_message(true, 'circle', '');   -- as above
                RETURN;
            END IF;
        END IF;
        INSERT INTO circle.pipeline_runs (pipeline_id, status, trigger_data, idempotency_key, priority, run_at, waits_until)
        SELECT p.id, p_status, p_trigger_data, p_key, p_priority, p_run_at, CASE WHEN p_run_at > clock_timestamp() THEN p_run_at END
        FROM circle.pipelines p
        WHERE p.id = p_pipeline_id AND (p.status = 'active') IS TRUE
        ON CONFLICT (pipeline_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING * INTO r;
        is_new := FOUND;
        EXIT WHEN is_new;
        -- judged here, as the pipeline may be activated before refuse_create reads it
        SELECT status INTO pipeline_status FROM circle.pipelines WHERE id = p_pipeline_id;
        IF pipeline_status <> 'active' AND NOT EXISTS (   -- the first run with the key may have been committed meanwhile
            SELECT FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND idempotency_key = p_key) THEN
            PERFORM circle.refuse_inactive(p_pipeline_id, pipeline_status);
        END IF;
        EXIT WHEN pipeline_status IS NULL;
    END LOOP;
    IF is_new THEN
        INSERT INTO circle.pipeline_counters (pipeline_id, run_count, last_run) VALUES (r.pipeline_id, 1, clock_timestamp());
    END IF;
END $function$;

-- Raises why a run of a pipeline can't be created.
CREATE OR REPLACE FUNCTION circle.refuse_create(p_pipeline_id bigint)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    p circle.pipelines;
BEGIN
    SELECT * INTO p FROM circle.pipelines WHERE id = p_pipeline_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_unknown_pipeline(p_pipeline_id);
    ELSIF p.status = 'active' THEN
        PERFORM circle.sort_graph(p.nodes, p.edges);
        IF p.nodes = '[]' THEN
            PERFORM circle.refuse_graph('no_nodes', 'Pipeline must have at least one node', '["nodes"]');
        END IF;
        PERFORM circle.refuse_graph('no_version', 'the stored graph was never compiled: ' || CASE
            WHEN current_setting('session_replication_role') = 'replica'
            THEN 'session_replication_role is replica, so that no trigger compiles it: reset it, then ' ELSE '' END || 'save it again');
    END IF;
    PERFORM circle.refuse_inactive(p_pipeline_id, p.status);
END $function$;

CREATE OR REPLACE FUNCTION circle.create_run(p_pipeline_id bigint, p_trigger_data jsonb DEFAULT '{}'::jsonb, p_key text DEFAULT NULL::text, p_priority integer DEFAULT 0, p_run_at timestamp with time zone DEFAULT NULL::timestamp with time zone, p_unless_live boolean DEFAULT false, p_tags jsonb DEFAULT NULL::jsonb)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    created record;
BEGIN
    SELECT * INTO created FROM circle.insert_run(p_pipeline_id, 'pending', p_trigger_data, p_key, p_priority, p_run_at, p_unless_live);
    IF created.is_new THEN
        INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, position, predecessors, successors)
        SELECT (created.r).id, c.node_id, c.node_type, c.place - 1, c.predecessors, c.successors
        FROM circle.pipeline_versions v
        CROSS JOIN LATERAL unnest(v.compiled) WITH ORDINALITY c (node_id, node_type, predecessors, successors, branches, place)
        WHERE v.pipeline_id = (created.r).pipeline_id AND v.version = (created.r).pipeline_version
        ORDER BY c.place;
        IF NOT FOUND THEN
            PERFORM circle.refuse_create(p_pipeline_id);
        ELSIF p_tags IS NOT NULL THEN
            INSERT INTO circle.pipeline_run_tags (run_id, key, value) SELECT (created.r).id, t.key, t.value FROM jsonb_each_text(p_tags) t;
        END IF;
    ELSIF created.r IS NULL THEN
        PERFORM circle.refuse_create(p_pipeline_id);
    END IF;
    RETURN created.r;
END $function$;

CREATE OR REPLACE FUNCTION circle.start_run(p_run_id bigint, p_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    UPDATE circle.pipeline_runs SET status = 'running', started_at = coalesce(started_at, clock_timestamp()), waits_until = NULL
    WHERE id = p_run_id AND (status = 'pending') IS TRUE
      AND circle.holds_run(claim_token, lease_expires_at, p_token)
    RETURNING * INTO r;
    IF NOT FOUND THEN
        -- with its token a second start changes nothing
        SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id AND claim_token = p_token AND status = 'running';
        IF NOT FOUND OR NOT circle.is_read_committed() THEN
            PERFORM circle.refuse_run(p_run_id, p_token, 'running');
        END IF;
        PERFORM pg_logical_emit_message(true, 'circle', '');   -- as in insert_run
    ELSIF r.pipeline_version IS NULL THEN
        PERFORM circle.refuse_graph('no_version', format(
            'run %s is bound to no version of its pipeline''s graph: cancel it and create it again', p_run_id));
    ELSIF NOT EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND position = 0) THEN
        PERFORM circle.fill_run(p_run_id);
    END IF;
    RETURN r;
END $function$;

-- Ends a run with the caller's status: completed, failed or cancelled. A cancel needs no token.
CREATE OR REPLACE FUNCTION circle.conclude_run(p_run_id bigint, p_status text, p_error text, p_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (p_status = 'cancelled' OR circle.holds_run(claim_token, lease_expires_at, p_token))
      AND circle.run_may_become(status, p_status)
    FOR NO KEY UPDATE;
    IF NOT FOUND AND p_status <> 'cancelled' THEN
        RETURN circle.repeat_or_refuse_run(p_run_id, ARRAY[p_status], p_token);
    ELSIF NOT FOUND THEN   -- of several that cancel one wins
        PERFORM circle.refuse_run(p_run_id, (SELECT claim_token FROM circle.pipeline_runs WHERE id = p_run_id), p_status);
    ELSIF p_status = 'completed' THEN
        PERFORM circle.fill_run(p_run_id);   -- a run never succeeds without its nodes
    ELSIF p_status = 'cancelled' THEN
        INSERT INTO circle.pipeline_run_history (run_id, kind, worker_id, reason) VALUES (p_run_id, 'cancelled', session_user, p_error);
    END IF;
    RETURN circle.end_run(p_run_id, p_status, p_error);
END $function$;

-- Ends a run with the status that follows from its nodes.
CREATE OR REPLACE FUNCTION circle.finish_run(p_run_id bigint, p_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN circle.repeat_or_refuse_run(p_run_id, '{completed,failed,cancelled}', p_token);
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
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
    -- locked, so that the ids of a run's entries grow in the order of their commits
    PERFORM FROM circle.pipeline_runs WHERE id = p_run_id AND circle.holds_run(claim_token, lease_expires_at, p_token) FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM circle.refuse_run(p_run_id, p_token, 'logged');
    END IF;
    INSERT INTO circle.pipeline_run_logs (run_id, entry) VALUES (p_run_id, p_entry);
END $function$;

-- A page of the history, newest first. The first column of the order is compared by >= and <, because with "=" the planner
-- would drop it from the order and might scan the primary key through the runs of other pipelines. Without sorts only the
-- right index remains.
CREATE OR REPLACE FUNCTION circle.page_of_runs(p_pipeline_id bigint, p_status text, p_after bigint, p_limit integer)
 RETURNS SETOF circle.pipeline_runs
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
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

-- A page of the history by more than one condition, newest first: of the runs that one index gives in the order of their ids, the first
-- 10,000 after the cursor are looked at. So a page may hold fewer than p_limit runs, even none, while the next one holds some. No page
-- follows 10,000 runs that were all created before p_since.
CREATE OR REPLACE FUNCTION circle.filtered_runs(p_pipeline_id bigint, p_statuses text[], p_tags jsonb, p_since timestamp with time zone, p_until timestamp with time zone, p_after bigint, p_limit integer, OUT ids bigint[], OUT next_cursor bigint)
 RETURNS record
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_sort TO 'off'
 SET enable_incremental_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
AS $function$
DECLARE
    most CONSTANT integer := 10000;
    tag record;
    runs refcursor;
    r record;
    looked_at bigint := 0;
    any_recent boolean := p_since IS NULL;
BEGIN
    ids := '{}';
    SELECT key, value INTO tag FROM jsonb_each_text(p_tags) LIMIT 1;
    IF FOUND THEN
        OPEN runs FOR SELECT c.id, c.pipeline_id, c.status, c.created_at
            FROM (SELECT t.run_id FROM circle.pipeline_run_tags t
                  WHERE t.key >= tag.key AND (t.key, t.value) >= (tag.key, tag.value) AND (t.key, t.value, t.run_id) < (tag.key, tag.value, p_after)
                  ORDER BY t.key DESC, t.value DESC, t.run_id DESC) t
            JOIN circle.pipeline_runs c ON c.id = t.run_id;
    ELSIF p_pipeline_id IS NOT NULL THEN
        OPEN runs FOR SELECT c.id, c.pipeline_id, c.status, c.created_at FROM circle.pipeline_runs c
            WHERE c.pipeline_id >= p_pipeline_id AND (c.pipeline_id, c.id) < (p_pipeline_id, p_after) ORDER BY c.pipeline_id DESC, c.id DESC;
    ELSE
        OPEN runs FOR SELECT c.id, c.pipeline_id, c.status, c.created_at FROM circle.pipeline_runs c
            WHERE c.id < p_after ORDER BY c.id DESC;
    END IF;
    LOOP
        FETCH runs INTO r;
        EXIT WHEN NOT FOUND;
        any_recent := any_recent OR r.created_at >= p_since;
        IF (p_pipeline_id IS NULL OR r.pipeline_id = p_pipeline_id) AND (p_statuses IS NULL OR r.status = ANY (p_statuses))
           AND (p_since IS NULL OR r.created_at >= p_since) AND (p_until IS NULL OR r.created_at < p_until)
           AND (p_tags IS NULL OR NOT EXISTS (SELECT FROM jsonb_each_text(p_tags) w WHERE NOT EXISTS (
                    SELECT FROM circle.pipeline_run_tags t WHERE t.run_id = r.id AND t.key = w.key AND t.value = w.value))) THEN
            IF cardinality(ids) = p_limit THEN
                next_cursor := ids[p_limit];
                EXIT;
            END IF;
            ids := ids || r.id;
        END IF;
        looked_at := looked_at + 1;
        IF looked_at >= p_limit::bigint + most THEN
            next_cursor := CASE WHEN any_recent THEN r.id END;
            EXIT;
        END IF;
    END LOOP;
    CLOSE runs;
END $function$;

-- The number of runs of a pipeline by status, and the median and the 95th percentile of the seconds that completed ones took: of the
-- last p_limit runs, as far as they were created after p_since. Without sorts only the right index remains, as in page_of_runs.
CREATE OR REPLACE FUNCTION circle.run_statistics(p_pipeline_id bigint, p_since timestamp with time zone, p_limit integer)
 RETURNS json
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_sort TO 'off'
 SET enable_incremental_sort TO 'off'
 SET enable_seqscan TO 'off'
AS $function$
DECLARE
    counts json;
    seconds double precision[];
BEGIN
    WITH recent AS (
        SELECT r.status, r.created_at, CASE WHEN r.status = 'completed' THEN date_part('epoch', r.completed_at - r.started_at) END AS took
        FROM circle.pipeline_runs r
        WHERE r.pipeline_id >= p_pipeline_id AND (r.pipeline_id, r.id) <= (p_pipeline_id, 9223372036854775807)
        ORDER BY r.pipeline_id DESC, r.id DESC LIMIT p_limit
    )
    SELECT json_strip_nulls(json_build_object(
               'pending', nullif(count(*) FILTER (WHERE status = 'pending'), 0),
               'running', nullif(count(*) FILTER (WHERE status = 'running'), 0),
               'completed', nullif(count(*) FILTER (WHERE status = 'completed'), 0),
               'failed', nullif(count(*) FILTER (WHERE status = 'failed'), 0),
               'cancelled', nullif(count(*) FILTER (WHERE status = 'cancelled'), 0),
               'timeout', nullif(count(*) FILTER (WHERE status = 'timeout'), 0))),
           percentile_cont('{0.5,0.95}'::float8[]) WITHIN GROUP (ORDER BY took)
    INTO counts, seconds FROM recent WHERE created_at >= p_since;
    RETURN json_build_object('runs', counts, 'p50', seconds[1], 'p95', seconds[2]);
END $function$;

-- Locks the runs before their pipeline. The advisory lock keeps create_run out.
CREATE OR REPLACE FUNCTION circle.delete_pipeline(p_pipeline_id bigint, p_force boolean)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
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

-- ---- alembic/sql/011_lifecycle/6_nodes.sql

-- The node runs at these positions. Inlined. Each is looked up by an ordered range of one, for which only the index on position saves a
-- sort: where most runs are small, the planner takes that on run_id for as good, and would read all nodes of a large run each time.
CREATE OR REPLACE FUNCTION circle.nodes_at(p_run_id bigint, p_positions integer[])
 RETURNS SETOF circle.pipeline_node_runs
 LANGUAGE sql
 STABLE
AS $function$
    SELECT n.* FROM unnest(p_positions) u (position) CROSS JOIN LATERAL (
        SELECT * FROM circle.pipeline_node_runs t
        WHERE t.run_id = p_run_id AND t.position >= u.position AND t.position <= u.position ORDER BY t.position LIMIT 1) n
$function$;

-- Whether the edge from a node run to the one at a position is dead. Inlined.
CREATE OR REPLACE FUNCTION circle.is_dead(p_status text, p_untaken integer[], p_position integer)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT p_status = 'skipped' OR p_status = 'completed' AND coalesce(p_position = ANY (p_untaken), false)
$function$;

-- Returns what blocks a pending node, NULL if it is ready. RETURNS SETOF, because a function with a subquery is inlined only in
-- FROM.
CREATE OR REPLACE FUNCTION circle.blocked_by(p_run_status text, p_failed_node text, p_run_id bigint, p_position integer, p_predecessors integer[], p_retry_count integer, p_available_at timestamp with time zone)
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
                        WHEN bool_and(circle.is_dead(p.status, p.untaken, p_position)) THEN 'skipped' END
            FROM circle.nodes_at(p_run_id, p_predecessors) p)
    END
$function$;

CREATE OR REPLACE VIEW circle.pending_node_runs WITH (security_invoker=true) AS
 SELECT n.id,
    n.run_id,
    n.node_id,
    n."position",
    b.reason AS blocked_by,
    ARRAY( SELECT p.node_id
           FROM circle.nodes_at(n.run_id, n.predecessors) p(id, run_id, node_id, node_type, status, input_data, output_data, error_message, retry_count, started_at, completed_at, duration_ms, "position", predecessors, successors, available_at, untaken, taken_from)
          WHERE ((p.status)::text <> ALL ((ARRAY['completed'::character varying, 'skipped'::character varying])::text[]))
          ORDER BY p."position") AS waiting_for
   FROM ((circle.pipeline_node_runs n
     JOIN circle.pipeline_runs r ON ((r.id = n.run_id)))
     CROSS JOIN LATERAL circle.blocked_by((r.status)::text, (r.failed_node)::text, n.run_id, n."position", n.predecessors, n.retry_count, n.available_at) b(reason))
  WHERE ((n.status)::text = 'pending'::text);

CREATE OR REPLACE VIEW circle.startable_node_runs WITH (security_invoker=true) AS
 SELECT id,
    run_id,
    node_id,
    "position"
   FROM circle.pending_node_runs n
  WHERE (blocked_by IS NULL);

-- The branches of nodes that have any, by node id, as the version of their run has them.
CREATE OR REPLACE FUNCTION circle.branches_of(p_run_id bigint, p_node_ids text[])
 RETURNS jsonb
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RETURN (SELECT jsonb_object_agg(c.node_id, c.branches)
            FROM circle.pipeline_runs r
            JOIN circle.pipeline_versions v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
            CROSS JOIN LATERAL unnest(v.compiled) c
            -- IS TRUE, because a join would be planned for a few nodes: by loops
            WHERE r.id = p_run_id AND c.branches IS NOT NULL AND (c.node_id IN (SELECT unnest(p_node_ids))) IS TRUE);
END $function$;

-- The successors that a node doesn't take if it completes with this outcome; '{}': it takes all. Without labels only 'false' takes
-- none. With labels edges without one are always taken, and of the others those of the label.
CREATE OR REPLACE FUNCTION circle.untaken(p_node_id text, p_branches jsonb, p_successors integer[], p_branch text)
 RETURNS integer[]
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    label text := circle.branch_label(p_branch);
BEGIN
    IF label NOT IN ('true', 'false') AND (p_branches ? label) IS NOT TRUE THEN
        PERFORM circle.refuse_branch(p_node_id, p_branch, p_branches);
    ELSIF p_branches IS NULL THEN
        RETURN CASE label WHEN 'false' THEN p_successors ELSE '{}' END;
    END IF;
    RETURN ARRAY(SELECT s::integer FROM jsonb_each(p_branches) b CROSS JOIN jsonb_array_elements(b.value) s
                 EXCEPT SELECT s::integer FROM jsonb_array_elements(p_branches -> label) s ORDER BY 1);
END $function$;

-- What a call returns of a node run: little, because these are the hot paths.
CREATE OR REPLACE FUNCTION circle.node_answer(n circle.pipeline_node_runs)
 RETURNS json
 LANGUAGE sql
 STABLE
AS $function$
    SELECT json_build_object('run_id', n.run_id, 'node_id', n.node_id, 'node_type', n.node_type, 'status', n.status,
                             'attempt', n.retry_count + 1::bigint, 'available_at', n.available_at, 'error_message', n.error_message)
$function$;

-- Whether a completed node takes what it would take with this outcome.
CREATE OR REPLACE FUNCTION circle.has_outcome(n circle.pipeline_node_runs, p_branch text)
 RETURNS boolean
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    wanted integer[] := circle.untaken(n.node_id, circle.branches_of(n.run_id, ARRAY[n.node_id]) -> n.node_id, n.successors, p_branch);
BEGIN
    RETURN wanted <@ coalesce(n.untaken, '{}') AND wanted @> coalesce(n.untaken, '{}');
END $function$;

--   state of the node              a repeat is
--   the status reported            the same attempt, and for completed the same output and outcome
--   pending, to be retried         failed, of an earlier attempt
CREATE OR REPLACE FUNCTION circle.is_repeat(n circle.pipeline_node_runs, p_token bigint, p_status text, p_attempt integer, p_output jsonb, p_branch text)
 RETURNS boolean
 LANGUAGE sql
 STABLE
AS $function$
    SELECT CASE
        WHEN p_status = 'skipped' THEN n.status = 'skipped'
        WHEN p_token IS NULL THEN false
        WHEN p_status = 'failed' AND n.status IN ('pending', 'running') THEN
            coalesce(p_attempt <= n.retry_count, n.status = 'pending' AND n.retry_count > 0)
        WHEN p_status = 'completed' THEN n.status = 'completed' AND coalesce(p_attempt = n.retry_count + 1::bigint, true)
                                         AND coalesce(p_output = n.output_data, true) AND (p_branch IS NULL OR circle.has_outcome(n, p_branch))
        ELSE n.status = p_status AND coalesce(p_attempt = n.retry_count + 1::bigint, true) END
$function$;

-- Raises why a call on a node run is refused, unless it repeats one that succeeded: then returns the node run.
CREATE OR REPLACE FUNCTION circle.repeat_or_refuse(p_run_id bigint, p_node_id text, p_token bigint, p_requested text, p_attempt integer DEFAULT NULL::integer, p_output jsonb DEFAULT NULL::jsonb, p_branch text DEFAULT NULL::text)
 RETURNS circle.pipeline_node_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    r circle.pipeline_runs;
    n circle.pipeline_node_runs;
    p record;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND OR NOT circle.holds_run(r.claim_token, r.lease_expires_at, p_token) THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    SELECT * INTO n FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND node_id = p_node_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_unknown_node(p_run_id, p_node_id);
    ELSIF circle.is_repeat(n, p_token, p_requested, p_attempt, p_output, p_branch) THEN
        PERFORM pg_logical_emit_message(true, 'circle', '');   -- writes WAL: the commit waits for a synchronous standby, as the first one did
        RETURN n;
    ELSIF r.status = 'running' AND n.status = 'pending' AND p_requested = 'running' THEN
        SELECT blocked_by, to_jsonb(waiting_for) AS waiting_for INTO p
        FROM circle.pending_node_runs WHERE run_id = p_run_id AND node_id = p_node_id;
        RAISE EXCEPTION 'node % of run % is not ready', p_node_id, p_run_id USING ERRCODE = 'PL005',
            DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', p_node_id, 'waiting_for', coalesce(p.waiting_for, '[]'),
                'reason', CASE
                    WHEN p.waiting_for <> '[]' THEN ''
                    WHEN p.blocked_by = 'retry' THEN 'its retry is due at ' || n.available_at
                    WHEN p.blocked_by = 'failure' THEN format('node %L failed, and only retries start after a failure', r.failed_node)
                    WHEN p.blocked_by IN ('predecessors', 'skipped') THEN 'no predecessor is completed and takes it: skip it, too'
                    ELSE 'it became ready during this call: try again' END);
    END IF;
    IF r.completed_at IS NOT NULL THEN
        PERFORM circle.refuse_run_over(p_run_id, r.status, r.completed_at, r.error_message, p_requested);
    END IF;
    PERFORM circle.refuse_transition(p_run_id, p_node_id, n.status, p_requested, CASE
        WHEN r.status <> 'running' THEN 'its run is ' || r.status
        WHEN p_attempt < n.retry_count + 1::bigint THEN format('attempt %s has ended, the current one is %s', p_attempt, n.retry_count + 1::bigint)
        WHEN p_attempt > n.retry_count + 1::bigint THEN format('attempt %s has not begun, the current one is %s', p_attempt, n.retry_count + 1::bigint)
        WHEN p_requested = 'completed' AND n.status = 'completed' AND p_token IS NOT NULL THEN
            'it completed with another ' || CASE WHEN p_output <> n.output_data THEN 'output' ELSE 'branch' END END);
END $function$;

-- Skips the nodes to which all edges are dead, transitively, from the nodes at these positions on. Returns these positions and those
-- of the nodes that follow the skipped ones.
CREATE OR REPLACE FUNCTION circle.skip_followers(p_run_id bigint, p_positions integer[])
 RETURNS integer[]
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    following integer[] := p_positions;
    touched integer[] := p_positions;
BEGIN
    WHILE cardinality(following) > 0 LOOP
        WITH skipped AS (
            UPDATE circle.pipeline_node_runs n SET status = 'skipped'
            WHERE n.run_id = p_run_id AND n.status = 'pending' AND n.position = ANY (following)
              AND (SELECT bool_and(circle.is_dead(p.status, p.untaken, n.position)) FROM circle.nodes_at(p_run_id, n.predecessors) p)
            RETURNING n.successors
        )
        SELECT array_agg(DISTINCT s.position) INTO following FROM skipped k CROSS JOIN unnest(k.successors) s (position);
        touched := touched || following;
    END LOOP;
    RETURN touched;
END $function$;

CREATE OR REPLACE FUNCTION circle.start_node(p_run_id bigint, p_node_id text, p_input jsonb, p_token bigint)
 RETURNS json
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    failed text;
    n circle.pipeline_node_runs;
BEGIN
    UPDATE circle.pipeline_runs SET current_node = left(p_node_id, 100)
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    RETURNING failed_node INTO failed;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs t SET
            status = 'running', started_at = clock_timestamp(), input_data = coalesce(p_input, t.input_data)
        WHERE t.run_id = p_run_id AND t.node_id = p_node_id AND (t.status = 'pending') IS TRUE
          AND (SELECT b.reason FROM circle.blocked_by('running', failed, t.run_id, t.position, t.predecessors, t.retry_count,
                                                      t.available_at) b (reason)) IS NULL
        RETURNING * INTO n;
    END IF;
    IF n.id IS NULL THEN
        n := circle.repeat_or_refuse(p_run_id, p_node_id, p_token, 'running');
    END IF;
    RETURN circle.node_answer(n);
END $function$;

CREATE OR REPLACE FUNCTION circle.complete_node(p_run_id bigint, p_node_id text, p_output jsonb, p_attempt integer, p_token bigint, p_branch text DEFAULT NULL::text)
 RETURNS json
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        UPDATE circle.pipeline_node_runs t SET
            status = 'completed', output_data = coalesce(p_output, t.output_data), error_message = NULL,
            untaken = CASE WHEN p_branch IS NOT NULL THEN nullif(circle.untaken(
                t.node_id, circle.branches_of(t.run_id, ARRAY[t.node_id]) -> t.node_id, t.successors, p_branch), '{}') END,
            completed_at = greatest(clock_timestamp(), t.started_at), duration_ms = circle.elapsed_ms(NULL, t.started_at)
        WHERE t.run_id = p_run_id AND t.node_id = p_node_id AND (t.status IN ('pending', 'running')) IS TRUE
          AND coalesce(p_attempt = t.retry_count + 1::bigint, true)
        RETURNING * INTO n;
    END IF;
    IF n.id IS NULL THEN
        n := circle.repeat_or_refuse(p_run_id, p_node_id, p_token, 'completed', p_attempt, p_output, p_branch);
    ELSIF n.untaken IS NOT NULL THEN
        PERFORM circle.skip_followers(p_run_id, n.untaken);
    END IF;
    RETURN circle.node_answer(n);
END $function$;

CREATE OR REPLACE FUNCTION circle.skip_node(p_run_id bigint, p_node_id text, p_token bigint)
 RETURNS json
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
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
        PERFORM circle.skip_followers(p_run_id, n.successors);
    END IF;
    IF n.id IS NULL THEN
        n := circle.repeat_or_refuse(p_run_id, p_node_id, p_token, 'skipped');
    END IF;
    RETURN circle.node_answer(n);
END $function$;

-- Whether an attempt that isn't named was reported before: its node waits for the retry. Inlined.
CREATE OR REPLACE FUNCTION circle.was_reported(n circle.pipeline_node_runs, p_attempt integer)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE
AS $function$
    SELECT p_attempt IS NULL AND n.status = 'pending' AND n.retry_count > 0
$function$;

-- When the next attempt of a node may start; PostgreSQL has no interval for a larger exponent. Inlined.
CREATE OR REPLACE FUNCTION circle.retry_due(p_base double precision, p_max double precision, p_retries integer)
 RETURNS timestamp with time zone
 LANGUAGE sql
AS $function$
    SELECT clock_timestamp() + make_interval(secs => least(p_base * power(2, least(p_retries, 62)), p_max))
$function$;

-- Records that the attempt of a node, or of all running nodes, failed: it is retried if retries remain, else failed.
CREATE OR REPLACE FUNCTION circle.fail_attempts(p_run_id bigint, p_node_id text, p_error text, p_retryable boolean, p_attempt integer, p_claimed boolean)
 RETURNS SETOF circle.pipeline_node_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    p circle.pipelines;
BEGIN
    SELECT * INTO p FROM circle.pipelines WHERE id = (SELECT pipeline_id FROM circle.pipeline_runs WHERE id = p_run_id);
    RETURN QUERY UPDATE circle.pipeline_node_runs n SET
        status = CASE WHEN a.retried THEN 'pending' ELSE 'failed' END,
        retry_count = n.retry_count + a.retried::integer,
        available_at = CASE WHEN a.retried THEN circle.retry_due(p.retry_backoff_base, p.retry_backoff_max, n.retry_count) END,
        error_message = p_error
    FROM (
        SELECT t.id, p_retryable AND t.status = 'running' AND t.retry_count < p.max_retries_per_node AS retried
        FROM circle.pipeline_node_runs t
        WHERE t.run_id = p_run_id AND CASE WHEN p_node_id IS NULL THEN t.status = 'running'
                                      ELSE t.node_id = p_node_id AND circle.node_may_become(t.status, 'failed')
                                           AND coalesce(p_attempt = t.retry_count + 1::bigint, true)
                                           AND NOT (p_claimed AND p_retryable AND circle.was_reported(t, p_attempt)) END
    ) a
    WHERE n.id = a.id
    RETURNING n.*;
END $function$;

CREATE OR REPLACE FUNCTION circle.fail_node(p_run_id bigint, p_node_id text, p_error text, p_retryable boolean, p_attempt integer, p_token bigint)
 RETURNS json
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    n circle.pipeline_node_runs;
BEGIN
    PERFORM FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND circle.holds_run(claim_token, lease_expires_at, p_token)
    FOR NO KEY UPDATE;
    IF FOUND THEN
        SELECT * INTO n FROM circle.fail_attempts(p_run_id, p_node_id, p_error, p_retryable, p_attempt, p_token IS NOT NULL);
    END IF;
    IF n.id IS NULL THEN
        n := circle.repeat_or_refuse(p_run_id, p_node_id, p_token, 'failed', p_attempt);
    END IF;
    RETURN circle.node_answer(n);
END $function$;

-- Raises why results can't be recorded, unless all that were not applied are repeats.
CREATE OR REPLACE FUNCTION circle.repeat_or_refuse_results(p_run_id bigint, p_results jsonb, p_applied text[], p_token bigint)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    x record;
BEGIN
    FOR x IN SELECT r.*, n.status AS current, count(*) OVER (PARTITION BY r.node_id) AS times
             FROM jsonb_populate_recordset(NULL::circle.node_result, p_results) r
             LEFT JOIN circle.pipeline_node_runs n ON n.run_id = p_run_id AND n.node_id = r.node_id
             ORDER BY n.id IS NULL DESC, times DESC, n.position LOOP
        IF x.current IS NOT NULL AND x.times > 1 THEN
            PERFORM circle.refuse_transition(p_run_id, x.node_id, x.current, x.status, 'the batch has more than one result for it');
        ELSIF (x.node_id = ANY (p_applied)) IS NOT TRUE THEN
            PERFORM circle.repeat_or_refuse(p_run_id, x.node_id, p_token, x.status, x.attempt, x.output, x.branch);
        END IF;
    END LOOP;
END $function$;

-- Records results, all or none. p_retry: whether failed attempts are retried where a result doesn't say. Returns the positions of the
-- nodes that may have become ready, and whether some results repeat earlier ones.
CREATE OR REPLACE FUNCTION circle.apply_results(p_run_id bigint, p_results jsonb, p_token bigint, p_retry boolean, OUT following integer[], OUT repeated boolean)
 RETURNS record
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    done record;
    p record;
BEGIN
    IF p_retry OR p_results @? '$[*] ? (@.retryable == true)' THEN
        SELECT t.max_retries_per_node AS retries, t.retry_backoff_base AS base, t.retry_backoff_max AS most INTO p
        FROM circle.pipelines t WHERE t.id = (SELECT pipeline_id FROM circle.pipeline_runs WHERE id = p_run_id);
    ELSE
        -- the types of the columns above: the statements below are prepared with them
        SELECT 0 AS retries, 0.0::double precision AS base, 0.0::double precision AS most INTO p;
    END IF;
    WITH updated AS (
        UPDATE circle.pipeline_node_runs n SET
            status = CASE WHEN x.retried THEN 'pending' ELSE x.status END, error_message = x.error,
            output_data = coalesce(x.output, n.output_data), duration_ms = circle.elapsed_ms(x.duration_ms, n.started_at),
            -- the branches are read once, if a result has one
            untaken = CASE WHEN x.branch IS NOT NULL AND x.status = 'completed' THEN nullif(circle.untaken(
                n.node_id, (SELECT circle.branches_of(p_run_id, ARRAY(SELECT e ->> 'node_id' FROM jsonb_array_elements(p_results) e
                                                                      WHERE e ? 'branch'))) -> n.node_id,
                n.successors, x.branch), '{}') END,
            retry_count = CASE WHEN x.retried THEN n.retry_count + 1 ELSE greatest(n.retry_count, CASE WHEN x.attempt IS NULL THEN x.retry_count END) END,
            available_at = CASE WHEN x.retried THEN circle.retry_due(p.base, p.most, n.retry_count) END,
            -- of a node that is reported after it ran
            started_at = CASE WHEN n.started_at IS NULL AND x.status IN ('completed', 'failed') THEN
                clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0) ELSE n.started_at END,
            completed_at = CASE WHEN NOT x.retried THEN greatest(clock_timestamp(), n.started_at) END
        FROM (
            SELECT t.id, r.*, r.status = 'failed' AND coalesce(r.retryable, p_retry) AND t.status = 'running'
                              AND t.retry_count < p.retries AS retried
            FROM jsonb_populate_recordset(NULL::circle.node_result, p_results) r
            JOIN circle.pipeline_node_runs t ON t.run_id = p_run_id AND t.node_id = r.node_id
            WHERE circle.node_may_become(t.status, r.status) AND coalesce(r.attempt = t.retry_count + 1::bigint, true)
              -- NOT IN, because with a list of the terminal statuses the planner would expect few results and join by loops
              AND r.status NOT IN ('pending', 'running')
              AND NOT (p_token IS NOT NULL AND r.status = 'failed' AND coalesce(r.retryable, p_retry)
                       AND circle.was_reported(t, r.attempt))
        ) x
        WHERE n.id = x.id
        RETURNING n.node_id, n.status, n.successors, n.untaken
    )
    SELECT array_agg(u.node_id) FILTER (WHERE coalesce(s.ord, 1) = 1) AS nodes, array_agg(s.position) AS following,
           bool_or(u.status = 'skipped' OR u.untaken IS NOT NULL) AS skipped
    INTO done FROM updated u LEFT JOIN unnest(u.successors) WITH ORDINALITY s (position, ord) ON true;
    repeated := coalesce(cardinality(done.nodes), 0) <> jsonb_array_length(p_results);
    IF repeated THEN
        PERFORM circle.repeat_or_refuse_results(p_run_id, p_results, done.nodes, p_token);
    END IF;
    following := coalesce(done.following, '{}');
    IF done.skipped THEN
        following := circle.skip_followers(p_run_id, following);
    END IF;
END $function$;

-- Nodes that were started, as a JSON list in execution order; p_inputs adds the outputs of completed predecessors that take them.
CREATE OR REPLACE FUNCTION circle.started_nodes(p_run_id bigint, p_ids bigint[], p_inputs boolean)
 RETURNS json
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF p_inputs THEN
        RETURN (SELECT json_agg(json_build_object(
                    'node_id', n.node_id, 'node_type', n.node_type, 'attempt', n.retry_count + 1::bigint, 'inputs', (
                        SELECT coalesce(json_object_agg(p.node_id, p.output_data ORDER BY p.position), '{}')
                        FROM circle.nodes_at(p_run_id, n.predecessors) p
                        WHERE p.status = 'completed' AND NOT circle.is_dead(p.status, p.untaken, n.position)))
                    ORDER BY n.position, n.id)
                FROM circle.pipeline_node_runs n WHERE n.id = ANY (p_ids));
    END IF;
    RETURN (SELECT json_agg(json_build_object('node_id', n.node_id, 'node_type', n.node_type, 'attempt', n.retry_count + 1::bigint)
                            ORDER BY n.position, n.id)
            FROM circle.pipeline_node_runs n WHERE n.id = ANY (p_ids));
END $function$;

-- The answer of advance_run if it started nothing: what is running, and when a retry is due.
CREATE OR REPLACE FUNCTION circle.waiting_step(p_run_id bigint)
 RETURNS json
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RETURN (SELECT json_build_object(
        'status', (SELECT r.status FROM circle.pipeline_runs r WHERE r.id = p_run_id),
        'running', json_agg(json_build_object('node_id', n.node_id, 'node_type', n.node_type, 'attempt', n.retry_count + 1::bigint)
                            ORDER BY n.position) FILTER (WHERE n.status = 'running'),
        'next_due', min(n.available_at) FILTER (WHERE n.status = 'pending'))
        FROM circle.pipeline_node_runs n WHERE n.run_id = p_run_id AND n.status IN ('pending', 'running'));
END $function$;

-- Starts the ready nodes at these positions, or all that are ready if they are NULL, and returns their ids.
CREATE OR REPLACE FUNCTION circle.start_ready_nodes(r circle.pipeline_runs, p_positions integer[])
 RETURNS bigint[]
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    started bigint[];
BEGIN
    IF p_positions IS NULL THEN
        WITH s AS (
            UPDATE circle.pipeline_node_runs n SET status = 'running', started_at = clock_timestamp()
            WHERE n.run_id = r.id AND (n.status = 'pending') IS TRUE
              AND (SELECT b.reason FROM circle.blocked_by(r.status, r.failed_node, n.run_id, n.position, n.predecessors, n.retry_count,
                                                          n.available_at) b (reason)) IS NULL
            RETURNING n.id
        ) SELECT array_agg(s.id) INTO started FROM s;
    ELSE
        WITH s AS (
            UPDATE circle.pipeline_node_runs n SET status = 'running', started_at = clock_timestamp()
            WHERE n.run_id = r.id AND n.position = ANY (p_positions) AND (n.status = 'pending') IS TRUE
              AND (SELECT b.reason FROM circle.blocked_by(r.status, r.failed_node, n.run_id, n.position, n.predecessors, n.retry_count,
                                                          n.available_at) b (reason)) IS NULL
            RETURNING n.id
        ) SELECT array_agg(s.id) INTO started FROM s;
    END IF;
    RETURN started;
END $function$;

-- The answer of advance_run if it started nodes.
CREATE OR REPLACE FUNCTION circle.started_step(p_run_id bigint, p_ids bigint[], p_inputs boolean)
 RETURNS json
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    UPDATE circle.pipeline_runs SET current_node = (
        SELECT node_id FROM circle.pipeline_node_runs WHERE id = ANY (p_ids) ORDER BY position DESC NULLS LAST, id DESC LIMIT 1)
    WHERE id = p_run_id;
    RETURN json_build_object('status', 'running', 'started', circle.started_nodes(p_run_id, p_ids, p_inputs));
END $function$;

-- Ends a run in which nothing was started, if nothing is left. If nothing runs, either, starts what became ready by other calls.
CREATE OR REPLACE FUNCTION circle.settle_run(p_run_id bigint, p_inputs boolean)
 RETURNS json
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    r circle.pipeline_runs := circle.end_run_if_done(p_run_id);
    started bigint[];
BEGIN
    IF r.id IS NULL AND NOT EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'running') THEN
        SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
        started := circle.start_ready_nodes(r, NULL);
        IF started IS NOT NULL THEN
            RETURN circle.started_step(p_run_id, started, p_inputs);
        END IF;
    END IF;
    RETURN circle.waiting_step(p_run_id);
END $function$;

-- Records results, starts what became ready, ends the run when nothing is left. The results of most calls complete nodes, without a
-- branch, of a run in which none failed: for them it is one statement, in which the guard fires once.
CREATE OR REPLACE FUNCTION circle.advance_run(p_run_id bigint, p_results jsonb, p_token bigint, p_retry boolean, p_inputs boolean)
 RETURNS json
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r circle.pipeline_runs;
    d record;
    fresh boolean := false;
    following integer[];   -- positions that may have become ready; NULL: any
    started bigint[];
    repeated boolean := false;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id FOR NO KEY UPDATE;
    IF r.status = 'running' AND r.failed_node IS NULL AND circle.holds_run(r.claim_token, r.lease_expires_at, p_token)
       AND p_results <> '[]' AND NOT p_results @? '$[*] ? (@.status != "completed" || @.branch != null)' THEN
        WITH done AS (
            UPDATE circle.pipeline_node_runs n SET
                status = 'completed', output_data = coalesce(x.output, n.output_data), error_message = NULL,
                duration_ms = circle.elapsed_ms(x.duration_ms, n.started_at), retry_count = greatest(n.retry_count, CASE WHEN x.attempt IS NULL THEN x.retry_count END),
                started_at = coalesce(n.started_at, clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0)),
                completed_at = greatest(clock_timestamp(), n.started_at)
            FROM jsonb_populate_recordset(NULL::circle.node_result, p_results) x
            WHERE n.run_id = p_run_id AND n.node_id = x.node_id AND (n.status IN ('pending', 'running')) IS TRUE
              AND coalesce(x.attempt = n.retry_count + 1::bigint, true)
            RETURNING n.node_id, n.position, n.successors
        ), started AS (
            UPDATE circle.pipeline_node_runs n SET status = 'running', started_at = clock_timestamp()
            WHERE n.run_id = p_run_id AND n.position = ANY (ARRAY(SELECT s FROM done, unnest(done.successors) s))
              AND (n.status = 'pending') IS TRUE AND coalesce(n.available_at <= clock_timestamp(), true)
              -- as blocked_by has it, of a run in which no node failed; done is of this statement, which doesn't see it, and takes all edges
              AND NOT EXISTS (SELECT FROM circle.nodes_at(p_run_id, n.predecessors) p
                              WHERE p.status NOT IN ('completed', 'skipped')
                                AND p.position NOT IN (SELECT done.position FROM done WHERE done.position IS NOT NULL))
            RETURNING n.id, n.node_id, n.node_type, n.position, n.retry_count
        ), current AS (
            UPDATE circle.pipeline_runs SET current_node = c.node_id
            FROM (SELECT node_id FROM started ORDER BY position DESC LIMIT 1) c WHERE id = p_run_id
        )
        SELECT (SELECT array_agg(node_id) FROM done) AS applied, array_agg(s.id) AS started,
               json_agg(json_build_object('node_id', s.node_id, 'node_type', s.node_type, 'attempt', s.retry_count + 1::bigint)
                        ORDER BY s.position) AS nodes
        INTO d FROM started s;
        started := d.started;
        IF cardinality(d.applied) = jsonb_array_length(p_results) THEN
            IF started IS NOT NULL THEN
                RETURN json_build_object('status', 'running', 'started', CASE WHEN p_inputs
                    THEN circle.started_nodes(p_run_id, started, true) ELSE d.nodes END);
            END IF;
        ELSE
            PERFORM circle.repeat_or_refuse_results(p_run_id, p_results, d.applied, p_token);
            repeated := true;
        END IF;
    ELSE
        IF (r.status = 'running' AND circle.holds_run(r.claim_token, r.lease_expires_at, p_token)) IS NOT TRUE THEN
            IF r.completed_at IS NOT NULL AND r.claim_token = p_token AND p_results <> '[]' THEN
                PERFORM circle.repeat_or_refuse_results(p_run_id, p_results, '{}', p_token);
                RETURN json_build_object('status', r.status);
            END IF;
            fresh := r.started_at IS NULL AND r.resumed_from IS NULL;
            r := circle.lock_run(p_run_id, p_token);
        END IF;
        IF p_results <> '[]' THEN
            SELECT a.following, a.repeated INTO following, repeated FROM circle.apply_results(p_run_id, p_results, p_token, p_retry) a;
            SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
        ELSIF fresh THEN
            SELECT array_agg(position) INTO following FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND predecessors = '{}';
        END IF;
        IF r.failed_node IS NOT NULL THEN
            following := NULL;   -- retries that are due can be anywhere
        END IF;
        started := circle.start_ready_nodes(r, following);
    END IF;
    IF repeated THEN   -- the answer to the first report may be lost: also what it started
        PERFORM circle.start_ready_nodes(r, NULL);
        SELECT array_agg(id) INTO started FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'running';
    END IF;
    RETURN CASE WHEN started IS NULL THEN circle.settle_run(p_run_id, p_inputs) ELSE circle.started_step(p_run_id, started, p_inputs) END;
END $function$;

-- IS TRUE keeps the index on ends away, which has the id as its second column.
CREATE OR REPLACE FUNCTION circle.record_results(p_run_id bigint, p_results jsonb, p_token bigint, p_retry boolean)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
    IF p_results <> '[]' AND EXISTS (
            SELECT FROM circle.pipeline_runs WHERE id = p_run_id AND (completed_at IS NOT NULL) IS TRUE AND claim_token = p_token) THEN
        PERFORM circle.repeat_or_refuse_results(p_run_id, p_results, '{}', p_token);
    ELSE
        PERFORM circle.lock_run(p_run_id, p_token);
        PERFORM circle.apply_results(p_run_id, p_results, p_token, p_retry);
    END IF;
END $function$;

-- Creates a run with the results of its nodes and ends it.
CREATE OR REPLACE FUNCTION circle.record_run(p_pipeline_id bigint, p_trigger_data jsonb, p_key text, p_results jsonb)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    created record;
    r circle.pipeline_runs;
    done record;
BEGIN
    SELECT * INTO created FROM circle.insert_run(p_pipeline_id, 'running', p_trigger_data, p_key, 0, NULL, false);
    r := created.r;
    IF NOT created.is_new THEN
        IF r.id IS NULL THEN
            PERFORM circle.refuse_create(p_pipeline_id);
        ELSIF r.completed_at IS NULL THEN
            PERFORM circle.refuse_transition(r.id, NULL, r.status, 'recorded', 'it has this key, and was created to be executed');
        END IF;
        RETURN r;
    END IF;
    WITH inserted AS (
        INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, position, predecessors, successors, status, output_data,
                                               untaken, error_message, retry_count, duration_ms, started_at, completed_at)
        SELECT r.id, c.node_id, c.node_type, c.place - 1, c.predecessors, c.successors, coalesce(x.status, 'pending'),
               coalesce(x.output, '{}'), CASE WHEN x.branch IS NOT NULL AND x.status = 'completed' THEN
                   nullif(circle.untaken(c.node_id, c.branches, c.successors, x.branch), '{}') END,
               x.error, coalesce(x.attempt - 1, x.retry_count, 0), coalesce(x.duration_ms, 0),
               CASE WHEN x.status IN ('completed', 'failed') THEN
                   clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0) END,
               CASE WHEN x.status IS NOT NULL THEN clock_timestamp() END
        FROM circle.pipeline_versions v
        CROSS JOIN LATERAL unnest(v.compiled) WITH ORDINALITY c (node_id, node_type, predecessors, successors, branches, place)
        LEFT JOIN (SELECT DISTINCT ON (y.node_id) y.* FROM jsonb_populate_recordset(NULL::circle.node_result, p_results) y) x
            ON x.node_id = c.node_id
        WHERE v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
        ORDER BY c.place
        RETURNING status, untaken, node_id
    )
    SELECT count(*) AS nodes, array_agg(i.node_id) FILTER (WHERE i.status <> 'pending') AS applied,
           bool_or(i.status = 'skipped' OR i.untaken IS NOT NULL) AS skipped INTO done FROM inserted i;
    IF done.nodes = 0 THEN
        PERFORM circle.refuse_create(p_pipeline_id);
    ELSIF coalesce(cardinality(done.applied), 0) <> jsonb_array_length(p_results) THEN
        PERFORM circle.repeat_or_refuse_results(r.id, p_results, done.applied, NULL);
    ELSIF done.skipped THEN
        PERFORM circle.skip_followers(r.id, ARRAY(SELECT s FROM circle.pipeline_node_runs n, unnest(n.successors) s
                                                  WHERE n.run_id = r.id AND (n.status = 'skipped' OR n.untaken IS NOT NULL)));
    END IF;
    r := circle.end_run_if_done(r.id);
    IF r.id IS NULL THEN
        PERFORM circle.refuse_run((created.r).id, NULL, 'completed', (
            SELECT format('nodes %s could have started, and have no result', string_agg(n.node_id, ', ' ORDER BY n.position))
            FROM (SELECT s.node_id, s.position FROM circle.startable_node_runs s WHERE s.run_id = (created.r).id
                  ORDER BY s.position LIMIT 10) n));
    END IF;
    RETURN r;
END $function$;

-- advance_run for many runs at once, each at most once, in one commit: for those whose call is plain. p_results has the results of
-- all, each with its run_id. A call is plain if its results complete nodes, without a branch, of a run that the caller holds and in
-- which no node failed, or begins such a run. A call whose run is locked by somebody else, or that isn't plain, changes nothing, and its
-- step is NULL: advance_run has to be called for it. So nobody waits for somebody else's run, and each refusal has its own error.
CREATE OR REPLACE FUNCTION circle.advance_runs(p_run_ids bigint[], p_tokens bigint[], p_results jsonb, p_with_inputs bigint[] DEFAULT '{}'::bigint[])
 RETURNS TABLE(run_id bigint, step json)
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
 SET lock_timeout TO '100ms'
AS $function$
#variable_conflict use_column
DECLARE
    calls record;
    moved record;
    idle bigint[];   -- runs in which nothing was started
    ended bigint[];
    one bigint;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    SELECT array_agg(l.id) FILTER (WHERE l.status = 'running' AND l.reported) AS reported,
           array_agg(l.id) FILTER (WHERE l.status = 'pending' AND NOT l.reported AND l.started_at IS NULL AND l.resumed_from IS NULL) AS fresh
    INTO calls FROM (
        SELECT r.id, r.status, r.started_at, r.resumed_from, x.run_id IS NOT NULL AS reported
        FROM unnest(p_run_ids, p_tokens) c (run_id, token)
        JOIN circle.pipeline_runs r ON r.id = c.run_id
        LEFT JOIN (SELECT DISTINCT run_id FROM jsonb_to_recordset(p_results) AS y (run_id bigint)) x ON x.run_id = c.run_id
        WHERE r.failed_node IS NULL AND r.completed_at IS NULL AND circle.holds_run(r.claim_token, r.lease_expires_at, c.token)
        ORDER BY r.id FOR NO KEY UPDATE OF r SKIP LOCKED
    ) l;
    IF calls.fresh IS NOT NULL THEN
        UPDATE circle.pipeline_runs SET status = 'running', started_at = coalesce(started_at, clock_timestamp())
        WHERE id = ANY (calls.fresh);
    END IF;
    WITH results AS MATERIALIZED (
        SELECT x.*, n.id, (n.status = ANY ('{pending,running}') AND x.status = 'completed' AND x.branch IS NULL
                           AND coalesce(x.attempt = n.retry_count + 1::bigint, true) AND count(*) OVER (PARTITION BY n.id) = 1) IS TRUE AS plain
        FROM jsonb_to_recordset(p_results) AS x (run_id bigint, node_id text, status text, output jsonb, duration_ms integer,
                                                 retry_count integer, attempt integer, branch text)
        LEFT JOIN circle.pipeline_node_runs n ON n.run_id = x.run_id AND n.node_id = x.node_id
        WHERE x.run_id = ANY (calls.reported)
    ), refused AS MATERIALIZED (
        SELECT DISTINCT x.run_id FROM results x WHERE NOT x.plain
    ), done AS (
        UPDATE circle.pipeline_node_runs n SET
            status = 'completed', output_data = coalesce(x.output, n.output_data), error_message = NULL,
            duration_ms = circle.elapsed_ms(x.duration_ms, n.started_at), retry_count = greatest(n.retry_count, CASE WHEN x.attempt IS NULL THEN x.retry_count END),
            started_at = coalesce(n.started_at, clock_timestamp() - make_interval(secs => coalesce(x.duration_ms, 0) / 1000.0)),
            completed_at = greatest(clock_timestamp(), n.started_at)
        FROM results x
        WHERE n.id = x.id AND (n.status IN ('pending', 'running')) IS TRUE AND NOT x.run_id IN (SELECT f.run_id FROM refused f)
        RETURNING n.run_id, n.position, n.successors
    ), following AS MATERIALIZED (
        SELECT DISTINCT d.run_id, s.position FROM done d CROSS JOIN unnest(d.successors) s (position)
        UNION ALL
        SELECT n.run_id, n.position FROM circle.pipeline_node_runs n WHERE n.run_id = ANY (calls.fresh) AND n.predecessors = '{}'
    ), started AS (
        UPDATE circle.pipeline_node_runs n SET status = 'running', started_at = clock_timestamp()
        FROM following f
        WHERE n.run_id = f.run_id AND n.position = f.position AND (n.status = 'pending') IS TRUE
          AND coalesce(n.available_at <= clock_timestamp(), true)
          AND NOT EXISTS (SELECT FROM circle.nodes_at(n.run_id, n.predecessors) p
                          WHERE p.status NOT IN ('completed', 'skipped')
                            AND NOT (p.run_id, p.position) IN (
                                SELECT d.run_id, d.position FROM done d WHERE d.position IS NOT NULL))
        RETURNING n.id, n.run_id, n.node_id, n.node_type, n.position, n.retry_count
    ), current AS (
        UPDATE circle.pipeline_runs r SET current_node = c.node_id
        FROM (SELECT DISTINCT ON (s.run_id) s.run_id, s.node_id FROM started s ORDER BY s.run_id, s.position DESC) c WHERE r.id = c.run_id
    ), steps AS (
        SELECT s.run_id, json_build_object('status', 'running', 'started', json_agg(json_build_object(
                   'node_id', s.node_id, 'node_type', s.node_type, 'attempt', s.retry_count + 1::bigint) ORDER BY s.position)) AS step,
               array_agg(s.id)::text AS ids
        FROM started s GROUP BY s.run_id
    )
    SELECT (SELECT count(*) FROM done) AS rows, (SELECT count(*) FROM results x WHERE NOT x.run_id IN (SELECT f.run_id FROM refused f)) AS wanted,
           ARRAY(SELECT f.run_id FROM refused f) AS refused, array_agg(s.run_id) AS run_ids, array_agg(s.step) AS steps, array_agg(s.ids) AS ids
    INTO moved FROM steps s;
    IF moved.rows <> moved.wanted THEN   -- a raw writer changed a node meanwhile
        RAISE EXCEPTION 'the batch was disturbed' USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN QUERY SELECT t.run_id::bigint, CASE WHEN t.run_id = ANY (p_with_inputs)   -- by a statement of its own, which sees the new outputs
        THEN json_build_object('status', 'running', 'started', circle.started_nodes(t.run_id, t.ids::bigint[], true)) ELSE t.step END
    FROM unnest(moved.run_ids, moved.steps, moved.ids) t (run_id, step, ids);
    idle := ARRAY(SELECT t.id FROM unnest(calls.reported || calls.fresh) t (id) EXCEPT SELECT unnest(moved.run_ids || moved.refused));
    IF idle <> '{}' THEN
        WITH over AS (
            UPDATE circle.pipeline_runs r SET
                status = 'completed', completed_at = greatest(clock_timestamp(), r.started_at), lease_expires_at = NULL,
                duration_seconds = least(extract(epoch FROM greatest(clock_timestamp(), r.started_at) - r.started_at), 2147483647)
            WHERE r.id = ANY (idle) AND NOT EXISTS (SELECT FROM circle.pipeline_node_runs n WHERE n.run_id = r.id
                                                    AND (n.status NOT IN ('completed', 'skipped') OR n.position IS NULL))
              AND EXISTS (SELECT FROM circle.pipeline_node_runs n WHERE n.run_id = r.id)   -- else settle_run gives it its nodes
            RETURNING r.id, r.pipeline_id
        ), counted AS (
            INSERT INTO circle.pipeline_counters (pipeline_id, success_count)
            SELECT o.pipeline_id, count(*) FROM over o GROUP BY o.pipeline_id
        )
        SELECT coalesce(array_agg(o.id), '{}') INTO ended FROM over o;
        RETURN QUERY SELECT t.id, '{"status": "completed"}'::json FROM unnest(ended) t (id);
        FOR one IN SELECT unnest(idle) EXCEPT SELECT unnest(ended) ORDER BY 1 LOOP   -- other nodes run, or something is unusual
            RETURN QUERY SELECT one, circle.settle_run(one, one = ANY (p_with_inputs));
        END LOOP;
    END IF;
    RETURN QUERY SELECT c.id, NULL::json FROM unnest(p_run_ids) c (id)
    WHERE NOT c.id = ANY (coalesce(moved.run_ids, '{}') || idle);
END $function$;

-- ---- alembic/sql/011_lifecycle/7_workers.sql

-- The running runs of a pipeline with max_running are counted under an advisory lock, which its claimers hold until they commit; one
-- that doesn't get it passes by.
CREATE OR REPLACE FUNCTION circle.claim_runs(p_worker_id text, p_lease interval, p_limit integer, p_pipelines bigint[] DEFAULT NULL::bigint[], p_max_claims integer DEFAULT NULL::integer)
 RETURNS SETOF circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_sort TO 'off'
 SET jit TO 'off'
AS $function$
DECLARE
    now timestamptz := clock_timestamp();
    head record;
    room bigint;
    queues integer;
    ids bigint[];
    picked bigint[];
    more integer;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    IF p_max_claims IS NOT NULL THEN   -- for callers whose transaction ends now: while a sweep is under way, nobody else sweeps
        PERFORM circle.sweep_runs(30, p_max_claims);
    END IF;
    IF (SELECT waits_until FROM circle.pipeline_runs WHERE status = 'pending' AND waits_until IS NOT NULL
        ORDER BY waits_until LIMIT 1) <= now THEN
        UPDATE circle.pipeline_runs SET waits_until = NULL WHERE id = ANY (ARRAY(
            SELECT id FROM circle.pipeline_runs WHERE status = 'pending' AND waits_until <= now
            ORDER BY waits_until LIMIT p_limit::bigint + 32 FOR NO KEY UPDATE SKIP LOCKED));
    END IF;
    FOREACH more IN ARRAY '{32,1000,100000}'::integer[] LOOP
        ids := '{}';
        queues := 0;
        FOR head IN
            SELECT p.id AS pipeline_id, p.max_running, q.id FROM circle.pipelines p
            CROSS JOIN LATERAL (
                SELECT r.id, r.priority FROM circle.pipeline_runs r
                WHERE r.pipeline_id = p.id AND r.status = 'pending' AND r.waits_until IS NULL AND r.pipeline_version IS NOT NULL
                ORDER BY r.pipeline_id, r.priority DESC, r.id LIMIT 1) q
            WHERE p.status = 'active' AND (p_pipelines IS NULL OR p.id = ANY (p_pipelines))
              AND (p.max_running = 0 OR NOT EXISTS (SELECT FROM circle.pipeline_runs r WHERE r.pipeline_id = p.id AND r.status = 'running'
                                                    ORDER BY r.pipeline_id, r.id OFFSET p.max_running - 1))
            ORDER BY q.priority DESC, q.id
        LOOP
            room := CASE WHEN queues < p_limit THEN p_limit::bigint - queues + more ELSE 1 END;   -- before it stand the heads of the others
            IF head.max_running > 0 THEN
                CONTINUE WHEN NOT pg_try_advisory_xact_lock(1734964329, hashint8(head.pipeline_id));
                room := least(room, head.max_running - (
                    SELECT count(*) FROM circle.pipeline_runs r WHERE r.pipeline_id = head.pipeline_id AND r.status = 'running'));
                CONTINUE WHEN room <= 0;
            END IF;
            ids := ids || CASE WHEN room = 1 AND head.max_running = 0 THEN ARRAY[head.id] ELSE ARRAY(
                SELECT r.id FROM circle.pipeline_runs r
                WHERE r.pipeline_id = head.pipeline_id AND r.status = 'pending' AND r.waits_until IS NULL AND r.pipeline_version IS NOT NULL
                ORDER BY r.pipeline_id, r.priority DESC, r.id LIMIT room) END;
            queues := queues + 1;
            EXIT WHEN queues >= p_limit::bigint + more;
        END LOOP;
        picked := ARRAY(
            SELECT r.id FROM circle.pipeline_runs r WHERE r.id = ANY (ids) AND (r.status = 'pending') IS TRUE AND r.waits_until IS NULL
            ORDER BY r.priority DESC, r.id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED);
        EXIT WHEN picked <> '{}' OR ids = '{}';
    END LOOP;
    FOR head IN SELECT i.id FROM unnest(picked) i (id)
                WHERE NOT EXISTS (SELECT FROM circle.pipeline_node_runs n WHERE n.run_id = i.id AND n.position = 0) LOOP
        BEGIN
            PERFORM circle.fill_run(head.id);
        EXCEPTION WHEN integrity_constraint_violation THEN   -- one run with wrong rows stops no other: it is looked at again in an hour
            RAISE WARNING 'run % can''t get its nodes: %', head.id, SQLERRM;
            UPDATE circle.pipeline_runs SET waits_until = clock_timestamp() + interval '1 hour' WHERE id = head.id;
            picked := array_remove(picked, head.id);
        END;
    END LOOP;
    RETURN QUERY WITH claimed AS (
        UPDATE circle.pipeline_runs r SET status = 'running', worker_id = p_worker_id, claim_token = circle.next_token(r.claim_token),
            claim_count = least(r.claim_count, 2147483646) + 1, started_at = coalesce(r.started_at, clock_timestamp()),
            lease_expires_at = clock_timestamp() + p_lease
        WHERE r.id = ANY (picked) RETURNING r.*
    ), noted AS (
        INSERT INTO circle.pipeline_run_history (run_id, kind, worker_id, token)
        SELECT c.id, 'claimed', c.worker_id, c.claim_token FROM claimed c
    )
    SELECT * FROM claimed;
END $function$;

CREATE OR REPLACE FUNCTION circle.heartbeat_run(p_run_id bigint, p_token bigint, p_lease interval)
 RETURNS timestamp with time zone
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
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

-- When a locked run without running nodes has something to do: NULL is now, else its next retry.
CREATE OR REPLACE FUNCTION circle.run_due(p_run_id bigint)
 RETURNS timestamp with time zone
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
    IF NOT EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'pending' AND available_at > clock_timestamp()) THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT CASE WHEN bool_and(b.reason IS NOT NULL) THEN min(n.available_at) FILTER (WHERE b.reason = 'retry') END
            FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id
            CROSS JOIN LATERAL circle.blocked_by('running', r.failed_node, n.run_id, n.position, n.predecessors, n.retry_count,
                                                  n.available_at) b (reason)
            WHERE r.id = p_run_id AND n.status = 'pending');
END $function$;

-- Returns a locked run without running nodes to pending. Its token grows, so that the last holder's is stale.
CREATE OR REPLACE FUNCTION circle.requeue_run(p_run_id bigint, p_lapsed integer, p_released_token bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE sql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
    UPDATE circle.pipeline_runs SET status = 'pending', worker_id = NULL, lease_expires_at = NULL,
        claim_token = circle.next_token(claim_token), lapsed_claims = least(lapsed_claims, 2147483646) + p_lapsed,
        released_token = coalesce(p_released_token, released_token), waits_until = circle.run_due(id)
    WHERE id = p_run_id RETURNING *
$function$;

CREATE OR REPLACE FUNCTION circle.release_run(p_run_id bigint, p_token bigint, p_reason text DEFAULT NULL::text)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r circle.pipeline_runs;
BEGIN
    SELECT * INTO r FROM circle.pipeline_runs
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND claim_token = p_token AND lease_expires_at IS NOT NULL
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id AND released_token = p_token;
        IF NOT FOUND OR NOT circle.is_read_committed() THEN
            PERFORM circle.refuse_lease(p_run_id);
        END IF;
        PERFORM pg_logical_emit_message(true, 'circle', '');   -- as in insert_run
        IF r.status <> 'pending' THEN   -- the token is not told that may be the next holder's
            r.claim_token := p_token;
        END IF;
        RETURN r;
    END IF;
    -- the release is deliberate: the attempts of its nodes don't count
    UPDATE circle.pipeline_node_runs SET status = 'pending' WHERE run_id = p_run_id AND status = 'running';
    INSERT INTO circle.pipeline_run_history (run_id, kind, worker_id, token, reason)
    VALUES (p_run_id, 'released', r.worker_id, p_token, p_reason);
    RETURN circle.requeue_run(p_run_id, 0, p_token);
END $function$;

-- Adds the counters of runs to the columns of their pipelines. A pipeline that somebody changes is left for the next sweep.
CREATE OR REPLACE FUNCTION circle.fold_counters()
 RETURNS void
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
    PERFORM circle.add_up_counters();
    WITH free AS MATERIALIZED (
        SELECT p.id FROM circle.pipelines p
        WHERE p.id IN (SELECT pipeline_id FROM circle.pipeline_counters WHERE run_count + success_count + error_count > 0)
        ORDER BY p.id FOR NO KEY UPDATE SKIP LOCKED
    ), rows AS MATERIALIZED (
        SELECT c.pipeline_id, c.id FROM circle.pipeline_counters c
        WHERE c.pipeline_id IN (SELECT free.id FROM free) AND c.run_count + c.success_count + c.error_count > 0 FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM circle.pipeline_counters c USING rows r WHERE c.pipeline_id = r.pipeline_id AND c.id = r.id RETURNING c.*
    ), sums AS MATERIALIZED (
        SELECT pipeline_id, sum(pending) AS pending, sum(running) AS running, sum(completed) AS completed, sum(failed) AS failed,
               sum(cancelled) AS cancelled, sum(timeout) AS timeout, sum(run_count) AS run_count,
               sum(success_count) AS success_count, sum(error_count) AS error_count, sum(leases_lost) AS leases_lost,
               max(last_run) AS last_run
        FROM gone GROUP BY pipeline_id
    ), kept AS (
        INSERT INTO circle.pipeline_counters (pipeline_id, pending, running, completed, failed, cancelled, timeout, leases_lost)
        SELECT pipeline_id, pending, running, completed, failed, cancelled, timeout, leases_lost FROM sums
    )
    UPDATE circle.pipelines p SET run_count = least(p.run_count + s.run_count, 2147483647),
        success_count = least(p.success_count + s.success_count, 2147483647),
        error_count = least(p.error_count + s.error_count, 2147483647), last_run = greatest(p.last_run, s.last_run)
    FROM sums s WHERE p.id = s.pipeline_id;
END $function$;

-- A pipeline's row with what its counters add to it. STABLE, so that both are of one snapshot: fold_counters moves numbers from the
-- counters to the row.
CREATE OR REPLACE FUNCTION circle.counted(p circle.pipelines)
 RETURNS circle.pipelines
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    c record;
BEGIN
    SELECT sum(run_count) AS run_count, sum(success_count) AS success_count, sum(error_count) AS error_count, max(last_run) AS last_run
    INTO c FROM circle.pipeline_counters WHERE pipeline_id = p.id;
    p.run_count := least(p.run_count + coalesce(c.run_count, 0), 2147483647);
    p.success_count := least(p.success_count + coalesce(c.success_count, 0), 2147483647);
    p.error_count := least(p.error_count + coalesce(c.error_count, 0), 2147483647);
    p.last_run := greatest(p.last_run, c.last_run);
    RETURN p;
END $function$;

-- The same in RETURNING, where the row is younger than the statement's snapshot if the statement waited for it.
CREATE OR REPLACE FUNCTION circle.counted_now(p circle.pipelines)
 RETURNS circle.pipelines
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RETURN circle.counted(p);
END $function$;

-- Each run in a subtransaction of its own, and at most 60 of them: beyond 64 every other session becomes slower. They are sorted by an
-- expression, so that no plan goes through the history in the order of the primary key.
CREATE OR REPLACE FUNCTION circle.recover_runs(p_limit integer, p_max_claims integer)
 RETURNS SETOF circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r record;
    result circle.pipeline_runs;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    FOR r IN SELECT id, pipeline_id, worker_id, claim_token, lapsed_claims + 1::bigint AS lapsed,
                    to_char(lease_expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS "UTC"') AS lease_end FROM circle.pipeline_runs
             WHERE status = 'running' AND lease_expires_at < clock_timestamp()
             ORDER BY id + 0 LIMIT least(p_limit, 60) FOR NO KEY UPDATE SKIP LOCKED LOOP
        BEGIN
            INSERT INTO circle.pipeline_run_history (run_id, kind, worker_id, token, reason)
            VALUES (r.id, 'recovered', r.worker_id, r.claim_token, 'the lease ended at ' || r.lease_end);
            INSERT INTO circle.pipeline_counters (pipeline_id, leases_lost) VALUES (r.pipeline_id, 1);
            PERFORM circle.fail_attempts(r.id, NULL, 'the worker''s lease ran out', true, NULL, false);
            result := circle.end_run_if_done(r.id);
            IF result.id IS NULL AND r.lapsed >= p_max_claims THEN
                result := circle.end_run(r.id, 'failed', format('its lease ran out %s times', r.lapsed));
            ELSIF result.id IS NULL THEN
                result := circle.requeue_run(r.id, 1, NULL);
            END IF;
        EXCEPTION WHEN OTHERS THEN   -- one run that can't be recovered stops no other
            RAISE WARNING 'run % can''t be recovered: %', r.id, SQLERRM;
            CONTINUE;
        END;
        RETURN NEXT result;
    END LOOP;
    PERFORM circle.fold_counters();
END $function$;

CREATE OR REPLACE FUNCTION circle.expire_runs(p_limit integer)
 RETURNS SETOF circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    r record;
    result circle.pipeline_runs;
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    FOR r IN SELECT t.id, p.timeout_seconds FROM circle.pipeline_runs t JOIN circle.pipelines p ON p.id = t.pipeline_id
             WHERE t.status = 'running' AND p.timeout_seconds > 0
               AND coalesce(t.started_at, t.created_at) < clock_timestamp() - make_interval(secs => p.timeout_seconds)
             ORDER BY t.id + 0 LIMIT least(p_limit, 60) FOR NO KEY UPDATE OF t SKIP LOCKED LOOP
        BEGIN
            result := circle.end_run(r.id, 'timeout', format('timed out after %s seconds', r.timeout_seconds));
        EXCEPTION WHEN OTHERS THEN   -- as in recover_runs
            RAISE WARNING 'run % can''t be timed out: %', r.id, SQLERRM;
            CONTINUE;
        END;
        RETURN NEXT result;
    END LOOP;
    PERFORM circle.fold_counters();
END $function$;

-- Recovers and expires runs, for all workers of the database in turns: where another caller sweeps, or the last sweep is not long ago,
-- it does nothing. The next one may begin after a second and 20 times what this one took, or at once if this one left runs.
CREATE OR REPLACE FUNCTION circle.sweep_runs(p_limit integer, p_max_claims integer)
 RETURNS SETOF circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    began timestamptz := clock_timestamp();
    most integer := least(p_limit, 30);   -- of each kind: more subtransactions would make every other session slower
    recovered integer;
    expired integer;
BEGIN
    PERFORM FROM circle.pipeline_sweep WHERE next_at <= began FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND AND EXISTS (SELECT FROM circle.pipeline_sweep) THEN
        RETURN;
    ELSIF NOT FOUND THEN   -- the first sweep of the database
        INSERT INTO circle.pipeline_sweep DEFAULT VALUES ON CONFLICT DO NOTHING;
    END IF;
    RETURN QUERY SELECT * FROM circle.recover_runs(most, p_max_claims);
    GET DIAGNOSTICS recovered = ROW_COUNT;
    RETURN QUERY SELECT * FROM circle.expire_runs(most);
    GET DIAGNOSTICS expired = ROW_COUNT;
    UPDATE circle.pipeline_sweep SET next_at = CASE
        WHEN most <= greatest(recovered, expired) THEN clock_timestamp()
        ELSE clock_timestamp() + interval '1 s' + 20 * (clock_timestamp() - began) END;
END $function$;

-- Deletes runs, but for those to which a row of a table of the host refers, and returns these. A batch is halved where one is refused.
CREATE OR REPLACE FUNCTION circle.delete_runs(p_ids bigint[])
 RETURNS bigint[]
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    half integer := cardinality(p_ids) / 2;
BEGIN
    DELETE FROM circle.pipeline_runs WHERE id = ANY (p_ids);
    RETURN '{}';
EXCEPTION WHEN foreign_key_violation OR restrict_violation THEN
    RETURN CASE half WHEN 0 THEN p_ids ELSE circle.delete_runs(p_ids[:half]) || circle.delete_runs(p_ids[half + 1:]) END;
END $function$;

-- Deletes runs that ended after the run p_after_id, which ended at p_after, oldest first. Returns the run after which the next call goes
-- on; NULL: none is left. Each refusal takes subtransactions, so a call ends after ten.
CREATE OR REPLACE FUNCTION circle.purge_runs(p_older_than interval, p_limit integer, p_after timestamp with time zone, p_after_id bigint, OUT deleted integer, OUT kept bigint[], OUT next_end timestamp with time zone, OUT next_id bigint)
 RETURNS record
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_sort TO 'off'
 SET jit TO 'off'
AS $function$
DECLARE
    before timestamptz := clock_timestamp() - p_older_than;   -- a constant, so that it bounds the index scan
    batch bigint[];
    refused bigint[];
    deferred text;
BEGIN
    SELECT string_agg(format('%I.%I', n.nspname, c.conname), ', ') INTO deferred
    FROM pg_constraint c JOIN pg_namespace n ON n.oid = c.connamespace
    WHERE c.contype = 'f' AND c.condeferred AND c.confrelid IN ('circle.pipeline_runs'::regclass, 'circle.pipeline_node_runs'::regclass);
    IF deferred IS NOT NULL THEN   -- keys of the host, which would refuse the commit
        EXECUTE 'SET CONSTRAINTS ' || deferred || ' IMMEDIATE';
    END IF;
    deleted := 0;
    kept := '{}';
    next_end := coalesce(p_after, '-infinity');
    next_id := coalesce(p_after_id, 0);
    LOOP
        WITH old AS MATERIALIZED (
            SELECT id, completed_at FROM circle.pipeline_runs WHERE completed_at < before AND (completed_at, id) > (next_end, next_id)
            ORDER BY completed_at, id LIMIT least(p_limit - deleted, 64) FOR UPDATE SKIP LOCKED
        )
        SELECT array_agg(id), max(completed_at), max(id) FILTER (WHERE completed_at = (SELECT max(completed_at) FROM old))
        INTO batch, next_end, next_id FROM old;
        EXIT WHEN batch IS NULL;
        refused := circle.delete_runs(batch);
        kept := kept || refused;
        deleted := deleted + cardinality(batch) - cardinality(refused);
        EXIT WHEN cardinality(kept) >= 10 OR deleted >= p_limit;
    END LOOP;
END $function$;

-- Deletes versions of before p_older_than that neither their pipeline nor a run names. Returns how many.
CREATE OR REPLACE FUNCTION circle.purge_versions(p_older_than interval, p_limit integer)
 RETURNS bigint
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    deleted bigint;
BEGIN
    -- in the order of their pipelines, whose locks keep creators of runs out until the transaction ends
    WITH unused AS MATERIALIZED (
        SELECT v.pipeline_id, v.version FROM circle.pipeline_versions v
        JOIN circle.pipelines p ON p.id = v.pipeline_id AND p.version <> v.version
        WHERE v.created_at < clock_timestamp() - p_older_than AND NOT EXISTS (
            SELECT FROM circle.pipeline_runs r WHERE r.pipeline_id = v.pipeline_id AND r.pipeline_version = v.version)
        ORDER BY v.pipeline_id, v.version LIMIT p_limit
    ), locked AS MATERIALIZED (
        SELECT u.*, pg_advisory_xact_lock(1734964328, hashint8(u.pipeline_id)) FROM unused u
    )
    DELETE FROM circle.pipeline_versions v USING locked l WHERE v.pipeline_id = l.pipeline_id AND v.version = l.version
      AND NOT circle.version_is_used(v.pipeline_id, v.version);
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END $function$;

-- Whether a run or its pipeline names a version now: a run may have been created since the caller's statement began.
CREATE OR REPLACE FUNCTION circle.version_is_used(p_pipeline_id integer, p_version integer)
 RETURNS boolean
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    RETURN EXISTS (SELECT FROM circle.pipelines WHERE id = p_pipeline_id AND version = p_version)
        OR EXISTS (SELECT FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND pipeline_version = p_version);
END $function$;

-- ---- alembic/sql/011_lifecycle/8_again.sql

-- The positions of the nodes that a resumed run takes over. Positions are in execution order: one pass is enough.
CREATE OR REPLACE FUNCTION circle.positions_to_take_over(p_run_id bigint)
 RETURNS integer[]
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
DECLARE
    n record;
    is_taken boolean[];
    taken integer[] := '{}';
BEGIN
    FOR n IN SELECT position, predecessors, status FROM circle.pipeline_node_runs
             WHERE run_id = p_run_id AND position IS NOT NULL ORDER BY run_id, position LOOP
        is_taken[n.position] := n.status IN ('completed', 'skipped')
            AND NOT EXISTS (SELECT FROM unnest(n.predecessors) p WHERE is_taken[p] IS NOT TRUE);
        IF is_taken[n.position] THEN
            taken := taken || n.position;
        END IF;
    END LOOP;
    RETURN taken;
END $function$;

-- Resumes a run that failed, was cancelled or timed out; returns the resumed one. The last of a chain of resumed runs is meant: if it
-- is live or completed, it is returned as it is.
CREATE OR REPLACE FUNCTION circle.resume_run(p_run_id bigint)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    old circle.pipeline_runs;
    r circle.pipeline_runs;
    pipeline_status text;
    taken integer[];
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    -- as insert_run: delete_pipeline waits for this lock before it takes any other
    PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(r.pipeline_id));
    FOR attempt IN 1 .. 100 LOOP   -- a concurrent call may resume it first
        WHILE r.id IS NOT NULL LOOP
            old := r;
            SELECT * INTO r FROM circle.pipeline_runs WHERE resumed_from = old.id;
        END LOOP;
        PERFORM FROM circle.pipeline_runs WHERE id = old.id FOR KEY SHARE;
        IF NOT FOUND THEN   -- deleted since, and its pipeline perhaps, too
            SELECT * INTO r FROM circle.pipeline_runs WHERE id = p_run_id;
            IF NOT FOUND THEN
                PERFORM circle.refuse_lease(p_run_id);
            END IF;
            old := r;
            CONTINUE;
        END IF;
        IF old.id <> p_run_id AND old.status IN ('pending', 'running', 'completed') THEN
            PERFORM pg_logical_emit_message(true, 'circle', '');   -- writes WAL: the commit waits for a synchronous standby, as the first one did
            RETURN old;
        ELSIF old.completed_at IS NULL OR old.status = 'completed' THEN
            PERFORM circle.refuse_transition(old.id, NULL, old.status, 'resumed', 'only a failed, cancelled or timed-out run can be');
        ELSIF old.pipeline_version IS NULL THEN
            PERFORM circle.refuse_graph('no_version', format('run %s is bound to no version of its pipeline''s graph: create it again', old.id));
        END IF;
        INSERT INTO circle.pipeline_runs (pipeline_id, trigger_data, priority, resumed_from)
        SELECT p.id, old.trigger_data, old.priority, old.id FROM circle.pipelines p
        WHERE p.id = old.pipeline_id AND (p.status = 'active') IS TRUE
        ON CONFLICT (resumed_from) WHERE resumed_from IS NOT NULL DO NOTHING
        RETURNING * INTO r;
        EXIT WHEN FOUND;
        SELECT status INTO pipeline_status FROM circle.pipelines WHERE id = old.pipeline_id;
        IF pipeline_status <> 'active' THEN
            PERFORM circle.refuse_inactive(old.pipeline_id, pipeline_status);
        END IF;
        r := old;
    END LOOP;
    IF r.id = old.id THEN   -- a trigger of the host discards every row
        PERFORM circle.refuse_create(old.pipeline_id);
    END IF;
    taken := circle.positions_to_take_over(old.id);
    INSERT INTO circle.pipeline_node_runs (run_id, node_id, node_type, position, predecessors, successors, status, input_data, output_data,
                                           untaken, retry_count, duration_ms, started_at, completed_at, taken_from)
    SELECT r.id, c.node_id, c.node_type, c.place - 1, c.predecessors, c.successors, coalesce(o.status, 'pending'), coalesce(o.input_data, '{}'),
           coalesce(o.output_data, '{}'), o.untaken, coalesce(o.retry_count, 0), coalesce(o.duration_ms, 0), o.started_at, o.completed_at,
           CASE WHEN o.id IS NOT NULL THEN coalesce(o.taken_from, old.id) END
    FROM circle.pipeline_versions v
    CROSS JOIN LATERAL unnest(v.compiled) WITH ORDINALITY c (node_id, node_type, predecessors, successors, branches, place)
    LEFT JOIN (SELECT * FROM circle.pipeline_node_runs n WHERE n.run_id = old.id AND (n.position IN (SELECT unnest(taken))) IS TRUE) o
        ON o.position = c.place - 1
    WHERE v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version ORDER BY c.place;
    INSERT INTO circle.pipeline_run_tags (run_id, key, value)
    SELECT r.id, t.key, t.value FROM circle.pipeline_run_tags t WHERE t.run_id = old.id;
    INSERT INTO circle.pipeline_run_history (run_id, kind, worker_id, reason)
    VALUES (r.id, 'resumed', session_user, format('from run %s', old.id));
    INSERT INTO circle.pipeline_counters (pipeline_id, run_count, last_run) VALUES (r.pipeline_id, 1, clock_timestamp());
    RETURN r;
END $function$;

-- Creates a run with the data, priority and tags of another one, of the current graph.
CREATE OR REPLACE FUNCTION circle.rerun_run(p_run_id bigint, p_key text)
 RETURNS circle.pipeline_runs
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    old circle.pipeline_runs;
BEGIN
    -- as insert_run: delete_pipeline waits for this lock before it takes any other
    PERFORM pg_advisory_xact_lock_shared(1734964328, hashint8(pipeline_id)) FROM circle.pipeline_runs WHERE id = p_run_id;
    SELECT * INTO old FROM circle.pipeline_runs WHERE id = p_run_id;
    IF NOT FOUND THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    RETURN circle.create_run(old.pipeline_id, old.trigger_data, p_key, old.priority, NULL, false, (
        SELECT jsonb_object_agg(t.key, t.value) FROM circle.pipeline_run_tags t WHERE t.run_id = p_run_id));
END $function$;

-- Resumes or cancels the runs that filtered_runs finds, each in a subtransaction of its own: at most 60, as in recover_runs.
CREATE OR REPLACE FUNCTION circle.change_runs(p_resume boolean, p_reason text, p_pipeline_id bigint, p_statuses text[], p_tags jsonb, p_since timestamp with time zone, p_until timestamp with time zone, p_after bigint, p_limit integer)
 RETURNS json
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
    page record;
    one bigint;
    changed json[] := '{}';
    refused jsonb := '{}';
BEGIN
    IF NOT circle.is_read_committed() THEN
        PERFORM circle.refuse_isolation();
    END IF;
    page := circle.filtered_runs(p_pipeline_id, p_statuses, p_tags, p_since, p_until, p_after, least(p_limit, 60));
    -- in the order of their ids: two callers that change the same runs don't wait for each other
    FOR one IN SELECT unnest(page.ids) ORDER BY 1 LOOP
        BEGIN
            changed := changed || CASE WHEN p_resume THEN to_json(circle.resume_run(one))
                                       ELSE to_json(circle.conclude_run(one, 'cancelled', p_reason, NULL)) END;
        EXCEPTION WHEN SQLSTATE 'PL001' OR SQLSTATE 'PL003' OR SQLSTATE 'PL006' OR SQLSTATE 'PL008' OR SQLSTATE 'PL012' THEN
            refused := refused || jsonb_build_object(one, SQLERRM);
        END;
    END LOOP;
    RETURN json_build_object('runs', changed, 'refused', refused, 'next_cursor', page.next_cursor);
END $function$;

-- ---- alembic/sql/011_lifecycle/9_explaining.sql

-- The last claim of a run of a pipeline: of its last 100 runs, the last 100 before the head of its queue, because the claimed ones stand
-- before a long queue, and 100 running ones.
CREATE OR REPLACE FUNCTION circle.last_claim(p_pipeline_id bigint, OUT claimed_at timestamp with time zone, OUT worker_id text)
 RETURNS record
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_sort TO 'off'
 SET enable_incremental_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
AS $function$
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
END $function$;

-- The facts from which gathering_pipeline/explaining.py says why a run stands still; NULL: there is no such run. Of its nodes at most
-- 100 that are live, failed, skipped or taken over, those first that something can be done about. Tokens stay secret.
CREATE OR REPLACE FUNCTION circle.explain_run(p_run_id bigint)
 RETURNS json
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_sort TO 'off'
 SET enable_incremental_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
AS $function$
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
END $function$;

-- Live runs in which nothing has moved for a time, and which nothing holds on purpose, oldest first: their lease is past, or their timeout, or
-- they are running and no worker executes a node, or a worker could have claimed them, or none ever can. Whatever the history, it looks at
-- the oldest 10,000 running runs and as many pending ones, the first p_limit of each queue, and the 10,000 longest past their waiting time.
CREATE OR REPLACE FUNCTION circle.stuck_runs(p_older_than interval, p_limit integer)
 RETURNS bigint[]
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_sort TO 'off'
 SET enable_incremental_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
AS $function$
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
END $function$;

-- Since when the first pending run is there, and the first event that a transaction which was open before it keeps from being read.
CREATE OR REPLACE FUNCTION circle.waiting_since(OUT run timestamp with time zone, OUT event timestamp with time zone)
 RETURNS record
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET plan_cache_mode TO 'force_generic_plan'
 SET enable_sort TO 'off'
 SET enable_incremental_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
AS $function$
BEGIN
    -- a range of one status, or the planner would drop it from the order and might use another index
    run := (SELECT r.created_at FROM circle.pipeline_runs r WHERE r.status >= 'pending' AND r.status <= 'pending'
            ORDER BY r.status, r.id LIMIT 1);
    event := (SELECT e.created_at FROM circle.pipeline_events e WHERE e.xid >= pg_snapshot_xmin(pg_current_snapshot())
              ORDER BY e.xid, e.id LIMIT 1);
END $function$;
