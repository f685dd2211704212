-- Revision 011: the triggers of runs and node runs.

-- == pipeline_runs: guard rows
-- The columns are those that guards are about: neither a heartbeat nor current_node fires a trigger. pipeline_runs_same_status is
-- apart, because only a column list tells whether a statement sets the status.
CREATE OR REPLACE TRIGGER pipeline_runs_before
    BEFORE INSERT OR UPDATE OF status, id, pipeline_id, pipeline_version, claim_token, completed_at, error_message, failed_node,
        trigger_data, logs, resumed_from
    ON circle.pipeline_runs FOR EACH ROW EXECUTE FUNCTION circle.pipeline_runs_before();
CREATE OR REPLACE TRIGGER pipeline_runs_same_status BEFORE UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW WHEN (NEW.status = OLD.status) EXECUTE FUNCTION circle.refuse_same_status();
CREATE OR REPLACE TRIGGER pipeline_runs_after_insert AFTER INSERT ON circle.pipeline_runs
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_runs_after_insert();
CREATE OR REPLACE TRIGGER pipeline_runs_after_update AFTER UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_runs_after_update();
CREATE OR REPLACE TRIGGER pipeline_runs_after_delete AFTER DELETE ON circle.pipeline_runs
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_runs_after_delete();
CREATE OR REPLACE TRIGGER pipeline_runs_after_truncate AFTER TRUNCATE ON circle.pipeline_runs
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_runs_after_truncate();
ALTER TABLE circle.pipeline_runs ENABLE ALWAYS TRIGGER pipeline_runs_before, ENABLE ALWAYS TRIGGER pipeline_runs_same_status;

-- == pipeline_node_runs: guard rows
CREATE OR REPLACE TRIGGER pipeline_node_runs_before BEFORE UPDATE ON circle.pipeline_node_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_node_runs_before();
CREATE OR REPLACE TRIGGER pipeline_node_runs_same_status BEFORE UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status = OLD.status) EXECUTE FUNCTION circle.refuse_same_status();
CREATE OR REPLACE TRIGGER pipeline_node_runs_after_insert AFTER INSERT ON circle.pipeline_node_runs
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_insert();
CREATE OR REPLACE TRIGGER pipeline_node_runs_after_update AFTER UPDATE ON circle.pipeline_node_runs
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_update();
CREATE OR REPLACE TRIGGER pipeline_node_runs_after_delete AFTER DELETE ON circle.pipeline_node_runs
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_delete();
CREATE OR REPLACE TRIGGER pipeline_node_runs_after_truncate AFTER TRUNCATE ON circle.pipeline_node_runs
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_node_runs_after_truncate();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_before,
                                      ENABLE ALWAYS TRIGGER pipeline_node_runs_same_status;
