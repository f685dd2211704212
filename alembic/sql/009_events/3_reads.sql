-- == create the tables of events
-- EventType, RUN_EVENTS and NODE_EVENTS of the package (events.py, lifecycle.py); a test compares them.
CREATE OR REPLACE FUNCTION circle.event_types() RETURNS text[] LANGUAGE sql IMMUTABLE AS $$
    SELECT ARRAY['pipeline_run.started', 'pipeline_run.completed', 'pipeline_run.failed', 'pipeline_run.cancelled',
                 'pipeline_run.timeout', 'pipeline_node.started', 'pipeline_node.completed', 'pipeline_node.failed',
                 'pipeline_node.skipped', 'pipeline_node.retrying']
$$;
-- The event of a run's new status; NULL where it has none. A run that returns to pending has an event when it starts again.
CREATE OR REPLACE FUNCTION circle.run_event(p_status text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE p_status
        WHEN 'running' THEN 'pipeline_run.started'
        WHEN 'completed' THEN 'pipeline_run.completed'
        WHEN 'failed' THEN 'pipeline_run.failed'
        WHEN 'cancelled' THEN 'pipeline_run.cancelled'
        WHEN 'timeout' THEN 'pipeline_run.timeout' END
$$;
-- The event of a node run's new status; NULL where it has none. A cancelled node has its run's event.
CREATE OR REPLACE FUNCTION circle.node_event(p_status text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE p_status
        WHEN 'running' THEN 'pipeline_node.started'
        WHEN 'completed' THEN 'pipeline_node.completed'
        WHEN 'failed' THEN 'pipeline_node.failed'
        WHEN 'skipped' THEN 'pipeline_node.skipped'
        WHEN 'pending' THEN 'pipeline_node.retrying' END
$$;

-- == create functions that read and purge events
CREATE OR REPLACE FUNCTION circle.page_of_events(p_run_id bigint, p_xid xid8, p_id bigint, p_limit integer)
RETURNS SETOF circle.pipeline_events
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_sort = off SET enable_incremental_sort = off AS $$
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
END $$;
-- Later events are younger, so only the first ones can be old enough. The last of them stays: a reader that has it misses nothing.
CREATE OR REPLACE FUNCTION circle.purge_events(p_older_than interval, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_sort = off AS $$
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
END $$;
