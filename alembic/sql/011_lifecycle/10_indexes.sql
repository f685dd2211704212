-- == index: circle.idx_pipeline_runs_idempotency_key
CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_idempotency_key
    ON circle.pipeline_runs (pipeline_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- == index: circle.idx_pipeline_runs_resumed_from
CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_resumed_from
    ON circle.pipeline_runs (resumed_from) WHERE resumed_from IS NOT NULL;

-- == index: circle.idx_pipeline_runs_queue
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_queue ON circle.pipeline_runs (pipeline_id, priority DESC, id)
    WHERE status = 'pending' AND waits_until IS NULL AND pipeline_version IS NOT NULL;

-- == index: circle.idx_pipeline_runs_waiting
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_waiting ON circle.pipeline_runs (waits_until)
    WHERE status = 'pending' AND waits_until IS NOT NULL;

-- == index: circle.idx_pipeline_runs_running
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_running ON circle.pipeline_runs (pipeline_id, id) WHERE status = 'running';

-- == index: circle.idx_pipeline_runs_history
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_history ON circle.pipeline_runs (pipeline_id, id);

-- == index: circle.idx_pipeline_runs_status_history
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_status_history ON circle.pipeline_runs (status, id);

-- == index: circle.idx_pipeline_runs_completed_at
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_completed_at
    ON circle.pipeline_runs (completed_at, id) WHERE completed_at IS NOT NULL;

-- == index: circle.idx_pipeline_node_runs_run_position
CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_node_runs_run_position
    ON circle.pipeline_node_runs (run_id, position);
