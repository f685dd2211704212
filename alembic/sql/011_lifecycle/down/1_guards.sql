-- == pipeline_runs: restore the trigger of revision 008, because the guards read columns that are dropped next
DROP TRIGGER IF EXISTS pipeline_runs_same_status ON circle.pipeline_runs;
DROP TRIGGER IF EXISTS pipeline_runs_after_insert ON circle.pipeline_runs;
DROP TRIGGER IF EXISTS pipeline_runs_after_update ON circle.pipeline_runs;
DROP TRIGGER IF EXISTS pipeline_runs_after_delete ON circle.pipeline_runs;
DROP TRIGGER IF EXISTS pipeline_runs_after_truncate ON circle.pipeline_runs;
CREATE OR REPLACE FUNCTION circle.pipeline_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status NOT IN ('pending', 'running') THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        IF coalesce(NEW.duration_seconds, 0) = 0 THEN
            NEW.duration_seconds := least(coalesce(extract(epoch FROM NEW.completed_at - NEW.started_at), 0), 2147483647)::integer;
        END IF;
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER pipeline_runs_before BEFORE INSERT OR UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_runs_before();
ALTER TABLE circle.pipeline_runs ENABLE ALWAYS TRIGGER pipeline_runs_before;

-- == pipeline_node_runs: restore the triggers of revision 008
DROP TRIGGER IF EXISTS pipeline_node_runs_same_status ON circle.pipeline_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_after_insert ON circle.pipeline_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_after_update ON circle.pipeline_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_after_delete ON circle.pipeline_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_after_truncate ON circle.pipeline_node_runs;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status NOT IN ('pending', 'running') THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER pipeline_node_runs_before BEFORE UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_node_runs_before();
CREATE OR REPLACE TRIGGER pipeline_node_runs_before_insert BEFORE INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status <> 'pending') EXECUTE FUNCTION circle.pipeline_node_runs_before();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_before,
                                      ENABLE ALWAYS TRIGGER pipeline_node_runs_before_insert;
