-- == pipelines: drop the graph check
DROP TRIGGER IF EXISTS pipelines_accept ON circle.pipelines;

-- == pipeline_runs: drop the JSON check
DROP TRIGGER IF EXISTS pipeline_runs_json ON circle.pipeline_runs;

-- == pipeline_node_runs: drop the JSON check
DROP TRIGGER IF EXISTS pipeline_node_runs_json ON circle.pipeline_node_runs;
