-- Revision 009: leases and sweeps.

-- == create functions of workers and sweeps
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
BEGIN
    UPDATE circle.pipeline_runs SET lease_expires_at = clock_timestamp() + p_lease
    WHERE id = p_run_id AND (status = 'running') IS TRUE AND claim_token = p_token AND lease_expires_at IS NOT NULL
    RETURNING lease_expires_at INTO expires;
    IF NOT FOUND THEN
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    RETURN expires;
END $$;
-- Returns a locked run without running nodes to pending. Its token grows, so that the last holder's is stale.
CREATE OR REPLACE FUNCTION circle.requeue_run(p_run_id bigint, p_counts integer) RETURNS circle.pipeline_runs
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
        PERFORM circle.refuse_lease(p_run_id);
    END IF;
    -- the release is deliberate: neither the attempts of its nodes nor the claim count
    UPDATE circle.pipeline_node_runs SET status = 'pending' WHERE run_id = p_run_id AND status = 'running';
    RETURN circle.requeue_run(p_run_id, 1);
END $$;
CREATE OR REPLACE FUNCTION circle.recover_runs(p_limit integer, p_max_claims integer) RETURNS SETOF circle.pipeline_runs
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
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
END $$;
CREATE OR REPLACE FUNCTION circle.expire_runs(p_limit integer) RETURNS SETOF circle.pipeline_runs
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
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
END $$;
