-- == pipelines: drop triggers
DROP TRIGGER IF EXISTS pipelines_before ON circle.pipelines;
DROP TRIGGER IF EXISTS pipelines_accept ON circle.pipelines;
DROP TRIGGER IF EXISTS pipelines_after_insert ON circle.pipelines;
DROP TRIGGER IF EXISTS pipelines_after_update ON circle.pipelines;

-- == drop pipeline_versions
DROP VIEW IF EXISTS circle.pipeline_version_nodes;
DROP TABLE IF EXISTS circle.pipeline_versions;

-- == pipeline_node_runs: drop the compiled graph
ALTER TABLE circle.pipeline_node_runs
    DROP COLUMN IF EXISTS position, DROP COLUMN IF EXISTS predecessors, DROP COLUMN IF EXISTS successors;

-- == pipeline_runs: drop the version
ALTER TABLE circle.pipeline_runs DROP COLUMN IF EXISTS pipeline_version;
