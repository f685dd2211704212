-- == create trigger functions that write events
-- A hot path: one statement, because PL/pgSQL prepares each expression in every transaction.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO circle.pipeline_events (xid, run_id, type, data) VALUES (
        circle.event_xid(), NEW.id,
        circle.run_event(NEW.status),
        CASE WHEN NEW.status IN ('failed', 'cancelled', 'timeout') THEN jsonb_build_object('error', NEW.error_message)
            ELSE '{}' END);
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_event() RETURNS trigger LANGUAGE plpgsql AS $$
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
END $$;

-- == pipeline_runs: write an event for each new status except pending
CREATE OR REPLACE TRIGGER pipeline_runs_event AFTER INSERT OR UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW WHEN (NEW.status <> 'pending') EXECUTE FUNCTION circle.pipeline_runs_event();

-- == pipeline_node_runs: write an event for each new status except cancelled
CREATE OR REPLACE TRIGGER pipeline_node_runs_event_insert AFTER INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status NOT IN ('pending', 'cancelled')) EXECUTE FUNCTION circle.pipeline_node_runs_event();
CREATE OR REPLACE TRIGGER pipeline_node_runs_event AFTER UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status <> 'cancelled') EXECUTE FUNCTION circle.pipeline_node_runs_event();
