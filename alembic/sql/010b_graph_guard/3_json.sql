-- Revision 010: every writer is refused JSON of runs that Python can't read back.

-- == create functions that check the JSON of runs
CREATE OR REPLACE FUNCTION circle.refuse_json(p_where text, p_table name, p_trigger name) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%: nested deeper than 64, or a number too large for a float', p_where
        USING ERRCODE = 'check_violation', SCHEMA = 'circle', TABLE = p_table, CONSTRAINT = p_trigger;
END $$;
-- Only changed values are checked: else a run with values from before this revision could never end, and nothing could be
-- appended to such logs. OLD is NULL in an INSERT.
CREATE OR REPLACE FUNCTION circle.pipeline_runs_json() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.trigger_data IS DISTINCT FROM OLD.trigger_data
       AND (circle.nested_too_deep(NEW.trigger_data) OR circle.number_too_large(NEW.trigger_data))
       OR NEW.logs IS DISTINCT FROM OLD.logs
       AND (circle.nested_too_deep(NEW.logs) OR circle.number_too_large(NEW.logs))
       AND (circle.nested_too_deep(OLD.logs) OR circle.number_too_large(OLD.logs)) IS NOT TRUE THEN
        PERFORM circle.refuse_json(format('trigger_data or logs of run %s', NEW.id), TG_TABLE_NAME, TG_NAME);
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_json() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.input_data IS DISTINCT FROM OLD.input_data
       AND (circle.nested_too_deep(NEW.input_data) OR circle.number_too_large(NEW.input_data))
       OR NEW.output_data IS DISTINCT FROM OLD.output_data
       AND (circle.nested_too_deep(NEW.output_data) OR circle.number_too_large(NEW.output_data)) THEN
        PERFORM circle.refuse_json(format('input_data or output_data of node %s of run %s', NEW.node_id, NEW.run_id),
                                   TG_TABLE_NAME, TG_NAME);
    END IF;
    RETURN NEW;
END $$;

-- == pipeline_runs: check JSON on write
-- Neither a CHECK, which would be evaluated on every change of the row, nor a condition in WHEN, which is planned for every
-- statement.
CREATE OR REPLACE TRIGGER pipeline_runs_json BEFORE INSERT OR UPDATE OF trigger_data, logs ON circle.pipeline_runs
    FOR EACH ROW WHEN (NEW.trigger_data <> '{}' OR NEW.logs <> '[]') EXECUTE FUNCTION circle.pipeline_runs_json();
ALTER TABLE circle.pipeline_runs ENABLE ALWAYS TRIGGER pipeline_runs_json;

-- == pipeline_node_runs: check JSON on write
CREATE OR REPLACE TRIGGER pipeline_node_runs_json BEFORE INSERT OR UPDATE OF input_data, output_data
    ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.input_data <> '{}' OR NEW.output_data <> '{}') EXECUTE FUNCTION circle.pipeline_node_runs_json();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_json;
