-- == pipelines: drop triggers and version
DROP TRIGGER IF EXISTS pipelines_before ON circle.pipelines;
DROP TRIGGER IF EXISTS pipelines_after_insert ON circle.pipelines;
DROP TRIGGER IF EXISTS pipelines_after_update ON circle.pipelines;
ALTER TABLE circle.pipelines DROP COLUMN IF EXISTS version;

-- == drop pipeline_versions and pipeline_version_nodes
DROP TABLE IF EXISTS circle.pipeline_version_nodes, circle.pipeline_versions;

-- == pipeline_node_runs: drop the view, triggers and columns
DROP VIEW IF EXISTS circle.startable_node_runs, circle.pending_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_after_insert ON circle.pipeline_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_failed ON circle.pipeline_node_runs;
CREATE OR REPLACE TRIGGER pipeline_node_runs_before_insert BEFORE INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status <> 'pending') EXECUTE FUNCTION circle.pipeline_node_runs_before();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_before_insert;
ALTER TABLE circle.pipeline_node_runs
    DROP COLUMN IF EXISTS position, DROP COLUMN IF EXISTS predecessors, DROP COLUMN IF EXISTS successors,
    DROP COLUMN IF EXISTS available_at;

-- == pipeline_runs: drop triggers, indexes and columns
DROP TRIGGER IF EXISTS pipeline_runs_terminal ON circle.pipeline_runs;
DROP TRIGGER IF EXISTS pipeline_runs_after ON circle.pipeline_runs;
DROP TRIGGER IF EXISTS pipeline_runs_after_insert ON circle.pipeline_runs;
DROP INDEX IF EXISTS circle.idx_pipeline_runs_pending, circle.idx_pipeline_runs_running, circle.idx_pipeline_runs_history,
    circle.idx_pipeline_runs_status_history, circle.idx_pipeline_runs_completed_at;
ALTER TABLE circle.pipeline_runs
    DROP COLUMN IF EXISTS pipeline_version, DROP COLUMN IF EXISTS failed_node, DROP COLUMN IF EXISTS worker_id,
    DROP COLUMN IF EXISTS claim_token, DROP COLUMN IF EXISTS claim_count, DROP COLUMN IF EXISTS lease_expires_at,
    DROP COLUMN IF EXISTS idempotency_key;

-- == pipeline_node_runs: reset fillfactor
ALTER TABLE circle.pipeline_node_runs RESET (fillfactor);

-- == pipeline_runs: reset fillfactor
ALTER TABLE circle.pipeline_runs RESET (fillfactor);
