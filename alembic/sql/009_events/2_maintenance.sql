-- == create functions that guard, announce and renumber events
CREATE OR REPLACE FUNCTION circle.pipeline_events_frozen() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'events are immutable' USING ERRCODE = 'integrity_constraint_violation';
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_events_notify() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NOTIFY circle_events;
    RETURN NULL;
END $$;
-- Switches whether commits wake listeners, which poll otherwise. Off by default, because commits that notify are serialized.
CREATE OR REPLACE FUNCTION circle.notify_events(p_on boolean) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DROP TRIGGER IF EXISTS pipeline_events_notify ON circle.pipeline_events;
    IF p_on THEN
        CREATE TRIGGER pipeline_events_notify AFTER INSERT ON circle.pipeline_events
            FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_events_notify();
    END IF;
END $$;
-- Moves all events before those to come, in the order of their ids, if one is ahead of the cluster's transactions: after a restore from
-- another cluster, whose numbers are higher. Returns the number of changed events, whose cursors are invalid
-- then. Waits for the transactions that write events, so that none of theirs comes to stand before one that was read.
CREATE OR REPLACE FUNCTION circle.reset_event_xids() RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    changed bigint;
BEGIN
    LOCK TABLE circle.pipeline_events IN SHARE ROW EXCLUSIVE MODE;
    UPDATE circle.pipeline_events SET xid = '0' WHERE xid <> '0'
        AND EXISTS (SELECT FROM circle.pipeline_events WHERE xid >= pg_snapshot_xmax(pg_current_snapshot()));
    GET DIAGNOSTICS changed = ROW_COUNT;
    RETURN changed;
END $$;

-- == pipeline_events: forbid UPDATE
CREATE OR REPLACE TRIGGER pipeline_events_frozen BEFORE UPDATE ON circle.pipeline_events FOR EACH ROW
    WHEN (NEW.xid <> '0' OR (NEW.id, NEW.run_id, NEW.node_id, NEW.type, NEW.data, NEW.created_at)
          IS DISTINCT FROM (OLD.id, OLD.run_id, OLD.node_id, OLD.type, OLD.data, OLD.created_at))
    EXECUTE FUNCTION circle.pipeline_events_frozen();
ALTER TABLE circle.pipeline_events ENABLE ALWAYS TRIGGER pipeline_events_frozen;
