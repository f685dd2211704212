-- == index: circle.idx_pipeline_node_runs_run_id
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_node_runs_run_id ON circle.pipeline_node_runs (run_id);

-- == index: circle.idx_pipeline_node_runs_run_node
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_node_runs_run_node ON circle.pipeline_node_runs (run_id, node_id);
