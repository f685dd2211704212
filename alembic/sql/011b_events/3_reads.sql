-- == create event_types
CREATE OR REPLACE FUNCTION circle.event_types() RETURNS text[] LANGUAGE sql IMMUTABLE AS $$
    SELECT ARRAY['pipeline_run.started', 'pipeline_run.completed', 'pipeline_run.failed', 'pipeline_run.cancelled',
                 'pipeline_run.timeout', 'pipeline_node.started', 'pipeline_node.completed', 'pipeline_node.failed',
                 'pipeline_node.skipped', 'pipeline_node.retrying']
$$;

-- == create functions that read and purge events
CREATE OR REPLACE FUNCTION circle.page_of_events(p_run_id bigint, p_xid xid8, p_id bigint, p_limit integer)
RETURNS SETOF circle.pipeline_events
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_sort = off SET enable_incremental_sort = off AS $$
BEGIN
    IF p_run_id IS NULL THEN
        RETURN QUERY SELECT * FROM circle.pipeline_events
        WHERE (xid, id) > (p_xid, p_id) AND xid < pg_snapshot_xmin(pg_current_snapshot()) AND type = ANY (circle.event_types())
        ORDER BY xid, id LIMIT p_limit;
    ELSE
        -- by >= and <=, because with "=" the planner would drop run_id from the order, and might take the other index
        RETURN QUERY SELECT * FROM circle.pipeline_events
        WHERE run_id >= p_run_id AND run_id <= p_run_id
          AND (run_id, xid, id) > (p_run_id, p_xid, p_id) AND xid < pg_snapshot_xmin(pg_current_snapshot())
          AND type = ANY (circle.event_types())
        ORDER BY run_id, xid, id LIMIT p_limit;
    END IF;
END $$;
-- Ages grow with the order of events; so only its beginning is looked at.
CREATE OR REPLACE FUNCTION circle.purge_events(p_older_than interval, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_sort = off AS $$
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
END $$;
