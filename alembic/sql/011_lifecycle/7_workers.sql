-- Revision 011: leases and sweeps.

-- == create functions of workers and sweeps
-- Claims the first runs of the queues of active pipelines, by priority, then by age. The first p_limit runs of all stand in the p_limit
-- queues with the first heads. Others may be claiming these very runs, so some more are looked at, and many more if all are locked.
-- Runs whose waiting time is over join their queues first, as many as one call can take.
-- Where a sort can be avoided only the right index remains, as in page_of_runs; without JIT, because others can't be.
--
-- The running runs of a pipeline with max_running are counted under an advisory lock, which its claimers hold until they commit; one
-- that doesn't get it passes by.
CREATE OR REPLACE FUNCTION circle.claim_runs(p_worker_id text, p_lease interval, p_limit integer, p_pipelines bigint[] DEFAULT NULL,
                                             p_max_claims integer DEFAULT NULL)
RETURNS SETOF circle.pipeline_runs LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off AS $$
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
END $$;
CREATE OR REPLACE FUNCTION circle.heartbeat_run(p_run_id bigint, p_token bigint, p_lease interval) RETURNS timestamptz
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
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
END $$;
-- When a locked run without running nodes has something to do: NULL is now, else its next retry.
CREATE OR REPLACE FUNCTION circle.run_due(p_run_id bigint) RETURNS timestamptz
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM circle.pipeline_node_runs WHERE run_id = p_run_id AND status = 'pending' AND available_at > clock_timestamp()) THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT CASE WHEN bool_and(b.reason IS NOT NULL) THEN min(n.available_at) FILTER (WHERE b.reason = 'retry') END
            FROM circle.pipeline_runs r JOIN circle.pipeline_node_runs n ON n.run_id = r.id
            CROSS JOIN LATERAL circle.blocked_by('running', r.failed_node, n.run_id, n.position, n.predecessors, n.retry_count,
                                                  n.available_at) b (reason)
            WHERE r.id = p_run_id AND n.status = 'pending');
END $$;
-- Returns a locked run without running nodes to pending. Its token grows, so that the last holder's is stale.
CREATE OR REPLACE FUNCTION circle.requeue_run(p_run_id bigint, p_lapsed integer, p_released_token bigint) RETURNS circle.pipeline_runs
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    UPDATE circle.pipeline_runs SET status = 'pending', worker_id = NULL, lease_expires_at = NULL,
        claim_token = circle.next_token(claim_token), lapsed_claims = least(lapsed_claims, 2147483646) + p_lapsed,
        released_token = coalesce(p_released_token, released_token), waits_until = circle.run_due(id)
    WHERE id = p_run_id RETURNING *
$$;
CREATE OR REPLACE FUNCTION circle.release_run(p_run_id bigint, p_token bigint, p_reason text DEFAULT NULL) RETURNS circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
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
END $$;
-- Adds the counters of runs to the columns of their pipelines. A pipeline that somebody changes is left for the next sweep.
CREATE OR REPLACE FUNCTION circle.fold_counters() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
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
END $$;
-- A pipeline's row with what its counters add to it. STABLE, so that both are of one snapshot: fold_counters moves numbers from the
-- counters to the row.
CREATE OR REPLACE FUNCTION circle.counted(p circle.pipelines) RETURNS circle.pipelines
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
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
END $$;
-- The same in RETURNING, where the row is younger than the statement's snapshot if the statement waited for it.
CREATE OR REPLACE FUNCTION circle.counted_now(p circle.pipelines) RETURNS circle.pipelines
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN circle.counted(p);
END $$;
-- Each run in a subtransaction of its own, and at most 60 of them: beyond 64 every other session becomes slower. They are sorted by an
-- expression, so that no plan goes through the history in the order of the primary key.
CREATE OR REPLACE FUNCTION circle.recover_runs(p_limit integer, p_max_claims integer) RETURNS SETOF circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
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
END $$;
CREATE OR REPLACE FUNCTION circle.expire_runs(p_limit integer) RETURNS SETOF circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
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
END $$;
-- Recovers and expires runs, for all workers of the database in turns: where another caller sweeps, or the last sweep is not long ago,
-- it does nothing. The next one may begin after a second and 20 times what this one took, or at once if this one left runs.
CREATE OR REPLACE FUNCTION circle.sweep_runs(p_limit integer, p_max_claims integer) RETURNS SETOF circle.pipeline_runs
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
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
END $$;
-- Deletes runs, but for those to which a row of a table of the host refers, and returns these. A batch is halved where one is refused.
CREATE OR REPLACE FUNCTION circle.delete_runs(p_ids bigint[]) RETURNS bigint[]
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    half integer := cardinality(p_ids) / 2;
BEGIN
    DELETE FROM circle.pipeline_runs WHERE id = ANY (p_ids);
    RETURN '{}';
EXCEPTION WHEN foreign_key_violation OR restrict_violation THEN
    RETURN CASE half WHEN 0 THEN p_ids ELSE circle.delete_runs(p_ids[:half]) || circle.delete_runs(p_ids[half + 1:]) END;
END $$;
-- Deletes runs that ended after the run p_after_id, which ended at p_after, oldest first. Returns the run after which the next call goes
-- on; NULL: none is left. Each refusal takes subtransactions, so a call ends after ten.
CREATE OR REPLACE FUNCTION circle.purge_runs(p_older_than interval, p_limit integer, p_after timestamptz, p_after_id bigint,
                                             OUT deleted integer, OUT kept bigint[], OUT next_end timestamptz, OUT next_id bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_sort = off SET jit = off AS $$
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
END $$;
-- Deletes versions of before p_older_than that neither their pipeline nor a run names. Returns how many.
CREATE OR REPLACE FUNCTION circle.purge_versions(p_older_than interval, p_limit integer) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
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
END $$;
-- Whether a run or its pipeline names a version now: a run may have been created since the caller's statement began.
CREATE OR REPLACE FUNCTION circle.version_is_used(p_pipeline_id integer, p_version integer) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN EXISTS (SELECT FROM circle.pipelines WHERE id = p_pipeline_id AND version = p_version)
        OR EXISTS (SELECT FROM circle.pipeline_runs WHERE pipeline_id = p_pipeline_id AND pipeline_version = p_version);
END $$;
