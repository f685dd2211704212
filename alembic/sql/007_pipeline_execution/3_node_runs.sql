-- == create pipeline_node_runs where absent
CREATE TABLE IF NOT EXISTS circle.pipeline_node_runs (
    id SERIAL PRIMARY KEY,
    run_id INTEGER NOT NULL,
    node_id VARCHAR(100) NOT NULL,
    node_type VARCHAR(50) NOT NULL,
    status VARCHAR(50) DEFAULT 'pending'
        CHECK (status IN ('pending', 'running', 'completed', 'failed', 'skipped', 'cancelled')),
    input_data JSONB DEFAULT '{}',
    output_data JSONB DEFAULT '{}',
    error_message TEXT,
    retry_count INTEGER DEFAULT 0,
    started_at TIMESTAMPTZ,
    completed_at TIMESTAMPTZ,
    duration_ms INTEGER DEFAULT 0
);

-- == pipeline_node_runs: add the foreign key to pipeline_runs, NOT VALID
DO $key$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_node_runs'::regclass AND contype = 'f'
                                               AND confrelid = 'circle.pipeline_runs'::regclass) THEN
        ALTER TABLE circle.pipeline_node_runs ADD CONSTRAINT pipeline_node_runs_run_id_fkey
            FOREIGN KEY (run_id) REFERENCES circle.pipeline_runs (id) ON DELETE CASCADE NOT VALID;
    END IF;
END $key$;

-- == pipeline_node_runs: validate the foreign key
DO $key$
BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_node_runs'::regclass
                                           AND conname = 'pipeline_node_runs_run_id_fkey' AND NOT convalidated) THEN
        ALTER TABLE circle.pipeline_node_runs VALIDATE CONSTRAINT pipeline_node_runs_run_id_fkey;
    END IF;
END $key$;
