-- Revision 009: columns and tables of versions, leases and compiled graphs.

-- == pipelines: add version
ALTER TABLE circle.pipelines ADD COLUMN IF NOT EXISTS version INTEGER NOT NULL DEFAULT 1;

-- == pipeline_runs: add lease, idempotency key and version
ALTER TABLE circle.pipeline_runs
    ADD COLUMN IF NOT EXISTS pipeline_version INTEGER,
    ADD COLUMN IF NOT EXISTS failed_node VARCHAR(100),
    ADD COLUMN IF NOT EXISTS worker_id VARCHAR(255),
    ADD COLUMN IF NOT EXISTS claim_token BIGINT NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS claim_count INTEGER NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS lease_expires_at TIMESTAMPTZ,
    ADD COLUMN IF NOT EXISTS idempotency_key VARCHAR(255);

-- == pipeline_node_runs: add the compiled graph
ALTER TABLE circle.pipeline_node_runs
    ADD COLUMN IF NOT EXISTS position INTEGER,
    ADD COLUMN IF NOT EXISTS predecessors INTEGER[],
    ADD COLUMN IF NOT EXISTS successors INTEGER[],
    ADD COLUMN IF NOT EXISTS available_at TIMESTAMPTZ;

-- == pipeline_node_runs: leave room on each page for new versions of its rows, so that a transition changes no index
ALTER TABLE circle.pipeline_node_runs SET (fillfactor = 50);

-- == pipeline_runs: leave room on each page for new versions of its rows
ALTER TABLE circle.pipeline_runs SET (fillfactor = 70);

-- == pipeline_runs: add a check of the lease, NOT VALID
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipeline_runs'::regclass
                                               AND conname = 'ck_pipeline_runs_lease') THEN
        ALTER TABLE circle.pipeline_runs ADD CONSTRAINT ck_pipeline_runs_lease CHECK (
            lease_expires_at IS NULL
            OR (completed_at IS NULL AND worker_id IS NOT NULL AND isfinite(lease_expires_at))) NOT VALID;
    END IF;
END $checks$;

-- == pipeline_runs: validate the check of the lease
ALTER TABLE circle.pipeline_runs VALIDATE CONSTRAINT ck_pipeline_runs_lease;

-- == create pipeline_versions
CREATE TABLE IF NOT EXISTS circle.pipeline_versions (
    pipeline_id INTEGER NOT NULL REFERENCES circle.pipelines (id) ON DELETE CASCADE,
    version INTEGER NOT NULL,
    nodes JSONB NOT NULL,
    edges JSONB NOT NULL,
    node_count INTEGER NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (pipeline_id, version)
);

-- == create pipeline_version_nodes
-- Compiled, so that creating a run parses no JSON. There is no foreign key, because a check for each node would cost more than
-- the rest of the insert: rows are written with their version and deleted with it (pipeline_versions_after_delete).
CREATE TABLE IF NOT EXISTS circle.pipeline_version_nodes (
    pipeline_id INTEGER NOT NULL,
    version INTEGER NOT NULL,
    position INTEGER NOT NULL,
    node_id VARCHAR(100) NOT NULL,
    node_type VARCHAR(50) NOT NULL,
    predecessors INTEGER[] NOT NULL,
    successors INTEGER[] NOT NULL,
    PRIMARY KEY (pipeline_id, version, position)
);
