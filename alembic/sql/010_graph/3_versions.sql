-- Revision 010: the versions of a pipeline's graph, and the revisions of its row.

-- == pipelines: add version, revision, max_running and status_changed_at
-- version numbers the graphs; revision numbers all that people edit, so that an edit of what was changed meanwhile is refused.
-- max_running is the number of runs that workers may have claimed at the same time; 0 is any number.
-- status_changed_at is NULL until the status of an older row changes.
ALTER TABLE circle.pipelines
    ADD COLUMN IF NOT EXISTS version INTEGER NOT NULL DEFAULT 1,
    ADD COLUMN IF NOT EXISTS revision BIGINT NOT NULL DEFAULT 1,
    ADD COLUMN IF NOT EXISTS max_running INTEGER NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS status_changed_at TIMESTAMPTZ;

-- == pipelines: add a check of max_running, NOT VALID
DO $checks$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'circle.pipelines'::regclass
                                               AND conname = 'ck_pipelines_max_running') THEN
        ALTER TABLE circle.pipelines ADD CONSTRAINT ck_pipelines_max_running CHECK (max_running >= 0) NOT VALID;
    END IF;
END $checks$;

-- == pipelines: validate the check
ALTER TABLE circle.pipelines VALIDATE CONSTRAINT ck_pipelines_max_running;

-- == pipeline_runs: add the version
ALTER TABLE circle.pipeline_runs ADD COLUMN IF NOT EXISTS pipeline_version INTEGER;

-- == pipeline_node_runs: add the compiled graph
ALTER TABLE circle.pipeline_node_runs
    ADD COLUMN IF NOT EXISTS position INTEGER,
    ADD COLUMN IF NOT EXISTS predecessors INTEGER[],
    ADD COLUMN IF NOT EXISTS successors INTEGER[];

-- == create pipeline_versions
-- A node of a compiled graph: its predecessors and successors are positions in execution order, its own is its place in the array.
-- branches has the successors of each label of its edges, NULL without labels; one to which an edge without label leads, too, is in none.
DO $type$
BEGIN
    IF to_regtype('circle.compiled_node') IS NULL THEN
        CREATE TYPE circle.compiled_node AS (
            node_id VARCHAR(100), node_type VARCHAR(50), predecessors INTEGER[], successors INTEGER[], branches JSONB);
    END IF;
END $type$;
-- The graph is compiled once, when it is written: creating a run parses no JSON. The nodes stand in the row of their version, so
-- that neither can be stored, changed or deleted without the other.
CREATE TABLE IF NOT EXISTS circle.pipeline_versions (
    pipeline_id INTEGER NOT NULL REFERENCES circle.pipelines (id) ON DELETE CASCADE,
    version INTEGER NOT NULL,
    nodes JSONB NOT NULL,
    edges JSONB NOT NULL,
    node_count INTEGER NOT NULL,
    compiled circle.compiled_node[] NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (pipeline_id, version)
);
CREATE OR REPLACE VIEW circle.pipeline_version_nodes WITH (security_invoker = true) AS
SELECT v.pipeline_id, v.version, (c.place - 1)::integer AS position, c.node_id, c.node_type, c.predecessors, c.successors,
       c.branches
FROM circle.pipeline_versions v
CROSS JOIN LATERAL unnest(v.compiled) WITH ORDINALITY c (node_id, node_type, predecessors, successors, branches, place);
