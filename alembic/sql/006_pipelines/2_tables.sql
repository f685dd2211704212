-- == create pipelines where absent
DO $create$
BEGIN
    IF to_regclass('circle.pipelines') IS NULL THEN
        CREATE TABLE circle.pipelines (
            id SERIAL PRIMARY KEY,
            name VARCHAR(255) NOT NULL,
            description TEXT,
            status VARCHAR(50) DEFAULT 'draft' CHECK (status IN ('active', 'paused', 'draft')),
            nodes JSONB DEFAULT '[]',
            edges JSONB DEFAULT '[]',
            created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
            updated_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
            last_run TIMESTAMPTZ,
            run_count INTEGER DEFAULT 0,
            success_count INTEGER DEFAULT 0,
            error_count INTEGER DEFAULT 0
        );
        -- of the key: Alembic compares the comments of tables
        COMMENT ON CONSTRAINT pipelines_pkey ON circle.pipelines IS 'created by gathering_pipeline revision 006_pipelines';
    END IF;
END $create$;

-- == create pipeline_runs where absent
DO $create$
BEGIN
    IF to_regclass('circle.pipeline_runs') IS NULL THEN
        CREATE TABLE circle.pipeline_runs (
            id SERIAL PRIMARY KEY,
            pipeline_id INTEGER NOT NULL REFERENCES circle.pipelines(id) ON DELETE CASCADE,
            status VARCHAR(50) DEFAULT 'pending'
                CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
            started_at TIMESTAMPTZ,
            completed_at TIMESTAMPTZ,
            current_node VARCHAR(100),
            logs JSONB DEFAULT '[]',
            trigger_data JSONB DEFAULT '{}',
            error_message TEXT,
            created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP
        );
        COMMENT ON CONSTRAINT pipeline_runs_pkey ON circle.pipeline_runs IS 'created by gathering_pipeline revision 006_pipelines';
    END IF;
END $create$;
