-- Revision 011: errors. DETAIL is a JSON object with the values of the error, which the package reads; PL013 has its message only.
--
--   PL001 illegal transition   PL002 no such pipeline   PL003 no such run       PL004 no such node run   PL005 node not ready
--   PL006 pipeline not active  PL007 lease lost         PL008 invalid graph     PL009 stale version      PL010 pipeline in use
--   PL011 isolation level      PL012 run is over        PL013 unknown branch    PL014 other data with the same idempotency key

-- == create functions that raise errors
-- PL001: an illegal transition, of a run where p_node_id is NULL, else of its node run. It returns boolean, so that a condition can
-- call it.
CREATE OR REPLACE FUNCTION circle.refuse_transition(p_run_id bigint, p_node_id text, p_current text, p_requested text, p_reason text)
RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    entity text := CASE WHEN p_node_id IS NULL THEN 'run' ELSE 'node run' END;
    id jsonb := coalesce(to_jsonb(p_run_id || '/' || p_node_id), to_jsonb(p_run_id));
BEGIN
    RAISE EXCEPTION '% % is % and can''t % %', entity, id #>> '{}', p_current, CASE WHEN p_requested LIKE '%ed' THEN 'be' ELSE 'become' END,
        concat_ws(': ', coalesce(p_requested, 'NULL'), nullif(p_reason, ''))
        USING ERRCODE = 'PL001', DETAIL = jsonb_build_object('entity', entity, 'id', id, 'current', p_current,
                                                             'requested', p_requested, 'reason', coalesce(p_reason, ''));
END $$;
-- PL012: a terminal run.
CREATE OR REPLACE FUNCTION circle.refuse_run_over(p_run_id bigint, p_status text, p_completed_at timestamptz, p_error text,
                                                  p_requested text)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'run % is terminal (% at %): it and its nodes can''t change', p_run_id, p_status, p_completed_at
        USING ERRCODE = 'PL012', DETAIL = jsonb_build_object('run_id', p_run_id, 'status', p_status, 'completed_at', p_completed_at,
                                                             'error', left(p_error, 1000), 'requested', p_requested);
END $$;
-- PL002
CREATE OR REPLACE FUNCTION circle.refuse_unknown_pipeline(p_pipeline_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'pipeline % does not exist', p_pipeline_id
        USING ERRCODE = 'PL002', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id);
END $$;
-- PL006
CREATE OR REPLACE FUNCTION circle.refuse_inactive(p_pipeline_id bigint, p_status text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'pipeline % is %, not active', p_pipeline_id, p_status
        USING ERRCODE = 'PL006', DETAIL = jsonb_build_object('pipeline_id', p_pipeline_id, 'status', p_status);
END $$;
-- PL007: the caller doesn't hold the run; PL003: there is no such run.
CREATE OR REPLACE FUNCTION circle.refuse_lease(p_run_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
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
CREATE OR REPLACE FUNCTION circle.refuse_unknown_node(p_run_id bigint, p_node_id text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'run % has no node %', p_run_id, left(p_node_id, 200)
        USING ERRCODE = 'PL004', DETAIL = jsonb_build_object('run_id', p_run_id, 'node_id', p_node_id);
END $$;
-- PL011. The lifecycle needs a new snapshot for each statement: two transactions that complete the last two predecessors of a node
-- would else both leave it waiting for the other.
CREATE OR REPLACE FUNCTION circle.refuse_isolation() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'runs can''t be changed at isolation level %', current_setting('transaction_isolation')
        USING ERRCODE = 'PL011', DETAIL = jsonb_build_object('level', current_setting('transaction_isolation')),
              HINT = 'Begin the transaction with ISOLATION LEVEL READ COMMITTED, or set default_transaction_isolation.';
END $$;
-- Whether each statement of the transaction has a snapshot of its own. Inlined.
CREATE OR REPLACE FUNCTION circle.is_read_committed() RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT current_setting('transaction_isolation') IN ('read committed', 'read uncommitted')
$$;
-- PL013: an outcome of a node that none of its edges has as label.
CREATE OR REPLACE FUNCTION circle.refuse_branch(p_node_id text, p_branch text, p_branches jsonb) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '%', format('branch of node %L must be %s, not %L', p_node_id, CASE
        WHEN p_branches IS NULL THEN 'true or false, as no edge of it has a condition'
        ELSE 'one of true, false' END || coalesce((
        SELECT string_agg(', ' || left(l.label, 40), '' ORDER BY l.label)
        FROM (SELECT k COLLATE "C" AS label FROM jsonb_object_keys(p_branches) k
              WHERE k NOT IN ('true', 'false') ORDER BY 1 LIMIT 20) l), ''), left(p_branch, 100)) USING ERRCODE = 'PL013';
END $$;
-- What no writer may change. p_what names the columns.
CREATE OR REPLACE FUNCTION circle.refuse_change(p_row text, p_what text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '% of % can''t be changed', p_what, p_row USING ERRCODE = 'integrity_constraint_violation';
END $$;
CREATE OR REPLACE FUNCTION circle.refuse_json(p_where text, p_table name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '%: nested deeper than 64, or a number too large for a float', p_where
        USING ERRCODE = 'check_violation', SCHEMA = 'circle', TABLE = p_table, CONSTRAINT = p_table || '_json';
END $$;
-- Whether Python can read a JSON value; NULL is readable. Inlined.
CREATE OR REPLACE FUNCTION circle.is_readable(p_json jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT (circle.nested_too_deep(p_json) OR circle.number_too_large(p_json)) IS NOT TRUE
$$;
