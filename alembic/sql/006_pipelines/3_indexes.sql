-- == index: circle.idx_pipelines_status
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipelines_status ON circle.pipelines (status);

-- == index: circle.idx_pipeline_runs_pipeline_id
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_pipeline_id ON circle.pipeline_runs (pipeline_id);

-- == index: circle.idx_pipeline_runs_status
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_pipeline_runs_status ON circle.pipeline_runs (status);
