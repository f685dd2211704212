-- == pipeline_runs: drop the event trigger
DROP TRIGGER IF EXISTS pipeline_runs_event ON circle.pipeline_runs;

-- == pipeline_node_runs: drop the event triggers
DROP TRIGGER IF EXISTS pipeline_node_runs_event ON circle.pipeline_node_runs;
DROP TRIGGER IF EXISTS pipeline_node_runs_event_insert ON circle.pipeline_node_runs;
